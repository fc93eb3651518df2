"""Which requests run this step, and which must wait or give way? With a model of a few lines."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Container
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import nanopaged
from nanopaged.block_allocator import BlockAllocator
from nanopaged.invariants import InvariantError
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Admission, BlockMove, Listener, Step
from nanopaged.waiting import AdmissionContext, AdmissionPolicy, OrderPolicy, TooManyWaiting, fcfs, watermark
from tests.recount import assert_consistent, assert_nothing_is_held, assert_writes_are_exclusive

VOCABULARY = 50


def kv_of(token: int, earlier: list[int | None]) -> int:
    """The model: a token's KV depends on itself and on all KV before it, and says which token comes next."""
    return hash((token, *earlier))


def continuation(prompt: list[int], num_tokens: int, stop: Container[int] = (), member: int = 0) -> list[int]:
    """What a prompt becomes with no cache, no batch and no scheduler; `member` of its n continuations."""
    kv: list[int | None] = []
    output: list[int] = []
    for token in prompt:
        kv.append(kv_of(token, kv))
    while len(output) < num_tokens and (not output or output[-1] not in stop):
        output.append((kv[-1] + member) % VOCABULARY)
        kv.append(kv_of(output[-1], kv))
    return output


def prompt_fits(context: AdmissionContext) -> bool:
    """Lets requests be preempted, whatever the default of admission is."""
    return context.available >= context.prompt


class Engine:
    """A scheduler and the model over its pool; checks at every step what must always hold, for any policy.

    KV is read and written through the block tables alone, so a block that is leaked, overwritten or
    served to the wrong request changes the tokens that come after it.
    """

    def __init__(self, num_blocks: int = 64, block_size: int = 4, seats: int = 8, budget: int = 64,
                 max_model_len: int = 128, admission: AdmissionPolicy = prompt_fits, order: OrderPolicy = fcfs,
                 sharing: bool = True) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size, sharing)
        self.scheduler = Scheduler(self.allocator, seats, budget, max_model_len, admission, order,
                                   clock=count().__next__)
        self.kv: list[int | None] = [None] * (num_blocks * block_size)
        self.requests: list[Request] = []
        self.reached: Counter[Request] = Counter()  # the most tokens of each that were in the pool at once

    def add(self, prompt: list[int], max_tokens: int = 4, priority: float = 0, **params: Any) -> Request:
        """The request is the first of its n continuations, which stand behind it in `requests`."""
        sampling = SamplingParams(max_tokens=max_tokens, **params)
        members = [Request(str(len(self.requests) + i), prompt, sampling, priority=priority) for i in range(sampling.n)]
        members[0].followers = members[1:]
        self.scheduler.add(members[0])
        self.requests += members
        return members[0]

    @property
    def waiting(self) -> list[Request]:
        return list(self.scheduler.waiting)

    def schedule(self) -> Step:
        """A plan, checked."""
        scheduler, size = self.scheduler, self.allocator.block_size
        running, first = list(scheduler.running), [*scheduler.running, *self.waiting][:1]
        preempted_before = self.preemptions()
        step = scheduler.schedule()
        self.check()
        assert_writes_are_exclusive(scheduler, step)
        assert first == [request for request in first if request in step.requests], "the first by key does not advance"
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert sum(step.num_tokens) == scheduler.max_num_batched_tokens - step.budget >= 0
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens, strict=True):
            assert start == request.num_computed_tokens < start + num_tokens <= len(request.token_ids)
            assert start + num_tokens <= len(request.block_table) * size, "a block table is too short"
        assert [n == 1 for n in step.num_tokens] == [i < step.num_decodes for i in range(len(step.requests))]
        gave_way = self.preemptions() - preempted_before
        assert not gave_way or not set(scheduler.running) - set(running), "admitted while others had to give way"
        return step

    def preemptions(self) -> int:
        """Also those of plans that were not carried out."""
        return sum(request.metrics.preemptions for request in self.requests)

    def forward(self, step: Step) -> dict[Request, int]:
        """Makes the moves, computes the plan, and draws a token for each continuation whose last token was computed."""
        size, token_ids = self.allocator.block_size, {}
        contents = [self.kv[source * size : (source + 1) * size] for _, source, _ in self.scheduler.moves]
        for (kind, _, target), values in zip(self.scheduler.moves, contents, strict=True):
            assert kind == "copy"
            self.kv[target * size : (target + 1) * size] = values
        self.scheduler.moves.clear()
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            table, end = request.block_table, start + num_tokens
            slots = [table[i // size] * size + i % size for i in range(end)]
            for i in range(start, end):
                self.kv[slots[i]] = kv_of(request.token_ids[i], [self.kv[slot] for slot in slots[:i]])
            if end == len(request.token_ids):
                for member in (request, *request.followers):
                    token_ids[member] = (self.kv[slots[-1]] + member.key[-1]) % VOCABULARY
        assert [request for _, request in step.sampled] == list(token_ids)
        return token_ids

    def step(self, stopped: Container[Request] | None = None) -> Step:
        """One step. Requests in `stopped` end with it, by default those that draw one of their stop tokens."""
        assert self.scheduler.has_unfinished(), "nothing is left to do"
        step = self.schedule()
        token_ids = self.forward(step)
        if stopped is None:
            stopped = {request for request, token in token_ids.items() if token in request.stop_token_ids}
        known = {request: request.metrics.recomputed_tokens for request in step.requests}
        lost = {request: range(start, min(start + num_tokens, self.reached[request]))
                for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens)}
        self.scheduler.update(step, token_ids, stopped)
        self.check()
        assert step.referenced_blocks == self.allocator.stats().referenced_blocks
        assert step.recomputed_tokens == sum(map(len, lost.values()))
        assert all(request.metrics.recomputed_tokens == known[request] + len(lost[request]) for request in known)
        return step

    def check(self) -> None:
        assert_consistent(self.scheduler)
        self.scheduler.check_invariants()
        for request in self.scheduler.running:
            self.reached[request] = max(self.reached[request], request.num_computed_tokens)

    def run(self) -> list[list[int]]:
        """Steps until all have finished; what each request became, in the order in which they came."""
        while self.scheduler.has_unfinished():
            self.step()
        return [request.output_token_ids for request in self.requests]


def random_order(rng: random.Random) -> OrderPolicy:
    """Any order at all is allowed."""
    return rng.choice([fcfs, lambda request: request.priority, lambda request: -request.num_prompt_tokens,
                       lambda request: rng.random()])


def random_admission(rng: random.Random) -> AdmissionPolicy:
    """So is any admission that lets a request into an empty pool."""
    return rng.choice([watermark(rng.choice([0.0, 0.0, 0.05, 0.3, 1.0])), lambda context: True,
                       lambda context: context.committed + context.full <= context.pool,
                       lambda context: context.prompt == 0 or rng.random() < 0.5])


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [first * 1000 + i for i in range(length)]


# Who runs: arrival, seats, budget.


@pytest.mark.policy
def test_fcfs_with_one_seat_serves_requests_in_order_of_arrival() -> None:
    engine = Engine(seats=1)
    requests = [engine.add(prompt_of(length, length), max_tokens=2) for length in (20, 3, 9)]
    order = []
    while engine.scheduler.has_unfinished():
        order += engine.step().requests
    assert order == [request for request in requests for _ in range(2)]


@pytest.mark.policy
def test_fcfs_admits_no_small_request_before_a_large_one_that_waits_for_room() -> None:
    engine = Engine(num_blocks=8)
    engine.add(prompt_of(20, 1), max_tokens=4)
    large, small = engine.add(prompt_of(20, 2)), engine.add([1])
    engine.step()
    assert engine.waiting == [large, small]
    assert engine.run() == [continuation(request.token_ids[:-4], 4) for request in engine.requests]


def test_a_request_joins_while_others_run_and_leaves_when_it_is_done() -> None:
    engine = Engine()
    long = engine.add([1, 2], max_tokens=6)
    engine.step()
    short = engine.add([3, 4], max_tokens=2)
    assert [set(engine.step().requests) for _ in range(3)] == [{long, short}, {long, short}, {long}]


def test_no_more_requests_run_than_there_are_seats() -> None:
    engine = Engine(seats=3)
    for i in range(7):
        engine.add([i], max_tokens=i + 1)
    seated = []
    while engine.scheduler.has_unfinished():
        seated.append(len(engine.step().requests))
    assert max(seated) == 3
    assert seated[:6] == [3] * 6, "a seat that falls free is taken in the next step"


def test_the_budget_is_never_exceeded_and_is_used_up_while_there_is_work() -> None:
    engine = Engine(budget=8)
    for i in range(5):
        engine.add(prompt_of(10, i), max_tokens=1)
    tokens = []
    while engine.scheduler.has_unfinished():
        tokens.append(sum(engine.step().num_tokens))
    assert tokens == [8, 8, 8, 8, 8, 8, 2]


def test_with_a_budget_of_one_token_every_request_is_served_in_the_end() -> None:
    engine = Engine(budget=1, seats=2)
    prompts = [prompt_of(5, i) for i in range(3)]
    for prompt in prompts:
        engine.add(prompt, max_tokens=3)
    assert engine.run() == [continuation(prompt, 3) for prompt in prompts]


def test_a_long_prompt_is_computed_in_chunks_while_others_decode_in_the_same_steps() -> None:
    engine = Engine(budget=8)
    decoding = engine.add([1, 2], max_tokens=8)
    engine.step()
    long = engine.add(prompt_of(20), max_tokens=8)
    steps = [engine.step() for _ in range(4)]
    assert [step.requests for step in steps] == [[decoding, long]] * 4
    assert [step.num_tokens for step in steps] == [[1, 7], [1, 7], [1, 6], [1, 1]]
    assert decoding.num_output_tokens == 5, "it gained a token in every step"
    assert long.output_token_ids == continuation(prompt_of(20), 2)


def test_nothing_is_planned_when_nothing_is_left_to_do() -> None:
    engine = Engine()
    assert not engine.scheduler.has_unfinished()
    assert engine.scheduler.schedule().requests == []
    request = engine.add([1], max_tokens=1)
    assert engine.scheduler.has_unfinished()
    engine.run()
    assert request.status is RequestStatus.FINISHED
    assert engine.scheduler.schedule().requests == []


# Room: watermark, preemption, progress.


@pytest.mark.policy
@pytest.mark.parametrize("share, admitted", [(0.0, 3), (0.125, 3), (0.25, 2), (0.5, 1), (1.0, 1)])
def test_the_watermark_policy_leaves_its_share_of_the_pool_free(share: float, admitted: int) -> None:
    engine = Engine(num_blocks=8, admission=watermark(share))
    for length in (9, 9, 1):  # three blocks, three blocks and one
        engine.add(prompt_of(length, length), max_tokens=4)
    assert len(engine.step().requests) == admitted


@pytest.mark.policy
def test_the_watermark_policy_never_keeps_a_lone_request_out() -> None:
    engine = Engine(num_blocks=4, admission=watermark(1.0))
    prompts = [prompt_of(13, i) for i in range(3)]
    for prompt in prompts:
        engine.add(prompt, max_tokens=4)
    assert engine.run() == [continuation(prompt, 4) for prompt in prompts]


def test_cached_blocks_that_a_hit_takes_are_not_counted_as_room() -> None:
    engine = Engine(num_blocks=6)
    engine.add(prompt_of(13), max_tokens=1)
    engine.run()
    assert engine.allocator.stats().cached_blocks == 3
    engine.add(prompt_of(9, 1), max_tokens=4)  # three blocks: six were available, three are now, all of them cached
    hit = engine.add(prompt_of(13), max_tokens=4)
    engine.step()
    assert engine.waiting == [hit], "it needs one block beside the three cached ones that it would hold"
    assert engine.run()[2] == continuation(prompt_of(13), 4)


@pytest.mark.policy
def test_under_fcfs_the_youngest_gives_way_and_waits_at_the_front_of_the_queue() -> None:
    engine = Engine(num_blocks=4, block_size=2, seats=2)
    old, young = engine.add([1, 2], max_tokens=6), engine.add([3, 4], max_tokens=4)
    never_ran = engine.add([5, 6], max_tokens=2)
    for _ in range(3):
        engine.step()
    assert engine.allocator.num_available == 0
    assert engine.scheduler.running == [old, young]
    step = engine.step()
    assert (step.requests, step.preempted) == ([old], [young])
    assert engine.waiting == [young, never_ran]
    assert (young.status, young.num_computed_tokens, young.block_table.tolist()) == (RequestStatus.WAITING, 0, [])
    assert young.num_output_tokens == 3, "what it has generated it keeps"
    assert (young.metrics.preemptions, engine.scheduler.stats.num_preemptions) == (1, 1)
    assert engine.run() == [continuation([1, 2], 6), continuation([3, 4], 4), continuation([5, 6], 2)]


@pytest.mark.policy
def test_under_fcfs_several_that_give_way_in_one_step_keep_their_order() -> None:
    engine = Engine(num_blocks=4, block_size=2)
    first, second, third, fourth = [engine.add(prompt_of(2, i), max_tokens=4) for i in range(4)]
    engine.step()
    step = engine.step()
    assert (step.requests, step.preempted) == ([first, second], [fourth, third])
    assert engine.waiting == [third, fourth]
    assert engine.run() == [continuation(prompt_of(2, i), 4) for i in range(4)]


@pytest.mark.parametrize("seed", range(10))
def test_the_first_running_request_advances_in_every_step_and_never_gives_way(seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(num_blocks=12, block_size=2, budget=rng.choice([6, 16, 64]), order=random_order(rng))
    for i in range(10):
        engine.add(prompt_of(rng.randint(1, 6), i), max_tokens=rng.randint(8, 16), priority=rng.randint(0, 2))
    while engine.scheduler.has_unfinished():
        first = (engine.scheduler.running or engine.waiting)[0]
        computed, preemptions = first.num_computed_tokens, first.metrics.preemptions
        engine.step()
        assert first.status is RequestStatus.FINISHED or first.num_computed_tokens > computed, f"seed {seed}"
        assert first.metrics.preemptions == preemptions, f"seed {seed}"
    assert engine.scheduler.stats.num_preemptions > 0, f"seed {seed} preempts no request"


@pytest.mark.policy
def test_under_fcfs_a_resumed_request_shares_the_common_prefix_and_its_table_covers_every_token() -> None:
    engine = Engine(num_blocks=9, block_size=2)
    prompts = [[1, 2, 3, 4, last] for last in (5, 6, 7)]
    lengths = 10, 6, 8
    long, _, resumed = [engine.add(prompt, max_tokens) for prompt, max_tokens in zip(prompts, lengths)]
    while not resumed.metrics.preemptions:
        engine.step()
    assert resumed.metrics.prefix_hit_tokens == 0, "all three computed the beginning in one step"
    while resumed.status is RequestStatus.WAITING:
        engine.step()
    assert long.status is RequestStatus.RUNNING
    assert resumed.block_table[:2] == long.block_table[:2]
    assert resumed.metrics.prefix_hit_tokens >= 4
    assert engine.run() == [continuation(prompt, max_tokens) for prompt, max_tokens in zip(prompts, lengths)]


def test_a_resumed_request_finds_its_own_blocks_again_if_they_were_not_reused() -> None:
    engine = Engine(num_blocks=7, block_size=2)
    engine.add([1, 2, 3], max_tokens=4)
    young = engine.add([4, 5, 6, 7, 8, 9], max_tokens=5)
    while not young.metrics.preemptions:
        engine.step()
    computed_before = engine.scheduler.stats.computed_tokens
    assert engine.run() == [continuation([1, 2, 3], 4), continuation([4, 5, 6, 7, 8, 9], 5)]
    assert young.metrics.prefix_hit_tokens >= 4
    assert engine.scheduler.stats.computed_tokens - computed_before < 6 + 5


@pytest.mark.policy
@pytest.mark.parametrize("budget", [64, 3], ids=["at once", "in chunks"])
def test_under_fcfs_a_resumed_request_computes_again_what_it_lost_but_for_what_it_finds(budget: int) -> None:
    engine = Engine(num_blocks=7, block_size=2, budget=budget)
    engine.add([1, 2, 3], max_tokens=8)
    young = engine.add([4, 5, 6, 7, 8, 9], max_tokens=5)
    while not young.metrics.preemptions:
        lost = young.num_computed_tokens
        engine.step()
    assert young.metrics.recomputed_tokens == engine.scheduler.stats.recomputed_tokens == 0
    engine.run()
    found = young.metrics.prefix_hit_tokens
    assert found > 0 and lost - found > 0
    assert young.metrics.recomputed_tokens == engine.scheduler.stats.recomputed_tokens == lost - found


def test_an_admission_policy_judges_by_the_blocks_of_all_continuations_beside_what_is_shared() -> None:
    contexts = []

    def admission(context: AdmissionContext) -> bool:
        contexts.append(context)
        return True

    engine = Engine(num_blocks=32, budget=10, admission=admission)
    engine.add(prompt_of(10), max_tokens=7, n=2)  # 16 slots, 4 blocks, at full length
    engine.step()
    engine.add([*prompt_of(8), *prompt_of(12, 1)], max_tokens=4, n=3)  # shares 2 blocks; 23 slots, 6 blocks
    contexts.clear()
    engine.step()
    # The first two decode: beside the 2 shared blocks each has one for itself. The budget is left for 8 tokens.
    assert contexts == [AdmissionContext(pool=32, available=28, committed=2 * 4, chunk=2, prompt=3, full=3 * 6)]


def test_what_a_subclass_restores_needs_room_beside_what_is_computed() -> None:
    class Restoring(Scheduler):
        def _restorable_tokens(self, request: Request, hit: int) -> int:
            return 8

    chunks = []

    def admission(context: AdmissionContext) -> bool:
        chunks.append(context.chunk)
        return not context.committed

    scheduler = Restoring(BlockAllocator(32, 4), 4, 8, 64, admission)
    first = Request("0", [1], SamplingParams())
    scheduler.add(first)
    scheduler.update(scheduler.schedule(), {first: 2})
    scheduler.add(Request("1", prompt_of(20), SamplingParams()))
    chunks.clear()
    scheduler.schedule()
    assert chunks == [4], "8 tokens are restored, and 7 computed: the first request takes one of the budget"


# What can never run is refused when it comes.


def test_a_request_that_could_never_fit_the_pool_is_refused_with_the_numbers() -> None:
    engine = Engine(num_blocks=4, block_size=4, max_model_len=18)
    request = Request("large", prompt_of(10), SamplingParams(max_tokens=100))
    before = engine.allocator.stats(), request.max_length, request.metrics.arrival_time
    with pytest.raises(ValueError, match=r"(?s)\b10\b.*\b8\b.*\b5\b.*\b4\b"):  # 10 + 8 tokens need 5 blocks of 4
        engine.scheduler.add(request)
    assert (engine.allocator.stats(), request.max_length, request.metrics.arrival_time) == before
    assert not engine.scheduler.has_unfinished()
    fitting = engine.add(prompt_of(10), max_tokens=7)  # the last token's KV is never needed: 16 slots do
    assert engine.run() == [continuation(prompt_of(10), 7)]
    assert fitting.metrics.preemptions == 0


def test_the_limit_of_the_model_counts_where_it_ends_a_request_before_the_pool_is_full() -> None:
    engine = Engine(num_blocks=4, block_size=4, max_model_len=17)
    engine.add(prompt_of(10), max_tokens=1000)
    assert engine.run() == [continuation(prompt_of(10), 7)]


@pytest.mark.parametrize("length", [16, 17, 100])
def test_a_prompt_that_leaves_no_room_for_an_output_is_refused_with_the_numbers(length: int) -> None:
    engine = Engine(max_model_len=16)
    with pytest.raises(ValueError, match=rf"(?s)\b{length}\b.*\b16\b"):
        engine.add(prompt_of(length), max_tokens=1)
    assert not engine.scheduler.has_unfinished()
    engine.add(prompt_of(15), max_tokens=1)
    assert engine.run() == [continuation(prompt_of(15), 1)]


@pytest.mark.parametrize("name, value, error", [
    ("max_num_seqs", 0, ValueError), ("max_num_seqs", 2.0, TypeError),
    ("max_num_batched_tokens", 0, ValueError), ("max_num_batched_tokens", "8", TypeError),
    ("max_model_len", 1, ValueError), ("max_model_len", None, TypeError),
    ("max_waiting", 0, ValueError), ("max_waiting", 1.5, TypeError),
])
def test_an_invalid_argument_of_the_scheduler_is_named(
    name: str, value: Any, error: type[Exception]
) -> None:
    arguments = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64, "max_waiting": None}
    with pytest.raises(error, match=name):
        Scheduler(BlockAllocator(8, 4), **{**arguments, name: value})


def test_the_smallest_values_are_enough_to_serve_a_request() -> None:
    scheduler = Scheduler(BlockAllocator(1, 1), 1, 1, max_model_len=2, max_waiting=1)
    request = Request("0", [1], SamplingParams())
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), {request: 2})
    assert (request.token_ids, request.finish_reason) == ([1, 2], "length")


def test_a_request_too_many_is_refused_until_one_leaves_the_queue() -> None:
    engine = Engine(seats=1)
    engine.scheduler.max_waiting = 2
    engine.add([1])
    engine.add([2])
    with pytest.raises(TooManyWaiting, match="2 requests wait already, max_waiting is 2"):
        engine.add([3])
    assert len(engine.waiting) == 2
    engine.step()
    assert engine.scheduler.queue_is_full() is False
    engine.add([4])
    assert engine.scheduler.queue_is_full() is True
    assert engine.run() == [continuation([token], 4) for token in (1, 2, 4)]


# How a request ends.


def test_max_tokens_ends_a_request_with_length() -> None:
    engine = Engine()
    request = engine.add([1, 2, 3], max_tokens=5)
    assert engine.run() == [continuation([1, 2, 3], 5)]
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, "length")


def test_max_model_len_ends_a_request_with_length() -> None:
    engine = Engine(max_model_len=8)
    request = engine.add([1, 2, 3], max_tokens=100)
    assert engine.run() == [continuation([1, 2, 3], 5)]
    assert request.finish_reason == "length"


def test_a_stop_token_ends_a_request_with_stop_and_is_its_last_token() -> None:
    engine = Engine()
    expected = continuation([1, 2, 3], 10)
    request = engine.add([1, 2, 3], max_tokens=10, stop_token_ids=[expected[4]])
    assert engine.run() == [expected[: expected.index(expected[4]) + 1]]
    assert request.finish_reason == "stop"


def test_a_stop_token_in_the_prompt_stops_nothing() -> None:
    engine = Engine()
    expected = continuation([1000, 1001], 4)
    engine.add([1000, 1001], max_tokens=4, stop_token_ids=[1000, 1001])
    assert engine.run() == [expected]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_text_token_stops_a_request_unless_it_ignores_it(ignore_eos: bool) -> None:
    engine = Engine()
    expected = continuation([1, 2, 3], 6)
    params = SamplingParams(max_tokens=6, ignore_eos=ignore_eos)
    engine.requests.append(Request("0", [1, 2, 3], params, eos_token_id=expected[2]))
    engine.scheduler.add(engine.requests[0])
    assert engine.run() == [expected if ignore_eos else expected[: expected.index(expected[2]) + 1]]
    assert engine.requests[0].finish_reason == ("length" if ignore_eos else "stop")


def test_a_stop_that_comes_with_the_last_token_is_a_stop() -> None:
    engine = Engine()
    request = engine.add([1, 2, 3], max_tokens=3, stop_token_ids=[continuation([1, 2, 3], 3)[2]])
    engine.run()
    assert (request.num_output_tokens, request.finish_reason) == (3, "stop")


def test_a_request_that_is_named_as_stopped_ends_with_stop_and_the_others_go_on() -> None:
    engine = Engine()
    one, other = engine.add([1], max_tokens=6), engine.add([2], max_tokens=6)
    engine.step()
    engine.step(stopped={one})
    assert (one.status, one.finish_reason, one.num_output_tokens) == (RequestStatus.FINISHED, "stop", 2)
    assert engine.scheduler.running == [other]
    assert engine.run() == [continuation([1], 2), continuation([2], 6)]


def test_a_finished_request_gives_its_blocks_back_at_once() -> None:
    engine = Engine()
    one, other = engine.add(prompt_of(9), max_tokens=1), engine.add([2], max_tokens=6)
    engine.step()
    assert (one.status, one.block_table.tolist()) == (RequestStatus.FINISHED, [])
    assert engine.allocator.stats().referenced_blocks == len(other.block_table) == 1


# Sharing.


@pytest.mark.parametrize("block_size, computed", [(1, 1), (2, 2), (4, 4), (8, 8), (3, 2), (16, 8)])
def test_a_prompt_that_is_cached_to_its_last_token_still_computes_that_token(block_size: int, computed: int) -> None:
    engine = Engine(block_size=block_size)
    engine.add(prompt_of(8), max_tokens=2)
    engine.run()
    again = engine.add(prompt_of(8), max_tokens=2)
    assert engine.step().num_tokens == [computed]
    assert again.metrics.prefix_hit_tokens == 8 - computed
    assert engine.run() == [continuation(prompt_of(8), 2)] * 2


def test_an_admission_tells_what_is_known_and_what_was_found() -> None:
    engine = Engine()
    engine.add(prompt_of(8))
    engine.run()
    request = engine.add(prompt_of(11))
    admission = Admission(request, known_tokens=11, hit_tokens=8, restored_tokens=0, is_first=True)
    assert engine.step().admitted == [admission]


def test_common_prefixes_are_stored_once_even_if_computed_in_the_same_step() -> None:
    engine = Engine()
    requests = [engine.add([*prompt_of(8), 100 + i], max_tokens=4) for i in range(3)]
    engine.step()
    assert len({tuple(request.block_table[:2]) for request in requests}) == 1
    assert engine.allocator.stats().shared_blocks == 2
    assert engine.allocator.stats().referenced_blocks == 2 + 3
    assert engine.run() == [continuation([*prompt_of(8), 100 + i], 4) for i in range(3)]


def test_generated_tokens_are_shared_too() -> None:
    engine = Engine()
    first = engine.add(prompt_of(6), max_tokens=8)
    engine.run()
    second = engine.add([*first.token_ids, 77], max_tokens=2)
    engine.run()
    assert second.metrics.prefix_hit_tokens == 12, "14 tokens, the last never computed, make three full blocks"
    assert second.output_token_ids == continuation([*first.token_ids, 77], 2)


def test_without_sharing_everything_is_computed_and_every_block_ends_free() -> None:
    engine = Engine(sharing=False)
    for _ in range(2):
        engine.add(prompt_of(9), max_tokens=3)
        engine.add(prompt_of(9), max_tokens=3)
        assert engine.run() == [continuation(prompt_of(9), 3)] * len(engine.requests)
    assert engine.scheduler.stats.computed_tokens == 4 * (9 + 2)
    assert engine.allocator.stats().prefix_hit_tokens == 0
    assert engine.allocator.stats().free_blocks == 64


# Several continuations of one prompt.


def test_continuations_start_from_the_blocks_in_which_the_first_has_computed_the_prompt() -> None:
    engine = Engine()
    first = engine.add(prompt_of(6), n=3)
    _, second, third = engine.requests
    assert first.followers == [second, third]
    step = engine.step()
    assert step.requests == [first] and [request for _, request in step.sampled] == [first, second, third]
    assert engine.scheduler.running == [first, second, third] and first.followers == []
    assert first.block_table == second.block_table == third.block_table
    assert [engine.allocator.ref_count(block) for block in first.block_table] == [3, 3]
    for request in engine.requests:
        assert (request.status, request.num_computed_tokens) == (RequestStatus.RUNNING, 6)
        assert request.metrics.waiting_s == first.metrics.waiting_s > 0
    assert engine.scheduler.stats.computed_tokens == 6


@pytest.mark.parametrize("length", [5, 6, 7])
def test_each_continuation_but_the_last_copies_the_partly_filled_block_before_it_writes(length: int) -> None:
    engine = Engine()
    engine.add(prompt_of(length), n=3)
    engine.step()
    full, partly = engine.requests[0].block_table
    step = engine.schedule()
    tables = [request.block_table for request in engine.requests]
    assert [table[:1].tolist() for table in tables] == [[full]] * 3
    (one,), (other,), (last,) = (table[1:] for table in tables)
    assert step.moves == engine.scheduler.moves == [BlockMove("copy", partly, one), BlockMove("copy", partly, other)]
    assert last == partly and len({one, other, partly}) == 3
    assert engine.run() == [continuation(prompt_of(length), 4, member=i) for i in range(3)]


def test_continuations_of_a_prompt_that_ends_with_a_block_copy_nothing() -> None:
    engine = Engine()
    engine.add(prompt_of(8), n=3)
    moves = []
    while engine.scheduler.has_unfinished():
        moves += engine.step().moves
    assert moves == []
    assert engine.run() == [continuation(prompt_of(8), 4, member=i) for i in range(3)]


# What goes wrong around it: plans that are not carried out, requests that are given up.


def test_a_request_that_could_not_be_computed_ends_with_an_error_and_the_others_go_on() -> None:
    engine = Engine()
    bad, good = engine.add(prompt_of(9, 1), n=2), engine.add(prompt_of(9, 2), n=2)
    _, bad_too, _, good_too = engine.requests
    step = engine.schedule()
    token_ids = engine.forward(step)
    assert step.requests == [bad, good] and list(token_ids) == engine.requests
    engine.scheduler.update(step, {good: token_ids[good], good_too: token_ids[good_too]}, failed={bad: "overflow"})
    engine.check()
    for request in (bad, bad_too):
        assert (request.status, request.finish_reason, request.error) == (RequestStatus.FINISHED, "error", "overflow")
        assert (request.block_table.tolist(), request.output_token_ids) == ([], [])
    assert step.ended == [bad, bad_too] and [request for _, request in step.sampled] == [good, good_too]
    assert engine.scheduler.running == [good, good_too]
    assert engine.allocator.find_prefix(prompt_of(9, 1), 9) == [], "nobody finds what it wrote"
    assert engine.run() == [[], [], *(continuation(prompt_of(9, 2), 4, member=i) for i in range(2))]
    assert engine.scheduler.stats.num_finished == 4


@pytest.mark.parametrize("abandoned", [1, 2, 5])
def test_a_plan_that_was_not_carried_out_leaks_nothing(abandoned: int) -> None:
    engine = Engine(num_blocks=9, block_size=2, budget=6)
    prompts = [prompt_of(1 + 2 * i, i % 3) for i in range(6)]
    for prompt in prompts:
        engine.add(prompt, max_tokens=4)
    while engine.scheduler.has_unfinished():
        for _ in range(abandoned):
            plan = engine.schedule()
        step = engine.step()
        assert step.requests[: len(plan.requests)] == plan.requests, "the same work is planned again"
        assert step.num_tokens[: len(plan.num_tokens)] == plan.num_tokens
    assert engine.run() == [continuation(prompt, 4) for prompt in prompts]
    assert engine.scheduler.stats.num_preemptions > 0
    assert engine.scheduler.stats.output_tokens == 6 * 4
    assert_nothing_is_held(engine.scheduler)


def in_the_queue() -> tuple[Engine, Request]:
    engine = Engine(seats=1)
    engine.add([1, 2, 3])
    request = engine.add([4, 5, 6])
    engine.step()
    return engine, request


def decoding() -> tuple[Engine, Request]:
    engine = Engine()
    engine.add([1, 2, 3])
    request = engine.add(prompt_of(9))
    engine.step()
    return engine, request


def within_its_prompt() -> tuple[Engine, Request]:
    engine = Engine(budget=5)
    request = engine.add(prompt_of(9))
    engine.step()
    return engine, request


def planned_in_vain() -> tuple[Engine, Request]:
    engine = Engine()
    request = engine.add(prompt_of(9))
    engine.schedule()
    return engine, request


def preempted() -> tuple[Engine, Request]:
    engine = Engine(num_blocks=4, block_size=2)
    engine.add([1, 2], max_tokens=6)
    request = engine.add([3, 4], max_tokens=6)
    while not request.metrics.preemptions:
        engine.step()
    return engine, request


def sharing_blocks() -> tuple[Engine, Request]:
    engine = Engine()
    request, _ = engine.add(prompt_of(9)), engine.add([*prompt_of(8), 77])
    engine.step()
    return engine, request


@pytest.mark.parametrize("request_in_state", [
    in_the_queue, decoding, within_its_prompt, planned_in_vain, preempted, sharing_blocks
])
def test_a_request_can_be_aborted_once(request_in_state: Callable[[], tuple[Engine, Request]]) -> None:
    engine, request = request_in_state()
    output = request.output_token_ids
    engine.scheduler.abort(request)
    engine.scheduler.check_invariants()
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, "abort")
    assert (request.block_table.tolist(), request.output_token_ids) == ([], output)
    assert request not in [*engine.scheduler.running, *engine.waiting]
    with pytest.raises(ValueError, match=repr(request.request_id)):
        engine.scheduler.abort(request)
    engine.run()
    for other in engine.requests:
        prompt = other.token_ids[: other.num_prompt_tokens]
        assert other is request or other.output_token_ids == continuation(prompt, other.params.max_tokens)
    assert_nothing_is_held(engine.scheduler)


def test_aborting_a_finished_request_is_an_error_and_changes_nothing() -> None:
    engine = Engine()
    request = engine.add([1], max_tokens=1)
    engine.run()
    with pytest.raises(ValueError, match="it has finished"):
        engine.scheduler.abort(request)
    assert request.finish_reason == "length"
    assert engine.scheduler.stats.num_finished == 1


def test_listeners_hear_of_requests_that_come_and_of_all_continuations_that_are_aborted() -> None:
    events = []

    class Recorder(Listener):
        def added(self, request: Request) -> None:
            events.append(("added", request))

        def ended(self, request: Request) -> None:
            events.append(("ended", request))

    engine = Engine()
    engine.scheduler.listeners.append(Recorder())
    first = engine.add([1], n=2)
    (follower,) = first.followers
    engine.scheduler.abort(first)
    assert events == [("added", first), ("ended", first), ("ended", follower)]


def test_a_block_that_no_request_holds_breaks_the_invariants() -> None:
    engine = Engine()
    engine.add([1])
    engine.step()
    leaked = engine.allocator.take()
    with pytest.raises(InvariantError, match=f"block {leaked} counts 1 holders, but 0 tables name it"):
        engine.scheduler.check_invariants()


# Figures.


@pytest.mark.policy
def test_under_fcfs_a_request_waits_until_it_starts_and_from_each_preemption_until_it_returns() -> None:
    engine = Engine(num_blocks=4, block_size=2, seats=2)
    now = 10.0
    engine.scheduler.clock = lambda: now
    old, young = engine.add([1, 2], max_tokens=6), engine.add([3, 4], max_tokens=4)
    preempted, returned = [], []
    while engine.scheduler.has_unfinished():
        now += 1.0
        step = engine.step()
        preempted += [now] * len(step.preempted)
        returned += [now for admission in step.admitted if not admission.is_first]
    assert (preempted, returned) == ([14.0], [17.0])
    assert (old.metrics.waiting_s, young.metrics.waiting_s) == (1.0, 1.0 + 3.0)


@pytest.mark.policy
def test_under_fcfs_the_statistics_are_exact() -> None:
    engine = Engine(num_blocks=4, block_size=2, seats=2)
    engine.add([1, 2], max_tokens=6)
    engine.add([3, 4], max_tokens=4)
    steps = 0
    while engine.scheduler.has_unfinished():
        engine.step()
        steps += 1
    stats = engine.scheduler.stats
    assert (stats.num_steps, stats.num_finished, stats.num_preemptions) == (steps, 2, 1)
    assert (stats.prompt_tokens, stats.prompt_hit_tokens, stats.output_tokens) == (2 + 2, 0, 6 + 4)
    # Of the five tokens that the second knew when it gave way, those in blocks that the first has not taken are left.
    hits = engine.requests[1].metrics.prefix_hit_tokens
    assert stats.computed_tokens == (2 + 5) + (2 + 2) + (5 - hits)
    assert engine.allocator.stats().prefix_hit_tokens == hits


@pytest.mark.policy
def test_under_lru_prompt_hits_are_counted_when_a_request_first_runs_and_not_when_it_resumes() -> None:
    engine = Engine(num_blocks=6, block_size=2)
    engine.add([1, 2, 3, 4], max_tokens=1)
    engine.run()
    engine.add([1, 2, 3], max_tokens=8)
    resumed = engine.add([1, 2, 3, 4, 5, 6], max_tokens=4)
    engine.run()
    assert resumed.metrics.preemptions == 1
    assert resumed.metrics.prefix_hit_tokens > 4
    assert engine.scheduler.stats.prompt_tokens == 4 + 3 + 6
    assert engine.scheduler.stats.prompt_hit_tokens == 0 + 2 + 4


def test_the_times_of_a_request_are_its_arrival_its_first_token_and_its_end() -> None:
    engine = Engine(budget=2)
    now = 0.0
    engine.scheduler.clock = lambda: now
    request = engine.add([1, 2, 3], max_tokens=3)
    times = []
    while engine.scheduler.has_unfinished():
        now += 1.0
        engine.step()
        times.append(request.metrics.first_token_time)
    assert times == [None, 2.0, 2.0, 2.0]
    assert (request.metrics.arrival_time, request.metrics.finished_time) == (0.0, 4.0)


# Anything, in any mixture.


@cache
def random_mixture(seed: int, abandon: bool) -> Counter[str]:
    """Runs unrelated requests under random policies, checks what each became; returns what happened on the way."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 4, 8, 16])
    beginnings = [[], *([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 24))] for _ in range(2))]
    work = []
    for _ in range(rng.randint(3, 14)):
        suffix = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, rng.choice([2, 20])))]
        stop = [rng.randrange(VOCABULARY)] if rng.random() < 0.3 else []
        work.append((rng.choice(beginnings) + suffix, rng.randint(1, 24), stop))
    longest = max(len(prompt) + max_tokens - 1 for prompt, max_tokens, _ in work)
    seats = rng.choice([1, 3, 20, 20])
    engine = Engine(num_blocks=-(-longest // size) + rng.choice([0, 0, 1, 2, 5, 20]), block_size=size,
                    seats=seats, budget=rng.choice([1, 5, 16, 64]),
                    admission=random_admission(rng), order=random_order(rng), sharing=rng.random() < 0.8)
    scheduler, allocator = engine.scheduler, engine.allocator
    happened: Counter[str] = Counter()
    expected: dict[Request, list[int]] = {}

    while scheduler.has_unfinished() or work:
        while work and rng.random() < 0.5:
            prompt, max_tokens, stop = work.pop()
            fitting = allocator.num_blocks // -(-(len(prompt) + max_tokens - 1) // size)  # under any policy
            first = engine.add(prompt, max_tokens, rng.randint(0, 2), stop_token_ids=stop,
                               n=min(seats, fitting, rng.choice([1, 1, 2, 3])))
            for i, member in enumerate([first, *first.followers]):
                expected[member] = continuation(prompt, max_tokens, stop, i)
        if not scheduler.has_unfinished():
            continue
        while abandon and rng.random() < 0.3:
            happened["plans abandoned"] += 1
            engine.schedule()
        if rng.random() < 0.01:
            happened["aborted"] += 1
            scheduler.abort(rng.choice([*scheduler.running, *engine.waiting]))
            scheduler.check_invariants()
            continue
        step = engine.step()
        happened["chunks"] += len(step.cut)
        happened["copies"] += len(step.moves)
        if not abandon:
            waste = allocator.stats().reserved_slots - allocator.stats().filled_slots
            assert waste <= len(scheduler.running) * (size - 1), f"seed {seed}: {waste} slots wasted"
            for request in scheduler.running:
                assert len(request.block_table) == -(-request.num_computed_tokens // size), f"seed {seed}: {request}"

    for request, output in expected.items():
        if request.finish_reason == "abort":
            output = output[: request.num_output_tokens]
        assert request.output_token_ids == output, f"seed {seed}: {request}"
    assert_nothing_is_held(engine.scheduler)
    assert allocator.enable_prefix_caching or allocator.stats().cached_blocks == 0
    happened["preemptions"] = scheduler.stats.num_preemptions
    happened["tokens found"] = allocator.stats().prefix_hit_tokens
    happened["evictions"] = allocator.stats().evicted_blocks
    happened["resumed from shared blocks"] = sum(
        bool(request.metrics.preemptions and request.metrics.prefix_hit_tokens) for request in engine.requests)
    return happened


SEEDS = range(100)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_request_becomes_does_not_depend_on_scheduling(seed: int) -> None:
    random_mixture(seed, abandon=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_waste_is_at_most_the_end_of_each_requests_last_block(seed: int) -> None:
    random_mixture(seed, abandon=False)


def test_the_random_mixtures_meet_every_pressure_often() -> None:
    happened = sum((random_mixture(seed, abandon=True) for seed in SEEDS), Counter())
    assert {what for what, times in happened.items() if times >= 50} == {
        "plans abandoned", "aborted", "chunks", "copies", "preemptions", "tokens found", "evictions",
        "resumed from shared blocks",
    }, happened


def test_scheduling_needs_no_numerical_library() -> None:
    program = ("import sys, nanopaged.scheduler, nanopaged.block_allocator; "
               "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          cwd=Path(nanopaged.__file__).parents[1])
    assert done.stdout.strip() == "[]"
