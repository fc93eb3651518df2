"""What was the state at each moment? Block tables and counts, made from the events of a recording alone.

A step is too coarse to look at: nineteen requests may join in one. So it is cut into *frames*, in the order in which
things happened: requests arrive; one gives its blocks back; others take blocks; a block is copied; the step writes
the K and V of its tokens; it is recorded. `frames` cuts, `State.apply` does what a frame's events say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nanopaged.block_allocator import blocks_for
from nanopaged.show.reading import Event, Line

# Of each event, by its name: the kind of frame that it belongs to. A frame is a run of events of one kind.
KINDS = {"add": "arrive", "preempt": "give back", "out": "give back", "back": "give back", "seat": "take", "in": "take",
         "publish": "take", "twin": "take", "take": "take", "copy": "copy", "keep": "copy"}
NOTHING_HELD = (None, 0)  # the place of a block whose words are not known


@dataclass
class Sequence:
    """A request, or one of the continuations of a request, at one moment."""

    request_id: str
    group: str
    prompt_length: int
    max_length: int
    token_ids: list[int] | None  # None: the recording has no text
    length: int  # tokens that are known
    status: str = "waiting"  # "running", "preempted" or "finished"
    table: list[int] = field(default_factory=list)
    computed: int = 0
    most_computed: int = 0  # before any preemption
    preemptions: int = 0
    swapped_blocks: int = 0
    reason: str | None = None  # why it ended
    followers: list[str] = field(default_factory=list)  # that have not started


class Frame(NamedTuple):
    """What happened between two pictures. `part` counts the frames of a step from 1."""

    step: int
    part: int
    kind: str
    events: list[Event]
    line: Line  # the line of the recording that it comes from

    @property
    def name(self) -> str:  # as in a link
        return f"{self.step}.{self.part}"


def labels(line: Line) -> dict[str, str]:
    """What to call the requests of an "add" line, by their ids: by the user's id, if each is the only continuation."""
    return {member: member if line["n"] > 1 else line["group"] for member in (line["add"], *line["followers"])}


class State:
    """The pool and the requests after the events so far; begins with a recording's header."""

    def __init__(self, header: Line) -> None:
        self.num_blocks, self.block_size = header["num_blocks"], header["block_size"]
        self.sequences: dict[str, Sequence] = {}
        self.holders = [0] * self.num_blocks  # tables that name each block
        self.filled = [0] * self.num_blocks
        self.places: list[tuple[str | None, int]] = [NOTHING_HELD] * self.num_blocks  # whose logical block it holds
        self.published = set(header["published"])
        for block in header["cached"]:
            self.filled[block] = self.block_size
        self.counts = dict(header["counts"])
        self.evicted: list[int] = []  # blocks, in the last event
        # Since the last step that was recorded.
        self._admitted: list[list[int]] = header["unrecorded"]["admitted"]  # [prompt tokens if first, hit, restored]
        self.unrecorded_preemptions: int = header["unrecorded"]["preempted"]
        self.unrecorded_again = 0  # tokens that were computed before, and lost

    def apply(self, event: Event) -> None:
        """Does what one event says."""
        name, *arguments = event
        self.evicted = []
        getattr(self, f"_on_{name}")(*arguments)

    def _on_add(self, line: Line) -> None:
        prompt, output = line["prompt"], line.get("output", [] if isinstance(line["prompt"], list) else 0)
        known = None if isinstance(prompt, int) else prompt + output
        length = prompt + output if known is None else len(known)
        for request_id in [line["add"], *line["followers"]]:
            self.sequences[request_id] = Sequence(
                request_id, line["group"], length - (output if known is None else len(output)), line["max_length"],
                None if known is None else known[:], length)
        first = self.sequences[line["add"]]
        first.followers = line["followers"][:]
        if "table" in line:  # it was there when the recording began
            first.computed, first.most_computed = line["computed"], line["most_computed"]
            first.swapped_blocks, first.preemptions = line["swapped_blocks"], line["preemptions"]
            first.status = "running" if line["status"] == "running" else "preempted"
            self._hold(first, line["table"])
            self._fill(first, 0, first.computed)

    def _on_seat(self, request_id: str, blocks: list[int], restored: int) -> None:
        request, hit = self.sequences[request_id], len(blocks) * self.block_size
        request.status = "running"
        self._hold(request, blocks)
        request.computed = hit + restored
        request.swapped_blocks = 0
        self.counts["prefix_hit_tokens"] += hit
        self._admitted.append([0 if request.preemptions else request.prompt_length, hit, restored])

    def _on_take(self, request_id: str, blocks: list[int]) -> None:
        self._hold(self.sequences[request_id], self._taken(blocks))

    def _on_in(self, request_id: str, host_block: int, block: int) -> None:
        request = self.sequences[request_id]
        self._hold(request, self._taken([block]))
        i = len(request.table) - 1
        self.filled[block] = min(self.block_size, request.computed - i * self.block_size)
        self.places[block] = request_id, i

    def _on_copy(self, request_id: str, source: int, target: int) -> None:
        request = self.sequences[request_id]
        i = request.table.index(source)
        self._taken([target])
        self.holders[target], self.filled[target] = 1, self.filled[source]
        self.places[target] = request_id, i
        request.table[i] = target
        self._release(source)
        if self.places[source][0] == request_id:  # the words are still there, and somebody else's
            self.places[source] = next(((other.request_id, i) for other in self.sequences.values()
                                        if source in other.table[i : i + 1]), NOTHING_HELD)

    def _on_keep(self, request_id: str, i: int) -> None:
        pass  # the request writes into its tail, which nobody else holds: nothing changes

    def _on_preempt(self, request_id: str, for_whom: str, needed: int, available: int) -> None:
        request = self.sequences[request_id]
        request.status = "preempted"
        request.preemptions += 1
        request.most_computed = max(request.most_computed, request.computed)
        request.computed = 0
        self.unrecorded_preemptions += 1

    def _on_out(self, request_id: str, block: int, host_block: int) -> None:
        self.sequences[request_id].swapped_blocks += 1

    def _on_back(self, request_id: str) -> None:
        table = self.sequences[request_id].table
        while table:
            self._release(table.pop())

    def _on_fill(self, request_id: str, start: int, num_tokens: int) -> None:
        request = self.sequences[request_id]
        self.unrecorded_again += max(0, min(start + num_tokens, request.most_computed) - start)
        request.computed = start + num_tokens
        self._fill(request, start, request.computed)
        self.counts["computed_tokens"] += num_tokens

    def _on_token(self, request_id: str, token_id: int) -> None:
        request = self.sequences[request_id]
        request.length += 1
        if request.token_ids is not None:
            request.token_ids.append(token_id)
        self.counts["output_tokens"] += 1

    def _on_publish(self, request_id: str, i: int) -> None:
        self.published.add(self.sequences[request_id].table[i])

    def _on_twin(self, request_id: str, i: int, twin: int) -> None:
        table = self.sequences[request_id].table
        own, table[i] = table[i], twin
        self.holders[twin] += 1
        self._release(own)

    def _on_start(self, request_id: str, leader_id: str) -> None:
        request, leader = self.sequences[request_id], self.sequences[leader_id]
        leader.followers.remove(request_id)
        request.status, request.computed = "running", leader.computed
        self._hold(request, leader.table)

    def _on_end(self, request_id: str, reason: str) -> None:
        request = self.sequences[request_id]
        request.status, request.reason, request.swapped_blocks = "finished", reason, 0
        self.counts["num_finished"] += 1

    def _on_wait(self, *why: object) -> None:
        pass  # says why the first waiting request is not admitted

    def _on_storm(self, cause: str, again: int, computed: int, steps: int) -> None:
        pass

    def _on_fail(self, what: str) -> None:
        pass  # a step that was not carried out: what it took stays taken

    def _on_recorded(self, failed_tokens: int) -> None:
        """The end of a step: what is counted by the step is counted, also of steps before it that failed.

        `failed_tokens` were computed for requests that end with an error.
        """
        counts = self.counts
        counts["computed_tokens"] += failed_tokens
        counts["num_steps"] += 1
        counts["num_preemptions"] += self.unrecorded_preemptions
        counts["recomputed_tokens"] += self.unrecorded_again
        for prompt_tokens, hit, restored in self._admitted:
            counts["swapped_in_tokens"] += restored
            counts["prompt_tokens"] += prompt_tokens
            counts["prompt_hit_tokens"] += hit if prompt_tokens else 0
        counts["referenced_block_steps"] += self.num_blocks - self.holders.count(0)
        self._admitted, self.unrecorded_preemptions, self.unrecorded_again = [], 0, 0

    def _hold(self, request: Sequence, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.holders[block] += 1
            request.table.append(block)

    def _taken(self, blocks: list[int]) -> list[int]:
        """The same blocks, empty. One that was cached is evicted with it."""
        for block in blocks:
            if block in self.published:
                self.published.remove(block)
                self.counts["evicted_blocks"] += 1
                self.evicted.append(block)
            self.filled[block], self.places[block] = 0, NOTHING_HELD
        return blocks

    def _release(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0 and block not in self.published:
            self.filled[block] = 0

    def _fill(self, request: Sequence, start: int, end: int) -> None:
        size = self.block_size
        for i in range(start // size, blocks_for(end, size)):
            block = request.table[i]
            self.filled[block] = min(size, end - i * size)
            self.places[block] = request.request_id, i

    def is_cached(self, block: int) -> bool:
        return self.holders[block] == 0 and block in self.published

    def with_status(self, *statuses: str) -> list[Sequence]:
        """The requests that have one of these; a follower that has not started counts as part of its leader."""
        pending = {follower for request in self.sequences.values() for follower in request.followers}
        return [request for request in self.sequences.values()
                if request.status in statuses and request.request_id not in pending]

    def figures(self) -> dict[str, int]:
        """The plain numbers of `LLM.stats()`, by their names there."""
        free = self.holders.count(0)  # or cached
        cached = sum(self.is_cached(block) for block in self.published)
        referenced = self.num_blocks - free
        return self.counts | {
            "num_blocks": self.num_blocks, "referenced_blocks": referenced, "cached_blocks": cached,
            "free_blocks": free - cached, "shared_blocks": sum(holders > 1 for holders in self.holders),
            "reserved_slots": referenced * self.block_size,
            "filled_slots": sum(filled for filled, holders in zip(self.filled, self.holders) if holders),
            "num_waiting": len(self.with_status("waiting", "preempted")),
            "num_running": len(self.with_status("running")),
            "swap_blocks_used": sum(request.swapped_blocks for request in self.sequences.values())}


def frames(lines: Iterable[Line]) -> Iterator[Frame]:
    """The frames of a recording's lines, without the header. What happens between two steps belongs to the second.

    A frame is a run of events of one kind; a copy, and a request that gives way, have frames of their own.
    """
    step, part, arrived, waited = 1, 0, [], None

    def cut(events: list[Event], line: Line, kind: str | None = None) -> Iterator[Frame]:
        """Frames of events that follow one another; each is a run of events of one kind."""
        nonlocal part
        run: list[Event] = []
        for event in events:
            alone = event[0] in ("copy", "keep", "preempt")
            if run and kind is None and (alone or KINDS[event[0]] != KINDS[run[0][0]]):
                part += 1
                yield Frame(step, part, KINDS[run[0][0]], run, line)
                run = []
            run.append(event)
        if run:
            part += 1
            yield Frame(step, part, kind or KINDS[run[0][0]], run, line)

    for line in lines:
        if "add" in line:
            arrived.append(["add", line])
            continue
        present = [event for event in arrived if "table" in event[1]]
        yield from cut(present, line, "begin")
        yield from cut(arrived[len(present):], line, "arrive")
        arrived = []
        if "step" not in line:
            yield from cut(line["events"], line, "abort")
            continue
        step = line["step"]
        yield from cut(line.get("events", []), line)
        waits = line.get("waits")
        if waits is not None and waits[1] == "preempted":  # the frames before it have shown why
            waits = None
        if waits is not None and waits[:2] != waited:
            yield from cut([["wait", *waits]], line, "wait")
        waited = waits and waits[:2]
        if line["recorded"]:
            failed = set(line.get("failed", ()))
            yield from cut([["fill", *row] for row in line["plan"] if row[0] not in failed], line, "write")
            failed_tokens = sum([num_tokens for request_id, _, num_tokens in line["plan"] if request_id in failed])
            tokens = [["token", *row] for row in line["tokens"]]
            yield from cut([*_recorded_in_order(tokens, line["after"]), ["recorded", failed_tokens]], line, "record")
            if "storm" in line:
                yield from cut([["storm", *line["storm"]]], line, "storm")
        else:
            yield from cut([["fail", line.get("error", "it was not carried out")]], line, "fail")
        step, part = step + 1, 0
    yield from cut(arrived, {}, "arrive")


def _recorded_in_order(tokens: list[Event], after: list[Event]) -> list[Event]:
    """Full blocks are published first, then followers start; then tokens are appended, and requests end."""
    i = next((i for i, event in enumerate(after) if event[0] == "end"), len(after))
    return [*after[:i], *tokens, *after[i:]]
