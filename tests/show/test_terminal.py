"""The terminal's picture, read as a person would read it: from the screen of a terminal, at several sizes."""

from __future__ import annotations

import io
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace

import pytest

from nanopaged.block_allocator import BlockAllocator
from nanopaged.config import engine_stats
from nanopaged.models.tokenizer import Tokenizer, byte_encoding
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.show import terminal
from nanopaged.show.terminal import TerminalPicture, cut, escaped, folded, runs, width
from nanopaged.waiting import AdmissionPolicy
from tests.crowds import whatever_fits
from tests.terminal import Resize, Shown, in_terminal, screen

SIZES = [(60, 15), (80, 24), (120, 40), (200, 50), (40, 10)]
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# All that the picture may send besides text and colours: up, erase a line or what is below, wrap or not.
COMMAND = re.compile(r"\x1b\[(?:\d+A|2K|J|\?7[lh])")
REPLY = " It was a dark and stormy night."


class Stage:
    """A scheduler without a model, whose requests go on with REPLY, and its picture in a window of any size."""

    def __init__(self, num_blocks: int = 40, columns: int = 80, rows: int = 24, seats: int = 16, budget: int = 1000,
                 admission: AdmissionPolicy = whatever_fits) -> None:
        self.columns, self.rows, self.num_added = columns, rows, 0
        self.scheduler = Scheduler(BlockAllocator(num_blocks, 4), seats, budget, 1000, admission)
        self.stream = io.StringIO()
        llm = SimpleNamespace(scheduler=self.scheduler, tokenizer=Tokenizer(byte_encoding()),
                              stats=lambda: engine_stats(self.scheduler, None))
        self.picture = TerminalPicture(llm, self.stream)

    def add(self, prompt: str, max_tokens: int = 8, n: int = 1) -> None:
        number, params = str(self.num_added), SamplingParams(n=n, max_tokens=max_tokens)
        members = [Request(f"{number}.{i}", list(prompt.encode()), params, group_id=number) for i in range(n)]
        members[0].followers = members[1:]
        self.scheduler.add(members[0])
        self.num_added += 1

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            step = self.scheduler.schedule()
            self.scheduler.moves.clear()  # as if they had been made
            self.scheduler.update(step, {request: ord(REPLY[request.num_output_tokens % len(REPLY)])
                                         for _, request in step.sampled})
            self.picture.show()

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.stream.write(Resize("", columns, rows).note())

    def text(self) -> str:  # of the picture as it is
        return "\n".join(COLOUR.sub("", line) for line in self.picture.lines(self.columns, self.rows - 1))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stages: list[Stage] = []

    def make(*args: object, **options: object) -> Stage:
        stages.append(Stage(*args, **options))
        return stages[-1]

    monkeypatch.setattr(terminal, "window", lambda stream: next(
        (stage.columns, stage.rows) for stage in stages if stage.stream is stream))
    yield make
    for made in stages:
        made.picture.close()


def shown(written: str, columns: int, rows: int, wraps_again: bool = True) -> Shown:
    return screen(written.replace("\n", "\r\n"), columns, rows, wraps_again)


@pytest.mark.parametrize("columns, rows", [*SIZES, (20, 6), (3, 3), (1, 1)])
def test_the_picture_fits_the_window_and_stays_where_it_is(columns: int, rows: int,
                                                           stage: Callable[..., Stage]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    crowd = stage(rng.choice([30, 200, 3000]), columns, rows)
    for _ in range(25):
        if rng.random() < 0.7:
            crowd.add("the same beginning " * rng.randrange(3) + f"{rng.random()} 図書館\x1b[2J", rng.randint(1, 20),
                      rng.choice([1, 1, 2]))
        if crowd.scheduler.has_unfinished():
            crowd.step()
            lines = crowd.picture.lines(columns, max(1, rows - 1))
            assert 0 < len(lines) <= max(1, rows - 1)
            assert all(width(COLOUR.sub("", line)) <= columns for line in lines), lines
    if rows > 1:
        seen = shown(crowd.stream.getvalue(), columns, rows)
        assert seen.scrollback == []
        assert seen.window == [*(COLOUR.sub("", line).rstrip() for line in lines), *[""] * (rows - len(lines))]


@pytest.mark.parametrize("columns, rows", [(80, 24), (60, 15)])
def test_every_block_is_there_with_its_owner_and_its_kind(columns: int, rows: int, stage: Callable[..., Stage]) -> None:
    crowd = stage(100 if columns == 80 else 300, columns, rows)
    crowd.add("a common beginning.", 1)  # ends at once: its full blocks are cached
    crowd.step()
    for number in range(1, 4):
        crowd.add(f"a common beg {number}{number} and what comes then", 30)
    crowd.step(3)
    stats = engine_stats(crowd.scheduler, None)
    assert min(stats.shared_blocks, stats.cached_blocks, stats.free_blocks) > 0
    text = crowd.text().splitlines()
    if columns == 80:
        cells = re.findall("...", "".join(line for line in text if re.match(r"( x| \d| \+|  [:.])", line)))
        kinds = Counter(re.sub(r"\d+", "", cell).strip() for cell in cells)
        expected = {"x": stats.shared_blocks, ":": stats.cached_blocks, ".": stats.free_blocks}
        assert cells[crowd.scheduler.running[0].block_table[0]] == " x3"
        assert "x20: shared by 20, 12: request 12's, +12: its, partly full, : cached, . free" in text
        for request in crowd.scheduler.running:
            own = [i for i, block in enumerate(request.block_table) if crowd.scheduler.allocator.ref_count(block) == 1]
            full = [i for i in own if (i + 1) * 4 <= request.num_computed_tokens]
            assert [cells[request.block_table[i]].strip() for i in own] == (
                [request.group_id] * len(full) + [f"+{request.group_id}"] * (len(own) - len(full)))
    else:
        cells = "".join(line for line in text if re.fullmatch(r"[#a-zA-Z:.]{40,}", line))
        kinds = Counter(cells)
        expected = {"#": stats.shared_blocks, ":": stats.cached_blocks, ".": stats.free_blocks}
        assert "# shared, a request 0's (A partly full), : cached, . free" in text
        assert {"b", "c", "d", "B", "C", "D"} <= set(cells), "requests 1, 2 and 3, full blocks and partly filled ones"
    assert len(cells) == stats.num_blocks and {kind: kinds[kind] for kind in expected} == expected


def test_in_a_pool_too_large_for_the_window_several_blocks_share_a_mark_and_none_that_is_used_is_hidden(
        stage: Callable[..., Stage]) -> None:
    crowd = stage(10_000, 80, 24)
    crowd.add("alone")
    crowd.step()
    text = crowd.text()
    each = int(re.search(r"each mark (\d+) blocks", text)[1])
    grid = "".join(re.findall(r"^[=+:.]+$", text, re.MULTILINE))
    assert len(grid) == -(-10_000 // each) and grid == "=" + "." * (len(grid) - 1)
    assert 'request 0: blocks 0-1 "e"' in text


def test_it_says_in_words_what_happens_to_blocks_and_requests(stage: Callable[..., Stage]) -> None:
    crowd = stage(11)
    crowd.add("once upon a time", 6)
    crowd.step()
    assert 'step 1: block 3 <- request 0: "time"' in crowd.text()
    crowd.add("once upon a ship", 12)
    crowd.step()
    assert 'step 2: request 1 shares 3 blocks (x2), the last: "n a "' in crowd.text()
    crowd.add("a cat", 9, n=2)
    crowd.step(2)
    assert re.search(r'step 4: block \d+ is request 2.0\'s copy of block \d+: "t I"', crowd.text())
    crowd.step(2)
    assert 'step 6: request 0 is done: " It wa"' in crowd.text()
    crowd.step(5)
    assert re.search(r'step 11: request 2.1 gives way, no block is left: ".+"', crowd.text())


def test_words_grow_while_a_block_is_filled(stage: Callable[..., Stage]) -> None:
    crowd = stage()
    crowd.add("four", 6)
    seen = []
    for _ in range(4):
        crowd.step()
        seen += re.findall(r'block 1 <- request 0: (".*")', crowd.text())
    assert seen == ['" I"', '" It"', '" It "']


@pytest.mark.parametrize("options, reason", [
    ({"num_blocks": 6}, "1 needs 3 more, and 2 of the blocks are left"),
    ({"seats": 1}, "1 needs 1 of 1 seats, and 1 are taken"),
    ({"budget": 15}, "the step's tokens are used up"),
    ({"admission": lambda context: context.committed == 0}, "the policy keeps the 36 blocks left")])
def test_the_waiting_line_says_why_the_first_waits(options: dict[str, object], reason: str,
                                                   stage: Callable[..., Stage]) -> None:
    crowd = stage(**options)
    crowd.add("the first, long")
    for _ in range(10):
        crowd.add("another one")
    crowd.step()
    assert f"waiting: 1 2 3 4 5 6 ... (10); {reason}" in crowd.text()


@pytest.mark.parametrize("text, columns, expected", [
    ("abcdef", 6, "abcdef"), ("abcdef", 5, "ab..."), ("図書館の本", 10, "図書館の本"), ("図書館の本", 9, "図書館..."),
    ("図書館の本", 8, "図書..."), ("e\u0301" * 6, 5, "e\u0301e\u0301..."), ("abcdef", 2, "..")])
def test_a_text_is_cut_by_the_columns_that_it_takes(text: str, columns: int, expected: str) -> None:
    assert cut(text, columns) == expected and width(expected) <= columns


def test_text_that_would_command_a_terminal_is_escaped() -> None:
    assert escaped("a\x1b[2J\x9b\r\nb\u202e\ufe0f\u200d 図 é") == r"a\x1b[2J\x9b\r\nb\u202e\ufe0f\u200d 図 é"


def test_parts_share_a_line_while_they_fit() -> None:
    assert folded(["aa", "bb", "cc"], 7) == ["aa, bb,", "cc"] and folded(["abcdef"], 5) == ["ab..."]


def test_blocks_that_follow_one_another_are_one_entry_of_a_table() -> None:
    assert runs([0, 1, 2, 9, 4, 3, 5, 6]) == "0-2 9 4 3 5-6" and runs([]) == ""


def play_with_messages(crowd: Stage, messages: int) -> None:
    """Steps of a few requests; messages are logged between them, to the same terminal."""
    handler = logging.StreamHandler(crowd.stream)
    handler.addFilter(crowd.picture.make_way)
    for number in range(6):
        crowd.add(f"a common beginning, and then {number}", 12)
    for number in range(4):
        crowd.step()
        if number < messages:
            message = f"message {number} {'long ' * 30}end"
            handler.handle(logging.LogRecord("a name", logging.WARNING, "a path", 1, message, (), None))


@pytest.mark.parametrize("columns, rows", SIZES)
def test_messages_stand_above_the_picture_and_stay(columns: int, rows: int, stage: Callable[..., Stage]) -> None:
    crowd = stage(100, columns, rows)
    play_with_messages(crowd, 3)
    seen = shown(crowd.stream.getvalue(), columns, rows)
    lines = seen.scrollback + seen.window
    for number in range(3):
        assert f"message {number} {'long ' * 30}end" in "".join(line.ljust(columns) for line in lines)
    assert sum(line.startswith("step 4: ") and "running" in line for line in lines) == 1
    assert not any(re.match("step [123]: .* running", line) for line in lines)


@pytest.mark.parametrize("messages", [0, 2])
@pytest.mark.parametrize("wraps_again", [True, False])
@pytest.mark.parametrize("after", [(60, 15), (120, 40), (40, 10), (80, 15), (60, 40)])
def test_in_a_resized_window_the_picture_is_drawn_anew_and_no_message_is_lost(
        after: tuple[int, int], wraps_again: bool, messages: int, stage: Callable[..., Stage]) -> None:
    crowd = stage(100, 80, 24)
    play_with_messages(crowd, messages)
    crowd.resize(*after)
    crowd.step(3)
    seen = shown(crowd.stream.getvalue(), 80, 24, wraps_again)
    picture = crowd.text().splitlines()
    end = max(i for i, line in enumerate(seen.window) if line) + 1
    assert [line.rstrip() for line in picture] == seen.window[end - len(picture):end]
    text = "".join(line.ljust(after[0]) for line in seen.scrollback + seen.window)
    for number in range(messages):
        assert f"message {number} long" in text
    if not messages and wraps_again and after[1] > 15:
        assert text.count(" running") == 1, "the old picture is gone"


def test_after_close_it_neither_listens_nor_filters(stage: Callable[..., Stage]) -> None:
    crowd = stage()
    crowd.add("a prompt")
    crowd.step()
    handlers = logging.getLogger().handlers
    assert handlers and all(crowd.picture.make_way in handler.filters for handler in handlers)
    crowd.picture.close()
    assert crowd.picture not in crowd.scheduler.listeners
    assert not any(crowd.picture.make_way in handler.filters for handler in handlers)


def test_a_terminal_that_cannot_show_a_letter_gets_a_question_mark(stage: Callable[..., Stage]) -> None:
    crowd = stage()
    crowd.stream = crowd.picture.stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    crowd.add("図")
    crowd.step()
    crowd.stream.seek(0)
    assert 'request 0: blocks 0 "?"' in crowd.stream.read()


# The demonstration itself, in a pseudo-terminal.

STORY = ("train_free_demo.py", "--device", "cpu", "--requests", "6", "--max-tokens", "8", "--num-blocks", "130")
WAVES = ("train_free_demo.py", "--device", "cpu", "--workload", "storm", "--requests", "6", "--num-blocks", "16",
         "--max-tokens", "8")  # short prompts, in several waves
STORM = ("train_free_demo.py", "--device", "cpu", "--workload", "storm", "--admission", "greedy", "--requests", "4",
         "--num-blocks", "8", "--max-tokens", "40")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@cache
def demo(*arguments: str, columns: int = 80, rows: int = 24, resize: Resize | None = None,
         **environment: str) -> str:
    """What the demonstration writes to its terminal."""
    status, written = in_terminal(*arguments, columns=columns, rows=rows, resize=resize,
                                  environment={**ENVIRONMENT, **environment})
    assert status == 0, written
    return written


def assert_is_whole(seen: Shown, others: int = 0) -> None:
    """The last picture is there once, with its legend, and the table below it; above are at most so many others."""
    lines = seen.scrollback + seen.window
    pictures = [i for i, line in enumerate(lines) if re.match(r"step \d+: \d+ running", line)]
    [table] = [i for i, line in enumerate(lines) if re.match(r" +requests  \d+, in \d+ steps", line)]
    assert "0 running" in lines[pictures[-1]] and pictures[-1] < table and len(pictures) - 1 <= others
    assert re.search(r": cached, \. free\n", "\n".join(lines[pictures[-1]:table]))


@pytest.mark.parametrize("columns, rows", [(60, 15), (200, 50)])
def test_the_demo_draws_in_place_and_leaves_the_last_picture_and_the_table(columns: int, rows: int) -> None:
    written = demo(*WAVES, columns=columns, rows=rows)
    first, *_, last = written.split(terminal.WRAP_OFF)
    assert not re.sub(COLOUR, "", first), "nothing stands above the picture"
    pictures = written.removesuffix(last.partition(terminal.WRAP_ON)[2])
    seen = screen(pictures, columns, rows)
    assert seen.scrollback == [] and re.match(r"step \d+: 0 running", seen.window[0])
    assert_is_whole(screen(written, columns, rows))


@pytest.mark.parametrize("before, after", [((120, 40), (60, 15)), ((60, 15), (120, 40))])
def test_the_demo_goes_on_in_a_window_that_is_resized(before: tuple[int, int], after: tuple[int, int]) -> None:
    resize = Resize(r"step 3: .*\x1b\[\?7h", *after)
    written = demo(*WAVES, columns=before[0], rows=before[1], resize=resize)
    # A terminal that becomes lower pushes the upper part of the old picture out of the window.
    assert_is_whole(screen(written, *before), others=int(after < before))


def test_the_storm_warnings_stay_above_the_picture() -> None:
    written = demo(*STORM)
    warnings = re.findall(r"WARNING: eviction storm.*?(?=\r\n)", written)
    seen = screen(written)
    lines = seen.scrollback + seen.window
    text = "".join(line.ljust(80) for line in lines)
    assert len(warnings) > 1 and all(warning in text for warning in warnings)
    assert f"         eviction storms  {len(warnings)}" in lines
    assert_is_whole(seen)


def test_without_colour_the_picture_is_the_same_and_has_none() -> None:
    plain, coloured = demo(*WAVES, columns=200, rows=50, NO_COLOR="1"), demo(*WAVES, columns=200, rows=50)
    assert COLOUR.search(coloured) and not COLOUR.search(plain)
    assert not COMMAND.sub("", plain).count("\x1b")
    table = re.compile(r"tokens/s.*|time .*")
    assert table.sub("", COLOUR.sub("", coloured)) == table.sub("", plain)


def test_a_dumb_terminal_gets_lines_and_no_commands() -> None:
    written = demo(*STORY, TERM="dumb")
    lines = [line for line in written.splitlines() if line.startswith("step ")]
    assert "\x1b" not in written and "\a" not in written
    assert "; arrived: requests 1 to 5" in lines[1] and "; done: " in lines[-1]


def test_a_command_to_the_terminal_in_a_prompt_is_shown_and_not_obeyed() -> None:
    written = demo("train_free_demo.py", "--device", "cpu", "--prompt", "a\x1b[31mb\x9b2J\x07 and on", "--max-tokens",
                   "4", "--num-blocks", "20", columns=120, rows=40, NO_COLOR="1")
    assert not COMMAND.sub("", written).count("\x1b") and not re.search("[\x07\x9b]", written)
    assert r"a\x1b[31mb" in written and "wrong" not in written
