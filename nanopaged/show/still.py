"""What did the pool look like at one moment? A picture that stands anywhere: SVG without a script, for light and dark.

Above are the block tables of a few requests: their words, cut into logical blocks. Below is the pool, with its fixed
cells. Links lead from each logical block to its cell, down the gutter before it. As in the movie, greys say what state
a block is in, and a hue says whose it is; a label always repeats the hue. Where a token is one character, as with
copycat, the character stands in the token's slot.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from xml.sax.saxutils import escape

from nanopaged.block_allocator import blocks_for
from nanopaged.show import replay
from nanopaged.show.moment import Moment

WIDTH, MARGIN = 860, 10
COLUMNS, GUTTER = 6, 16  # of the pool; a gutter is on the left of each column
CELL_WIDTH, CELL_HEIGHT, ROW = 124, 42, 50
BOX_WIDTH, BOX_HEIGHT, BOX_ROW, BOX_GAP = 116, 35, 42, 6  # of logical blocks; links go down the gaps
NAME_WIDTH = 124  # of what stands before them
PADDING = 4  # before and after the words of a block
CHANNEL = 58  # between tables and pool, where the links turn
HUES = 6
NO_BREAK = "\u00a0"  # a space that is drawn at the end of a text too

# Of each class of text: pixels, and the width of a character in these, rounded up so that it holds for any system font.
SIZES = {"caption": (14, 0.66), "heading": (12, 0.66), "plain": (11.5, 0.6), "small": (10, 0.6), "strong": (10, 0.68),
         "words": (11, 0.61)}
BOLD = {"caption", "heading", "strong"}
STYLE = """\
svg { --ink: #1b1d20; --paper: #fcfcfa; --muted: #5a6068; --line: #8a9098; --held: #d5d8dc; --hatch: #a9afb6;
  --accent: #8a1c1c; --hue-0: #b35c00; --hue-1: #1f6fb2; --hue-2: #00795a; --hue-3: #a13d84; --hue-4: #6b6300;
  --hue-5: #5b4bb5 }
@media (prefers-color-scheme: dark) { svg { --ink: #eceef0; --paper: #16181b; --muted: #a6adb5; --line: #6c737b;
  --held: #3d4349; --hatch: #59616a; --accent: #ff9d8f; --hue-0: #f0a24a; --hue-1: #74b9ee; --hue-2: #4fc9a4;
  --hue-3: #e391c8; --hue-4: #cfc35a; --hue-5: #aa9ef2 } }
text { fill: var(--ink); font-family: system-ui, sans-serif }
.words { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
.muted { fill: var(--muted) }
.halo { paint-order: stroke; stroke: var(--paper); stroke-width: 5px }
.in-hue { fill: var(--hue) }
.inverse { fill: var(--paper) }
.paper { fill: var(--paper) }
.held { fill: var(--held) }
.hatched { fill: url(#hatch) }
.edge { fill: none; stroke: var(--line) }
.free { stroke-dasharray: 4 3 }
.mine { stroke: var(--hue); stroke-width: 2 }
.changed { fill: none; stroke: var(--accent); stroke-width: 2.5 }
.badge { fill: var(--ink) }
.chip { fill: var(--hue) }
.link { fill: none; stroke: var(--hue); stroke-width: 1.6 }
.slots { stroke: var(--muted); stroke-width: 2; stroke-linecap: round }
"""


def still(moment: Moment, chosen: Sequence[str], reader: str | None = None) -> str:
    """One moment as SVG.

    Args:
        chosen: ids of the requests whose block tables are shown, once they have arrived. The first has the first hue.
        reader: one of them, whose attention reads its slots: its links lead from the pool to the table.

    Raises ValueError if more requests are chosen than there are hues.
    """
    if len(chosen) > HUES:
        raise ValueError(f"{len(chosen)} requests are chosen, and there are {HUES} hues: choose fewer")
    picture = Picture(moment)
    shown = [request_id for request_id in chosen if request_id in moment.state.sequences]
    picture.heading("Block tables: the words of each request, cut into logical blocks" if reader is None else
                    f"{moment.name(reader)} reads its slots in the order of its block table")
    corners = {request_id: _table(picture, request_id, chosen.index(request_id), request_id == reader)
               for request_id in shown}
    top = picture.y + CHANNEL
    for request_id in [reader] if reader else shown:
        _links(picture, request_id, chosen.index(request_id), corners[request_id], top, request_id == reader)
    state = moment.state
    for i, line in enumerate(("The pool:", f"{state.num_blocks} blocks of {state.block_size} slots")):
        picture.text(MARGIN, picture.y + 18 + 15 * i, line, "heading", 2 * NAME_WIDTH, "halo")
    for block in range(state.num_blocks):
        _cell(picture, block, top, chosen)
    picture.y = top + -(-state.num_blocks // COLUMNS) * ROW
    _legend(picture)
    return picture.svg(_described(moment, shown))


class Picture:
    """Collects the elements of an SVG from the top down; `y` is where the next one may begin."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.elements = moment, []
        frame = moment.told.frame
        self.text(MARGIN, 24, moment.told.caption, "caption", WIDTH - 2 * MARGIN)
        self.text(MARGIN, 42, f"Step {frame.step}, frame {frame.part}. {self._crowd('Running', 'running')} "
                  f"{self._crowd('Waiting', 'waiting', 'preempted')}", "plain", WIDTH - 2 * MARGIN, "muted")
        self.y = 50.0

    def _crowd(self, what: str, *statuses: str) -> str:
        names = [self.moment.name(request.request_id) for request in self.moment.state.with_status(*statuses)]
        return f"{what}: {', '.join(names) or 'none'}."

    def heading(self, text: str) -> None:
        self.text(MARGIN, self.y + 16, text, "heading", WIDTH - 2 * MARGIN)
        self.y += 24

    def add(self, element: str) -> None:
        self.elements.append(element)

    def rect(self, x: float, y: float, width: float, height: float, css: str, radius: float = 3) -> None:
        self.add(f'<rect class="{css}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>')

    def text(self, x: float, y: float, text: str, css: str, room: float, more: str = "", span: float = 0) -> None:
        """Text is data: it is escaped, and cut to the pixels of `room`. `span` makes it exactly so long."""
        length = f' textLength="{span:g}"' if span else ""
        self.add(f'<text class="{f"{css} {more}".strip()}" x="{x:g}" y="{y:g}"{length}>'
                 f"{escape(shortened(text, css, room))}</text>")

    def svg(self, description: str) -> str:
        sizes = "".join(f".{css} {{ font-size: {pixels}px{'; font-weight: 700' if css in BOLD else ''} }}\n"
                        for css, (pixels, _) in SIZES.items())
        title = escape(self.moment.told.caption)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.y:g}" width="{WIDTH}" '
            f'height="{self.y:g}" role="img">',
            f"<title>{title}</title>", f"<desc>{escape(description)}</desc>", f"<style>\n{STYLE}{sizes}</style>",
            '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            '<path d="M0 0V7" style="stroke: var(--hatch); stroke-width: 3"/></pattern>',
            f'<rect class="paper" width="{WIDTH}" height="{self.y:g}" rx="6"/>', *self.elements, "</svg>\n"])


def shortened(text: str, css: str, room: float) -> str:
    """The text, or as much of its beginning as fits."""
    if text_width(text, css) <= room:
        return text
    while text and text_width(text + "…", css) > room:
        text = text[:-1]
    return text + "…"


def text_width(text: str, css: str) -> float:
    """At most so many pixels, in whatever font the reader's system has."""
    pixels, width = SIZES[css]
    return pixels * width * sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _table(picture: Picture, request_id: str, hue: int, reads: bool) -> list[tuple[float, float]]:
    """A request's name, and its logical blocks. Returns the lower right corner of each block."""
    state, request = picture.moment.state, picture.moment.state.sequences[request_id]
    size, top, label = state.block_size, picture.y, picture.moment.labels[request_id]
    picture.add(f'<g style="--hue: var(--hue-{hue})">')
    picture.rect(MARGIN, top, 5, 24 if request.status == "finished" else BOX_HEIGHT, "chip", 1)
    room = NAME_WIDTH - 20
    picture.text(MARGIN + 10, top + 11, f"request {label}", "heading", room)
    picture.text(MARGIN + 10, top + 23, STATUSES[request.status], "small", room)
    if request.status != "finished":
        picture.text(MARGIN + 10, top + 34, f"{request.computed} of {request.length} computed", "small", room, "muted")
    number = max(len(request.table), blocks_for(request.length, size)) if request.status != "finished" else 0
    per_line, corners = (WIDTH - MARGIN - NAME_WIDTH + BOX_GAP) // (BOX_WIDTH + BOX_GAP), []
    for i in range(number):
        line, column = divmod(i, per_line)
        x, y = NAME_WIDTH + column * (BOX_WIDTH + BOX_GAP), top + line * BOX_ROW
        _box(picture, request, i, x, y, reads)
        corners.append((x + BOX_WIDTH, y + BOX_HEIGHT))
    picture.add("</g>")
    picture.y += BOX_ROW * -(-number // per_line) + 4 if number else BOX_HEIGHT - 5
    return corners


STATUSES = {"waiting": "waits", "running": "runs", "preempted": "gave way, waits", "finished": "is done"}


def _box(picture: Picture, request: replay.Sequence, i: int, x: float, y: float, reads: bool) -> None:
    """A logical block: grey as far as it is computed, and the number of the block that holds it."""
    size, held = picture.moment.state.block_size, i < len(request.table)
    computed = min(size, max(0, request.computed - i * size))
    picture.rect(x, y, BOX_WIDTH, BOX_HEIGHT, "paper")
    _fill(picture, x, y, BOX_HEIGHT, computed / size, BOX_WIDTH)
    picture.rect(x, y, BOX_WIDTH, BOX_HEIGHT, "edge mine" if held else "edge free")
    _words(picture, picture.moment.words(request.request_id, i * size, (i + 1) * size), x, y + 14, BOX_WIDTH,
           min(size, request.length - i * size), "" if computed else "muted")
    if not held:
        place = "no block"
    elif reads:
        place = f"slots {request.table[i] * size}–{request.table[i] * size + computed - 1}"
    else:
        place = f"block {request.table[i]}"
    picture.text(x + PADDING, y + 29, place, "strong" if held else "small", BOX_WIDTH - 2 * PADDING,
                 "in-hue" if held else "muted")


def _fill(picture: Picture, x: float, y: float, height: float, share: float, width: float, css: str = "held") -> None:
    """Fills as much of a block as there are tokens in it, up to the edge if it is full."""
    if share:
        picture.rect(x, y, width if share == 1 else PADDING + share * (width - 2 * PADDING), height, css)


def _words(picture: Picture, words: str, x: float, y: float, width: float, num_tokens: int, more: str = "") -> None:
    """Words where their slots are, if each token is one character; else as many as fit."""
    inner = width - 2 * PADDING
    if words:
        size = picture.moment.state.block_size
        one_each = len(words) == num_tokens and text_width(words, "words") <= inner + 2
        picture.text(x + PADDING, y, words.replace(" ", NO_BREAK), "words", inner + 2, more,
                     num_tokens / size * inner if one_each else 0)


def _links(picture: Picture, request_id: str, hue: int, corners: Sequence[tuple[float, float]], top: float,
           reads: bool) -> None:
    """A link for each logical block, from its lower edge to the left edge of its cell; `reads` turns them round."""
    turn, bend = top - CHANNEL, (CHANNEL - 4) * 0.6
    for (right, y), block in zip(corners, picture.moment.state.sequences[request_id].table):
        left, cell_top = _place(block, top)
        if y + BOX_ROW > turn:  # no block is below
            start = over = right - BOX_WIDTH / 2
        else:
            start, over = right - 12, right + 1.5 * (1 + hue % 3)  # down the gap between the blocks below
        lane, end = left - GUTTER + 2 + 3 * (hue % 3), cell_top + 12 + 8 * (hue % 4)  # down the gutter before the cell
        path = (f"M{start:g} {y:g}v2.5H{over:g}V{turn:g}C{over:g} {turn + bend:g} {lane:g} {top - 4 - bend:g} {lane:g} "
                f"{top - 4:g}V{end - 3:g}q0 3 3 3H{left:g}")
        head = f"M{start:g} {y:g}l-4 7h8z" if reads else f"M{left:g} {end:g}l-5 -3v6z"
        picture.add(f'<g style="--hue: var(--hue-{hue})"><path class="link" d="{path}"/>'
                    f'<path class="chip" d="{head}"/></g>')


def _place(block: int, top: float) -> tuple[float, float]:
    """Where a block's cell is."""
    row, column = divmod(block, COLUMNS)
    return MARGIN + column * (CELL_WIDTH + GUTTER) + GUTTER, top + row * ROW


def _cell(picture: Picture, block: int, top: float, chosen: Sequence[str]) -> None:
    moment, state = picture.moment, picture.moment.state
    x, y = _place(block, top)
    share = state.filled[block] / state.block_size
    cached, free = state.is_cached(block), state.holders[block] == 0 and block not in state.published
    number = f"{block}" + (" cached" if cached else " free" if free else "")
    picture.add(f'<g data-block="{block}">')
    picture.rect(x, y, CELL_WIDTH, CELL_HEIGHT, "paper")
    if cached:
        picture.rect(x, y, CELL_WIDTH, CELL_HEIGHT, "hatched")
        picture.rect(x + 2, y + 2, text_width(number, "strong") + 4, 15, "paper")
        picture.rect(x + 2, y + 21, CELL_WIDTH - 4, 15, "paper")
    else:
        _fill(picture, x, y, CELL_HEIGHT, share, CELL_WIDTH)
    picture.rect(x, y, CELL_WIDTH, CELL_HEIGHT, "edge free" if free else "edge")
    picture.text(x + PADDING, y + 13, number, "small" if free else "strong", CELL_WIDTH, "muted" if free else "")
    holder, i = state.places[block]
    if holder is not None and not free:
        start = i * state.block_size
        _words(picture, moment.words(holder, start, start + state.filled[block]), x, y + 32, CELL_WIDTH,
               state.filled[block])
    if not cached and not free and share < 1:
        _unfilled(picture, x, y + 29, CELL_WIDTH, state.filled[block])
    _holders(picture, block, x + PADDING + text_width(number, "strong"), x + CELL_WIDTH - 3, y + 2, chosen)
    if block in moment.changed:
        picture.rect(x - 2, y - 2, CELL_WIDTH + 4, CELL_HEIGHT + 4, "changed", 5)
    picture.add("</g>")


def _unfilled(picture: Picture, x: float, y: float, width: float, filled: int) -> None:
    """A dot for each slot that holds no token yet."""
    size = picture.moment.state.block_size
    slot = (width - 2 * PADDING) / size
    picture.add(f'<path class="slots" stroke-dasharray="0 {slot:g}" d="M{x + PADDING + (filled + 0.5) * slot:g} {y:g}'
                f'h{(size - filled - 1) * slot + 0.1:g}"/>')


def _holders(picture: Picture, block: int, left: float, right: float, y: float, chosen: Sequence[str]) -> None:
    """Who holds a block: ×k, and labels, with a hue for those chosen, without one for another. As many as fit."""
    moment = picture.moment
    holders = [request.request_id for request in moment.state.with_status("running") if block in request.table]
    mine = [request_id for request_id in holders if request_id in chosen]
    tags = [(f"×{len(holders)}", "badge", None)] if len(holders) > 1 else []
    for request_id in mine or holders[:1]:
        hue = chosen.index(request_id) if mine else None
        tags.append((moment.name(request_id), "chip" if mine else "edge", hue))
    while sum(_tag_width(text) + 3 for text, _, _ in tags) > right - left:
        tags.pop()  # the badge says how many there are
    for text, css, hue in reversed(tags):
        right -= _tag_width(text)
        if hue is not None:
            picture.add(f'<g style="--hue: var(--hue-{hue})">')
        picture.rect(right, y, _tag_width(text), 14, css)
        picture.text(right + 3, y + 11, text, "strong", _tag_width(text) - 6, "muted" if css == "edge" else "inverse")
        if hue is not None:
            picture.add("</g>")
        right -= 3


def _tag_width(text: str) -> float:
    return text_width(text, "strong") + 6


def _legend(picture: Picture) -> None:
    picture.add('<g data-part="legend">')
    x, y = MARGIN + 6.0, picture.y + 8
    for css, text in (("held", "held, full"), ("half", "held: each dot is an unfilled slot"),
                      ("hatched", "cached: nobody holds it, its words can still be found"), ("free", "free"),
                      ("label", "request 3 holds it"), ("badge", "two block tables name it"),
                      ("changed", "changed in this frame")):
        width = 32 + text_width(text, "plain")
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN + 6.0, y + 21
        _swatch(picture, css, x, y)
        picture.text(x + 32, y + 11, text, "plain", width)
        x += width + 14
    picture.add("</g>")
    picture.y = y + 24


def _swatch(picture: Picture, css: str, x: float, y: float) -> None:
    if css in ("badge", "label"):
        picture.rect(x + 2, y, 21, 14, "badge" if css == "badge" else "edge")
        picture.text(x + 5, y + 11, "×2" if css == "badge" else "R3", "strong", 14,
                     "inverse" if css == "badge" else "muted")
        return
    if css in ("held", "hatched"):
        picture.rect(x, y, 26, 14, css)
    if css == "half":
        picture.rect(x, y, 12, 14, "held")
        picture.add(f'<path class="slots" stroke-dasharray="0 5" d="M{x + 15:g} {y + 8:g}h7"/>')
    picture.rect(x, y, 26, 14, {"free": "edge free", "changed": "changed"}.get(css, "edge"))


def _described(moment: Moment, shown: Sequence[str]) -> str:
    """The picture in words, for those who do not see it."""
    state, figures = moment.state, moment.state.figures()
    tables = [f"Request {moment.labels[request_id]} has the block table {state.sequences[request_id].table}."
              for request_id in shown]
    return " ".join([f"Of {state.num_blocks} blocks {figures['referenced_blocks']} are held, "
                     f"{figures['shared_blocks']} of them by several requests, {figures['cached_blocks']} are cached, "
                     f"and {figures['free_blocks']} are free.", *tables])
