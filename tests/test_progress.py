"""Progress is for a terminal, and for nothing else."""

from __future__ import annotations

import io
import sys

import pytest

from nanopaged import progress
from nanopaged.outputs import SchedulerStats
from nanopaged.progress import Progress, show_progress, time_left


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_each_line_replaces_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    for line in ("1 of 2", "2 of 2", ""):
        show_progress(line)
    assert sys.stderr.getvalue() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\r\x1b[K"


def test_nothing_is_written_to_a_file_or_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show_progress("1 of 2")
    assert capsys.readouterr() == ("", "")


def test_continuations_and_tokens_are_counted_from_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    now = 100.0
    monkeypatch.setattr(progress, "show_progress", shown.append)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stats = SchedulerStats(num_finished=7, output_tokens=900)
    of_generate = Progress(stats, wanted=3)
    of_generate.show()  # no time has passed
    now, stats.num_finished, stats.output_tokens = 104.0, 9, 1000
    of_generate.show()
    assert shown == ["0 of 3 continuations, 0 tokens/s", "2 of 3 continuations, 25 tokens/s"]


@pytest.mark.parametrize("share, elapsed_s, text", [
    (0.0, 3.0, "0% done"), (0.25, 3.0, "25% done, about 9 s left"), (0.01, 6.0, "1% done, about 10 min left"),
    (1.0, 8.0, "100% done, about 0 s left")])
def test_the_time_left_assumes_that_the_rest_is_as_slow(share: float, elapsed_s: float, text: str) -> None:
    assert time_left(share, elapsed_s) == text
