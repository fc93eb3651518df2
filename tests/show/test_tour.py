"""The committed pictures are what the code draws, and show what docs/tour.md and README.md say of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests.show.test_still import cells_of, has, said, texts_that_overflow

from nanopaged.batch import Batch
from nanopaged.gpt2 import GPT2
from nanopaged.models.copycat import build_copycat
from nanopaged.show import tour
from nanopaged.show.moment import moments

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [stop.file for stop in tour.STOPS]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return build_copycat()


@pytest.fixture(scope="module")
def drawn(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("docs")
    written = tour.write_tour(str(folder), model)
    assert written == [str(folder / name) for name in NAMES]
    return {name: (folder / name).read_text(encoding="utf-8") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_is_what_the_code_draws(drawn: dict[str, str], name: str) -> None:
    committed = (DOCS / name).read_text(encoding="utf-8") if (DOCS / name).exists() else ""
    if committed != drawn[name]:
        pytest.fail(f"the picture docs/{name} no longer matches the code: run `python -m nanopaged.show --tour`, look "
                    "at it, and at what docs/tour.md and README.md say of it")


@pytest.mark.parametrize("name", NAMES)
def test_every_text_lies_in_its_box_and_the_file_is_small(drawn: dict[str, str], name: str) -> None:
    assert not texts_that_overflow(drawn[name])
    assert len(drawn[name].encode()) < 30_000


def test_each_stop_of_the_tour_shows_its_picture_once_and_in_order() -> None:
    text = (DOCS / "tour.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\S+\.svg)\)", text) == [name for name in NAMES if name != "still.svg"]
    assert (DOCS.parent / "README.md").read_text(encoding="utf-8").count("](docs/still.svg)") == 1
    assert {path.name for path in (DOCS / "tour").iterdir()} == {Path(name).name for name in NAMES} - {"still.svg"}


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_that_the_text_names_are_in_its_picture(drawn: dict[str, str], name: str) -> None:
    if name == "still.svg":
        text = " ".join((DOCS.parent / "README.md").read_text(encoding="utf-8").split())
        table = re.search(r"table of request 3 is `(\[[\d, ]+\])`", text)[1]
        assert f"Request 3 has the block table {table}." in drawn[name]
        assert "block tables begin with block 14," in text and "×2" in said(cells_of(drawn[name])[14])
        return
    section = (DOCS / "tour.md").read_text(encoding="utf-8").partition(f"]({name})")[2].partition("Where it happens")[0]
    prose = re.sub(r"[Rr]equests?\s\d+(\sand\s\d+)?", "", section)
    numbers = set(re.findall(r"\d+", prose)) - {"25", "26"}  # tokens of a step that the test below looks at
    picture = " ".join([*said(ElementTree.fromstring(drawn[name])), re.search("<desc>.*</desc>", drawn[name])[0]])
    assert numbers <= set(re.findall(r"\d+", picture)), "docs/tour.md names what its picture does not show"


def test_the_tour_goes_from_the_queue_over_giving_way_to_blocks_that_another_request_finds(
        model: GPT2, tmp_path: Path) -> None:
    path = str(tmp_path / "run.jsonl")
    tour.record_run(path, model)
    names, again = {}, {}
    for moment in moments(path):
        for event in moment.told.frame.events:
            if event[0] != "add":
                names.setdefault((event[0], event[1]), moment.told.names[0])
            if event[0] == "fill":
                again[moment.told.frame.step, event[1]] = event[3]
    assert [names[event, request] for event, request in (
        ("seat", "3.0"), ("take", "3.0"), ("preempt", "3.0"), ("end", "3.0"), ("seat", "4.0"))] == [
        "shares", "shares", "gives way", "finishes", "shares"]
    assert (again[47, "3.0"], again[58, "4.0"]) == (26, 6)  # as docs/tour.md says


def test_the_readme_still_has_two_tables_one_shared_block_unfilled_slots_and_a_legend(drawn: dict[str, str]) -> None:
    svg, cells = drawn["still.svg"], cells_of(drawn["still.svg"])
    words = said(ElementTree.fromstring(svg))
    assert len(cells) == 24
    assert [text for text in words if text.startswith("request ")][:2] == ["request 2", "request 3"]
    assert [block for block, cell in cells.items() if has(cell, "badge")] == [14]
    assert {"×2", "R2", "R3"} <= set(said(cells[14]))
    assert svg.count('class="link"') == 10
    held = [cell for cell in cells.values() if has(cell, "held")]
    assert sum(has(cell, "slots") for cell in held) == 2
    assert sum("R1" in said(cell) for cell in held) >= 8
    assert sum(has(cell, "hatched") for cell in cells.values()) == 2
    assert sum(has(cell, "free") for cell in cells.values()) == 2
    legend = next(part for part in ElementTree.fromstring(svg).iter() if part.get("data-part") == "legend")
    for word in ("full", "unfilled", "cached", "free", "two", "changed"):
        assert word in " ".join(said(legend))


def test_the_rows_are_those_that_the_engine_lays_out(
        model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, plain = [], Batch.from_step

    def noting(*arguments: object) -> Batch:
        batches.append(plain(*arguments))
        return batches[-1]

    monkeypatch.setattr(Batch, "from_step", noting)
    path = str(tmp_path / "run.jsonl")
    tour.record_run(path, model)
    checked = 0
    for moment in moments(path):
        if moment.told.frame.kind == "write":
            batch, flat = batches[moment.told.frame.step - 1], tour.rows_of(moment)
            assert [row.position for row in flat] == batch.positions.tolist()
            assert [row.slot for row in flat] == batch.slots.tolist()
            starts = [0, *(i for i in range(1, len(flat)) if flat[i].request_id != flat[i - 1].request_id), len(flat)]
            assert starts == batch.query_start.tolist()
            checked += 1
    assert checked == len(batches) > 50


def test_a_run_without_the_moments_of_the_tour_is_refused(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tour, "ARRIVALS", tour.ARRIVALS[1:2])
    with pytest.raises(RuntimeError, match=r"no moment for tour/1_arrives\.svg"):
        tour.draw_tour(model)


def test_a_wrong_answer_is_not_drawn(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tour, "ARRIVALS", [tour.ARRIVALS[0]._replace(expected=("another",))])
    with pytest.raises(RuntimeError, match="the run of the tour has a wrong answer: request 0 went wrong"):
        tour.draw_tour(model)
