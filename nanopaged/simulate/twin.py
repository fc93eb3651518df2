"""What would contiguous memory have done, in a comparison that is fair?

Five servers get the same requests, memory, seats, token budget, order and clock; they differ in one thing, how the
memory is handed out. No two prompts have a common prefix, so prefix sharing saves nothing, and what paging gains here
it gains alone. `twin_scene` runs all five in the simulator and keeps, for each step, what every slot holds:

    [16, 11, 11, 3]     a block of 16 slots, 11 of them filled, of request 3
    [192, 40, 61, 5]    a range of 192 slots: 40 tokens, 61 at full length, so 21 reserved and 131 never used
    [128, 0, 0]         a gap

`show/page/twin.js` draws it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import groupby

from nanopaged.block_allocator import BlockAllocator, blocks_for
from nanopaged.request import Request
from nanopaged.simulate.contiguous import RESERVATIONS, ContiguousAllocator, ContiguousScheduler, MemoryUse
from nanopaged.simulate.simulator import (Clock, PagedServer, Result, Server, StepCost, Trace, memory_refused, simulate,
                                          summarize)
from nanopaged.simulate.traces import TraceRequest
from nanopaged.step import Step

BLOCK_SIZE = 16
SLOTS = 32 * BLOCK_SIZE
SEATS, BUDGET, MAX_MODEL_LEN = 16, 256, 192
NUM_REQUESTS, PROMPTS, OUTPUTS = 14, (10, 60), (4, 100)  # shortest and longest
# Paging lets requests give way when the pool is full. They often find their own blocks again, which would be prefix
# sharing's doing. With this seed two give way, and find none: so both paged servers do the same.
SEED = 34
COST = StepCost()
SERVERS = {
    "paged + sharing": "Takes a block when a token needs it. A common prefix would be stored once.",
    "paged": "Takes a block when a token needs it. Every request has blocks of its own.",
    "max": f"Knows nothing: reserves the declared limit of {MAX_MODEL_LEN} tokens for each request.",
    "pow2": "Knows each output's length, rounded up to a power of two, and reserves that.",
    "oracle": "Knows the future: reserves exactly what the request will need. No real server can.",
}

Segment = list[int]  # slots, tokens in them, tokens in them at full length, and the requests that hold them


def twin_scene() -> dict[str, object]:
    """The scene as plain lists and numbers, for JSON. Requests are numbered in the order of their arrival, from 0."""
    trace = twin_trace()
    servers = [_scene_of(name, trace) for name in SERVERS]
    return {
        "kind": "twin", "title": "Paged and contiguous memory",
        "intro": "Five servers get the same requests, and differ in one thing: how they hand out memory.",
        "notes": notes(trace, max(server["final"]["preemptions"] for server in servers)),
        "slots": SLOTS, "block_size": BLOCK_SIZE, "fields": list(MemoryUse._fields),
        "requests": [[len(request.prompt), request.output_tokens] for request in trace()],
        "servers": servers}


def notes(trace: Trace, preemptions: int) -> list[str]:
    """What a reader must know to judge whether the comparison is fair; `preemptions` are those of a paged server."""
    prompts, outputs = zip(*[(len(request.prompt), request.output_tokens) for request in trace()])
    return [
        f"{NUM_REQUESTS} requests arrive at once, with prompts of {min(prompts)} to {max(prompts)} tokens and outputs "
        f"of {min(outputs)} to {max(outputs)}. All five servers have {SLOTS} slots of KV memory, each for one token, "
        f"{SEATS} seats, and up to {BUDGET} tokens in a step. They serve first come, first served. A request may have "
        f"{MAX_MODEL_LEN} tokens in all; the last needs no slot, since no token comes after it and reads its K and V.",
        f"One clock for all: a step takes {COST.fixed_s * 1e3:g} ms, and {COST.per_token_s * 1e3:g} ms for each token "
        f"computed, and {COST.per_kv_token_s * 1e3:g} ms for each token of context that is read.",
        "No two prompts have a common prefix, so prefix sharing saves nothing here, and both paged servers take "
        "the same time. The difference from the contiguous servers is the work of paging alone. Look at the time at "
        "which all have finished: in the beginning paging may generate fewer tokens, since it computes more prompts.",
        "Paging has a price. It knows no output lengths, and admits more requests than fit in the end: here "
        f"{preemptions} times a request gives way, and is computed again. With other requests the oracle, which never "
        "does that, can be slightly faster."]


def twin_trace() -> Trace:
    """Prompts that differ from their first token on, and outputs of very different lengths; all arrive at once."""
    rng = random.Random(SEED)
    shortest, longest = OUTPUTS
    requests = [TraceRequest(0.0, [i + 1] * rng.randint(*PROMPTS),
                             round(shortest * (longest / shortest) ** rng.random())) for i in range(NUM_REQUESTS)]
    return lambda: iter(requests)


def make_server(name: str, clock: Clock) -> Server:
    """One of `SERVERS`, empty."""
    limits = SEATS, BUDGET, MAX_MODEL_LEN
    if name in RESERVATIONS:
        return ContiguousScheduler(ContiguousAllocator(SLOTS), RESERVATIONS[name], *limits, clock)
    return PagedServer(BlockAllocator(SLOTS // BLOCK_SIZE, BLOCK_SIZE, name == "paged + sharing"), *limits, clock=clock)


def run_server(name: str, trace: Trace) -> tuple[Camera, Result]:
    """Serves the trace, with a picture of every step and one of the end."""
    clock = Clock()
    camera = Camera(make_server(name, clock), clock)
    result = simulate(trace, summarize(trace).last_arrival_s, camera.server, clock, COST, watch=camera.take)
    camera.take(Step(BUDGET), 0.0)
    return camera, result


def _scene_of(name: str, trace: Trace) -> dict[str, object]:
    camera, result = run_server(name, trace)
    columns = {column: list(values) for column, values in zip(Camera.COLUMNS, zip(*camera.pictures))}
    final = {"finished_s": round(result.simulated_s, 6), "tokens_share": round(result.memory["tokens"], 6),
             "requests": round(result.average_batch, 6), "preemptions": result.counts.num_preemptions}
    return {"name": name, "about": SERVERS[name], "paged": name not in RESERVATIONS, **columns, "final": final}


class Camera:
    """Takes a picture of a server's memory in each step, the tokens that the step computes included."""

    COLUMNS = ("times", "memory", "counts", "heads", "admitted", "preempted", "ended", "segments")

    def __init__(self, server: Server, clock: Clock) -> None:
        self.server, self.clock = server, clock
        self.pictures: list[tuple[object, ...]] = []  # by COLUMNS
        self._ended: list[int] = []  # since the last picture
        server.listeners.append(self)

    def ended(self, request: Request) -> None:
        self._ended.append(int(request.request_id))

    def take(self, step: Step, seconds: float) -> None:
        server, stats = self.server, self.server.stats
        refused = memory_refused(server, step)
        computed = {request: request.num_computed_tokens for request in server.running}
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            computed[request] = start + num_tokens
        counts = [len(server.running), len(server.waiting), stats.num_finished, stats.output_tokens]
        self.pictures.append((
            round(self.clock.now, 6), list(server.memory(step.computed_tokens, refused)), counts,
            self._head() if refused else None, [int(admission.request.request_id) for admission in step.admitted],
            [int(request.request_id) for request in step.preempted], self._ended, self._segments(computed)))
        self._ended = []

    def _head(self) -> list[int]:
        """The first waiting request, the slots that it waits for, and the slots that it could have.

        A range needs one gap that is long enough: the longest counts. Blocks may lie anywhere: all free ones count.
        """
        server, request = self.server, self.server.waiting.first()
        if isinstance(server, ContiguousScheduler):
            return [int(request.request_id), server.slots_for(request),
                    max([length for _, length in server.memory_ranges.gaps], default=0)]
        needed = blocks_for(len(request.token_ids), server.block_size) * server.block_size
        return [int(request.request_id), needed, server.allocator.num_available * server.block_size]

    def _segments(self, computed: dict[Request, int]) -> list[Segment]:
        if isinstance(self.server, ContiguousScheduler):
            return list(_ranges(self.server, computed))
        return list(_blocks(self.server, computed))


def _ranges(server: ContiguousScheduler, computed: dict[Request, int]) -> Iterator[Segment]:
    """The ranges and the gaps between them, from the first slot to the last."""
    end = 0
    for request, start in sorted(server.starts.items(), key=lambda item: item[1]):
        if start > end:
            yield [start - end, 0, 0]
        reserved = server.slots_for(request)
        yield [reserved, computed[request], request.max_length - 1, int(request.request_id)]
        end = start + reserved
    if end < SLOTS:
        yield [SLOTS - end, 0, 0]


def _blocks(server: PagedServer, computed: dict[Request, int]) -> Iterator[Segment]:
    """The blocks in use, and the blocks between them as gaps; a cached block is as good as free."""
    blocks: dict[int, Segment] = {}
    for request, num_tokens in computed.items():
        for i, block in enumerate(request.block_table):
            filled = min(max(num_tokens - i * BLOCK_SIZE, 0), BLOCK_SIZE)
            segment = blocks.setdefault(block, [BLOCK_SIZE, 0, 0])
            segment[1] = segment[2] = max(segment[1], filled)
            segment.append(int(request.request_id))
    yield from _with_gaps_joined(blocks.get(i) for i in range(server.allocator.num_blocks))


def _with_gaps_joined(blocks: Iterable[Segment | None]) -> Iterator[Segment]:
    for is_gap, run in groupby(blocks, key=lambda block: block is None):
        if is_gap:
            yield [BLOCK_SIZE * len(list(run)), 0, 0]
        else:
            yield from run
