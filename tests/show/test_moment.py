"""A moment has the state after a frame, and says what the frame changed."""

from __future__ import annotations

from pathlib import Path

from tests.recordings import RandomRun

from nanopaged.models.copycat import CONFIG
from nanopaged.models.tokenizer import tokenizer_for
from nanopaged.show.moment import Moment, moments
from nanopaged.show.recording import record
from tests.crowds import request_with
from tests.show.test_captions import Story


def looks(moment: Moment) -> list[tuple[int, int, bool]]:
    state = moment.state
    return [(state.holders[block], state.filled[block], block in state.published) for block in range(state.num_blocks)]


def test_the_changed_blocks_are_those_that_look_different_from_the_frame_before(tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    for seed in range(10):
        print(f"seed {seed}")
        run = RandomRun(seed)
        with record(run.scheduler, path):
            run.go_on(60)
        before = [(0, 0, False)] * run.scheduler.allocator.num_blocks
        for moment in moments(path):
            now = looks(moment)
            assert moment.changed == {block for block, look in enumerate(now) if look != before[block]}, moment.told
            before = now


def test_words_are_printable_and_continuations_are_told_apart(tmp_path: Path) -> None:
    run = Story(tmp_path / "run.jsonl", 16)
    run.recording.__exit__(None, None, None)
    run.recording = record(run.scheduler, run.path)
    recorder = run.recording.__enter__()
    recorder.tokenizer = tokenizer_for(CONFIG.vocab_size, None, download=False)
    run.add([*"naïve\n\x1b[1m".encode()], n=2)
    run.scheduler.add(request_with(7, [65, 66]))
    run.step()
    run.recording.__exit__(None, None, None)
    *_, last = moments(run.path)
    assert last.words("0.0", 0, 11) == "naïve↵·[1m"
    assert last.words("0.0", 2, 3) == "\N{REPLACEMENT CHARACTER}"  # half of a character
    assert (last.name("0.1"), last.name("7.0")) == ("0.1", "7.0")
