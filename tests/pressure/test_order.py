"""Which waiting request is served first, and which request gives way? For every order, and for each alone."""

from __future__ import annotations

import math
import random
from itertools import count
from statistics import mean

import pytest
from tests.crowds import random_request, record, request_with, take_step, whatever_fits
from tests.oracle import assert_dense_continuation, tiny_model
from tests.recount import assert_consistent, assert_nothing_is_held
from tests.test_engine import random_prompts, tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.order import by_name, priority, shortest
from nanopaged.request import Request, RequestStatus
from nanopaged.scheduler import Scheduler
from nanopaged.waiting import OrderPolicy, fcfs

MODEL = tiny_model()


def longest_prompt(request: Request) -> float:
    return -request.num_prompt_tokens


ORDERS = [fcfs, priority, shortest, longest_prompt]
every_order = pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)


class Crowd:
    """Random requests that come to a tight pool over time."""

    def __init__(self, order: OrderPolicy, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        allocator = BlockAllocator(rng.choice([12, 16]), 4, rng.random() < 0.5)
        self.scheduler = Scheduler(allocator, rng.choice([8, 16]), rng.choice([7, 12, 200]), 64, whatever_fits, order)
        self.to_come = [random_request(rng, i) for i in range(20)]
        self.where = f"seed {seed}"

    def goes_on(self) -> bool:
        """Adds the requests that come before the next step; False after the last step."""
        while self.to_come and (self.rng.random() < 0.4 or not self.scheduler.has_unfinished()):
            self.scheduler.add(self.to_come.pop())
        return self.scheduler.has_unfinished()

    def assert_pressed(self) -> None:
        assert_nothing_is_held(self.scheduler, self.where)
        assert self.scheduler.stats.num_preemptions > 0, f"{self.where}: the pool was meant to be too small"


@every_order
@pytest.mark.parametrize("seed", range(6))
def test_the_first_request_by_key_advances_in_every_step_and_is_never_preempted(order: OrderPolicy, seed: int) -> None:
    crowd = Crowd(order, seed)
    while crowd.goes_on():
        first = [*crowd.scheduler.running, *crowd.scheduler.waiting][0]
        computed, preemptions = first.num_computed_tokens, first.metrics.preemptions
        step = take_step(crowd.scheduler, crowd.rng, crowd.where)
        assert first in step.requests and first.metrics.preemptions == preemptions, crowd.where
        assert first.status is RequestStatus.FINISHED or first.num_computed_tokens > computed, crowd.where
    crowd.assert_pressed()


@every_order
@pytest.mark.parametrize("seed", range(6))
def test_running_requests_are_planned_in_key_order_and_the_last_by_key_give_way(order: OrderPolicy, seed: int) -> None:
    crowd = Crowd(order, seed)
    while crowd.goes_on():
        running = sorted(crowd.scheduler.running, key=lambda request: request.key)
        step = crowd.scheduler.schedule()
        stay = len(running) - len(step.preempted)
        assert step.preempted == running[stay:][::-1], f"{crowd.where}: others than the last by key gave way"
        planned = [request for request in running if request in step.requests]
        assert planned == running[: len(planned)], f"{crowd.where}: a request was passed over"
        num_tokens = dict(zip(step.requests, step.num_tokens))
        for request in planned[:-1]:
            assert request.num_computed_tokens + num_tokens[request] == len(request.token_ids), \
                f"{crowd.where}: {request} got less than the budget allowed, and later requests got tokens"
        assert len(planned) == stay or step.budget == 0, crowd.where
        record(crowd.scheduler, step, crowd.rng)
    crowd.assert_pressed()


@every_order
@pytest.mark.parametrize("seed", range(6))
def test_the_first_in_the_queue_are_admitted_and_none_that_preempts_a_running_request(
        order: OrderPolicy, seed: int) -> None:
    crowd = Crowd(order, seed)
    while crowd.goes_on():
        queue = sorted(crowd.scheduler.waiting, key=lambda request: request.key)
        step = crowd.scheduler.schedule()
        admitted = [admission.request for admission in step.admitted]
        assert admitted == queue[: len(admitted)], f"{crowd.where}: a request was overtaken"
        assert not admitted or not step.preempted, f"{crowd.where}: admitted while others gave way"
        record(crowd.scheduler, step, crowd.rng)
    crowd.assert_pressed()


def preempted_behind_others(order: OrderPolicy) -> int:
    """In how many steps of random runs the requests that gave way came behind another; checks their places."""
    behind_others = 0
    for seed in range(6):
        crowd = Crowd(order, seed)
        keys: dict[Request, tuple[float, ...]] = {}
        while crowd.goes_on():
            step = take_step(crowd.scheduler, crowd.rng, crowd.where)
            queue = list(crowd.scheduler.waiting)
            assert all(keys.setdefault(request, request.key) == request.key for request in queue), crowd.where
            assert [request.key for request in queue] == sorted(keys[request] for request in queue), crowd.where
            behind_others += bool(step.preempted) and queue[0] not in step.preempted
        crowd.assert_pressed()
    return behind_others


@pytest.mark.parametrize("order", [priority, shortest, longest_prompt], ids=lambda order: order.__name__)
def test_a_preempted_request_waits_at_the_place_that_its_key_gives_it(order: OrderPolicy) -> None:
    assert preempted_behind_others(order) > 0


@pytest.mark.policy
def test_under_fcfs_a_preempted_request_waits_at_the_front() -> None:
    assert preempted_behind_others(fcfs) == 0


@every_order
@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_the_order(order: OrderPolicy, seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, 8)
    llm = tiny_llm(MODEL, num_blocks=11, order=order, admission=whatever_fits,
                   max_num_batched_tokens=rng.choice([16, 200]))
    work, outputs = {}, {}
    while prompts or llm.has_unfinished_requests():
        if prompts and rng.random() < 0.5:
            params = SamplingParams(temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(8, 30),
                                    seed=rng.randrange(99))
            prompt = prompts.pop()
            work[llm.add_request(prompt, params, priority=rng.uniform(-1, 1))] = prompt, params
        outputs |= {output.request_id: output for output in llm.step()}
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler, f"seed {seed}")
    for request_id, (prompt, params) in work.items():
        (completion,) = outputs[request_id].outputs
        assert_dense_continuation(MODEL, prompt, params, params.seed, completion.token_ids, True, f"seed {seed}")
    assert llm.stats().num_preemptions > 0, f"seed {seed}"


def test_an_order_is_found_by_its_name() -> None:
    for order in (fcfs, priority, shortest):
        assert by_name(order.__name__) is order
        assert tiny_llm(MODEL, order=order.__name__).scheduler.order is order


def finished_in_turn(llm: LLM) -> list[str]:
    finished = []
    while llm.has_unfinished_requests():
        finished += [output.request_id for output in llm.step() if output.finished]
    return finished


@pytest.mark.policy
def test_priority_serves_the_lowest_first_and_equal_ones_by_arrival() -> None:
    llm = tiny_llm(MODEL, order="priority", max_num_seqs=1)
    params = SamplingParams(max_tokens=2)
    priorities = [3, 0, -1.5, 3, 10**400, -(10**400), 0]
    ids = [llm.add_request([1, 2], params, priority=value) for value in priorities[:-1]]
    ids.append(llm.add_request([1, 2], params))  # 0 unless told
    assert finished_in_turn(llm) == [ids[i] for i in (5, 2, 1, 6, 0, 3, 4)]


@pytest.mark.policy
def test_shortest_serves_the_smallest_max_tokens_first_and_equal_ones_by_arrival() -> None:
    llm = tiny_llm(MODEL, order="shortest", max_num_seqs=1)
    ids = [llm.add_request([1] * (20 - n), SamplingParams(max_tokens=n), priority=-n) for n in (5, 2, 9, 2, 1)]
    assert finished_in_turn(llm) == [ids[i] for i in (4, 1, 3, 0, 2)]


@pytest.mark.policy
def test_fcfs_serves_by_arrival_whatever_else_is_asked_for() -> None:
    llm = tiny_llm(MODEL, max_num_seqs=1)
    ids = [llm.add_request([1] * (20 - n), SamplingParams(max_tokens=n), priority=-n) for n in (5, 2, 9, 2, 1)]
    assert finished_in_turn(llm) == ids


@pytest.mark.policy
def test_an_urgent_request_waits_for_room_and_then_stands_before_the_others() -> None:
    scheduler, rng = Scheduler(BlockAllocator(8, 4, False), 4, 64, 64, whatever_fits, priority), random.Random(0)
    first, second = (request_with(i, [i] * 8, max_tokens, priority=5) for i, max_tokens in ((1, 20), (2, 3)))
    urgent = request_with(3, [3] * 20, 8, priority=-100)
    for request in (first, second):
        scheduler.add(request)
    take_step(scheduler, rng)
    scheduler.add(urgent)  # it needs 5 blocks, and 4 are left
    while second.status is RequestStatus.RUNNING:
        assert scheduler.running == [first, second] and list(scheduler.waiting) == [urgent]
        take_step(scheduler, rng)
    take_step(scheduler, rng)
    assert scheduler.running == [urgent, first] and scheduler.stats.num_preemptions == 0
    while not scheduler.stats.num_preemptions:
        take_step(scheduler, rng)
    assert scheduler.running == [urgent] and list(scheduler.waiting) == [first], "it came first, but is less urgent"


@pytest.mark.policy
def test_a_preempted_request_goes_behind_more_urgent_ones_and_before_less_urgent_ones() -> None:
    scheduler, rng = Scheduler(BlockAllocator(8, 4, False), 4, 64, 64, whatever_fits, priority), random.Random(0)
    first, second = request_with(0, [1] * 12, 12, priority=0), request_with(2, [2] * 12, 12, priority=2)
    for request in (first, second):
        scheduler.add(request)
    take_step(scheduler, rng)
    waiting = {place: request_with(place, [3] * 20, priority=place) for place in (3, 1)}  # none of them fits
    for request in waiting.values():
        scheduler.add(request)
    while not second.metrics.preemptions:
        take_step(scheduler, rng)
    assert list(scheduler.waiting) == [waiting[1], second, waiting[3]]


@pytest.mark.policy
@pytest.mark.parametrize("order, starves", [(fcfs, False), (priority, True), (shortest, True)])
def test_a_steady_stream_of_preferred_requests_starves_the_others_but_not_under_fcfs(
        order: OrderPolicy, starves: bool) -> None:
    scheduler, rng = Scheduler(BlockAllocator(20, 4), 2, 64, 64, whatever_fits, order), random.Random(0)
    victim = request_with(0, [1] * 4, 8, priority=1)
    numbers = count(1)

    def stream() -> None:
        while len(scheduler.waiting) < 3:
            scheduler.add(request_with(next(numbers), [2] * 4, 2, priority=0))

    stream()
    scheduler.add(victim)
    for _ in range(200):
        take_step(scheduler, rng)
        stream()
    assert victim.finish_reason == (None if starves else "length")
    assert victim.num_output_tokens == (0 if starves else 8)
    while scheduler.has_unfinished():
        take_step(scheduler, rng)
    assert victim.finish_reason == "length", "it is served when the stream ends"


@pytest.mark.policy
def test_shortest_lowers_the_mean_waiting_time() -> None:
    waited = {}
    for order in (fcfs, shortest):
        rng, clock = random.Random(0), count()
        scheduler = Scheduler(BlockAllocator(20, 4), 1, 64, 64, whatever_fits, order, clock=lambda: now)
        now = 0
        requests = [request_with(i, [1], rng.randint(1, 40)) for i in range(30)]
        for request in requests:
            scheduler.add(request)
        while scheduler.has_unfinished():
            take_step(scheduler, rng)
            now = next(clock)
        waited[order] = mean(request.metrics.waiting_s for request in requests)
    assert waited[shortest] < 0.8 * waited[fcfs]


class CountedPlace(float):
    """A place that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        CountedPlace.compared += 1
        return float(self) < float(other)

    def __eq__(self, other: object) -> bool:
        CountedPlace.compared += 1
        return float(self) == other

    __hash__ = float.__hash__


def test_adding_admitting_and_aborting_in_a_long_queue_take_a_logarithm_of_its_length() -> None:
    rng, size = random.Random(0), 10_000
    scheduler = Scheduler(BlockAllocator(20, 4), 1, 64, 64, order=lambda request: CountedPlace(rng.random()))
    requests = [request_with(i, [1], 1) for i in range(size)]

    def comparisons_per_request(act: str, served: list[Request]) -> float:
        before = CountedPlace.compared
        for request in served:
            if act == "step":
                record(scheduler, scheduler.schedule(), rng)
            else:
                getattr(scheduler, act)(request)
        return (CountedPlace.compared - before) / len(served)

    allowed = 4 * math.log2(size)
    assert 1 <= comparisons_per_request("add", requests) < allowed
    assert 1 <= comparisons_per_request("step", requests[:1000]) < allowed
    left = list(scheduler.waiting)
    aborted = rng.sample(left, 7000)
    assert comparisons_per_request("abort", aborted) < allowed
    gone = set(aborted)
    left = [request for request in left if request not in gone]
    assert list(scheduler.waiting) == left and len(scheduler.waiting) == len(left) == 2000
    served = []
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        served += step.requests
        record(scheduler, step, rng)
    assert served == left, "those that were not aborted keep their order"
