"""python -m nanopaged.show: a recording as a page, or as a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.recordings import RandomRun

from nanopaged.show.recording import record

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    run = RandomRun(3)
    with record(run.scheduler, str(path)):
        run.go_on(60)
    return path


def show(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nanopaged.show", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=60)


def test_the_page_lies_beside_the_recording_or_where_it_is_wanted(recording: Path, tmp_path: Path) -> None:
    done = show(recording)
    beside = recording.with_suffix(".html")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{beside}: {beside.stat().st_size:,} bytes\n"
    assert show(recording, "--out", tmp_path / "page.html").returncode == 0
    assert (tmp_path / "page.html").read_bytes() == beside.read_bytes()


def test_a_page_of_some_steps_is_smaller(recording: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.html"
    assert show(recording, "--steps", "5:9", "--out", part).returncode == 0
    data = part.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script")[0]
    assert {frame[0] for frame in json.loads(data)["scenes"][0]["frames"]} == {5, 6, 7, 8, 9}


def test_a_trace_is_written_instead_of_a_page(recording: Path, tmp_path: Path) -> None:
    assert show(recording, "--trace", tmp_path / "trace.json").returncode == 0
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("damage", [lambda lines: [lines[0], *lines[4:]], lambda lines: ['{"step": 1}', *lines[1:]],
                                    lambda lines: [lines[0], '{"step": 1}', *lines[1:]]])
def test_a_damaged_recording_is_refused_in_one_line(damage: Callable[[list[str]], list[str]], recording: Path,
                                                   tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text("\n".join(damage(recording.read_text().splitlines())) + "\n")
    done = show(path)
    assert done.returncode == 2 and "damaged.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("arguments, words", [
    ([], "give the FILE of a recording, or --tour"), (["missing.jsonl"], "No such file"), (["README.md"], "README.md"),
    (["RECORDING", "--steps", "9"], "--steps must be A:B, two numbers of steps, got '9'"),
    (["RECORDING", "--steps", "9:5"], "--steps must go from 1 or more to no less, got '9:5'"),
    (["RECORDING", "--steps", "900:"], "has no step from 900 on: there is nothing to show"),
    (["RECORDING", "--trace", "trace.json", "--steps", "1:2"], "--steps would have no effect beside --trace"),
    (["RECORDING", "--tour"], "FILE would have no effect beside --tour"),
    (["RECORDING", "--out", "RECORDING"], "is the recording itself, which would be overwritten"),
    (["RECORDING", "--trace", "RECORDING"], "is the recording itself, which would be overwritten")])
def test_a_mistake_gets_one_line_and_status_2(arguments: list[str], words: str, recording: Path) -> None:
    done = show(*[recording if argument == "RECORDING" else argument for argument in arguments])
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
