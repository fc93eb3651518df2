"""The simulator: the real scheduler, a formula for the seconds of a step, and the figures that result."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import pytest

from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure import order
from nanopaged.pressure.admission import greedy
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.simulate import traces
from nanopaged.simulate.contiguous import RESERVATIONS, ContiguousAllocator, ContiguousScheduler, MemoryUse
from nanopaged.simulate.simulator import (SHORTEST_STEP_S, Averages, Clock, Histogram, PagedServer, Result, Server,
                                          StepCost, SwappingServer, Trace, simulate, summarize)
from nanopaged.simulate.traces import DATASETS, TraceRequest
from nanopaged.step import Listener
from nanopaged.waiting import OrderPolicy, fcfs, watermark
from tests.recount import assert_nothing_is_held

SECOND = StepCost(1.0, 0.0, 0.0)  # every step takes one


def paged(clock: Clock, num_blocks: int, block_size: int = 4, seats: int = 8, **others: object) -> PagedServer:
    kind = SwappingServer if "swap_blocks" in others else PagedServer
    return kind(BlockAllocator(num_blocks, block_size), seats, 64, 128, clock=clock, **others)


def fixed(*requests: tuple[float, int, int]) -> Trace:
    """A trace of (arrival, prompt length, output length)."""
    return lambda: iter([TraceRequest(arrival, [i] * prompt, output)
                         for i, (arrival, prompt, output) in enumerate(requests)])


def small_trace(seed: int, num_requests: int = 60) -> Trace:
    return partial(traces.generate, DATASETS["alpaca"], num_requests, 2.0, 256, 0.3, seed)


def small_server(name: str, clock: Clock, order: OrderPolicy = fcfs) -> Server:
    if name == "paged":
        return PagedServer(BlockAllocator(64, 16), 32, 256, 256, order=order, clock=clock)
    return ContiguousScheduler(ContiguousAllocator(64 * 16), RESERVATIONS[name], 32, 256, 256, clock, order)


def small_run(name: str, seed: int) -> tuple[Server, Result]:
    clock, trace = Clock(), small_trace(seed)
    server = small_server(name, clock)
    return server, simulate(trace, summarize(trace).last_arrival_s, server, clock, SECOND)


class Added(Listener):
    """The requests that a server was given, in order."""

    def __init__(self, server: Scheduler) -> None:
        self.requests: list[Request] = []
        server.listeners.append(self)

    def added(self, request: Request) -> None:
        self.requests.append(request)


def test_a_run_of_two_requests_matches_figures_computed_by_hand() -> None:
    """8 blocks of 4 slots, steps of one second. A comes at 0 s, 3 + 3 tokens; B at 1 s, 2 + 2 tokens."""
    clock = Clock()
    result = simulate(fixed((0.0, 3, 3), (1.0, 2, 2)), 0, paged(clock, 8), clock, SECOND)
    # seconds   0-1   1-2     2-3
    # A writes  3     1       1      in 1, 1 and 2 blocks
    # B writes        2       1      in    1 and 1 block
    assert clock.now == result.simulated_s == 3
    assert result.counts.num_finished == 2 and result.tokens_per_s == pytest.approx(5 / 3)
    assert result.memory["tokens"] == pytest.approx((3 + (4 + 2) + (5 + 3)) / 3 / 32)
    assert result.memory["internal"] == pytest.approx((1 + (0 + 2) + (3 + 1)) / 3 / 32)
    assert result.memory["free"] == pytest.approx((28 + 24 + 20) / 3 / 32)
    assert result.memory["external"] == result.memory["reserved"] == 0
    assert result.average_batch == pytest.approx((1 + 2 + 2) / 3)
    assert result.average_table == pytest.approx((1 + 2 + 3) / (1 + 2 + 2))
    assert result.ttft_p50_s == result.ttft_p99_s == pytest.approx(1.0, rel=0.01)
    assert result.tbt_p50_s == result.tbt_p99_s == pytest.approx(1.0, rel=0.01)
    assert result.goodput == 1 and result.hit_share == 0


def test_the_shortest_step_advances_a_clock_that_shows_the_seconds_since_1970() -> None:
    clock = Clock()
    result = simulate(fixed((1.7e9, 3, 9)), 0, paged(clock, 8), clock, StepCost(SHORTEST_STEP_S, 0.0, 0.0))
    assert result.simulated_s == pytest.approx(9 * SHORTEST_STEP_S, rel=0.2)
    assert result.tbt_p99_s == pytest.approx(SHORTEST_STEP_S, rel=0.2)


def test_time_to_first_token_counts_from_the_arrival_even_in_the_middle_of_a_step() -> None:
    clock = Clock()
    result = simulate(fixed((0.0, 3, 2), (0.25, 3, 1)), 0, paged(clock, 8), clock, SECOND)
    assert result.ttft_p50_s == pytest.approx(1.0, rel=0.01)
    assert result.ttft_p99_s == result.ttft_max_s == pytest.approx(1.75, rel=0.01)


def test_time_between_tokens_counts_every_gap_of_every_request() -> None:
    """Two decode steps of four requests take 5 s each, then three of the last one 2 s each: 8 long gaps, 3 short."""
    clock = Clock()
    result = simulate(fixed(*[(0.0, 1, 3)] * 3, (0.0, 1, 6)), 0, paged(clock, 16), clock, StepCost(1.0, 1.0, 0.0))
    assert result.tbt_p50_s == result.tbt_p99_s == pytest.approx(5.0, rel=0.01)
    clock = Clock()
    result = simulate(fixed((0.0, 1, 3), (0.0, 1, 9)), 0, paged(clock, 16), clock, StepCost(1.0, 1.0, 0.0))
    assert result.tbt_p50_s == pytest.approx(2.0, rel=0.01), "4 gaps of 3 s, 6 of 2 s"
    assert result.tbt_max_s == pytest.approx(3.0, rel=0.01)


def test_idle_time_is_skipped_and_counts_as_free_memory() -> None:
    clock = Clock()
    result = simulate(fixed((0.0, 3, 1), (9.0, 4, 1)), 0, paged(clock, 1, 8), clock, SECOND)
    assert result.simulated_s == 10 and result.counts.num_steps == 2
    assert result.memory["tokens"] == pytest.approx((3 + 4) / 8 / 10) and result.average_batch == pytest.approx(0.2)


def test_a_trace_of_one_request_has_averages_too() -> None:
    clock, trace = Clock(), fixed((5.0, 3, 2))
    result = simulate(trace, summarize(trace).last_arrival_s, paged(clock, 8), clock, SECOND)
    assert result.average_table == 1 and result.tbt_p50_s == pytest.approx(1.0, rel=0.01) and result.simulated_s == 2


@pytest.mark.parametrize("start", [3600.0, 1.7e9])
@pytest.mark.parametrize("last", [0.0, 20.0])
def test_averages_start_with_the_first_arrival_at_any_time_of_day(start: float, last: float) -> None:
    """Also if all arrive at once, and the averages are over the whole run."""
    results = []
    for midnight in (0.0, start):
        clock, trace = Clock(), fixed((midnight, 3, 9), (midnight, 3, 3), (midnight + last, 2, 30))
        results.append(asdict(simulate(trace, summarize(trace).last_arrival_s, paged(clock, 16), clock, SECOND)))
    assert results[0] == results[1]
    assert summarize(trace)[1:3] == (start, start + last)


def test_a_watcher_is_told_each_planned_step_as_it_begins_also_after_the_averages_end() -> None:
    clock, seen = Clock(), []
    server = paged(clock, 4)
    simulate(fixed((0.0, 4, 3)), 0.5, server, clock, StepCost(1.0, 0.5, 0.0), watch=lambda step, seconds: seen.append(
        (clock.now, seconds, step.computed_tokens, server.stats.num_steps)))
    assert seen == [(0.0, 3.0, 4, 0), (3.0, 1.5, 1, 1), (4.5, 1.5, 1, 2)]


def test_averages_end_at_the_given_time() -> None:
    clock = Clock()
    result = simulate(fixed((0.0, 4, 8)), 1.5, paged(clock, 4), clock, SECOND)
    assert result.memory["tokens"] == pytest.approx((4 + 5) / 2 / 16) and result.simulated_s == 8


def test_free_blocks_that_are_refused_to_the_first_waiting_request_are_external() -> None:
    """A request with 3 of 4 blocks runs, and the watermark is half the pool."""
    clock = Clock()
    server = paged(clock, 4, admission=watermark(0.5))
    result = simulate(fixed((0.0, 9, 1), (0.0, 8, 1)), 0.5, server, clock, SECOND)
    assert result.memory == {name: pytest.approx(slots / 16) for name, slots in zip(MemoryUse._fields, (9, 0, 3, 4, 0))}


def test_hits_are_the_prompt_tokens_that_earlier_requests_left_in_full_blocks() -> None:
    """Prompts of 9, 8 and 10 equal tokens in blocks of 4. The last token of a prompt is always computed."""
    clock, prompts = Clock(), (9, 8, 10)
    result = simulate(lambda: iter([TraceRequest(5.0 * i, [7] * prompts[i], 2) for i in range(3)]), 0, paged(clock, 8),
                   clock, SECOND)
    assert result.hit_share == pytest.approx((0 + 4 + 8) / (9 + 8 + 10))


def test_the_cost_of_a_step_is_the_sum_of_its_three_parts() -> None:
    clock = Clock()
    result = simulate(fixed((0.0, 5, 3)), 0, paged(clock, 8), clock, StepCost(1.0, 0.1, 0.01))
    assert result.simulated_s == pytest.approx(3 * 1.0 + 0.1 * (5 + 1 + 1) + 0.01 * (5 + 6 + 7))


@pytest.mark.parametrize("values", [(0.0, 1.0, 1.0), (1.0, -1.0, 0.0), (1.0, 0.0, math.nan), (1.0, 1e308, 0.0)])
def test_an_invalid_cost_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError):
        StepCost(*values)


@pytest.mark.parametrize("name", ["paged", *RESERVATIONS])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_output_length_and_no_memory_is_held_at_the_end(name: str, seed: int) -> None:
    clock, trace = Clock(), small_trace(seed)
    server = small_server(name, clock)
    added = Added(server).requests
    result = simulate(trace, 0, server, clock, SECOND)
    assert [r.num_output_tokens for r in added] == [wanted.output_tokens for wanted in trace()], f"seed {seed}"
    assert [r.token_ids[: r.num_prompt_tokens] for r in added] == [wanted.prompt for wanted in trace()], f"seed {seed}"
    assert [r.metrics.arrival_time for r in added] == [wanted.arrival_s for wanted in trace()], f"seed {seed}"
    assert sum(result.memory.values()) == pytest.approx(1) and min(result.memory.values()) >= 0, f"seed {seed}"
    assert not server.has_unfinished() and server.memory(0, False) == MemoryUse(0, 0, 0, 0, 64 * 16)
    server.check_invariants()
    assert_nothing_is_held(server, f"seed {seed}")
    if name != "paged":
        assert server.memory_ranges.gaps == [(0, 64 * 16)], f"seed {seed}"


def test_a_pool_that_is_too_small_causes_preemptions_and_costs_goodput() -> None:
    clock = Clock()
    server = paged(clock, 12, admission=greedy)
    result = simulate(fixed(*[(0.0, 8, 20)] * 6), 0, server, clock, SECOND)
    server.check_invariants()
    assert result.counts.num_preemptions > 0 and result.goodput < 1 and result.counts.num_finished == 6
    assert result.goodput == 1 - result.counts.recomputed_tokens / result.counts.computed_tokens


def test_swapped_requests_return_without_being_computed_again() -> None:
    clock = Clock()
    server = paged(clock, 12, admission=greedy, swap_blocks=64)
    result = simulate(fixed(*[(0.0, 8, 20)] * 6), 0, server, clock, SECOND)
    assert result.counts.num_preemptions > 0 and result.goodput == 1 and result.counts.swapped_in_tokens > 0
    assert server.moves == [], "they are dropped in each step, so that they do not accumulate"


def test_a_trace_is_read_as_its_requests_arrive() -> None:
    """Steps of one second; requests arrive faster than they are served, so many wait."""
    clock, read_at = Clock(), []

    def trace() -> Iterator[TraceRequest]:
        for i in range(200):
            read_at.append(clock.now)
            yield TraceRequest(0.25 * i, [i] * 4, 4)

    server = paged(clock, 64, seats=3)
    simulate(trace, 0, server, clock, SECOND)
    assert read_at[1:] == [math.ceil(0.25 * i) for i in range(199)], "one request ahead of those that have arrived"
    assert server.stats.num_finished == 200


def test_all_requests_that_have_arrived_are_queued() -> None:
    clock, lengths = Clock(), []
    server = paged(clock, 64, seats=3)
    schedule = server.schedule
    server.schedule = lambda: (lengths.append(len(server.waiting)), schedule())[1]
    simulate(fixed(*[(0.0, 4, 4)] * 200, (4.5, 4, 4)), 0, server, clock, SECOND)
    assert lengths[:6] == [200, 197, 197, 197, 197, 195], "the last one arrives in the fifth step"
    assert server.stats.num_finished == 201


@pytest.mark.parametrize("name", ["paged", *RESERVATIONS])
def test_an_order_policy_chooses_among_all_requests_that_have_arrived(name: str) -> None:
    """A short request arrives last, after many more than there are seats, and is the first to finish."""
    clock = Clock()
    server = small_server(name, clock, order.shortest)
    added = Added(server).requests
    simulate(fixed(*[(0.0, 4, 8)] * 99, (0.0, 4, 2)), 0, server, clock, SECOND)
    assert added[-1].metrics.finished_time == 2.0 < min(request.metrics.finished_time for request in added[:-1])


def test_the_priorities_of_a_trace_reach_the_scheduler() -> None:
    clock, priorities = Clock(), (0, 1, -1, 0)
    server = paged(clock, 16, seats=1, order=order.priority)
    added = Added(server).requests
    simulate(lambda: iter([TraceRequest(0.0, [i] * 4, 1, priorities[i]) for i in range(4)]), 0, server, clock, SECOND)
    assert [request.metrics.finished_time for request in added] == [2, 4, 1, 3]


@pytest.mark.policy
@pytest.mark.parametrize("name", ["paged", "oracle"])
@pytest.mark.parametrize("seed", range(3))
def test_shortest_first_lowers_the_mean_time_to_first_token_under_overload(name: str, seed: int) -> None:
    means = {}
    for policy in (fcfs, order.shortest):
        clock = Clock()
        server = small_server(name, clock, policy)
        added = Added(server).requests
        simulate(small_trace(seed, 200), 0, server, clock, SECOND)
        means[policy] = sum(request.metrics.time_to_first_token_s for request in added) / len(added)
    assert means[order.shortest] < 0.8 * means[fcfs], f"seed {seed}: {means}"


@pytest.mark.parametrize("name", ["paged", *RESERVATIONS])
@pytest.mark.parametrize("seed", range(2))
def test_requests_finish_when_they_do_in_a_loop_written_by_hand(name: str, seed: int) -> None:
    clock, trace = Clock(), small_trace(seed, 40)
    server = small_server(name, clock)
    arrivals, requests = list(enumerate(trace())), list[Request]()
    while arrivals or server.has_unfinished():
        while arrivals and arrivals[0][1].arrival_s <= clock.now:
            index, arrival = arrivals.pop(0)
            params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
            requests.append(Request(str(index), arrival.prompt, params))
            server.add(requests[-1])
        if not server.has_unfinished():
            clock.now = arrivals[0][1].arrival_s
            continue
        step = server.schedule()
        clock.now += 1.0
        server.update(step, {request: 0 for _, request in step.sampled})
    finished = {request.request_id: request.metrics.finished_time for request in requests}

    clock = Clock()
    server = small_server(name, clock)
    added = Added(server).requests
    simulate(trace, 0, server, clock, SECOND)
    assert {request.request_id: request.metrics.finished_time for request in added} == finished, f"seed {seed}"


def test_storms_are_counted() -> None:
    clock = Clock()
    result = simulate(fixed(*[(0.0, 8, 60)] * 40), 0, paged(clock, 40, seats=40, admission=greedy), clock, SECOND)
    assert result.num_storms > 0 and result.goodput < 0.8
    clock = Clock()
    assert simulate(fixed(*[(0.0, 8, 60)] * 40), 0, paged(clock, 800), clock, SECOND).num_storms == 0


@pytest.mark.policy
@pytest.mark.parametrize("seed", range(3))
def test_paging_runs_the_largest_batches_and_then_the_baselines_that_know_more(seed: int) -> None:
    results = {name: small_run(name, seed)[1] for name in ("paged", *RESERVATIONS)}
    batches = [results[name].average_batch for name in ("paged", "oracle", "pow2", "max")]
    assert batches == sorted(batches, reverse=True) and batches[0] > batches[-1], f"seed {seed}: {batches}"
    shares = [results[name].memory["tokens"] for name in ("paged", "oracle", "pow2", "max")]
    assert shares == sorted(shares, reverse=True), f"seed {seed}: {shares}"


@pytest.mark.parametrize("name", ["paged", "pow2"])
def test_the_same_seed_gives_the_same_result_and_another_does_not(name: str) -> None:
    first, again, other = (asdict(small_run(name, seed)[1]) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_within_one_percent_of_the_sorted_list(seed: int) -> None:
    rng, histogram = random.Random(seed), Histogram()
    values = sorted(rng.lognormvariate(-3, 2) for _ in range(2000))
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 99, 100):
        wanted = values[20 * percent - 1]
        assert histogram.percentile(percent) == pytest.approx(wanted, rel=0.01), f"seed {seed}, {percent}"
    assert Histogram().percentile(50) is None
    assert len(histogram.counts) < 1700


def test_averages_are_weighted_by_seconds() -> None:
    averages = Averages()
    averages.add(1.0, MemoryUse(8, 0, 0, 0, 2), requests=4, output_tokens=4)
    averages.add(3.0, MemoryUse(0, 0, 0, 0, 10), requests=0, output_tokens=1)
    assert (averages.seconds, averages.requests, averages.output_tokens) == (4.0, 4.0, 5)
    assert averages.memory == [8, 0, 0, 0, 32]
