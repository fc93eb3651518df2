"""Is work thrown away as fast as it is done? The window, the warning, its cause, and each request's own figures."""

from __future__ import annotations

import logging
import random

import pytest
from tests.crowds import by_arrival
from tests.oracle import tiny_model
from tests.test_engine import tiny_llm

from nanopaged import SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.admission import greedy, reserve
from nanopaged.pressure.storm import WINDOW_STEPS, StepFigures, StormWatch
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step
from nanopaged.waiting import AdmissionPolicy


def figures(goodput: float, **others: int) -> StepFigures:
    return StepFigures(1000, round(1000 * (1 - goodput)), **{"preemptions": 1, **others})


def holders(*full_blocks: int) -> list[Request]:
    """Requests that hold so many blocks at full length."""
    requests = [Request(str(i), [1], SamplingParams()) for i in range(len(full_blocks))]
    for request, blocks in zip(requests, full_blocks):
        request.full_blocks = blocks
    return requests


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("seed", range(4))
def test_the_window_is_the_exact_sum_of_the_last_64_steps(seed: int) -> None:
    rng, watch, history = random.Random(seed), StormWatch(100), []
    for step in range(200):
        computed = rng.choice([0, rng.randint(1, 10**6)])
        history.append(StepFigures(computed, rng.randint(0, computed), *(rng.randint(0, 999) for _ in range(5))))
        watch.record(history[-1])
        recent = history[-64:]
        assert watch.window == tuple(map(sum, zip(*recent))), f"seed {seed}, step {step}"
        total = sum(f.computed_tokens for f in recent)
        lost = sum(f.recomputed_tokens for f in recent)
        assert watch.window.goodput == pytest.approx(1 - lost / total if total else 1.0, abs=1e-12), f"seed {seed}"
        assert len(watch.steps) == len(recent) and watch.before == tuple(
            map(sum, zip(StepFigures(), *history[:-64]))), f"seed {seed}, step {step}"


def test_nothing_is_called_a_storm_before_the_window_is_full(caplog: pytest.LogCaptureFixture) -> None:
    watch = StormWatch(100)
    for _ in range(63):
        watch.record(figures(0.1))
    assert warnings(caplog) == [] and not watch.storming
    watch.record(figures(0.1))
    assert len(warnings(caplog)) == watch.num_storms == 1 and watch.storming


@pytest.mark.parametrize("goodput, storms", [(0.799, 1), (0.8, 0), (0.85, 0), (1.0, 0)])
def test_a_storm_begins_below_a_goodput_of_four_fifths(goodput: float, storms: int) -> None:
    watch = StormWatch(100)
    for _ in range(200):
        watch.record(figures(goodput))
    assert watch.num_storms == storms


def test_a_storm_that_wavers_is_one_storm_and_ends_when_goodput_has_recovered(caplog: pytest.LogCaptureFixture) -> None:
    watch, storms = StormWatch(100), []
    for goodput in (1.0, 0.7, 0.85, 0.75, 0.89, 0.5, 0.91, 0.85, 0.81, 0.79):
        for _ in range(WINDOW_STEPS):
            watch.record(figures(goodput))
        storms.append((watch.storming, watch.num_storms))
    assert storms == [(False, 0)] + [(True, 1)] * 5 + [(False, 1)] * 3 + [(True, 2)]
    assert len(warnings(caplog)) == 2


def test_the_warning_names_goodput_preemptions_and_the_likely_cause(caplog: pytest.LogCaptureFixture) -> None:
    watch = StormWatch(50)
    watch.pressed = holders(30, 30)
    for _ in range(WINDOW_STEPS):
        watch.record(figures(0.25, preemptions=3, running=7))
    (message,) = warnings(caplog)
    assert message.startswith(
        "eviction storm: over the last 64 steps goodput is 0.25 (48000 of 64000 tokens were computed before), with "
        "3.00 preemptions a step and 7.0 requests running in 50 blocks. Likely cause: ")
    assert [record.name for record in caplog.records] == ["nanopaged.pressure.storm"]


WATERMARK = "Likely cause: the watermark is too low"
UNKNOWN = "No known cause fits"


@pytest.mark.parametrize("held, hits_before, hits, words", [
    ((70, 5, 5, 5), 0, 0, "Likely cause: one very long request ('0' holds up to 70 of 100 blocks)"),
    ((50, 5, 5, 5), 0, 0, UNKNOWN),
    ((50, 20, 20, 20), 0, 0, WATERMARK),
    ((10,) * 15, 50, 10, "Likely cause: sharing was lost (of admitted tokens 10% were found in the pool, 50% before)"),
    ((10,) * 15, 50, 25, WATERMARK),
    ((10,) * 15, 30, 0, WATERMARK),
    ((40, 40, 40), 0, 0, "Likely cause: the pool is too small for even the running set"),
    ((33,) * 4, 0, 0, WATERMARK),
    ((34,) * 4, 0, 0, "Likely cause: the pool is too small for even the running set"),
    ((70, 5, 5, 5), 50, 0, "Likely cause: one very long request"),
    ((40, 40, 40), 50, 0, "Likely cause: sharing was lost"),
    ((25, 25, 25, 25), 0, 0, "No known cause fits: the requests that ran when the pool was last full need 100 of 100"),
    ((26, 25, 25, 25), 0, 0, "Likely cause: the watermark is too low (a request at full length holds 25.2 blocks, and "
                             "those that ran together 101 of 100)"),
    ((9,) * 5, 0, 0, "No known cause fits: the requests that ran when the pool was last full need 45 of 100 blocks"),
    ((9,) * 5, 50, 10, "Likely cause: sharing was lost"),
    ((), 0, 0, UNKNOWN),
])
def test_the_likely_cause_is_the_first_that_fits_the_numbers(
        held: tuple[int, ...], hits_before: int, hits: int, words: str, caplog: pytest.LogCaptureFixture) -> None:
    watch = StormWatch(100)
    watch.pressed = holders(*held)
    calm = StepFigures(computed_tokens=100, running=len(held), admitted_tokens=100)
    for _ in range(WINDOW_STEPS):
        watch.record(calm._replace(hit_tokens=hits_before))
    for _ in range(WINDOW_STEPS - 1):
        watch.record(calm._replace(hit_tokens=hits))
    assert warnings(caplog) == []
    # One step is enough to begin a storm, so that the window holds nothing of the time before.
    watch.record(StepFigures(10**6, 10**6, 1, len(held), 90, 100, hits))
    (message,) = warnings(caplog)
    causes = message.count("Likely cause") + message.count("No known cause")
    assert words in message and causes == 1


def test_the_cause_is_judged_by_the_requests_that_ran_when_the_pool_was_last_full() -> None:
    watch = StormWatch(100)
    running, preempted, later = holders(40, 30), holders(50), holders(1, 1, 1)
    watch.stepped(Step(64, requests=running, num_tokens=[1, 1], preempted=preempted))
    assert set(watch.pressed) == {*running, *preempted}
    watch.stepped(Step(64, requests=later, num_tokens=[1, 1, 1]))
    assert set(watch.pressed) == {*running, *preempted}, "in this step the pool was not full"
    watch.stepped(Step(64, requests=later, num_tokens=[1, 1, 1], preempted=preempted))
    assert set(watch.pressed) == {*later, *preempted}


def serve(admission: AdmissionPolicy, seed: int,
          swap_blocks: int = 0) -> tuple[Scheduler, StormWatch, list[Request], float]:
    """Serves 60 random requests from a tight pool, with random tokens for a model; also the lowest goodput seen."""
    rng, lowest, watch = random.Random(seed), 1.0, StormWatch(32)
    arguments = (BlockAllocator(32, 4, False), 16, 64, 64, admission)
    scheduler = SwappingScheduler(*arguments, swap_blocks=swap_blocks) if swap_blocks else Scheduler(*arguments)
    scheduler.listeners.append(watch)
    requests = [Request(str(i), [1] * rng.randint(8, 16), SamplingParams(max_tokens=rng.randint(12, 20)))
                for i in range(60)]
    for request in requests:
        scheduler.add(request)
    furthest, again = dict.fromkeys(requests, 0), dict.fromkeys(requests, 0)
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            again[request] += max(0, min(start + num_tokens, furthest[request]) - start)
            furthest[request] = max(start + num_tokens, furthest[request])
        scheduler.moves.clear()
        scheduler.update(step, {request: rng.randrange(50) for _, request in step.sampled})
        if len(watch.steps) == WINDOW_STEPS:
            lowest = min(lowest, watch.window.goodput)
    assert {request: request.metrics.recomputed_tokens for request in requests} == again, f"seed {seed}"
    return scheduler, watch, requests, lowest


@pytest.mark.policy
@pytest.mark.parametrize("seed", range(5))
def test_greedy_admission_to_a_tight_pool_is_one_storm_and_reserve_is_none(
        seed: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    scheduler, watch, requests, lowest = serve(greedy, seed)
    assert lowest < 0.8, f"seed {seed}"
    assert len(warnings(caplog)) == watch.num_storms == 1, f"seed {seed}"
    assert "Likely cause: the watermark is too low" in warnings(caplog)[0], f"seed {seed}"
    caplog.clear()
    calm, watch, _, lowest = serve(reserve, seed)
    assert warnings(caplog) == [] and watch.num_storms == 0 and lowest == 1.0, f"seed {seed}"
    assert calm.stats.computed_tokens < 0.9 * scheduler.stats.computed_tokens, f"seed {seed}"
    assert tuple(capsys.readouterr()) == ("", ""), "the library printed"


@pytest.mark.parametrize("swap_blocks", [0, 6, 100])
def test_recomputed_tokens_are_counted_exactly_for_each_request_and_in_total(swap_blocks: int) -> None:
    scheduler, _, requests, _ = serve(greedy, 1, swap_blocks)
    metrics = [request.metrics for request in requests]
    assert sum(m.recomputed_tokens for m in metrics) == scheduler.stats.recomputed_tokens
    assert sum(m.preemptions for m in metrics) == scheduler.stats.num_preemptions > 0
    assert any(m.preemptions == 0 for m in metrics)
    assert all(m.recomputed_tokens == 0 for m in metrics if m.preemptions == 0)
    assert (scheduler.stats.recomputed_tokens == 0) == (swap_blocks == 100)
    assert scheduler.stats.output_tokens == sum(m.output_tokens for m in metrics)
    needed = sum(len(request.token_ids) - 1 for request in requests)
    assert scheduler.stats.computed_tokens == needed + scheduler.stats.recomputed_tokens


def test_the_times_of_a_request_are_read_from_the_clock() -> None:
    now = [0.0]
    scheduler = Scheduler(BlockAllocator(4, 4, False), 2, 64, 64, greedy, by_arrival, clock=lambda: now[0])

    def step_ending_at(start: float, end: float) -> None:
        now[0] = start
        step = scheduler.schedule()
        now[0] = end
        scheduler.update(step, {request: 7 for _, request in step.sampled})

    first = Request("first", [1] * 7, SamplingParams(max_tokens=4))
    second = Request("second", [1] * 7, SamplingParams(max_tokens=3))
    scheduler.add(first)
    now[0] = 1.0
    scheduler.add(second)
    assert first.metrics.time_to_first_token_s is None
    step_ending_at(5.0, 7.0)
    assert (first.metrics.time_to_first_token_s, second.metrics.time_to_first_token_s) == (7.0, 6.0)
    assert first.metrics.time_between_tokens_s is None, "there is no time between fewer than two"
    step_ending_at(8.0, 10.0)
    step_ending_at(20.0, 21.0)  # the ninth token of the first needs a third block: the second gives way
    assert second.metrics.preemptions == 1 and scheduler.running == [first]
    step_ending_at(22.0, 28.0)
    step_ending_at(30.0, 32.0)
    assert not scheduler.has_unfinished()
    assert (first.metrics.waiting_s, second.metrics.waiting_s) == (5.0, 4.0 + 10.0)
    assert first.metrics.time_between_tokens_s == (28.0 - 7.0) / 3
    assert second.metrics.time_between_tokens_s == (32.0 - 7.0) / 2
    assert (first.metrics.finished_time, second.metrics.finished_time) == (28.0, 32.0)
    assert (first.metrics.recomputed_tokens, second.metrics.recomputed_tokens) == (0, 8)


def test_continuations_have_the_waiting_time_of_their_prompt_and_each_its_own_tokens() -> None:
    now = [0.0]
    scheduler = Scheduler(BlockAllocator(9, 4), 2, 64, 64, clock=lambda: now[0])
    members = [Request(f"0.{i}", [1] * 5, SamplingParams(n=2, max_tokens=2)) for i in range(2)]
    members[0].followers = members[1:]
    scheduler.add(members[0])
    now[0] = 3.0
    step = scheduler.schedule()
    now[0] = 4.0
    scheduler.update(step, dict(zip(members, [7, 8])))
    for member in members:
        assert (member.metrics.waiting_s, member.metrics.time_to_first_token_s) == (3.0, 4.0)
        assert member.metrics.output_tokens == 1


def test_the_engine_reports_goodput_preemptions_and_occupancy_over_the_window() -> None:
    llm = tiny_llm(tiny_model(), num_blocks=8, admission="greedy", enable_prefix_caching=False, max_num_seqs=3)
    assert (llm.stats().goodput, llm.stats().preemptions_per_step, llm.stats().pool_occupancy) == (1.0, 0.0, 0.0)
    for token in range(3):
        llm.add_request([token] * 9, SamplingParams(temperature=0.0, max_tokens=50))
    held = []
    while llm.has_unfinished_requests():
        outputs = llm.step()
        # A request that ended with this step gave its blocks back before they were counted.
        held.append(llm.stats().referenced_blocks / 8)
        stats, last = llm.stats(), len(held)
        assert stats.pool_occupancy == pytest.approx(sum(held[-64:]) / min(last, 64))
        if last <= 64:
            assert stats.preemptions_per_step == pytest.approx(stats.num_preemptions / last)
            assert stats.goodput == pytest.approx(1 - stats.recomputed_tokens / stats.computed_tokens)
    assert stats.num_preemptions > 0 and 0 < stats.goodput < 1 and outputs[0].finished
    assert stats.num_steps == last > 64
    assert stats.num_storms == llm.storm_watch.num_storms
