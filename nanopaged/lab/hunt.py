"""How many bugs do a student's tests find? The lab that copying the source does not solve.

The tests must pass on the source and on right solutions that look different. Then they are run on each planted bug, and
the score is how many they kill. The bugs are numbered here, not named.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from nanopaged.lab import bugs, labs
from nanopaged.lab.check import choose_how_kernels_run
from nanopaged.lab.isolation import Outcome, Report, isolated
from nanopaged.lab.workspace import HUNT

SECONDS = 30.0  # that the tests may take on the source
SHORTEST = 5.0  # seconds that they may always take on another version; else three times what they took on the source


@dataclass
class Hunt:
    right: dict[str, str] = field(default_factory=dict)  # each right solution, with what the tests say if they fail
    killed: list[bool] = field(default_factory=list)  # bug by bug

    @property
    def is_fair(self) -> bool:
        return not any(self.right.values())


def hunt(folder: Path, progress: Callable[[str], object] = lambda text: None) -> Hunt:
    """Runs the tests of a workspace. If they fail on a right solution, no bug is tried."""
    importlib.import_module("pytest")  # here, so that each process has it, as it has torch
    choose_how_kernels_run()
    found, start = Hunt(), time.monotonic()
    found.right["the source"] = _complaint(_run(folder, lambda variant: None, SECONDS))
    limit = max(SHORTEST, 3 * (time.monotonic() - start))
    for name in filter(bugs.has_alternative, labs.NAMES):
        progress(f"another right solution of {name}")
        outcome = _run(folder, lambda variant, name=name: bugs.plant_alternative(name, variant), limit)
        found.right[f"another right solution of {name}"] = _complaint(outcome)
    if found.is_fair:
        planted = bugs.every_bug()
        for number, (_, bug) in enumerate(planted, 1):
            progress(f"bug {number} of {len(planted)}: {sum(found.killed)} killed")
            outcome = _run(folder, lambda variant, bug=bug: bugs.plant(bug, variant), limit)
            found.killed.append(_complaint(outcome) != "")
    return found


def _run(folder: Path, change: Callable[[Path], object], seconds: float) -> Outcome:
    """The tests on a changed copy of the source's package."""
    with TemporaryDirectory() as scratch:
        variant = bugs.variant(Path(scratch).resolve())
        change(variant)
        shutil.copytree(folder / HUNT, variant / HUNT, ignore=shutil.ignore_patterns("__pycache__"))
        return isolated(_pytest, variant, seconds)


def _pytest(report: Report) -> None:
    import pytest
    import torch

    torch.set_num_threads(1)
    os.environ.pop("PYTEST_ADDOPTS", None)  # which may start other processes, with another package
    report(status=int(pytest.main([HUNT, "-x", "-q", "--no-header", "-p", "no:cacheprovider"])))


def _complaint(outcome: Outcome) -> str:
    """Why the tests did not pass; empty if they did."""
    if not outcome.results:
        return f"the process {outcome.status}" + (f", at {outcome.stands}" if outcome.stands else "")
    return "" if outcome.results[0]["status"] == 0 else outcome.printed
