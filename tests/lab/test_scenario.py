"""One scenario on two versions of the package shows what a bug does to a user."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged.lab import scenario
from nanopaged.lab.bugs import variant
from nanopaged.lab.labs import Scenario
from nanopaged.lab.scenario import play

TEXT = "abcdefghijklmnopqrstuvwx"
REQUESTS = (0, TEXT + TEXT[:20], {"max_tokens": 4}), (1, TEXT + TEXT[:18], {"max_tokens": 2, "n": 2})
SCENARIO = Scenario(REQUESTS, {"num_blocks": 16}, watch="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return variant(tmp_path.resolve())


def change(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / "nanopaged" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_a_scenario_shows_texts_order_and_what_was_done(folder: Path, tmp_path: Path) -> None:
    seen = play(folder, SCENARIO, tmp_path / "run.jsonl")
    assert (seen["texts"], seen["order"], seen["error"]) == ({"0": "uvwx", "1": "st | st"}, ["1", "0"], "")
    assert seen["held"] == seen["preemptions"] == seen["recomputed"] == 0 and seen["steps"] == 4
    assert (tmp_path / "run.jsonl").stat().st_size > 0


def test_an_exception_and_a_process_that_ends_are_told(folder: Path) -> None:
    place = "block = self._free.pop() if"
    change(folder, "block_allocator.py", place, f"import os; os._exit(7)\n        {place}")
    assert play(folder, SCENARIO) == {"error": "the process ended with status 7", "printed": ""}
    change(folder, "block_allocator.py", "import os; os._exit(7)", "raise KeyError('lost')")
    seen = play(folder, SCENARIO)
    assert seen["error"] == "KeyError: 'lost'" and seen["texts"] == {"0": ""}


def test_a_run_that_does_not_end_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "STEPS", 12)
    change(folder, "scheduler.py", "len(request.token_ids) == request.max_length", "False")
    seen = play(folder, SCENARIO)
    assert (seen["error"], seen["steps"]) == ("it has not ended after 12 steps", 12) and seen["held"] > 0
