"""What does the pool look like while it works? A picture of it on a terminal, redrawn in place after each step.

    step 12: 20 running, 3 waiting, ...      the figures
    x20x20x20 15 15+15  :  .                 every block, and whose it is
    x20: shared by 20, 15: request 15's ...  the legend
    waiting: 24 25 26; 24 needs ...          who waits, and why
    step 12: block 181 <- request 15 "..."   what happened last, with the words in the blocks
    request 15: 0-104 151 181 "..."          block tables, while there is room

The picture is made for the window as it is at each step. In a small one, the lowest parts are left out first, and then
several blocks share a mark. Nothing wraps, nothing scrolls, and log messages stand above it and stay.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import unicodedata
from collections import deque
from collections.abc import Iterable
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple, TextIO

from nanopaged.block_allocator import blocks_for
from nanopaged.request import Request
from nanopaged.step import Listener, Step

if TYPE_CHECKING:
    from nanopaged.engine import LLM

WRAP_OFF, WRAP_ON, ERASE_LINE, ERASE_BELOW = "\x1b[?7l", "\x1b[?7h", "\x1b[2K", "\x1b[J"
SHARED, FULL, PARTLY, CACHED, FREE = MARKS = "#=+:."  # what a block is
STYLES = {SHARED: "1;97;44", FULL: "33", PARTLY: "36", CACHED: "2", FREE: "2"}
OWNER_STYLES = ("31", "32", "33", "35", "36")  # of a request's own block: readable on white and on black
NUMBERS_LEGEND = ["x20: shared by 20", "12: request 12's", "+12: its, partly full", f"{CACHED} cached", f"{FREE} free"]
WORDS = 5  # lines that the grid leaves for words, where there are enough
Cell = tuple[str, str]  # a text and its style


class Event(NamedTuple):
    """What happened in a step, and the tokens that it is about. Their words grow while the block is being filled."""

    step: int
    sentence: str
    request: Request
    start: int
    end: int


class Holding(NamedTuple):
    """What a referenced block is, how many hold it, and one of them."""

    mark: str
    holders: int
    request: Request


class TerminalPicture(Listener):
    """Listens to what an LLM does, and draws it on `stream`, a terminal, whenever `show` is called; then `close` it."""

    def __init__(self, llm: LLM, stream: TextIO) -> None:
        self.llm, self.scheduler, self.stream = llm, llm.scheduler, stream
        self.block_size = llm.scheduler.block_size
        self.has_colour = not os.environ.get("NO_COLOR")  # see no-color.org
        self.widths: list[int] = []  # of the lines of the picture that is on the terminal
        self.has_logged = False
        self.step = Step(budget=0)  # the last one
        self.events: dict[str, Event] = {}  # the last of each kind
        self.taken: deque[Event] = deque(maxlen=3)  # blocks that requests took, the newest first
        self.scheduler.listeners.append(self)
        self.handlers = logging.getLogger().handlers[:]
        for handler in self.handlers:
            handler.addFilter(self.make_way)

    def close(self) -> None:
        """Stops listening. The last picture stays, and what is written next stands below it."""
        self.widths = []
        self.scheduler.listeners[:] = [other for other in self.scheduler.listeners if other is not self]
        for handler in self.handlers:
            handler.removeFilter(self.make_way)

    def make_way(self, record: logging.LogRecord) -> bool:
        """Before a message is logged: removes the picture, so that the next one is drawn below the message."""
        if self.widths:
            self._write(self._to_top(window(self.stream)[0]) + ERASE_BELOW)
            self.widths, self.has_logged = [], True
        return True

    def show(self) -> None:
        """Draws the picture over the one before, in one piece, so that no terminal shows half of it."""
        columns, rows = window(self.stream)
        lines = self.lines(columns, max(1, rows - 1))  # the cursor stands in the row below
        self._write(self._to_top(columns) + WRAP_OFF + "".join(f"{ERASE_LINE}{line}\n" for line in lines) +
                    ERASE_BELOW + WRAP_ON)
        self.widths = [width(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines]

    def _to_top(self, columns: int) -> str:
        """Moves the cursor to the first line of the picture.

        When a window gets narrower, most terminals wrap the lines that are there, and some cut them. The way up is
        longer if they were wrapped. If they were cut, it would lead too far: never over a message.
        """
        height = len(self.widths) if self.has_logged else sum(max(1, blocks_for(w, columns)) for w in self.widths)
        return f"\x1b[{height}A" if height else ""

    def _write(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()

    def stepped(self, step: Step) -> None:
        """Remembers what words can tell."""
        self.step, size = step, self.block_size
        for admission in step.admitted:
            request, hits = admission.request, admission.hit_tokens // size
            if hits and request.block_table:  # else it has ended in this very step
                holders = self.scheduler.allocator.ref_count(request.block_table[hits - 1])
                self._tell("shares", f"request {name(request)} shares {hits} blocks (x{holders}), the last",
                           request, hits - 1)
        self._note_blocks(step)
        where = ", goes to CPU memory" if any(move.kind == "to_host" for move in step.moves) else ""
        for request in step.preempted:
            self._tell("gives way", f"request {name(request)} gives way, no block is left{where}", request,
                       (len(request.token_ids) - 1) // size)
        for request in step.ended:
            self.events["ends"] = Event(self.scheduler.stats.num_steps, f"request {name(request)} "
                                        f"{'is done' if request.error is None else 'failed'}", request,
                                        request.num_prompt_tokens, len(request.token_ids))

    def _note_blocks(self, step: Step) -> None:
        """Which blocks requests took, and which are copies of others."""
        copies = {move.target: move.source for move in step.moves if move.kind == "copy"}
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            last = blocks_for(start + num_tokens, self.block_size) - 1
            if start <= last * self.block_size and request.block_table:
                self.taken.appendleft(self._event(f"block {request.block_table[last]} <- request {name(request)}",
                                                  request, last))
            for i, block in enumerate(request.block_table if copies else ()):
                if block in copies:
                    self._tell("copies", f"block {block} is request {name(request)}'s copy of block {copies[block]}",
                               request, i)

    def _tell(self, kind: str, sentence: str, request: Request, i: int) -> None:
        self.events[kind] = self._event(sentence, request, i)

    def _event(self, sentence: str, request: Request, i: int) -> Event:
        """Something about the tokens of a request's logical block `i`."""
        return Event(self.scheduler.stats.num_steps, sentence, request, i * self.block_size, (i + 1) * self.block_size)

    def lines(self, columns: int, height: int) -> list[str]:
        """The picture, of at most so many columns and lines: the most important first, then what there is room for."""
        stats = self.llm.stats()
        status = folded([f"step {stats.num_steps}: {stats.num_running} running", f"{stats.num_waiting} waiting",
                         f"{stats.referenced_blocks} of {stats.num_blocks} blocks in use",
                         f"{stats.shared_blocks} shared", f"{stats.cached_blocks} cached", f"{stats.free_blocks} free",
                         f"{stats.num_preemptions} preemptions"], columns)
        grid = self._grid(stats.num_blocks, columns, height - len(status) - 1)
        if not grid:
            return status[:height]
        events = [self.events[kind] for kind in ("gives way", "copies", "shares", "ends") if kind in self.events]
        told = [f"step {event.step}: {event.sentence}: {self._words(*event[2:])}" for event in (*events, *self.taken)]
        told += [self._table(request) for request in islice(self.scheduler.running, height)]
        below = [cut(text, columns) for text in (self._waiting(), *told)]
        return [self._painted(text, "1") for text in status] + grid + below[:height - len(status) - len(grid)]

    def _grid(self, num_blocks: int, columns: int, height: int) -> list[str]:
        """The blocks and the legend: with numbers if they fit, else with marks; nothing if not even these do."""
        held, cached = self._holdings(), self.scheduler.allocator.cached_blocks()
        digits = max([2, *(len(holding.request.group_id) for holding in held.values())])
        legend = folded(NUMBERS_LEGEND, columns)
        per_line = columns // (digits + 1)
        if per_line and blocks_for(num_blocks, per_line) + len(legend) <= height - WORDS:
            return self._painted_lines([number_cell(held.get(block), block in cached, digits)
                                        for block in range(num_blocks)], per_line) + legend
        each = 1
        if blocks_for(num_blocks, columns) + len(folded(mark_legend(each), columns)) > height - WORDS:
            room = height - len(folded(mark_legend(num_blocks), columns))
            room = max(min(room, 4), room - WORDS)
            if room < 1:
                return []
            each = blocks_for(num_blocks, room * columns)
        cells = mark_cells(held, cached, num_blocks, each)
        return self._painted_lines(cells, columns) + folded(mark_legend(each), columns)

    def _holdings(self) -> dict[int, Holding]:
        """What each referenced block is."""
        held: dict[int, Holding] = {}
        for request in self.scheduler.running:
            full = request.num_computed_tokens // self.block_size
            for i, block in enumerate(request.block_table):
                before = held.get(block)
                held[block] = Holding(FULL if i < full else PARTLY, 1, request) if before is None else Holding(
                    SHARED, before.holders + 1, request)
        return held

    def _painted_lines(self, cells: list[Cell], per_line: int) -> list[str]:
        lines = (cells[i : i + per_line] for i in range(0, len(cells), per_line))
        return ["".join(self._painted("".join(text for text, _ in same), style)
                        for style, same in groupby(line, key=lambda cell: cell[1])) for line in lines]

    def _painted(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_colour else text

    def _words(self, request: Request, start: int, end: int) -> str:
        """The text of a request's tokens, in quotes; control characters are escaped: it may be anything."""
        token_ids, tokenizer = request.token_ids[start:end], self.llm.tokenizer
        if tokenizer is None:
            return f"tokens {token_ids}"
        return f'"{escaped(b"".join(map(tokenizer.bytes_of, token_ids)).decode(errors="replace"))}"'

    def _table(self, request: Request) -> str:
        """A request's block table, and the words in its last block."""
        last = max(0, request.num_computed_tokens - 1) // self.block_size * self.block_size
        return (f"request {name(request)}: blocks {runs(request.block_table)} "
                f"{self._words(request, last, request.num_computed_tokens)}")

    def _waiting(self) -> str:
        """Who waits, and why the first one does."""
        waiting, allocator = list(self.scheduler.waiting), self.scheduler.allocator
        if not waiting:
            return "waiting: none"
        first, names = waiting[0], list(map(name, waiting))
        prefix = allocator.find_prefix(first.token_ids, len(first.token_ids) - 1)
        missing = blocks_for(len(first.token_ids), self.block_size) - len(prefix)
        left = allocator.num_available - sum(allocator.ref_count(block) == 0 for block in prefix)
        if self.scheduler.committed_seats + first.num_seats > self.scheduler.max_num_seqs:
            why = (f"{names[0]} needs {first.num_seats} of {self.scheduler.max_num_seqs} seats, and "
                   f"{self.scheduler.committed_seats} are taken")
        elif missing > left:
            why = f"{names[0]} needs {missing} more, and {left} of the blocks are left"
        elif self.step.preempted:
            why = "what is left is for those that gave way"
        elif self.step.budget == 0:
            why = "the step's tokens are used up"
        else:
            why = f"the policy keeps the {left} blocks left"
        return f"waiting: {' '.join(names[:6])}{' ...' if len(names) > 6 else ''} ({len(names)}); {why}"


def number_cell(holding: Holding | None, cached: bool, digits: int) -> Cell:
    """Whose a block is: its request, or how many share it; as wide as `digits` and a mark."""
    if holding is None:
        mark = CACHED if cached else FREE
        return f"{mark:>{digits + 1}}", STYLES[mark]
    mark, holders, request = holding
    if mark == SHARED:
        return f"{f'x{min(holders, 10**digits - 1)}':>{digits + 1}}", STYLES[mark]
    return f"{('+' if mark == PARTLY else '') + request.group_id:>{digits + 1}}", owner_style(request)


def mark_cells(held: dict[int, Holding], cached: set[int], num_blocks: int, each: int) -> list[Cell]:
    """A mark for `each` blocks: of what these are, it shows what stands first in MARKS."""
    marks = [FREE] * blocks_for(num_blocks, each)
    for block in cached:
        marks[block // each] = CACHED
    for block, holding in held.items():
        marks[block // each] = min(marks[block // each], holding.mark, key=MARKS.index)
    cells = [(mark, STYLES[mark]) for mark in marks]
    for block, (mark, _, request) in held.items() if each == 1 else ():
        if mark != SHARED:
            letter = chr(ord("a") + int(request.group_id) % 26)
            cells[block] = letter.upper() if mark == PARTLY else letter, owner_style(request)
    return cells


def mark_legend(each: int) -> list[str]:
    own = ["a request 0's (A partly full)"] if each == 1 else [f"{FULL} one request's", f"{PARTLY} partly full"]
    names = [f"{SHARED} shared", *own, f"{CACHED} cached", f"{FREE} free"]
    return names if each == 1 else [*names, f"each mark {each} blocks, the first of these"]


def name(request: Request) -> str:
    """What the user calls it: of several continuations of one prompt, each with its number."""
    return request.request_id if request.params.n > 1 else request.group_id


def owner_style(request: Request) -> str:
    return OWNER_STYLES[int(request.group_id) % len(OWNER_STYLES)]


def window(stream: TextIO) -> tuple[int, int]:
    """The columns and rows of the terminal, now; the usual 80 and 24 if it does not say."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no terminal, or no file at all
        columns = rows = 0
    return (columns, rows) if columns and rows else shutil.get_terminal_size()


def folded(parts: Iterable[str], columns: int) -> list[str]:
    """The parts with commas between them, in as many lines as they need."""
    lines: list[str] = []
    for part in parts:
        if lines and width(lines[-1]) + len(", ") + width(part) < columns:
            lines[-1] += f", {part}"
        elif lines:
            lines[-1] = cut(f"{lines[-1]},", columns)
            lines.append(cut(part, columns))
        else:
            lines.append(cut(part, columns))
    return lines


def runs(block_table: list[int]) -> str:
    """A block table, such as "0-104 181 190": blocks whose numbers follow one another are one entry."""
    following = (list(run) for _, run in groupby(enumerate(block_table), key=lambda entry: entry[1] - entry[0]))
    entries = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in following]
    return " ".join(entries)


def escaped(text: str) -> str:
    """Text that a terminal only shows: what does not print, or changes a letter's width, is escaped."""
    return "".join(letter if letter.isprintable() and not "\ufe00" <= letter <= "\ufe0f" else
                   letter.encode("unicode_escape").decode() for letter in text)


def cut(text: str, columns: int) -> str:
    """The text, or as much of it as so many columns hold with an ellipsis behind it."""
    if width(text) <= columns:
        return text
    room, end = columns - len("..."), 0
    while end < len(text) and (room := room - width(text[end])) >= 0:
        end += 1
    return text[:end] + "..."[:columns]


def width(text: str) -> int:
    """The columns that a text takes: most characters one, Chinese and Japanese ones two, accents none."""
    return sum(0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
               for letter in text)
