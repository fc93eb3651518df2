"""How does a recording become a page that opens in any browser, from disk?

One HTML file: the page's own style and script, and the recording as data. Python has the words (captions, questions),
the script has the pictures: it replays the same events (`page/replay.js` is `State` once more). What requests say is
data and never markup: in the file no `<` of theirs is left, and the script writes it as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanopaged.show.captions import Told, narrate
from nanopaged.show.reading import Event, Line, read
from nanopaged.show.replay import Frame, Sequence, State, labels
from nanopaged.show.rules import RARE

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("replay.js", "drawing.js", "pool.js", "twin.js", "player.js")
LAST = 10**9  # a step after any other
ALIKE = 16  # tokens that two requests have in common if it is worth looking for more
MOST_FRAMES = 10_000
MOST_CELLS = 40_000_000  # blocks times frames
# Of the counts of LLM.stats(), those that page/replay.js keeps.
COUNTS = ("num_steps", "num_finished", "num_preemptions", "computed_tokens", "recomputed_tokens", "output_tokens",
          "prefix_hit_tokens", "evicted_blocks")
Scene = dict[str, Any]


def page(scenes: list[Scene], title: str) -> str:
    """The HTML of a movie; each scene is what `pool_scene` or `twin.twin_scene` returns."""
    data = json.dumps({"title": title, "scenes": scenes}, separators=(",", ":"))
    parts = {"TITLE": _escaped(title), "STYLE": _text("page.css"), "DATA": data.replace("<", "\\u003c"),
             "SCRIPT": "\n".join(map(_text, SCRIPTS))}
    first, *rest = _text("page.html").split("{{")
    return first + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in rest)


def _text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def pool_scene(path: str, title: str = "", intro: str = "", steps: tuple[int, int] | None = None) -> Scene:
    """A recording as a scene: all of it, or the steps from `steps[0]` to `steps[1]`.

    Raises OSError if the file cannot be read, and ValueError if it is no recording, or too large for a page.
    """
    lines = read(path)
    header = next(lines)
    scene = Packing(header, steps or (1, LAST)).scene(lines)
    if not scene["frames"]:
        which = "in it" if not steps else f"from {steps[0]} " + ("on" if steps[1] == LAST else f"to {steps[1]}")
        raise ValueError(f"{path} has no step {which}: there is nothing to show")
    return scene | {"title": title or Path(path).name, "intro": intro}


class Packing:
    """Turns a recording into the data of a scene: requests by number, and events of one kind in one list."""

    def __init__(self, header: Line, steps: tuple[int, int]) -> None:
        self.header, self.steps = header, steps
        self.numbers: dict[str, int] = {}  # of each request
        self.requests: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}
        self.words: list[list[int]] = []  # all tokens of each request
        self.beginnings: dict[tuple[int, ...], list[int]] = {}  # requests by their first tokens
        self.start: list[Event] | None = None  # what must be applied before the first frame
        self.asked: set[str] = set()

    def scene(self, lines: Iterator[Line]) -> Scene:
        frames, size, last = [], 0, None
        first, end = self.steps
        for state, told in narrate(self.header, self._noting(lines), self._before):
            last = state
            if first <= told.frame.step <= end:
                frames.append(self._frame(told))
                size += self.header["num_blocks"]
                if len(frames) > MOST_FRAMES or size > MOST_CELLS:
                    fits = f"{first}:{max(first, told.frame.step - 1)}"
                    raise ValueError(f"{len(frames):,} frames of {self.header['num_blocks']:,} blocks are too many for "
                                     f"a page: show fewer steps, such as --steps {fits}")
        if last is not None:
            for request_id, number in self.numbers.items():
                self._words(self.requests[number], last.sequences[request_id])
        keys = ("num_blocks", "block_size", "max_model_len", "text")
        return {"kind": "pool", **{key: self.header[key] for key in keys}, "counts": _kept(self.header["counts"]),
                "requests": self.requests, "texts": self.texts, "start": self.start or [], "frames": frames,
                "rare": RARE}

    def _noting(self, lines: Iterator[Line]) -> Iterator[Line]:
        for line in lines:
            self.texts |= line.get("texts", {})
            if "add" in line:
                for member, label in labels(line).items():
                    self.numbers[member] = len(self.requests)
                    self.requests.append({"label": label, "max": line["max_length"],
                                          "leader": self.numbers[line["add"]]})
            yield line

    def _before(self, state: State, frame: Frame) -> None:
        """Notes the state before the first frame that is shown, as events that lead to it."""
        if self.start is None and frame.step >= self.steps[0]:
            self.start = self._as_events(state)

    def _as_events(self, state: State) -> list[Event]:
        events: list[Event] = [["published", sorted(state.published)], ["counts", _kept(state.counts)],
                               ["pending", state.unrecorded_preemptions, state.unrecorded_again]]
        for block, (request_id, i) in enumerate(state.places):
            if state.filled[block]:
                events.append(["place", block, state.filled[block], self.numbers.get(request_id, -1), i])
        for request in state.sequences.values():
            events.append(["be", self.numbers[request.request_id], request.status, request.table[:], request.computed,
                           request.length, request.most_computed, request.swapped_blocks])
        return events

    def _frame(self, told: Told) -> list[Any]:
        """[step, part, caption, names, why, events, question]; events of one name follow it in one list."""
        frame, packed = told.frame, []
        for event in frame.events:
            name, arguments = event[0], self._arguments(event)
            if not packed or packed[-1][0] != name:
                packed.append([name])
            packed[-1].append(arguments)
        question = None
        if told.question and told.names[0] not in self.asked:
            self.asked.add(told.names[0])
            question = [told.question.text, told.question.choices, told.question.answer]
        return [frame.step, frame.part, told.caption, told.names, told.why, packed, question]

    def _arguments(self, event: Event) -> list[Any]:
        name, *arguments = event
        if name == "add":
            line = arguments[0]
            members = [self.numbers[member] for member in (line["add"], *line["followers"])]
            length = line["prompt"] if isinstance(line["prompt"], int) else len(line["prompt"])
            if "table" not in line:
                return [members, length]
            # It was there when the recording began.
            length += line["output"] if isinstance(line["output"], int) else len(line["output"])
            return [members, length, "running" if line["status"] == "running" else "preempted", line["table"],
                    line["computed"], length, line["most_computed"], line["swapped_blocks"]]
        if name == "recorded":
            return arguments
        if name in ("storm", "fail"):
            return []
        if name == "token":
            return [self.numbers[arguments[0]]]
        if name in ("preempt", "start"):
            return [self.numbers[arguments[0]], self.numbers[arguments[1]], *arguments[2:]]
        return [self.numbers[arguments[0]], *arguments[1:]]

    def _words(self, packed: dict[str, Any], request: Sequence) -> None:
        """All tokens that a request ever has; what it has in common with an earlier one is named, not repeated."""
        if request.token_ids is None:
            return
        best, like = 0, None
        alike = self.beginnings.setdefault(tuple(request.token_ids[:ALIKE]), [])
        for number in alike[:1] + alike[-3:]:  # the first and the last few: all would take too long
            common = _common(self.words[number], request.token_ids)
            if common > best:
                best, like = common, number
        alike.append(len(self.words))
        self.words.append(request.token_ids)
        packed["like"], packed["tokens"] = [like, best] if like is not None else None, request.token_ids[best:]


def _kept(counts: dict[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in COUNTS}


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that two requests have in common from the beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
