"""How many bugs do a student's tests find? The lab that copying the source does not solve.

The tests must pass on the source and on right solutions that look different. Then they are run on each planted bug, and
the score is how many they kill. The bugs are numbered here, not named.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from nanopaged.lab import bugs, labs
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
    for name in ("pytest", "torch"):  # here, so that each process has them
        importlib.import_module(name)
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, in each process
    found, start = Hunt(), time.monotonic()
    found.right["the source"] = _complaint(_run(folder, lambda variant: None, SECONDS))
    limit = max(SHORTEST, 3 * (time.monotonic() - start))
    others = {"the source, written in another way": bugs.plant_nothing}
    for name in filter(bugs.has_alternative, labs.NAMES):
        others[f"another right solution of {name}"] = partial(bugs.plant_alternative, name)
    for solution, plant in others.items():
        progress(solution)
        found.right[solution] = _complaint(_run(folder, plant, limit))
    if found.is_fair:
        planted = bugs.every_bug()
        for number, (_, bug) in enumerate(planted, 1):
            progress(f"bug {number} of {len(planted)}: {sum(found.killed)} killed")
            found.killed.append(_complaint(_run(folder, partial(bugs.plant, bug), limit)) != "")
        # A test that fails now and then kills bugs by chance.
        found.right["the source, once more"] = _complaint(_run(folder, lambda variant: None, limit))
        if not found.is_fair:
            found.killed.clear()
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
    sys.modules["nanopaged.lab"] = None  # the tests have no business there
    report(status=int(pytest.main([HUNT, "-x", "-q", "--no-header", "-p", "no:cacheprovider"])))


def _complaint(outcome: Outcome) -> str:
    """Why the tests did not pass; empty if they did."""
    if not outcome.results:
        return f"the process {outcome.status}" + (f", at {outcome.stands}" if outcome.stands else "")
    return "" if outcome.results[0]["status"] == 0 else outcome.printed
