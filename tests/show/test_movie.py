"""What is in a page, and which recordings become one? Without a browser; test_browser.py looks at the page itself."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tests.crowds import record as record_step
from tests.crowds import request_with
from tests.recordings import RandomRun, tight_scheduler

from nanopaged.show import movie
from nanopaged.show.movie import page, pool_scene
from nanopaged.show.recording import record

HOSTILE = "</script><script>window.bad = 1</script><!-- <img src=x onerror=alert(1)> & \" ' \u2028 \x00"


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recording of 40 requests in a pool that is too small for them."""
    rng, path = random.Random(0), str(tmp_path_factory.mktemp("storm") / "run.jsonl")
    scheduler = tight_scheduler(0)
    with record(scheduler, path):
        for number in range(40):
            scheduler.add(request_with(number, [1] * rng.randint(8, 16), rng.randint(12, 20)))
        while scheduler.has_unfinished():
            record_step(scheduler, scheduler.schedule(), rng)
    return path


def data_of(html: str) -> dict[str, object]:
    """What a browser would read as the page's data: all up to the next end of a script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)[1])


def steps_of(scene: dict[str, object]) -> list[int]:
    return sorted({frame[0] for frame in scene["frames"]})


def test_a_page_is_one_file_that_names_no_other(storm: str) -> None:
    html = page([pool_scene(storm)], "a storm")
    assert "{{" not in html
    assert not re.search(r"<link|<img|<iframe|\ssrc=|@import|https?:(?!//www\.w3\.org/2000/svg)", html)
    assert "Content-Security-Policy\" content=\"default-src 'none';" in html
    assert "<title>a storm</title>" in html
    assert data_of(html)["scenes"][0]["kind"] == "pool"


def test_what_requests_and_titles_say_is_data_and_never_markup(storm: str) -> None:
    scene = pool_scene(storm, HOSTILE, HOSTILE)
    scene["texts"] = {token: HOSTILE for token in range(3)}
    html = page([scene], HOSTILE)
    harmless = page([pool_scene(storm, "title", "intro")], "title")
    assert html.count("<") == harmless.count("<")
    assert data_of(html) == json.loads(json.dumps({"title": HOSTILE, "scenes": [scene]}))


def test_placeholders_in_what_requests_say_are_left_alone(storm: str) -> None:
    assert data_of(page([pool_scene(storm, "{{STYLE}} {{DATA}}")], "{{SCRIPT}}"))["title"] == "{{SCRIPT}}"


def test_what_prompts_have_in_common_is_stored_once(tmp_path: Path) -> None:
    scheduler, path = tight_scheduler(0), str(tmp_path / "run.jsonl")
    with record(scheduler, path):
        for number in range(5):
            scheduler.add(request_with(number, [7] * 40 + [number]))
        record_step(scheduler, scheduler.schedule(), random.Random(0))
    requests = pool_scene(path)["requests"]
    assert json.dumps(requests).count("7, 7") <= 40 / 2
    assert [request["like"] for request in requests] == [None, *[[0, 40]] * 4]


def test_a_scene_has_the_title_of_its_file_unless_it_is_told_one(storm: str) -> None:
    assert pool_scene(storm)["title"] == "run.jsonl"
    assert pool_scene(storm, "too many", "They come at once.")["title"] == "too many"
    assert pool_scene(storm, "too many", "They come at once.")["intro"] == "They come at once."


def test_steps_can_be_cut_out(storm: str) -> None:
    assert steps_of(pool_scene(storm))[0] == 1
    assert steps_of(pool_scene(storm, steps=(20, 30))) == list(range(20, 31))
    assert steps_of(pool_scene(storm, steps=(25, 25))) == [25]


@pytest.mark.parametrize("first", [1, 20])
@pytest.mark.parametrize("limit, frames", [("MOST_FRAMES", 1), ("MOST_CELLS", 32)])
def test_what_is_too_large_is_refused_with_the_flag_that_cuts_it(
        limit: str, frames: int, first: int, storm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movie, limit, 50 * frames)
    with pytest.raises(ValueError, match=r"too many for a page: show fewer steps, such as --steps \d+:\d+") as refused:
        pool_scene(storm, steps=(first, 10**9))
    start, end = map(int, re.search(r"--steps (\d+):(\d+)", str(refused.value)).groups())
    assert start == first < end
    assert len(pool_scene(storm, steps=(start, end))["frames"]) > 25


def test_steps_that_the_recording_does_not_have_are_refused(storm: str) -> None:
    with pytest.raises(ValueError, match=r"run\.jsonl has no step from 5000 to 6000: there is nothing to show"):
        pool_scene(storm, steps=(5000, 6000))


def test_a_recording_in_which_nothing_happens_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "nothing.jsonl")
    with record(tight_scheduler(0), path):
        pass
    with pytest.raises(ValueError, match=r"nothing\.jsonl has no step in it: there is nothing to show"):
        pool_scene(path)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("hello\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.txt, line 1"):
        pool_scene(str(tmp_path / "other.txt"))


@pytest.mark.parametrize("seed", range(10))
def test_every_random_run_becomes_a_page(seed: int, tmp_path: Path) -> None:
    """Also those that are recorded from the middle on, and without text: the page then has no token in it."""
    print(f"seed {seed}")
    run, path = RandomRun(seed), str(tmp_path / "run.jsonl")
    run.go_on(seed % 3 * 20)
    with record(run.scheduler, path, text=seed % 2 == 0):
        run.go_on(60)
    scene = data_of(page([pool_scene(path)], "random"))["scenes"][0]
    assert scene["frames"] and scene["text"] == (seed % 2 == 0)
    assert any("tokens" in request for request in scene["requests"]) == scene["text"]
