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
from itertools import repeat
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
    killed: dict[str, list[bool]] = field(default_factory=dict)  # of each lab, bug by bug

    @property
    def is_fair(self) -> bool:
        return not any(self.right.values())

    @property
    def score(self) -> tuple[int, int]:
        """Bugs that were killed, and bugs that there are."""
        return sum(map(sum, self.killed.values())), sum(map(len, self.killed.values()))


def hunt(folder: Path, progress: Callable[[str], object] = lambda text: None, lab: str | None = None) -> Hunt:
    """Runs the tests of a workspace, on all bugs or on those of one lab.

    No bug is tried if the tests fail on a right solution, and no other right solution if they fail on the source.
    """
    for name in ("pytest", "torch"):  # here, so that each process has them
        importlib.import_module(name)
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, in each process
    planted = [(name, bug) for name, bug in bugs.every_bug() if lab in (None, name)]
    found = Hunt()
    right = {"the source": lambda variant: None, "the source, written in another way": bugs.plant_nothing}
    for name in filter(bugs.has_alternative, labs.NAMES):
        right[f"another right solution of {name}"] = partial(bugs.plant_alternative, name)
    seconds, start = SECONDS, time.monotonic()
    for solution, plant in right.items():
        progress(solution)
        found.right[solution] = _complaint(_run(folder, plant, seconds, "--tb=short"), seconds)
        if solution == "the source":
            seconds = max(SHORTEST, 3 * (time.monotonic() - start))
            if not found.is_fair:
                break
    killed: list[bool] = []
    for number, (_, bug) in enumerate(planted if found.is_fair else [], 1):
        progress(f"bug {number} of {len(planted)}: {sum(killed)} killed")
        killed.append(_complaint(_run(folder, partial(bugs.plant, bug), seconds, "-x"), seconds) != "")
    if found.is_fair:  # a test that fails now and then kills bugs by chance
        found.right["the source, once more"] = _complaint(_run(folder, lambda variant: None, seconds, "-x"), seconds)
    for (name, _), dead in zip(planted, killed if found.is_fair else repeat(False)):
        found.killed.setdefault(name, []).append(dead)
    return found


def _run(folder: Path, change: Callable[[Path], object], seconds: float, option: str) -> Outcome:
    """The tests on a changed copy of the source's package."""
    with TemporaryDirectory() as scratch:
        variant = bugs.variant(Path(scratch).resolve())
        change(variant)
        (variant / HUNT).mkdir()
        if (folder / HUNT).is_dir():
            shutil.copytree(folder / HUNT, variant / HUNT, ignore=shutil.ignore_patterns("__pycache__"),
                            dirs_exist_ok=True)
        return isolated(partial(_pytest, option), variant, seconds)


class Passed:
    """A pytest plugin that counts tests that passed: one that was skipped says nothing."""

    count = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        self.count += report.when == "call" and report.passed


def _pytest(option: str, report: Report) -> None:
    import pytest
    import torch

    torch.set_num_threads(1)
    os.environ.pop("PYTEST_ADDOPTS", None)  # which may start other processes, with another package
    sys.modules["nanopaged.lab"] = None  # the tests have no business there
    passed = Passed()
    status = pytest.main([HUNT, option, "-q", "--no-header", "-p", "no:cacheprovider"], plugins=[passed])
    report(status=int(status), passed=passed.count)


def _complaint(outcome: Outcome, seconds: float) -> str:
    """Why the tests did not pass; empty if they did."""
    if not outcome.results:
        late = f"they had not ended after {seconds:.0f} s, at {outcome.stands}"
        return late if outcome.stands else f"their process {outcome.status}"
    (result,) = outcome.results
    if result["status"] in (0, 5) and result["passed"] == 0:
        return f"no test ran: there should be files {HUNT}/test_*.py with functions test_*"
    return "" if result["status"] == 0 else outcome.printed or "they fail"
