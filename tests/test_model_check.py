"""The model checker finds nothing in the scheduler, and finds the bugs that are planted in a copy of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import pytest
from tests.model_check import Ask, Scope, few_scopes, report

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    scope: Scope
    before: str  # a line of scheduler.py
    planted: str  # what comes after it
    num_events: int  # that show it
    error: str


PUBLISH = """\
for i in range(start // self.block_size, (start + num_tokens) // self.block_size):
    self.allocator.fill(request.block_table[i], self.block_size)
    self._publish(request, i)
"""
BUGS = {
    "an aborted request does not give back its first block": Bug(
        Scope((Ask((0, 1, 0), 3),), 3),
        "    def _finish(self, request: Request, reason: str) -> None:\n",
        "        if reason == 'abort' and request.block_table:\n            request.block_table.pop(0)\n",
        3, "InvariantError: block 0 counts 1 holders, but 0 tables name it"),  # add, step, abort
    "a block can be found before it is computed": Bug(
        Scope((Ask((0, 1, 0), 3),), 3),
        "        step.requests.append(request)\n",
        indent(PUBLISH, " " * 8),
        2, "AssertionError: request A0 writes block 0, which other requests can find"),  # add, step
    "what a request wrote can be found though its logits are not finite": Bug(
        Scope((Ask((0, 1, 0), 3),), 3),
        "            if request in failed:\n",
        indent(PUBLISH, " " * 16),
        2, "('pool', 0, 0) holds None, for whoever finds block 0 it must be (0,)"),  # add, a step that is not finite
    "a continuation is forgotten when its leader gives way": Bug(
        Scope((Ask((0,), 5), Ask((1, 0, 1, 0, 1), 3, n=2)), 3),
        "        request.metrics.preemptions += 1\n",
        "        request.followers = []\n",
        5, "is in 0 places, not in 1"),  # add, add, step, step, and a step in which the leader gives way
    "moves are lost if a step fails": Bug(
        Scope((Ask((0, 1, 0), 3, n=2),), 3),
        "        step, unrecorded = Step(self.max_num_batched_tokens), self._unrecorded\n",
        "        self.moves.clear()\n",
        4, "reads None in ('pool', "),  # add, step, a step that fails after it has planned a copy, step
    "a request gives way whenever three of its tokens are computed": Bug(
        Scope((Ask((0, 1, 0), 3),), 1),
        "        step.referenced_blocks = allocator.num_blocks - allocator.num_available\n",
        "        if self.running and self.running[0].num_computed_tokens == 3:\n"
        "            self._preempt(self.running.pop(), step)\n",
        2, "AssertionError: steps alone do not lead to the end: a state comes back"),  # add, and steps without end
}


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)


def test_no_order_of_events_breaks_the_scheduler(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(few_scopes()) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_and_a_shortest_series_of_events_repeats_it(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    shutil.copytree(ROOT / "nanopaged", tmp_path / "nanopaged", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for file in ("__init__.py", "model_check.py", "recount.py"):
        shutil.copy(ROOT / "tests" / file, tmp_path / "tests")
    path = tmp_path / "nanopaged" / "scheduler.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(bug.before) == 1, f"{path.name} has changed: {source.count(bug.before)} times {bug.before!r}"
    path.write_text(source.replace(bug.before, bug.before + bug.planted), encoding="utf-8")

    found = run(tmp_path, f"from tests.model_check import *; sys.exit(report([{bug.scope}]))")
    assert found.returncode == 1 and found.stderr == "", found.stderr
    title, snippet, error = found.stdout.strip().split("\n\n")
    assert title == f"A violation after {bug.num_events} events:", found.stdout
    assert snippet.count("\nworld.") == bug.num_events, snippet
    assert bug.error in error
    repeated = run(tmp_path, snippet)
    assert repeated.returncode == 1 and repeated.stderr.strip().endswith(error), repeated.stderr
    assert run(ROOT, snippet).returncode == 0, "without the bug, the same events break nothing"
