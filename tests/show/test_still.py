"""The picture of one moment shows what the state is, in every state of random runs, and text is data in it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.recordings import RandomRun, recorded

from nanopaged import LLM, SamplingParams
from nanopaged.models.copycat import build_copycat
from nanopaged.show.moment import Moment, moments
from nanopaged.show.recording import record
from nanopaged.show.still import SIZES, STYLE, shortened, still, text_width

SVG = "{http://www.w3.org/2000/svg}"
Rect = tuple[float, float, float, float]  # left, top, right, bottom


def rect_of(element: ElementTree.Element) -> Rect:
    x, y, width, height = (float(element.get(name, 0)) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def texts_that_overflow(svg: str) -> list[str]:
    """Texts that may end outside the smallest rectangle in which they begin."""
    root = ElementTree.fromstring(svg)
    rects = [rect_of(element) for element in root.iter(f"{SVG}rect")  # but not what fills only a part of a block
             if {"edge", "badge", "chip", "paper"}.intersection(element.get("class").split())]
    overflowing = []
    for text in root.iter(f"{SVG}text"):
        x, y = float(text.get("x")), float(text.get("y"))
        around = [rect for rect in rects if rect[0] <= x <= rect[2] and rect[1] < y <= rect[3]]
        left, top, right, bottom = min(around, key=lambda rect: (rect[2] - rect[0]) * (rect[3] - rect[1]))
        css = text.get("class").split()[0]
        width = float(text.get("textLength", 0)) or text_width(text.text, css)
        if x + width > right or y - 0.8 * SIZES[css][0] < top or y > bottom:
            overflowing.append(f"{text.text!r} at {x}, {y} in {left, top, right, bottom}")
    return overflowing


def cells_of(svg: str) -> dict[int, ElementTree.Element]:
    return {int(group.get("data-block")): group for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
            if group.get("data-block")}


def has(element: ElementTree.Element, css: str) -> bool:
    return any(css in (part.get("class") or "").split() for part in element.iter())


def said(element: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def run_of(tmp_path: Path, prompts: list[str], **options: object) -> Iterator[Moment]:
    path = str(tmp_path / "run.jsonl")
    llm = LLM(build_copycat(), num_blocks=24)
    with record(llm, path, **options):
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=3))
    return moments(path)


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_cells_badges_and_links_are_those_of_the_state_in_every_fifth_frame_of_random_runs(
        first: int, tmp_path: Path) -> None:
    seen = set()
    for seed in range(first, first + 8):
        print(f"seed {seed}")
        run = RandomRun(seed)
        with recorded(run.scheduler, tmp_path):
            run.go_on(60)
        for number, moment in enumerate(moments(str(tmp_path / "run.jsonl"))):
            if number % 5:
                continue
            state = moment.state
            chosen = list(state.sequences)[-6:]
            svg = still(moment, chosen)
            assert not texts_that_overflow(svg), f"frame {moment.told.frame.name}"
            cells = cells_of(svg)
            assert list(cells) == list(range(state.num_blocks))
            for block, cell in cells.items():
                holders, filled = state.holders[block], state.filled[block]
                is_free = holders == 0 and not state.is_cached(block)
                assert has(cell, "hatched") == state.is_cached(block)
                assert has(cell, "free") == is_free
                assert has(cell, "held") == (holders > 0 and filled > 0)
                assert has(cell, "slots") == (holders > 0 and filled < state.block_size)
                assert (f"×{holders}" in said(cell)) == has(cell, "badge") == (holders > 1)
                assert has(cell, "changed") == (block in moment.changed)
                seen |= {"shared"} if holders > 1 else {"cached"} if state.is_cached(block) else set()
            num_links = sum(len(state.sequences[request_id].table) for request_id in chosen)
            assert svg.count('class="link"') == num_links
    assert seen == {"shared", "cached"}


def test_what_a_request_says_is_text_and_never_markup(tmp_path: Path) -> None:
    hostile = '</style><script>alert("1")</script> & <text class=\'x\'>\x00\x1b\n' * 2
    for moment in run_of(tmp_path, [hostile]):
        root = ElementTree.fromstring(still(moment, ["0.0"]))
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
            "svg", "title", "desc", "style", "pattern", "path", "rect", "text", "g"}
        if moment.told.frame.kind == "record":
            words = "".join(said(root)).replace("\u00a0", " ")
            assert "</style><script>" in words and "&" in words and "··↵" in words


def test_wide_and_broken_characters_stay_within_their_block(tmp_path: Path) -> None:
    for moment in run_of(tmp_path, ["図書館の本はどこにありますか" * 3, "é" * 50]):
        assert not texts_that_overflow(still(moment, ["0.0", "1.0"]))


def test_a_recording_without_text_shows_the_same_blocks_without_words(tmp_path: Path) -> None:
    prompts = ["Once upon a time there was a library."]
    with_text = [still(moment, ["0.0"]) for moment in run_of(tmp_path, prompts)]
    without = [still(moment, ["0.0"]) for moment in run_of(tmp_path, prompts, text=False)]
    assert "Once\u00a0upon" in with_text[-2]
    assert without == [re.sub(r'<text class="words.*\n', "", svg) for svg in with_text]


def test_the_reader_gets_its_slots_in_the_order_of_its_table(tmp_path: Path) -> None:
    moment = next(moment for moment in run_of(tmp_path, ["Once upon a time there was a library."])
                  if moment.told.frame.kind == "write")
    table = moment.state.sequences["0.0"].table
    words = [text for text in said(ElementTree.fromstring(still(moment, ["0.0"], reader="0.0"))) if "slots " in text]
    assert words[1:] == [f"slots {table[0] * 16}–{table[0] * 16 + 15}", f"slots {table[1] * 16}–{table[1] * 16 + 15}",
                         f"slots {table[2] * 16}–{table[2] * 16 + 4}"]


def test_more_requests_than_hues_are_refused(tmp_path: Path) -> None:
    moment = next(run_of(tmp_path, ["Once"]))
    with pytest.raises(ValueError, match="7 requests are chosen, and there are 6 hues"):
        still(moment, [f"{number}.0" for number in range(7)])


def test_the_dark_style_has_every_colour_of_the_light_one_and_no_colour_is_unknown() -> None:
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in STYLE.split("@media (prefers-color-scheme: dark)"))
    assert light == dark >= {"--ink", "--paper", "--hue-5"}
    assert {f"--{name}" for name in re.findall(r"var\(--([\w-]+)\)", STYLE)} - {"--hue"} <= light


def test_a_text_is_cut_only_where_it_does_not_fit() -> None:
    assert shortened("block 7", "small", text_width("block 7", "small")) == "block 7"
    cut = shortened("block 7", "small", text_width("block 7", "small") - 1)
    assert cut == "block…"[: len(cut) - 1] + "…" and text_width(cut, "small") < text_width("block 7", "small")
