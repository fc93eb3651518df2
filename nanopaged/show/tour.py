"""What happens to one request, from its prompt to its last token? The pictures of docs/tour.md, from a real run.

Five requests run in a pool of 24 blocks. The tour follows request 3: it shares a block with request 2, grows, gives
way when the pool is full, comes back, and ends; request 4 finds what it leaves. A stop is a frame of the recording,
chosen by what happens in it, so the pictures follow the code when it changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanopaged.engine import LLM
from nanopaged.gpt2 import GPT2
from nanopaged.show.moment import Moment, moments
from nanopaged.show.reading import Event
from nanopaged.show.recording import record
from nanopaged.show.scenes import play, round_and_round
from nanopaged.show.still import MARGIN, NAME_WIDTH, WIDTH, Picture, still

OPENING = "Dear librarian, "  # exactly one block
BUSY = ("On busy nights every box in the library was taken by dusk, and who came last was asked to wait in the cold "
        "hall until the sun rose over the town. ")
DOG = "may I bring my dog along? "
ARRIVALS = [
    round_and_round(0, "Back by noon, I think. ", 4),
    round_and_round(0, BUSY, 64),
    round_and_round(1, "where is the blue book kept? ", 45, OPENING),
    round_and_round(5, DOG, 36, OPENING),
    round_and_round(57, DOG, 6, OPENING + DOG),  # goes on where request 3 ended
]
NUM_BLOCKS = 24
SHOWN = ("2.0", "3.0", "4.0")  # requests whose tables the pictures show
OURS, NEXT = "3.0", "4.0"
FIRST_ROWS, LAST_ROWS = 6, 4  # of a request with many rows


class Stop(NamedTuple):
    """The `nth` frame, from the stop before on, in which something happens to a request; and the picture of it."""

    file: str
    event: str
    request_id: str = OURS
    nth: int = 1
    draw: Callable[[Moment], str] = lambda moment: still(moment, SHOWN)


def rows(moment: Moment) -> str:
    """The flat rows of a step that is being computed, as SVG: `Batch.from_step`, recomputed from the plan."""
    picture = Picture(moment)
    picture.heading("The batch: one row for each token of each request, with no padding between them")
    flat = rows_of(moment)
    columns = list(_columns(flat))
    width = (WIDTH - MARGIN - NAME_WIDTH) / len(columns)
    top, step = picture.y + 4, 26
    for i, name in enumerate(("row", "request", "token", "position", "block", "slot")):
        picture.text(MARGIN, top + i * step + 17, name, "heading", NAME_WIDTH - MARGIN)
    for column, number in enumerate(columns):
        x = NAME_WIDTH + column * width
        if number is None:
            picture.text(x + 8, top + 2.5 * step + 4, "…", "heading", width)
            continue
        _column(picture, number, flat[number], x, top, width, step)
    picture.y = top + 6 * step + 8
    size = moment.state.block_size
    example = next(row for row in reversed(flat) if row.position >= size)
    at, offset = divmod(example.position, size)
    picture.text(MARGIN, picture.y + 14, f"slot = block_table[position // {size}] * {size} + position % {size}. The "
                 f"last row: block_table[{at}] is {example.block}, and {example.block} * {size} + {offset} = "
                 f"{example.slot}.", "plain", WIDTH - 2 * MARGIN)
    plan = moment.told.frame.events
    starts = [sum(event[3] for event in plan[:i]) for i in range(len(plan) + 1)]
    picture.text(MARGIN, picture.y + 34, f"query_start = {starts}: where each request's rows begin. seq_lens = "
                 f"{[event[2] + event[3] for event in plan]}: the length of each context.", "plain", WIDTH - 2 * MARGIN)
    picture.y += 46
    return picture.svg(f"{len(flat)} rows. " + " ".join(
        f"Request {moment.labels[request_id]} has {_number_of_rows(num_tokens)}, from position {start} on."
        for _, request_id, start, num_tokens in plan))


class Row(NamedTuple):
    request_id: str
    position: int
    block: int
    slot: int


def rows_of(moment: Moment) -> list[Row]:
    """A row for each token that the step computes, in the order of its plan."""
    size, flat = moment.state.block_size, []
    for _, request_id, start, num_tokens in moment.told.frame.events:
        table = moment.state.sequences[request_id].table
        for position in range(start, start + num_tokens):
            block = table[position // size]
            flat.append(Row(request_id, position, block, block * size + position % size))
    return flat


def _number_of_rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _columns(flat: list[Row]) -> Iterator[int | None]:
    """The numbers of the rows that are shown; None stands for those that are left out."""
    for number, row in enumerate(flat):
        same = [other for other in range(len(flat)) if flat[other].request_id == row.request_id]
        place, from_end = number - same[0], same[-1] - number
        if place < FIRST_ROWS or from_end < LAST_ROWS:
            yield number
        elif place == FIRST_ROWS:
            yield None


def _column(picture: Picture, number: int, row: Row, x: float, top: float, width: float, step: float) -> None:
    moment = picture.moment
    chosen = row.request_id in SHOWN
    if chosen:
        picture.add(f'<g style="--hue: var(--hue-{SHOWN.index(row.request_id)})">')
    token = moment.words(row.request_id, row.position, row.position + 1).replace(" ", "␣")
    picture.rect(x, top, width - 3, 6 * step, "edge mine" if chosen else "edge")
    cells = (str(number), moment.name(row.request_id), token, str(row.position), str(row.block), str(row.slot))
    for i, cell in enumerate(cells):
        y = top + i * step
        css = "words" if i == 2 else "strong" if i in (1, 5) else "plain"
        if i == 1 and chosen:
            picture.rect(x, y, width - 3, step, "chip", 0)
        picture.text(x + 6, y + 17, cell, css, width - 8, "inverse" if i == 1 and chosen else "muted" if i == 0 else "")
    if chosen:
        picture.add("</g>")


STOPS = [
    Stop("tour/1_arrives.svg", "add"),
    Stop("tour/2_admitted.svg", "seat"),
    Stop("tour/3_rows.svg", "fill", draw=rows),
    Stop("tour/4_attention.svg", "fill", draw=lambda moment: still(moment, SHOWN, reader=OURS)),
    Stop("tour/5_recorded.svg", "token"),
    Stop("tour/6_grows.svg", "take"),
    Stop("still.svg", "fill", nth=3),
    Stop("tour/7_gives_way.svg", "preempt"),
    Stop("tour/8_resumes.svg", "seat"),
    Stop("tour/9_ends.svg", "end"),
    Stop("tour/10_found.svg", "seat", NEXT),
]


def write_tour(folder: str, model: GPT2 | None = None) -> list[str]:
    """Plays and records the run, and draws its stops; returns the files that it wrote.

    Args:
        folder: where the still and the folder `tour` are written.
        model: copycat, if it is built already.

    Raises OSError if a file cannot be written, and RuntimeError if the run is not the one that the tour describes.
    """
    pictures = draw_tour(model)
    written = []
    for name, svg in pictures.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg, encoding="utf-8")
        written.append(str(path))
    return written


def draw_tour(model: GPT2 | None = None) -> dict[str, str]:
    """The pictures by their names. Raises RuntimeError if the run is not the one that the tour describes."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tour.jsonl"
        record_run(path, model)
        return dict(_pictures(moments(path)))


def record_run(path: str, model: GPT2 | None = None) -> None:
    llm = LLM(model or "copycat", num_blocks=NUM_BLOCKS, block_size=16, max_num_batched_tokens=256, watermark=0.0)
    with record(llm, path):
        wrong = play(llm, ARRIVALS)
    if wrong:
        raise RuntimeError(f"the run of the tour has a wrong answer: {wrong[0]}")


def _pictures(run: Iterator[Moment]) -> Iterator[tuple[str, str]]:
    """Goes through the run once; several stops may be in one frame."""
    stops, seen = iter(STOPS), 0
    stop = next(stops)
    for moment in run:
        seen += any(_concerns(event, stop) for event in moment.told.frame.events)
        while seen == stop.nth:
            yield stop.file, stop.draw(moment)
            following = next(stops, None)
            if following is None:
                return
            stop = following
            seen = int(any(_concerns(event, stop) for event in moment.told.frame.events))
    raise RuntimeError(f"the run of the tour has no moment for {stop.file}: change its requests (ARRIVALS) or its "
                       "stops (STOPS)")


def _concerns(event: Event, stop: Stop) -> bool:
    name, *arguments = event
    if name != stop.event:
        return False
    return (arguments[0]["add"] if name == "add" else arguments[0]) == stop.request_id
