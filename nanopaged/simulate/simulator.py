"""What would a server have done with these requests, if each step had taken so long?

The scheduler and the block allocator are the engine's own; only the model is replaced, by a formula
for the seconds of a step, and with it the clock. So every decision is the one that the engine would
make, without a GPU, and without torch.

    trace ──> server.add        each request that has arrived by now
              server.schedule   which requests run this step
              now += seconds of that step
              server.update     any token for each request that gets one: output lengths are in the trace

The same loop drives the contiguous baselines of `contiguous`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nanopaged.block_allocator import blocks_for
from nanopaged.outputs import SchedulerStats, goodput
from nanopaged.pressure.storm import StormWatch
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.simulate.contiguous import ContiguousScheduler, MemoryUse
from nanopaged.simulate.traces import TraceRequest
from nanopaged.step import Step
from nanopaged.validation import require_number

Trace = Callable[[], Iterator[TraceRequest]]  # each call starts the same trace from its beginning

SHORTEST_STEP_S = 1e-5  # every step must advance the clock, even one that shows the seconds since 1970


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step: all weights are read once, each token is computed, each request's context is read.

    The defaults were fitted by `python -m nanopaged.bench cost` on 23 November 2026: GPT-2 124M with random
    weights, float32, two cores of an AMD EPYC with no GPU, torch 2.13.0. Half of the 33 steps are predicted
    within 9%. On a CPU arithmetic is expensive, so a larger batch saves little: set the constants of your own
    device to learn about its throughput.
    """

    fixed_s: float = 0.035
    per_token_s: float = 0.0014
    per_kv_token_s: float = 1.4e-5

    def __post_init__(self) -> None:
        for name in ("fixed_s", "per_token_s", "per_kv_token_s"):
            require_number(name, getattr(self, name), SHORTEST_STEP_S if name == "fixed_s" else 0.0, 1000.0)

    def seconds(self, num_tokens: int, context_tokens: int) -> float:
        """Of a step that computes `num_tokens`, for requests whose contexts have `context_tokens` in all."""
        return self.fixed_s + self.per_token_s * num_tokens + self.per_kv_token_s * context_tokens


class Clock:
    """Simulated seconds; they pass only when `now` is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class PagedServer(Scheduler):
    """The engine's scheduler, with its memory counted as that of the baselines is."""

    left_over = 0  # slots of the memory that make no whole block

    @property
    def longest(self) -> int:
        """Slots that one request can have."""
        return self.allocator.num_blocks * self.block_size

    def slots_for(self, request: Request) -> int:
        """In its blocks at full length, which can be `longest` at most."""
        return blocks_for(request.max_length - 1, self.block_size) * self.block_size

    def memory(self, writing: int, refused: bool) -> MemoryUse:
        """What the slots hold during a step; O(1). A shared block counts once, a cached one as free.

        Nothing is reserved. Internal waste is what is unfilled in the blocks in use, which is the ends of last
        blocks, and the slots that are too few for a block.
        """
        stats = self.allocator.stats()
        tokens = stats.filled_slots + writing
        free = (stats.free_blocks + stats.cached_blocks) * self.block_size
        internal = stats.reserved_slots - tokens + self.left_over
        return MemoryUse(tokens, 0, internal, free if refused else 0, 0 if refused else free)


class SwappingServer(PagedServer, SwappingScheduler):
    """The same with a swap space."""


Server = PagedServer | ContiguousScheduler


class Histogram:
    """Percentiles of any number of durations in bounded memory: buckets that are 1% wide."""

    LOG_WIDTH = math.log(1.01)

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[math.floor(math.log(seconds) / self.LOG_WIDTH)] += times

    def percentile(self, percent: float) -> float | None:
        """The smallest duration that at least `percent` of all do not exceed, within 0.5%; None if there are none."""
        rank = percent / 100 * self.counts.total()
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return math.exp((bucket + 0.5) * self.LOG_WIDTH)
        return None


class TraceSummary(NamedTuple):
    """The size of a trace, from reading it once."""

    requests: int
    first_arrival_s: float
    last_arrival_s: float
    mean_prompt: float  # tokens
    mean_output: float


def summarize(trace: Trace) -> TraceSummary:
    """Reads a trace to its end, so that a damaged one is refused before anything is simulated."""
    requests, first_arrival_s, last_arrival_s, prompt, output = 0, 0.0, 0.0, 0, 0
    for request in trace():
        last_arrival_s = request.arrival_s
        first_arrival_s = first_arrival_s if requests else last_arrival_s
        requests, prompt, output = requests + 1, prompt + len(request.prompt), output + request.output_tokens
    return TraceSummary(requests, first_arrival_s, last_arrival_s, prompt / requests, output / requests)


@dataclass
class Averages:
    """Sums over the steps of the measured time, each step weighted by its seconds."""

    seconds: float = 0.0
    memory: list[float] = field(default_factory=lambda: [0.0] * 5)  # slots, as in MemoryUse
    requests: float = 0.0  # in the step
    table_entries: float = 0.0  # in the block tables of all of them
    output_tokens: int = 0  # not weighted

    def add(self, seconds: float, memory: MemoryUse, requests: int = 0, table_entries: int = 0,
            output_tokens: int = 0) -> None:
        self.seconds += seconds
        self.memory = [total + slots * seconds for total, slots in zip(self.memory, memory)]
        self.requests += requests * seconds
        self.table_entries += table_entries * seconds
        self.output_tokens += output_tokens


@dataclass(kw_only=True)
class Result:
    """One server's run. Memory, batch and throughput are averages over the time in which requests arrive.

    That time, from the first arrival to the last, is the same for all servers, and it leaves out the end,
    when no more requests arrive. If all requests arrive at once it is the whole run. Latencies and counts
    are of all requests.
    """

    memory: dict[str, float]  # share of the whole KV memory, by the fields of MemoryUse
    average_batch: float  # requests in a step
    average_table: float  # blocks in the block table of one of them
    tokens_per_s: float  # generated
    ttft_p50_s: float | None  # time to first token, from arrival
    ttft_p99_s: float | None
    ttft_max_s: float | None
    tbt_p50_s: float | None  # time between two consecutive tokens of a request
    tbt_p99_s: float | None
    tbt_max_s: float | None
    simulated_s: float  # of the whole run, from the first arrival on
    goodput: float  # share of the computed tokens that were computed for the first time
    hit_share: float  # of the prompt tokens: found in the pool instead of computed
    num_storms: int
    counts: SchedulerStats


def simulate(trace: Trace, measure_until_s: float, server: Server, clock: Clock, cost: StepCost,
             progress: Callable[[int], None] = lambda finished: None,
             watch: Callable[[Step, float], None] = lambda step, seconds: None) -> Result:
    """Serves a whole trace; the clock starts at its first arrival.

    Every request that has arrived is queued, since an order policy may prefer any of them. So memory grows
    with the queue; it does not grow with the rest of the trace, which is read as its requests arrive.

    Args:
        measure_until_s: when the averages end, usually `TraceSummary.last_arrival_s`. If that is not after the
            first arrival, they end with the run.
        server: empty, with `clock` as its clock.
        progress: is told now and then how many requests have finished.
        watch: is told each planned step and its seconds, as it begins, before anything of it is recorded.
    """
    arrivals, averages, first_tokens, gaps = enumerate(trace()), Averages(), Histogram(), Histogram()
    storms = StormWatch(server.allocator.num_blocks)
    server.listeners.append(storms)
    index, upcoming = next(arrivals)
    start = clock.now = upcoming.arrival_s
    until = measure_until_s if measure_until_s > start else math.inf
    while upcoming or server.has_unfinished():
        while upcoming and upcoming.arrival_s <= clock.now:
            _add(server, upcoming, index)
            index, upcoming = next(arrivals, (0, None))
        if not server.has_unfinished():  # idle until the next arrival
            averages.add(upcoming.arrival_s - clock.now, server.memory(0, False))
            clock.now = upcoming.arrival_s
            continue
        step = server.schedule()
        server.moves.clear()  # blocks have no contents here, so there is nothing to move
        sampled, computed = [request for _, request in step.sampled], step.computed_tokens
        seconds = cost.seconds(computed, computed + sum(step.starts))
        if clock.now <= until:
            averages.add(seconds, server.memory(computed, memory_refused(server, step)), len(step.requests),
                         sum([len(request.block_table) for request in step.requests]), len(sampled))
        watch(step, seconds)
        clock.now += seconds
        _record_latencies(sampled, clock.now, first_tokens, gaps)
        server.update(step, dict.fromkeys(sampled, 0))
        if server.stats.num_steps % 256 == 0:
            progress(server.stats.num_finished)
    return _result(averages, first_tokens, gaps, clock.now - start, storms.num_storms, server.stats)


def memory_refused(server: Server, step: Step) -> bool:
    """Whether the first waiting request lacks only memory: the planned step leaves it a seat, and tokens."""
    return bool(server.waiting) and step.budget > 0 and len(server.running) < server.max_num_seqs


def as_request(arrival: TraceRequest, index: int) -> Request:
    params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
    return Request(str(index), arrival.prompt, params, priority=arrival.priority)


def _add(server: Server, arrival: TraceRequest, index: int) -> None:
    request = as_request(arrival, index)
    server.add(request)
    request.metrics.arrival_time = request.waiting_since = arrival.arrival_s  # perhaps in the middle of a step


def _record_latencies(sampled: Sequence[Request], now: float, first_tokens: Histogram, gaps: Histogram) -> None:
    """Of the tokens that `sampled` get at `now`, before they are recorded.

    Nearly all requests got their last token at the same time: one addition counts them all.
    """
    times = Counter([request.metrics.last_token_time for request in sampled])
    if times.pop(None, 0):
        for request in sampled:
            if request.metrics.first_token_time is None:
                first_tokens.add(now - request.metrics.arrival_time)
    for before, requests in times.items():
        gaps.add(now - before, requests)


def _result(averages: Averages, first_tokens: Histogram, gaps: Histogram, simulated_s: float, num_storms: int,
            stats: SchedulerStats) -> Result:
    slots, seconds = sum(averages.memory), averages.seconds
    return Result(
        memory={name: share / slots for name, share in zip(MemoryUse._fields, averages.memory)},
        average_batch=averages.requests / seconds, average_table=averages.table_entries / averages.requests,
        tokens_per_s=averages.output_tokens / seconds, ttft_p50_s=first_tokens.percentile(50),
        ttft_p99_s=first_tokens.percentile(99), ttft_max_s=first_tokens.percentile(100),
        tbt_p50_s=gaps.percentile(50), tbt_p99_s=gaps.percentile(99), tbt_max_s=gaps.percentile(100),
        simulated_s=simulated_s, goodput=goodput(stats.computed_tokens, stats.recomputed_tokens),
        hit_share=stats.prompt_hit_tokens / stats.prompt_tokens, num_storms=num_storms, counts=stats)
