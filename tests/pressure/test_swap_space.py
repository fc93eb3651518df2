"""Swapping: the same tokens as with recomputation, for less work, whatever fits or is evicted in between."""

from __future__ import annotations

import random

import pytest
from tests.crowds import by_arrival, request_with, take_step, whatever_fits
from tests.oracle import assert_dense_continuation, tiny_model
from tests.recount import assert_consistent, assert_nothing_is_held
from tests.test_engine import random_prompts, tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.invariants import InvariantError
from nanopaged.pressure.swap_space import Swapped, SwappingScheduler
from nanopaged.request import Request, RequestStatus
from nanopaged.step import BlockMove
from nanopaged.waiting import AdmissionContext

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def finish(llm: LLM, outputs: dict[str, list[int]]) -> dict[str, list[int]]:
    """Steps to the end; adds each request's tokens to `outputs`."""
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler)
    assert_nothing_is_held(llm.scheduler)
    assert llm.stats().swap_blocks_used == len(llm.scheduler.moves) == 0
    return outputs


def assert_right(prompt: list[int], params: SamplingParams, output: list[int], where: str = "") -> None:
    assert_dense_continuation(MODEL, prompt, params, params.seed or 0, output, True, where)


@pytest.mark.parametrize("seed", range(8))
def test_swapping_gives_the_same_tokens_as_recomputing_for_less_work(seed: int) -> None:
    rng = random.Random(seed)
    prompts = random_prompts(rng, 7)
    params = [SamplingParams(temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(15, 30), seed=i)
              for i in range(7)]
    options = {"num_blocks": 14, "admission": "greedy", "enable_prefix_caching": rng.random() < 0.5,
               "max_num_batched_tokens": rng.choice([16, 200])}
    tokens, stats = {}, {}
    for preemption in ("swap", "recompute"):
        llm = tiny_llm(MODEL, preemption=preemption, **options)
        tokens[preemption] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        llm.scheduler.check_invariants()
        stats[preemption] = llm.stats()
    for prompt, param, output in zip(prompts, params, tokens["swap"]):
        assert_right(prompt, param, output, f"seed {seed}")
    assert tokens["swap"] == tokens["recompute"], f"seed {seed}"
    assert stats["swap"].num_preemptions > 0 and stats["swap"].swapped_in_tokens > 0, f"seed {seed}"
    assert stats["swap"].recomputed_tokens < stats["recompute"].recomputed_tokens, f"seed {seed}"
    assert (stats["swap"].swap_blocks, stats["swap"].swap_blocks_used) == (1024, 0)
    assert (stats["recompute"].swap_blocks, stats["recompute"].swapped_in_tokens) == (0, 0)


STEM = list(range(8))  # two blocks of 4


def three_requests(long_tokens: int) -> tuple[SwappingScheduler, list[Request], dict[str, bool], list[BlockMove]]:
    """The first request fills the pool, until it has generated `long_tokens` tokens and ends.

    The other two have a common prefix of two blocks, and have been swapped out: first the last, with 10
    computed tokens, then the second, with 14. Also returns a door, shut for waiting requests, and the moves.
    """
    door = {"open": True}

    def doorkeeper(context: AdmissionContext) -> bool:
        return door["open"]

    scheduler = SwappingScheduler(BlockAllocator(6, 4), 4, 64, 64, doorkeeper, by_arrival, swap_blocks=6)
    requests = [request_with(0, [90, 91, 92, 93], long_tokens), request_with(1, [*STEM, 50, 51], 12),
                request_with(2, [*STEM, 60], 12)]
    for request in requests:
        scheduler.add(request)
    moves: list[BlockMove] = []
    rng = random.Random(0)
    while requests[0].status is not RequestStatus.FINISHED:
        moves += take_step(scheduler, rng).moves
        door["open"] = not scheduler.swapped
    return scheduler, requests, door, moves


def test_shared_blocks_stay_in_the_pool_until_their_last_holder_is_swapped_out_with_them() -> None:
    scheduler, (_, second, last), _, moves = three_requests(6)
    assert list(scheduler.swapped) == [last, second]
    assert scheduler.swapped[last] == Swapped({2: 0}, 10), "the second request still needs the common prefix"
    assert scheduler.swapped[second] == Swapped({0: 1, 1: 2, 2: 3, 3: 4}, 14)
    assert [(move.kind, move.target) for move in moves] == [("to_host", block) for block in range(5)]
    assert len({move.source for move in moves[1:]}) == 4
    assert scheduler.swap_space.stats().referenced_blocks == 5


@pytest.mark.policy  # which blocks are evicted first follows from the least recently used
@pytest.mark.parametrize("long_tokens, abort_second, restored", [
    # (tokens found in the pool, tokens restored) of the second request, and of the last
    (6, False, [(12, 2), (8, 2)]),
    (10, False, [(8, 6), (8, 2)]),  # the first request has evicted one block of the second
    (14, False, [(4, 10), (8, 2)]),  # two: what the second brings back is found by the last
    (18, False, [(0, 14), (8, 2)]),
    (6, True, [(8, 2)]),
    (14, True, [(4, 0)]),  # the common prefix is gone in part, so what was swapped out is computed again too
    (18, True, [(0, 0)]),
])
def test_swapped_blocks_are_restored_behind_the_prefix_that_is_still_found(
        long_tokens: int, abort_second: bool, restored: list[tuple[int, int]]) -> None:
    scheduler, (_, second, last), door, _ = three_requests(long_tokens)
    kept = dict(scheduler.swapped)
    if abort_second:
        scheduler.abort(second)
    door["open"] = True
    step = scheduler.schedule()
    assert [(admission.hit_tokens, admission.restored_tokens) for admission in step.admitted] == restored
    assert [admission.request for admission in step.admitted] == ([last] if abort_second else [second, last])
    wanted = []
    for request, _, hit, num_restored, is_first in step.admitted:
        assert not is_first and request.num_computed_tokens == hit + num_restored
        wanted += [BlockMove("to_pool", kept[request].blocks[i], request.block_table[i])
                   for i in range(hit // 4, -(-(hit + num_restored) // 4))]
    assert step.moves == wanted
    assert not scheduler.swapped and scheduler.swap_space.stats().referenced_blocks == 0
    scheduler.check_invariants()
    assert_consistent(scheduler)


def test_a_partly_filled_block_that_two_continuations_share_is_swapped_out_for_each() -> None:
    scheduler = SwappingScheduler(BlockAllocator(2, 4), 4, 64, 64, whatever_fits, by_arrival, swap_blocks=4)
    long, pair = request_with(0, [9] * 4, 5), request_with(1, [1, 2, 3], 5, n=2)
    for request in (long, pair):
        scheduler.add(request)
    (follower,) = pair.followers
    rng = random.Random(0)
    take_step(scheduler, rng)
    (shared,) = pair.block_table
    assert follower.block_table.tolist() == [shared]
    step = take_step(scheduler, rng)
    assert step.preempted == [follower, pair]
    assert step.moves == [BlockMove("to_host", shared, 0), BlockMove("to_host", shared, 1)], "it cannot be found again"
    while scheduler.has_unfinished():
        take_step(scheduler, rng)
    assert scheduler.stats.recomputed_tokens == 0 and scheduler.stats.swapped_in_tokens > 0


def test_a_request_whose_blocks_others_need_moves_nothing_and_finds_them_again() -> None:
    scheduler = SwappingScheduler(BlockAllocator(2, 4), 4, 64, 64, whatever_fits, by_arrival, swap_blocks=4)
    leader = request_with(0, [1, 2, 3, 4], 3, n=2)
    (follower,) = leader.followers
    scheduler.add(leader)
    rng = random.Random(0)
    take_step(scheduler, rng)
    assert leader.block_table == follower.block_table
    assert leader.block_table.tolist() == [0], "both continuations have this block, and it is full"
    step = take_step(scheduler, rng)
    assert (step.requests, step.preempted, step.moves) == ([leader], [follower], [])
    assert not scheduler.swapped and scheduler.swap_space.num_available == 4
    while follower.status is RequestStatus.WAITING:
        step = take_step(scheduler, rng)
    assert [(admission.hit_tokens, admission.restored_tokens) for admission in step.admitted] == [(4, 0)]


def test_a_request_fits_the_cpu_blocks_if_those_of_its_blocks_that_move_do() -> None:
    scheduler = SwappingScheduler(BlockAllocator(5, 4), 4, 64, 64, whatever_fits, by_arrival, swap_blocks=1)
    requests = [request_with(number, [*STEM, 60 + number], 12) for number in range(2)]
    for request in requests:
        scheduler.add(request)
    rng = random.Random(0)
    while not scheduler.stats.num_preemptions:
        step = take_step(scheduler, rng)
    assert step.preempted == requests[1:] == list(scheduler.swapped)
    assert scheduler.swapped[requests[1]] == Swapped({2: 0}, 12), "two of its three blocks are the common prefix"


def test_a_request_that_finds_more_in_the_pool_than_was_swapped_out_brings_nothing_back() -> None:
    scheduler = SwappingScheduler(BlockAllocator(4, 4), 4, 2, 64, whatever_fits, lambda request: request.priority,
                                  swap_blocks=4)
    prompt = [*STEM, 1, 1, 1, 1, 2]
    long, victim = request_with(0, [90], 10), request_with(1, prompt, 3, priority=1)
    for request in (long, victim):
        scheduler.add(request)
    rng = random.Random(0)
    while not scheduler.swapped:
        take_step(scheduler, rng)
    assert scheduler.swapped[victim].num_tokens == 8, "it gave way within its prompt"
    twin = request_with(2, prompt, 3)
    scheduler.add(twin)
    while victim.status is RequestStatus.WAITING:
        step = take_step(scheduler, rng)
    assert twin.status is RequestStatus.FINISHED
    assert [(admission.hit_tokens, admission.restored_tokens) for admission in step.admitted] == [(12, 0)]
    assert not step.moves and not scheduler.swapped and scheduler.swap_space.num_available == 4


def test_the_invariants_count_the_blocks_in_cpu_memory_too() -> None:
    scheduler, (_, second, _), _, _ = three_requests(6)
    scheduler.check_invariants()
    leaked = scheduler.allocator.take()
    with pytest.raises(InvariantError, match=f"block {leaked} counts 1 holders, but 0 tables name it"):
        scheduler.check_invariants()
    scheduler.allocator.give_back(leaked)
    leaked = scheduler.swap_space.take()
    with pytest.raises(InvariantError, match=f"block {leaked} counts 1 holders, but 0 tables name it"):
        scheduler.check_invariants()
    scheduler.swap_space.give_back(leaked)
    scheduler.swapped[request_with(3, [1])] = scheduler.swapped.pop(second)
    with pytest.raises(InvariantError, match="belong to requests that do not wait.*'3.0'"):
        scheduler.check_invariants()


@pytest.mark.parametrize("swap_blocks, error", [(0, ValueError), (-1, ValueError), (None, TypeError), (2.0, TypeError)])
def test_an_invalid_number_of_swap_blocks_is_refused(swap_blocks: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="swap_blocks must be"):
        SwappingScheduler(BlockAllocator(8, 4), 8, 64, 64, swap_blocks=swap_blocks)


def test_one_cpu_block_is_a_swap_space() -> None:
    scheduler = SwappingScheduler(BlockAllocator(8, 4), 8, 64, 64, swap_blocks=1)
    assert (scheduler.swap_space.num_blocks, scheduler.swap_space.block_size) == (1, 4)


def pair_with_one_in_cpu_memory(**options: object) -> tuple[LLM, Request]:
    """Two requests in a pool too small for both, right after the second has given way."""
    llm = tiny_llm(MODEL, num_blocks=8, preemption="swap", admission="greedy", order=by_arrival, **options)
    ids = [llm.add_request([token] * 20, GREEDY) for token in (1, 2)]
    (victim,) = llm._groups[ids[1]]
    while not victim.metrics.preemptions:
        llm.step()
        llm.scheduler.check_invariants()
    return llm, victim


def test_a_request_is_swapped_out_with_all_its_computed_tokens_and_comes_back_with_them() -> None:
    llm, victim = pair_with_one_in_cpu_memory()
    assert victim.status is RequestStatus.WAITING and not victim.block_table
    swapped = llm.scheduler.swapped[victim]
    assert llm.stats().swap_blocks_used == len(swapped.blocks) == 4
    assert swapped.num_tokens == len(victim.token_ids) - 1
    outputs = finish(llm, {})
    assert_right([1] * 20, GREEDY, outputs["0"])
    assert_right([2] * 20, GREEDY, outputs["1"])
    assert llm.stats().recomputed_tokens == victim.metrics.recomputed_tokens == 0
    assert llm.stats().computed_tokens == 2 * (20 + 23)


def test_aborting_a_swapped_request_gives_its_cpu_blocks_back() -> None:
    llm, victim = pair_with_one_in_cpu_memory()
    output = llm.abort_request("1")
    llm.scheduler.check_invariants()
    assert llm.stats().swap_blocks_used == 0 and output.outputs[0].finish_reason == "abort"
    assert victim.status is RequestStatus.FINISHED and not llm.scheduler.swapped
    assert_right([1] * 20, GREEDY, finish(llm, {})["0"])


@pytest.mark.parametrize("swap_blocks, fits", [(3, False), (4, True)])
def test_a_request_that_does_not_fit_the_cpu_blocks_as_a_whole_is_recomputed(swap_blocks: int, fits: bool) -> None:
    llm, victim = pair_with_one_in_cpu_memory(swap_blocks=swap_blocks, enable_prefix_caching=False)
    assert victim.status is RequestStatus.WAITING and (victim in llm.scheduler.swapped) == fits
    assert llm.stats().swap_blocks_used == (4 if fits else 0)
    outputs = finish(llm, {})
    for token in (1, 2):
        assert_right([token] * 20, GREEDY, outputs[str(token - 1)])
    assert (llm.stats().recomputed_tokens == 0) == fits


@pytest.mark.parametrize("wait_until_it_is_evicted", [True, False])
def test_a_prefix_that_was_evicted_is_recomputed_with_all_that_follows_it(wait_until_it_is_evicted: bool) -> None:
    door = {"open": True}

    def doorkeeper(context: AdmissionContext) -> bool:
        return door["open"]

    llm = tiny_llm(MODEL, num_blocks=8, preemption="swap", admission=doorkeeper, order=by_arrival)
    stem = list(range(16))
    work = {"0": ([50] * 8, SamplingParams(temperature=0, max_tokens=56)),
            "1": (stem + [1], SamplingParams(temperature=0, max_tokens=14)),
            "2": (stem + [2, 3], SamplingParams(temperature=0, max_tokens=40))}
    for prompt, params in work.values():
        llm.add_request(prompt, params)
    long, _, victim = (request for group in llm._groups.values() for request in group)
    outputs: dict[str, list[int]] = {}
    while "1" in llm._groups:
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        if victim in llm.scheduler.swapped:
            door["open"] = False
    assert min(llm.scheduler.swapped[victim].blocks) == 2, "the prefix is shared"
    assert len(llm.scheduler.allocator.find_prefix(stem, 16)) == 2, "cached: it has no holder any more"
    while wait_until_it_is_evicted and llm.scheduler.allocator.find_prefix(stem, 16):
        llm.step()
    door["open"] = True
    outputs = finish(llm, outputs)
    for request_id, (prompt, params) in work.items():
        assert_right(prompt, params, outputs[request_id])
    assert long.metrics.preemptions == 0
    if wait_until_it_is_evicted:
        assert llm.stats().swapped_in_tokens == 0 and victim.metrics.recomputed_tokens >= 16
    else:
        assert llm.stats().swapped_in_tokens > 0
