"""Does the page show what was recorded, and can everybody use it? In a real browser; skipped where there is none."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.crowds import record as record_step
from tests.crowds import request_with, whatever_fits
from tests.oracle import tiny_model
from tests.recordings import RandomRun
from tests.show.browser import LOW_CONTRAST, PICTURE, Movie, chromium

from nanopaged import LLM
from nanopaged.block_allocator import BlockAllocator
from nanopaged.gpt2 import GPT2Config
from nanopaged.scheduler import Scheduler
from nanopaged.show.movie import page, pool_scene
from nanopaged.show.reading import Line, read
from nanopaged.show.recording import record
from nanopaged.show.replay import Frame, State, frames
from nanopaged.show.rules import RARE
from nanopaged.show.scenes import SCENES, play
from nanopaged.simulate.twin import twin_scene
from nanopaged.step import Step
from train_free_demo import story_jobs

FRAME_MS = 1100  # at speed 1
COPY = [scene.title for scene in SCENES].index("copy-on-write")
EVICTED = [scene.title for scene in SCENES].index("cached, found, evicted")
FULL = [scene.title for scene in SCENES].index("full")
STORY, TWIN = len(SCENES), len(SCENES) + 1
HOSTILE = ["</script><script>window.bad = 1</script>", "<img src=x onerror='window.bad = 1'>",
           "\"quotes' & `ticks` ${1}", "\u2028\u2029",
           "\x00\x07\x1b[31m\r\n\t", "{{DATA}}", "\u202e reversed", 15 * "." + "\ufeff at a block's beginning"]
Scene = dict[str, Any]
Open = Callable[..., Movie]


class Scenes:
    """A movie like the demo's: small scenes, the demo's story, and the twin; with the recordings that it is made of."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"{number}.jsonl" for number in range(STORY + 1)]
        self.scenes: list[Scene] = []
        for scene, path in zip(SCENES, self.paths):
            llm = quoting_llm(num_blocks=scene.num_blocks, max_num_batched_tokens=256, **scene.options)
            with record(llm, str(path)):
                assert play(llm, scene.arrivals) == []
            self.scenes.append(pool_scene(str(path), scene.title, scene.intro))
        record_story(str(self.paths[STORY]))
        self.scenes += [pool_scene(str(self.paths[STORY]), "the story"), twin_scene()]
        self.html = folder / "movie.html"
        self.html.write_text(page(self.scenes, "scenes"), encoding="utf-8")

    def frames(self, scene: int) -> list[Any]:
        return self.scenes[scene]["frames"]

    def frames_named(self, scene: int, *names: str) -> list[int]:
        return [i for i, frame in enumerate(self.frames(scene)) if set(names) & set(frame[3])]


def quoting_llm(**options: object) -> LLM:
    """Continues the prompts of scenes with the right words: what copycat computes for seconds, it knows."""
    llm = LLM(tiny_model(GPT2Config(vocab_size=257, n_positions=1024, n_embd=2, n_layer=1, n_head=1)), **options)
    arrivals = sorted((arrival for scene in SCENES for arrival in scene.arrivals), key=lambda it: len(it.expected[0]))
    known = {arrival.prompt.encode(): arrival.expected for arrival in arrivals}  # the longest, if it occurs twice

    def logits_of(step: Step) -> torch.Tensor:
        logits = torch.zeros(len(step.sampled) + len(step.cut), 257)
        for row, (_, request) in enumerate(step.sampled):
            texts = known.get(bytes(request.token_ids[: request.num_prompt_tokens]), (100 * ".",))
            member = int(request.request_id.partition(".")[2] or 0)
            logits[row, texts[member % len(texts)].encode()[request.num_output_tokens]] = 1000.0
        return logits

    llm.logits_of = logits_of
    return llm


def record_story(path: str) -> None:
    """The demo's requests, with a scheduler and no model: what they are continued with is random."""
    rng, jobs, step = random.Random(0), story_jobs(32, 24, 0), 0
    scheduler = Scheduler(BlockAllocator(200, 16, True), 64, 512, 4096, whatever_fits)
    with record(scheduler, path):
        while jobs or scheduler.has_unfinished():
            while jobs and jobs[0].arrival_step <= step:
                scheduler.add(request_with(32 - len(jobs), list(jobs.pop(0).prompt.encode()), 24))
            record_step(scheduler, scheduler.schedule(), rng)
            step += 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def scenes(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    return Scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def window(browser: Any) -> Movie:
    return Movie(browser)


@pytest.fixture
def open_page(browser: Any, window: Movie) -> Iterator[Open]:
    """Opens pages; with options, in a window of their own. None may write to the console, raise, or fetch anything."""
    windows = [window]

    def open_one(path: Path, fragment: str = "", **options: Any) -> Movie:
        if options:
            windows.append(Movie(browser, **options))
        return windows[-1].open(path, fragment)

    yield open_one
    complaints = [complaint for opened in windows for complaint in opened.complaints]
    window.complaints.clear()
    for opened in windows[1:]:
        opened.close()
    assert complaints == []


@pytest.fixture
def movie(open_page: Open, scenes: Scenes) -> Movie:
    return open_page(scenes.html)


# What is shown is what was recorded.


class Recording:
    """What Python says of each frame of a recording: the truth for the page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, str] = {}

    def states(self, steps: tuple[int, int] = (1, 10**9)) -> Iterator[tuple[Frame, State]]:
        lines = read(str(self.path))
        state = State(next(lines))
        for frame in frames(self._noting(lines)):
            for event in frame.events:
                state.apply(event)
            if steps[0] <= frame.step <= steps[1]:
                yield frame, state

    def _noting(self, lines: Iterable[Line]) -> Iterator[Line]:
        for line in lines:
            self.texts |= line.get("texts", {})
            yield line

    def words(self, state: State, request_id: str | None, i: int, filled: int) -> str:
        """Of a request's logical block i, of which so many slots are filled."""
        if request_id is None or state.sequences[request_id].token_ids is None:
            return ""
        tokens = state.sequences[request_id].token_ids[i * state.block_size :][:filled]
        if not self.texts:
            return "".join(f"‹{token}›" for token in tokens)
        encoded = "".join(self.texts[str(token)] for token in tokens).encode("latin-1")
        return encoded.decode("utf-8", errors="replace").replace("\n", "↵")

    def cell(self, state: State, block: int) -> dict[str, Any]:
        holders, filled = state.holders[block], state.filled[block]
        kind = "shared" if holders > 1 else "held" if holders else "cached" if state.is_cached(block) else "free"
        share = 0 if kind == "cached" else 100 * filled / state.block_size
        return {"block": block, "badge": f"×{holders}" if holders > 1 else "", "state": kind, "share": share,
                "words": self.words(state, *state.places[block], filled)}

    def differences(self, movie: Movie, scene: int, indexes: Iterable[int]) -> list[str]:
        """What the page shows in these frames and should not, or does not and should; in a random order of frames."""
        states = {i: (frame.name, self.expected(state)) for i, (frame, state) in enumerate(self.states())
                  if i in set(indexes)}
        assert states.keys() == set(indexes)
        found = []
        for i in indexes:
            name, expected = states[i]
            movie.show(scene, i)
            found += [f"frame {name}: {what}" for what in compared(json.loads(movie.js(PICTURE)), expected)]
        return found

    def expected(self, state: State) -> dict[str, Any]:
        tables = {}
        for number, request in enumerate(state.sequences.values()):
            size = state.block_size
            filled = [max(0, min(size, request.computed - i * size)) for i in range(len(request.table))]
            tables[number] = [[block, self.words(state, request.request_id, i, filled[i])]
                              for i, block in enumerate(request.table)]
        return {"cells": [self.cell(state, block) for block in range(state.num_blocks)], "tables": tables,
                "figures": state.figures()}


def compared(picture: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """A sentence for each thing that a picture has and should not, or has not and should."""
    has_text = any(words for table in expected["tables"].values() for _, words in table)
    for cell, wanted in zip(picture["cells"], expected["cells"], strict=True):
        wanted = wanted if has_text else wanted | {"words": cell["words"]}
        wanted = wanted | {"lost": cell["lost"]}
        if cell | {"share": 0} != wanted | {"share": 0} or abs(cell["share"] - wanted["share"]) > 0.1:
            yield f"the cell {cell} should be {wanted}"
    shown: dict[int, list[int]] = {}
    for number, i, block, words in picture["boxes"]:
        shown.setdefault(number, []).append(block)
        wanted_block, wanted_words = expected["tables"][number][i]
        if block != wanted_block or has_text and words != (wanted_words or " "):
            yield f"request {number}'s box {i} is block {block} “{words}” and should be {wanted_block} “{wanted_words}”"
    for number, blocks in shown.items():
        table = [block for block, _ in expected["tables"][number]]
        if len(table) <= 12 and blocks != table or blocks[-1:] != table[-1:]:
            yield f"request {number}'s boxes {blocks} should be its table {table}"
    if picture["links"] != shown.get(picture["focus"], []):
        yield f"the links {picture['links']} should be those of request {picture['focus']}, {shown}"
    figures = expected["figures"]
    for name, figure in picture["figures"].items():
        if figure != figures[name]:
            yield f"the figure {name} is {figure} and should be {figures[name]}"
    written = {"running": f"{figures['num_running']}", "waiting": f"{figures['num_waiting']}",
               "held": f"{figures['referenced_blocks']} of", "shared": f"{figures['shared_blocks']} ",
               "cached": f"{figures['cached_blocks']} ", "free": f"{figures['free_blocks']} "}
    for name, text in written.items():
        if not picture["shown"][name].startswith(text):
            yield f"the page says {name}: {picture['shown'][name]}, and should say {text}"


def test_cells_tables_links_and_figures_are_the_recordings_at_random_frames(movie: Movie, scenes: Scenes) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for number, path in enumerate(scenes.paths):
        indexes = rng.sample(range(len(scenes.frames(number))), 8)
        assert Recording(path).differences(movie, number, indexes) == []


REPLAYED = """number => {
  const {replay, length} = player.scene, frames = [];
  const order = [...Array(length).keys()].sort((a, b) => (a * 7919 + number) % 101 - (b * 7919 + number) % 101);
  for (const i of order) {
    replay.seek(i);
    const s = replay.state;
    frames[i] = {figures: replay.figures(), holders: [...s.holders], filled: [...s.filled],
                 tables: structuredClone(s.tables), computed: [...s.computed],
                 published: [...s.published.keys()].filter(block => s.published[block])};
  }
  return JSON.stringify(frames);
}"""


@pytest.mark.parametrize("first", range(0, 12, 6))
def test_the_page_replays_random_runs_as_python_does(first: int, tmp_path: Path, open_page: Open) -> None:
    """Whole or cut, recorded from the start or the middle, with swapping and failures; frames in a random order.

    And a scene is the same when it is opened again.
    """
    all_steps, runs, scenes = (1, 10**9), [], []
    for seed in range(first, first + 6):
        run, path = RandomRun(seed), tmp_path / f"{seed}.jsonl"
        run.go_on(seed % 3 * 20)
        with record(run.scheduler, str(path), text=seed % 4 > 0):
            run.go_on(80)
        steps = [(state.unrecorded_preemptions > 0, frame.step) for frame, state in Recording(path).states()
                 if frame.kind in ("record", "fail")]
        hard = [step + 1 for is_hard, step in steps[:-1] if is_hard]  # what a failed step did is not counted yet
        cut = (run.rng.choice(hard or [step for _, step in steps]), 10**9) if hard or seed % 2 else all_steps
        runs.append((path, cut))
        scenes.append(pool_scene(str(path), steps=cut))
    (tmp_path / "runs.html").write_text(page(scenes, "random runs"), encoding="utf-8")
    movie = open_page(tmp_path / "runs.html")
    replayed = [(movie.show(number), movie.js(REPLAYED, number))[1] for number in range(len(runs))]
    for number, (path, cut) in enumerate(runs):
        for page_says, (frame, state) in zip(json.loads(replayed[number]), Recording(path).states(cut), strict=True):
            where, figures = f"seed {first + number}, steps {cut}, frame {frame.name}", state.figures()
            assert page_says["figures"] == {name: figures[name] for name in page_says["figures"]}, where
            assert page_says["holders"] == state.holders, where
            assert page_says["filled"] == state.filled, where
            assert page_says["published"] == sorted(state.published), where
            for request, table, computed in zip(state.sequences.values(), page_says["tables"], page_says["computed"]):
                assert (table, computed) == (request.table, request.computed), where
        movie.show(number)
        assert movie.js(REPLAYED, number) == replayed[number], f"seed {first + number}, opened again"


def test_the_cells_and_tables_of_random_runs_are_the_recordings(tmp_path: Path, open_page: Open) -> None:
    """Also of a recording without text."""
    for seed in (1, 2):
        path, html = tmp_path / f"{seed}.jsonl", tmp_path / f"{seed}.html"
        run = RandomRun(seed)
        with record(run.scheduler, str(path), text=seed == 1):
            run.go_on(120)
        scene = pool_scene(str(path))
        html.write_text(page([scene], "a random run"), encoding="utf-8")
        indexes = run.rng.sample(range(len(scene["frames"])), 20)
        assert Recording(path).differences(open_page(html), 0, indexes) == []


@pytest.mark.parametrize("broken, by", [
    ('case "copy":', 'case "no such event":'),
    ("this.release(s.tables[r].pop())", "s.tables[r].pop()"),
    ("s.published[block] ? CACHED : FREE", "FREE"),
    ("`×${s.holders[block]}`", "`×${s.holders[block] + 1}`"),
    ("s.placeAt[block] * this.size", "0"),
])
def test_the_comparison_notices_a_broken_script(broken: str, by: str, scenes: Scenes, open_page: Open,
                                                tmp_path: Path) -> None:
    html = scenes.html.read_text(encoding="utf-8")
    assert broken in html
    (tmp_path / "broken.html").write_text(html.replace(broken, by), encoding="utf-8")
    indexes = range(0, len(scenes.frames(COPY)), 3)
    assert Recording(scenes.paths[COPY]).differences(open_page(tmp_path / "broken.html"), COPY, indexes) != []


def test_a_copy_is_shown_by_an_arrow_and_marks_the_first_different_word(movie: Movie, scenes: Scenes) -> None:
    frame = scenes.frames_named(COPY, "copies")[0]
    _, (_, source, target) = next(run for run in scenes.frames(COPY)[frame][5] if run[0] == "copy")
    movie.show(COPY, frame)
    assert movie.js("document.querySelector('[data-ghost]').dataset.ghost") == f"{source} {target}"
    assert movie.text(f".cell[data-block='{source}'] .badge") == "×2"
    movie.show(COPY, scenes.frames_named(COPY, "no copy")[0] + 3)  # all three have written two words
    marks = movie.js("[...document.querySelectorAll('.cell mark')].map(mark => mark.textContent)")
    assert {"b", "c"} <= set(marks)
    assert not movie.page.query_selector("[data-ghost]")


def test_the_words_that_an_eviction_loses_are_struck_out(movie: Movie, scenes: Scenes) -> None:
    evictions = scenes.frames_named(EVICTED, "evicts")
    assert evictions
    for frame in evictions:
        movie.show(EVICTED, frame - 1)
        cached = {cell["block"]: cell["words"] for cell in json.loads(movie.js(PICTURE))["cells"]
                  if cell["state"] == "cached"}
        taken = {block for name, *rows in scenes.frames(EVICTED)[frame][5] if name == "take" for row in rows
                 for block in row[1]}
        movie.show(EVICTED, frame)
        lost = {cell["block"]: cell["lost"] for cell in json.loads(movie.js(PICTURE))["cells"] if cell["lost"]}
        assert lost == {block: words for block, words in cached.items() if block in taken}
        assert lost


# Playing, and going from frame to frame.


def test_playing_shows_frame_after_frame_in_time(movie: Movie, scenes: Scenes) -> None:
    quiet = scenes.frames_named(COPY, "duplicate")[0] + 1  # many frames follow at which it does not pause
    movie.show(COPY, quiet)
    movie.page.select_option("#speed", "16")
    movie.click("#play")
    movie.until(f"player.at >= {quiet + 3}")
    assert movie.is_playing
    movie.click("#play")
    assert not movie.is_playing


def test_playing_pauses_at_the_first_event_of_each_kind(open_page: Open, scenes: Scenes) -> None:
    movie, met, pauses = open_page(scenes.html, f"#scene={COPY + 1}", has_clock=True), set(), []
    last = len(scenes.frames(COPY)) - 1
    for i in range(1, last + 1):
        names = {name for name in scenes.frames(COPY)[i][3] if name in RARE} - met
        if names or i == last:
            pauses.append(i)
        met |= names
    assert len(pauses) > 4
    movie.ask(False)
    for pause in pauses:
        start = movie.at
        movie.press("Space")
        for at in range(start + 1, pause + 1):
            assert movie.is_playing
            movie.wait(FRAME_MS)
            assert movie.at == at
        movie.wait(FRAME_MS if pause == last else 0)
        assert not movie.is_playing
        assert movie.text("#said") or pause == last
    movie.press("Space")  # at the end it begins again
    assert movie.is_playing and movie.at == 0


@pytest.mark.parametrize("is_right", [True, False])
def test_a_question_comes_before_its_frame_and_the_answer_is_judged(is_right: bool, movie: Movie,
                                                                          scenes: Scenes) -> None:
    frame = next(i for i, frame in enumerate(scenes.frames(FULL)) if frame[6] and "gives way" in frame[3])
    _, _, caption, _, _, _, [question, choices, answer] = scenes.frames(FULL)[frame]
    movie.show(FULL, frame - 1)
    movie.page.select_option("#speed", "16")
    movie.click("#play")
    movie.until("player.isAsking")
    assert not movie.is_playing and movie.at == frame - 1
    assert movie.text("#asked") == question
    assert not movie.is_visible("#caption")  # it would give the answer away
    buttons = movie.page.query_selector_all("#choices button")
    assert [button.inner_text()[3:] for button in buttons] == choices
    buttons[answer if is_right else answer - 1].click()
    assert movie.at == frame
    assert not movie.is_visible("#question")
    said = movie.text("#caption")
    assert said.endswith(caption) and said.startswith("Yes" if is_right else "No")
    assert is_right or choices[answer] in said
    assert movie.js("document.activeElement.id") == "play"  # the keyboard goes on where it was
    movie.show(FULL, frame)
    assert movie.text("#caption") == caption


def test_steps_forwards_and_back_stop_at_both_ends(movie: Movie, scenes: Scenes) -> None:
    movie.ask(False)
    last = len(scenes.frames(0)) - 1
    for selector, start, wanted in [("#next", 5, 6), ("#previous", 5, 4), ("#next", last, last), ("#previous", 0, 0)]:
        movie.show(0, start)
        movie.click(selector)
        assert movie.at == wanted
        step, part, caption = scenes.frames(0)[wanted][:3]
        assert movie.text("#caption") == caption
        movie.until(f"location.hash === '#scene=1&step={step}.{part}'")


def test_the_scrubber_goes_anywhere_and_says_where(movie: Movie, scenes: Scenes) -> None:
    movie.page.fill("#scrubber", "17")
    assert movie.at == 17
    assert scenes.frames(0)[17][2] in movie.page.get_attribute("#scrubber", "aria-valuetext")
    assert f"step {scenes.frames(0)[17][0]} of" in movie.text("#where")


def test_scrubbing_far_leaves_the_address_of_the_last_frame(movie: Movie, scenes: Scenes) -> None:
    """Browsers refuse hundreds of changes of the address in a few seconds."""
    movie.show(COPY)
    movie.js("for (let i = 0; i < 300; i++) player.show(i % 50)")
    movie.show(COPY, 9)
    step, part = scenes.frames(COPY)[9][:2]
    movie.until(f"location.hash === '#scene={COPY + 1}&step={step}.{part}'")


def test_a_press_on_a_chart_goes_to_its_frame(movie: Movie) -> None:
    for i in range(3):
        movie.show(0, 0)
        chart = movie.page.locator(".scene canvas").nth(i)
        box = chart.bounding_box()
        chart.click(position={"x": box["width"] - 5, "y": 3})
        assert movie.at == movie.js("player.scene.length") - 1


def test_jumps_go_from_event_to_event(movie: Movie, scenes: Scenes) -> None:
    events = scenes.frames_named(FULL, *RARE)
    movie.show(FULL)
    reached = []
    for _ in events:
        movie.click("#next-event")
        reached.append(movie.at)
    assert reached == [i for i in events if i > 0][: len(reached)] + [events[-1]] * (events[0] == 0)
    movie.click("#next-event")
    assert movie.at == events[-1] and movie.text("#said")  # there is no later one
    movie.click("#previous-event")
    assert movie.at == events[-2]


def test_jumps_can_be_to_one_kind_of_event(movie: Movie, scenes: Scenes) -> None:
    movie.show(FULL)
    kinds = movie.js("[...document.querySelectorAll('#event-kind option')].map(option => option.value)")
    assert set(kinds[1:]) == {name for frame in scenes.frames(FULL) for name in frame[3]} & set(RARE)
    for kind in ("gives way", "finishes"):
        movie.show(FULL)
        movie.page.select_option("#event-kind", kind)
        for wanted in scenes.frames_named(FULL, kind):
            movie.click("#next-event")
            assert movie.at == wanted
        assert movie.at > 0


@pytest.mark.parametrize("wanted, label", [("3", "3"), ("request 2", "2"), ("Late guests", "4"), ("“nobody”", None),
                                           ("", None)])
def test_a_request_is_found_by_its_number_or_its_words(wanted: str, label: str | None, movie: Movie) -> None:
    movie.show(FULL)
    movie.page.fill("#wanted", wanted)
    movie.page.press("#wanted", "Enter")
    assert movie.text("#said")
    focus = movie.js("player.scene.label(player.scene.pinned ?? -1)") if label else movie.js("player.scene.pinned")
    assert focus == label
    if label:
        assert movie.js("document.querySelector('.sequence.focus').dataset.request") == label
        assert movie.js("[...document.querySelectorAll('.sequence.focus [aria-pressed=true]')].length") == 1


def test_a_request_that_is_chosen_stays_in_focus(movie: Movie, scenes: Scenes) -> None:
    movie.show(2, 20)
    focus = movie.js("player.scene.focus")
    other = movie.page.locator(".sequence:not(.focus)").first
    label = other.get_attribute("data-request")
    other.locator("button").click()
    for frame in (21, 25, 30):
        movie.show(2, frame)
        assert movie.js("document.querySelector('.sequence.focus').dataset.request") == label
    assert movie.js("player.scene.focus") != focus


@pytest.mark.parametrize("how", ["hover", "focus", "click"])
def test_a_block_tells_its_words_holders_and_parent(how: str, movie: Movie, scenes: Scenes) -> None:
    movie.show(2, scenes.frames_named(2, "shares")[-1])
    block = movie.js("[...document.querySelectorAll('.cell.shared')][1].dataset.block")
    getattr(movie.page.locator(f".cell[data-block='{block}']"), how)()
    told = movie.text(".detail")
    holders = movie.js(f"player.scene.replay.holdersOf({block}).map(r => player.scene.label(r))")
    assert len(holders) > 1
    for piece in [f"block {block}", "parent", *[f"request {label}" for label in holders],
                  movie.js(f"player.scene.replay.words({block}).join('').trim()")]:
        assert piece in told


def test_scenes_are_opened_by_their_tabs(movie: Movie, scenes: Scenes) -> None:
    tabs = movie.page.get_by_role("tab")
    assert tabs.all_inner_texts() == [scene["title"] for scene in scenes.scenes]
    for number in (COPY, TWIN, 0):
        tabs.nth(number).click()
        assert movie.js("player.number") == number and movie.at == 0
        assert [tab.get_attribute("aria-selected") for tab in tabs.all()].index("true") == number
        assert movie.text("#intro") == scenes.scenes[number]["intro"]


def test_the_twin_shows_five_servers_at_one_moment(movie: Movie, scenes: Scenes) -> None:
    movie.show(TWIN)
    assert movie.page.locator("[data-server]").count() == 5
    last = movie.js("player.scene.length") - 1
    for frame in (last // 3, 2 * last // 3, last):
        movie.show(TWIN, frame)
        now = movie.js("player.scene.timeOf(player.at)") + 1e-9
        for server in scenes.scenes[TWIN]["servers"]:
            step = max(i for i, time in enumerate(server["times"]) if time <= now)
            row = movie.page.locator(f"[data-server='{server['name']}']")
            running, waiting, finished, generated = server["counts"][step]
            assert row.locator("[data-figure=running]").inner_text() == str(running)
            assert row.locator("[data-figure=waiting]").inner_text() == str(waiting)
            assert row.locator("[data-figure=finished]").inner_text().startswith(f"{finished} of")
            assert row.locator("[data-figure=generated]").inner_text().startswith(f"{generated} ")
        assert movie.text("#caption") and movie.text("#where")
    movie.press("Home", "Shift+ArrowRight")  # to the first event: a request waits, or gives way
    assert movie.at > 0 and "needs" in movie.text("#caption") or "gives way" in movie.text("#caption")
    assert not movie.page.locator("#search").is_visible() and not movie.page.locator("#ask").is_visible()
    movie.show(0)
    assert movie.page.locator("#search").is_visible() and movie.page.locator("#ask").is_visible()


# Links.


def test_a_link_opens_its_frame(scenes: Scenes, open_page: Open) -> None:
    frame = scenes.frames_named(COPY, "copies")[1]
    step, part, caption = scenes.frames(COPY)[frame][:3]
    movie = open_page(scenes.html, f"#scene={COPY + 1}&step={step}.{part}")
    assert movie.js("[player.number, player.at]") == [COPY, frame]
    assert movie.text("#caption") == caption
    movie.js("location.hash = '#scene=1&step=3.1'")
    movie.until("player.number === 0")
    assert scenes.frames(0)[movie.at][:2] == [3, 1]
    movie.js(f"location.hash = '#scene={TWIN + 1}&step=5'")
    movie.until(f"player.number === {TWIN}")
    assert movie.at == 4


@pytest.mark.parametrize("fragment, scene, complains", [
    ("#scene=4&step=9999.1", 3, True), ("#scene=2&step=words", 1, True), ("#step=-1", 0, True), ("#scene=99", 0, True),
    ("#scene=words", 0, True), ("#scene=8&step=99999", 7, True), ("#scene=8&step=-1", 7, True), ("#nothing", 0, False),
    ("#scene=4", 3, False), ("#scene=1&step=2.99", 0, False)])
def test_a_link_to_what_does_not_exist_shows_what_is_nearest(fragment: str, scene: int, complains: bool, scenes: Scenes,
                                                             open_page: Open) -> None:
    movie = open_page(scenes.html, fragment)
    assert movie.js("player.number") == scene
    assert bool(movie.text("#said")) == complains
    assert movie.at == (scenes.frames(0).index(next(frame for frame in scenes.frames(0) if frame[0] == 2))
                        if "2.99" in fragment else 0)
    assert movie.text("#caption")


# Everybody can use it.


def test_the_tab_key_reaches_every_control_and_shows_where_it_is(movie: Movie, scenes: Scenes) -> None:
    movie.show(COPY, scenes.frames_named(COPY, "copies")[0])
    wanted = movie.js("""() => [...document.querySelectorAll("button, input, select, a[href], [tabindex='0']")]
      .filter(found => found.checkVisibility()).map((found, i) => { found.dataset.stop = i; return i; })""")
    stops = set()
    for _ in range(len(wanted) + 2):
        movie.press("Tab")
        stop = movie.js("""() => {
          const {dataset, ariaLabel, textContent, labels, id} = document.activeElement;
          const style = getComputedStyle(document.activeElement);
          const name = ariaLabel || textContent || labels?.[0]?.textContent || "";
          return {stop: Number(dataset.stop), outline: style.outlineStyle, width: parseFloat(style.outlineWidth), id,
                  name: name.trim(), isBody: document.activeElement === document.body};
        }""")
        if stop["isBody"]:
            continue
        assert stop["outline"] != "none" and stop["width"] >= 2, stop
        stops.add(stop["stop"])
    assert stops == set(wanted)
    assert len(wanted) > 24 + 10  # cells, and controls


def test_every_control_and_picture_has_a_name(movie: Movie) -> None:
    nameless = movie.js("""() => [...document.querySelectorAll("button, input, select, canvas, [role=img]")]
      .filter(found => found.checkVisibility() && !(found.ariaLabel || found.getAttribute("aria-label")
        || found.textContent.trim() || found.labels?.[0]?.textContent.trim())).map(found => found.outerHTML)""")
    assert nameless == []


def test_the_keys_do_what_the_buttons_do(movie: Movie, scenes: Scenes) -> None:
    movie.ask(False)
    movie.js("document.activeElement.blur()")
    events, last = scenes.frames_named(FULL, *RARE), len(scenes.frames(FULL)) - 1
    movie.show(FULL)
    later, before_last = next(i for i in events if i > 1), max(i for i in events if i < last)
    for keys, wanted in [(["ArrowRight"], 1), (["ArrowRight", "ArrowLeft"], 1), (["Shift+ArrowRight"], later),
                         (["End"], last), (["Shift+ArrowLeft"], before_last), (["Home"], 0)]:
        movie.press(*keys)
        assert movie.at == wanted, keys
    movie.press("Space")
    assert movie.is_playing
    movie.press("Space")
    assert not movie.is_playing
    speeds = [movie.page.input_value("#speed")]
    for key in ("+", "+", "-", "-", "-", "-"):
        movie.press(key)
        speeds.append(movie.page.input_value("#speed"))
    assert speeds == ["1", "2", "4", "2", "1", "0.5", "0.5"]


def test_a_request_is_found_with_the_keyboard_alone(movie: Movie) -> None:
    movie.show(FULL)
    movie.press("/")
    movie.page.keyboard.type("request 2")
    movie.press("Enter", "Escape", "ArrowRight")
    assert movie.js("player.scene.label(player.scene.pinned)") == "2"
    assert movie.at > 0  # the keys are those of the page again


def test_a_question_is_answered_with_the_keyboard_alone(movie: Movie, scenes: Scenes) -> None:
    frame = next(i for i, frame in enumerate(scenes.frames(COPY)) if frame[6])
    movie.show(COPY, frame - 1)
    movie.press("ArrowRight")
    assert movie.is_visible("#question") and movie.at == frame - 1
    movie.press(str(1 + scenes.frames(COPY)[frame][6][2]))
    assert movie.at == frame and movie.text("#caption").startswith("Yes")


def test_the_space_bar_presses_what_has_the_focus(movie: Movie) -> None:
    """Playing is what it does everywhere else."""
    movie.page.focus("#ask")
    movie.press("Space")
    assert not movie.page.is_checked("#ask") and not movie.is_playing
    movie.page.focus("#next")
    movie.press("Space")
    assert movie.at == 1 and not movie.is_playing
    movie.page.focus(".cell[data-block='3']")
    movie.press("Space")
    assert "block 3" in movie.text(".detail") and not movie.is_playing


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_against_what_lies_behind_it(scheme: str, scenes: Scenes, open_page: Open) -> None:
    movie, checked = open_page(scenes.html, color_scheme=scheme), 0
    kinds = {}  # the first frame of each kind of event in any scene
    for number in range(len(scenes.paths)):
        for i, frame in enumerate(scenes.frames(number)):
            for name in frame[3]:
                kinds.setdefault(name, (number, i))
    asking = next(i for i, frame in enumerate(scenes.frames(FULL)) if frame[6])
    for scene, frame in [*sorted(set(kinds.values())), (STORY, 100), (TWIN, 0), (TWIN, 10**9), (FULL, asking - 1)]:
        movie.show(scene, frame)
        if frame == asking - 1:
            movie.press("ArrowRight")
            assert movie.is_visible("#question")
        result = movie.js(LOW_CONTRAST, 4.5)
        assert result["found"] == [], (scene, frame)
        checked += result["checked"]
    assert checked > 1000


def test_the_page_is_dark_where_dark_is_preferred_and_follows_a_change(open_page: Open, large: Path) -> None:
    """What is drawn on a canvas changes too."""
    movie = open_page(large, color_scheme="light")
    ground = """() => {
      const darkness = colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
      const style = getComputedStyle(document.body);
      return [darkness(style.backgroundColor), darkness(style.color)];
    }"""
    picture = "document.querySelector('.density canvas').toDataURL()"
    (paper, ink), light = movie.js(ground), movie.js(picture)
    assert paper > 200 and ink < 60
    movie.page.emulate_media(color_scheme="dark")
    paper, ink = movie.js(ground)
    assert paper < 60 and ink > 200
    movie.until(f"{picture} !== '{light}'")


def test_nothing_moves_by_itself_where_reduced_motion_is_preferred(open_page: Open, scenes: Scenes) -> None:
    movie = open_page(scenes.html, reduced_motion="no-preference")
    movie.show(COPY, scenes.frames_named(COPY, "copies")[0])
    moving = "document.getAnimations().length"
    assert movie.js(moving) > 0
    movie.page.emulate_media(reduced_motion="reduce")
    assert movie.js(moving) == 0


def test_a_window_as_narrow_as_a_phone_shows_everything(scenes: Scenes, open_page: Open) -> None:
    movie = open_page(scenes.html, viewport={"width": 360, "height": 740}, has_touch=True)
    for scene in range(len(scenes.scenes)):
        movie.show(scene, movie.js("player.scene.length >> 1"))
        assert movie.js("document.documentElement.scrollWidth") <= 360, scenes.scenes[scene]["title"]
    movie.show(COPY, scenes.frames_named(COPY, "copies")[0])
    for control in movie.page.query_selector_all("#controls button, #controls select, #controls input, .cell"):
        control.click(trial=True)  # that it can be seen, and that nothing lies over it
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, control.get_attribute("id")
    assert movie.page.locator(".pool").bounding_box()["width"] > 300
    movie.page.tap(".cell.shared")
    assert "block" in movie.text(".detail")


# Large pools, and evil prompts.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 1,000 steps in a pool of 2,000 blocks."""
    folder, rng, number = tmp_path_factory.mktemp("large"), random.Random(0), 0
    scheduler = Scheduler(BlockAllocator(2000, 16, True), 64, 512, 4096, whatever_fits)
    with record(scheduler, str(folder / "run.jsonl"), text=False):
        for _ in range(1000):
            while len(scheduler.waiting) < 3:
                scheduler.add(request_with(number, [number] * rng.randint(20, 600), rng.randint(50, 900)))
                number += 1
            record_step(scheduler, scheduler.schedule(), rng)
    html = folder / "large.html"
    html.write_text(page([pool_scene(str(folder / "run.jsonl"))], "a large pool"), encoding="utf-8")
    return html


DRAW_MS = """([first, other]) => Math.min(...[0, 1, 2].map(() => {
  player.show(other);
  document.body.getBoundingClientRect();
  const start = performance.now();
  player.show(first);
  document.body.getBoundingClientRect();  // the page is laid out, too
  return performance.now() - start;
}))"""


def test_any_frame_of_a_large_pool_is_drawn_at_once(large: Path, open_page: Open) -> None:
    """Within 50 ms; single frames may take twice that on a busy machine."""
    seed = random.randrange(10**6)
    rng, movie = random.Random(seed), open_page(large)
    length = movie.js("player.scene.length")
    assert movie.js("player.scene.scene.num_blocks") == 2000 and length > 2000
    assert not movie.page.query_selector(".cell")  # so many are shown by density
    times = [movie.js(DRAW_MS, [rng.randrange(length), rng.randrange(length)]) for _ in range(20)]
    print(f"seed {seed}: {[round(ms, 1) for ms in times]}")
    assert statistics.median(times) < 50
    assert max(times) < 100


def test_a_large_pool_is_read_with_the_keyboard(large: Path, open_page: Open) -> None:
    movie = open_page(large)
    movie.page.focus(".density canvas")
    movie.press("ArrowRight", "ArrowRight", "ArrowDown")
    assert f"block {2 + movie.js('player.scene.across')}" in movie.text(".detail")
    assert movie.at == 0


def test_what_requests_say_is_shown_and_does_nothing(tmp_path: Path, open_page: Open, scenes: Scenes) -> None:
    llm, path = quoting_llm(num_blocks=64), tmp_path / "hostile.jsonl"
    with record(llm, str(path)):
        for prompt in [*HOSTILE, "é" * 20]:  # of two bytes each: some are cut in half by a block's end
            llm.add_request("x" + prompt)
        for _ in range(3):
            llm.step()
    html = tmp_path / "hostile.html"
    scene = pool_scene(str(path), HOSTILE[0], HOSTILE[1])
    html.write_text(page([scene] * 2, HOSTILE[0]), encoding="utf-8")
    movie = open_page(html)
    last = len(scene["frames"]) - 1
    assert Recording(path).differences(movie, 0, [0, last // 2, last]) == []
    assert "\ufffd" in movie.text(".pool")
    for prompt in HOSTILE:
        movie.page.fill("#wanted", prompt)
        movie.page.press("#wanted", "Enter")
    assert movie.page.title() == HOSTILE[0]
    assert movie.text("#title") == HOSTILE[0] and movie.text("#intro") == HOSTILE[1]
    assert movie.js("window.bad") is None
    assert movie.js("document.querySelectorAll('script').length") == 2
    assert not movie.page.query_selector("img")


def test_a_page_like_the_demos_is_smaller_than_a_megabyte(scenes: Scenes) -> None:
    assert scenes.html.stat().st_size < 1_000_000
