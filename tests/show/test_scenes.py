"""Each scene shows what it is for, in a small pool, and its answers are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged import LLM
from nanopaged.gpt2 import GPT2
from nanopaged.models.copycat import build_copycat
from nanopaged.show.recording import record
from nanopaged.show.scenes import SCENES, play, record_all

SHOWS = {  # what must happen in each scene
    "growth": {"takes", "publishes", "finishes"}, "two lengths": {"takes", "finishes"},
    "a shared prefix": {"shares"}, "copy-on-write": {"starts", "copies", "no copy"},
    "cached, found, evicted": {"finishes", "shares", "evicts"}, "full": {"waits", "gives way", "resumes", "storm"}}


@pytest.fixture(scope="module")
def copycat() -> GPT2:
    return build_copycat()


def test_every_scene_shows_what_it_is_for_and_its_answers_are_right(copycat: GPT2) -> None:
    scenes, wrong = record_all(lambda **options: LLM(copycat, device="cpu", **options))
    assert not wrong
    assert [scene["title"] for scene in scenes] == list(SHOWS)
    for scene in scenes:
        assert 24 <= scene["num_blocks"] <= 32 and scene["intro"]
        names = {name for frame in scene["frames"] for name in frame[3]}
        assert SHOWS[scene["title"]] <= names, scene["title"]
        assert "fails" not in names


def test_in_the_scene_of_growth_the_last_request_lies_in_blocks_that_others_left(copycat: GPT2, tmp_path: Path) -> None:
    llm, tables = LLM(copycat, device="cpu", num_blocks=24, max_num_batched_tokens=256), {}

    class Watch:
        def stepped(self, step: object) -> None:
            tables.update({request.group_id: request.block_table.tolist() for request in llm.scheduler.running})

    llm.scheduler.listeners.append(Watch())
    play(llm, SCENES[0].arrivals)
    assert tables["3"] != sorted(tables["3"])
    assert set(tables["3"]) & set(tables["0"])


def test_a_wrong_answer_is_named(copycat: GPT2, tmp_path: Path) -> None:
    llm = LLM(copycat, device="cpu", num_blocks=24)
    arrivals = [SCENES[1].arrivals[1]._replace(expected=("nonsense",))]
    with record(llm, str(tmp_path / "run.jsonl")):
        (sentence,) = play(llm, arrivals)
    assert sentence.startswith("request 0 went wrong: [") and sentence.endswith("instead of ['nonsense']")
