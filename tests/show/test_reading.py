"""A recording that was cut off is read as far as it goes; what is no recording is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.recordings import RandomRun

from nanopaged.show.reading import FORMAT, VERSION, Line, read
from nanopaged.show.recording import record
from nanopaged.show.replay import State, frames


def lines_of(path: Path) -> list[Line]:
    return list(read(str(path)))


@pytest.mark.parametrize("seed", range(3))
def test_a_recording_that_was_cut_off_anywhere_opens_and_is_a_prefix(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    run, path, cut = RandomRun(seed), tmp_path / "run.jsonl", tmp_path / "cut.jsonl"
    with record(run.scheduler, str(path)):
        run.go_on(60)
    whole, data = lines_of(path), path.read_bytes()
    header_end = data.index(b"\n")
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    positions = {rng.randrange(header_end, len(data)) for _ in range(100)}
    positions |= {end + offset for end in rng.sample(ends[1:], 20) for offset in (-1, 0, 1)}
    for position in sorted({header_end, header_end + 1, *positions}):
        cut.write_bytes(data[:position])
        lines = lines_of(cut)
        complete = sum(end <= position for end in ends)  # the last needs no line feed
        assert lines == whole[:complete], f"cut off at byte {position}, seed {seed}"
        state = State(lines[0])
        for frame in frames(lines[1:]):
            for event in frame.events:
                state.apply(event)
    for position in (1, header_end // 2, header_end - 1):
        cut.write_bytes(data[:position])
        with pytest.raises(ValueError, match="cut.jsonl, line 1: not JSON: this is no recording, or a damaged one"):
            lines_of(cut)


HEADER = json.dumps({"format": FORMAT, "version": VERSION})


@pytest.mark.parametrize("content, message", [
    ("", "is empty: this is no recording, or one that could not be written"),
    (bytes(range(256)), "line 1: not JSON: this is no recording, or a damaged one"),
    ("\n", "line 1: not JSON"), ("text\n", "line 1: not JSON"), ("[1]\n", "line 1: not an object"),
    ("{}\n", 'is no recording: it does not begin with {"format": "nanopaged recording"}'),
    ('{"traceEvents": []}', "is no recording: it does not begin with"),
    (json.dumps({"format": FORMAT, "version": 99}), "has version 99 of the format, and this program reads version 1: "
                                                    "record it again"),
    (json.dumps({"format": FORMAT}), "has version None of the format"),
    (f"{HEADER}\nrubbish\n{{}}\n", "line 2: not JSON: this is no recording, or a damaged one"),
    (f"{HEADER}\n7\n", "line 2: not an object")])
def test_what_is_no_recording_is_refused_with_its_reason(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        lines_of(path)
    assert message in str(raised.value) and str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lines_of(tmp_path / "no.jsonl")
