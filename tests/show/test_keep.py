"""Of a run those files are kept that are named, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.test_engine import tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.show.keep import kept
from nanopaged.show.movie import page, pool_scene
from nanopaged.show.reading import read


@pytest.fixture
def llm() -> LLM:
    return tiny_llm()


def run(llm: LLM) -> None:
    llm.generate([[1, 2, 3], [4, 5, 6, 7]], SamplingParams(temperature=0, max_tokens=5))


def test_each_file_that_is_named_is_written_from_the_same_run(llm: LLM, tmp_path: Path) -> None:
    names = {name: str(tmp_path / name) for name in ("recording", "movie", "trace")}
    with kept(llm, **names, title="my run"):
        run(llm)
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    steps = [line for line in read(names["recording"]) if "step" in line]
    assert len(steps) == llm.stats().num_steps
    html = Path(names["movie"]).read_text(encoding="utf-8")
    assert html == page([pool_scene(names["recording"], "my run")], "nanopaged: what happens in the pool")
    trace = json.loads(Path(names["trace"]).read_text(encoding="utf-8"))
    assert any(event["name"] == "preempted" or event.get("ph") == "X" for event in trace["traceEvents"])


@pytest.mark.parametrize("name", ["recording", "movie", "trace"])
def test_only_what_is_named_is_written(name: str, llm: LLM, tmp_path: Path) -> None:
    with kept(llm, **{name: str(tmp_path / name)}):
        run(llm)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["recording", "movie", "trace"])
def test_a_file_that_cannot_be_written_is_refused_before_the_run(name: str, llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        with kept(llm, **{name: str(tmp_path / "missing" / name)}):
            run(llm)
    assert llm.stats().num_steps == 0


def test_two_files_must_not_be_the_same(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be different files"):
        with kept(llm, movie=str(tmp_path / "file"), trace=str(tmp_path / "." / "file")):
            run(llm)
    assert llm.stats().num_steps == 0


def test_of_a_run_that_is_interrupted_there_is_what_happened_until_then(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with kept(llm, movie=str(tmp_path / "movie"), trace=str(tmp_path / "trace")):
            run(llm)
            raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"movie", "trace"}


def test_scenes_before_come_before(llm: LLM, tmp_path: Path) -> None:
    first, movie = str(tmp_path / "first"), tmp_path / "movie"
    with kept(llm, recording=first):
        run(llm)
    with kept(llm, movie=str(movie), title="second", scenes_before=[pool_scene(first, "first")]):
        run(llm)
    html = movie.read_text(encoding="utf-8")
    assert 0 < html.index('"title":"first"') < html.index('"title":"second"')
