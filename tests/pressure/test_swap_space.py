"""Swapping: the same tokens as with recomputation, for less work, whatever fits or is lost meanwhile."""

from __future__ import annotations

import random

import pytest
import torch
from tests.oracle import TINY, assert_dense_continuation, tiny_model
from tests.test_engine import random_prompts, tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.pressure.admission import Situation
from nanopaged.block_allocator import BlockAllocator
from nanopaged.kv_cache import KVCache
from nanopaged.request import Request, RequestStatus
from nanopaged.pressure.swap_space import BlockMove, SwapSpace

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def finish(llm: LLM, outputs: dict[str, list[int]]) -> dict[str, list[int]]:
    """Steps to the end; adds each request's tokens to `outputs`."""
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        llm.scheduler.check_invariants()
    assert llm.stats().referenced_blocks == llm.stats().swap_blocks_used == len(llm.scheduler.moves) == 0
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
    for prompt, wishes, output in zip(prompts, params, tokens["swap"]):
        assert_right(prompt, wishes, output, f"seed {seed}")
    assert tokens["swap"] == tokens["recompute"], f"seed {seed}"
    assert stats["swap"].num_preemptions > 0 and stats["swap"].swapped_in_tokens > 0, f"seed {seed}"
    assert stats["swap"].recomputed_tokens < stats["recompute"].recomputed_tokens, f"seed {seed}"
    assert (stats["swap"].swap_blocks, stats["swap"].swap_blocks_used) == (1024, 0)
    assert (stats["recompute"].swap_blocks, stats["recompute"].swapped_in_tokens) == (0, 0)


def cache_with_contents() -> KVCache:
    cache = KVCache(TINY, 8, 6, 4, torch.device("cpu"), torch.float32)
    cache.blocks.copy_(torch.rand(cache.blocks.shape))
    cache.swapped.fill_(-1)
    return cache


def test_all_layers_of_a_block_come_back_as_they_went_and_nothing_else_changes() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    moves = [BlockMove("out", 4, 2), BlockMove("out", 1, 0)]
    cache.carry_out(moves)
    assert moves == []
    assert torch.equal(cache.swapped[[2, 0]], before[:, :, [4, 1]].permute(2, 0, 1, 3, 4, 5))
    assert (cache.swapped[[1, 3]] == -1).all() and torch.equal(cache.blocks, before)
    cache.blocks[:, :, [1, 4]] = 0
    cache.carry_out([BlockMove("in", 2, 1), BlockMove("in", 0, 5), BlockMove("copy", 3, 4)])
    assert torch.equal(cache.blocks, before[:, :, [0, 4, 2, 3, 3, 1]])


def test_moves_are_made_in_their_order() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    # Block 0 goes out, takes a copy of 1, is copied on to 2 by way of the CPU, and comes back itself as 1.
    cache.carry_out([BlockMove("out", 0, 0), BlockMove("copy", 1, 0), BlockMove("out", 0, 1), BlockMove("in", 1, 2),
                     BlockMove("in", 0, 1), BlockMove("copy", 2, 3)])
    assert torch.equal(cache.blocks, before[:, :, [1, 0, 1, 1, 4, 5]])


def test_the_last_of_two_moves_to_one_block_counts() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    cache.carry_out([BlockMove("copy", 0, 5), BlockMove("copy", 1, 4), BlockMove("copy", 2, 5)])
    assert torch.equal(cache.blocks, before[:, :, [0, 1, 2, 3, 1, 2]])


def test_moves_that_fail_are_made_the_next_time_and_those_before_them_are_not_repeated() -> None:
    cache = cache_with_contents()
    before, swapped = cache.blocks.clone(), cache.swapped
    moves = [BlockMove("copy", 0, 5), BlockMove("out", 1, 3), BlockMove("in", 3, 2)]
    cache.swapped = swapped[:0]
    with pytest.raises(IndexError):
        cache.carry_out(moves)
    assert moves == [BlockMove("out", 1, 3), BlockMove("in", 3, 2)]
    cache.swapped = swapped
    cache.carry_out(moves)
    assert moves == [] and torch.equal(cache.blocks, before[:, :, [0, 1, 1, 3, 4, 0]])


def holder(pool: BlockAllocator, shared: list[int], tokens: int) -> Request:
    """A request that holds `shared` full blocks and its own after them, with `tokens` computed."""
    request = Request(str(tokens), list(range(tokens + 1)), SamplingParams())
    pool.take_prefix(shared)
    request.block_table = shared + [pool.take() for _ in range(-(-tokens // 4) - len(shared))]
    request.num_computed_tokens = tokens
    return request


def test_shared_blocks_stay_while_another_needs_them_and_are_moved_once_by_the_last_holder() -> None:
    pool, moves = BlockAllocator(10, 4), []
    swap = SwapSpace(6, pool, moves)
    shared = []
    for i in range(2):
        shared.append(pool.take())
        pool.fill(shared[i], 4)
        pool.publish(shared[i], shared[i - 1] if i else None, list(range(4 * i, 4 * i + 4)))
    first, last = holder(pool, shared, 10), holder(pool, shared, 13)
    pool.give_back_all(shared[:])  # they alone hold them
    own, others = first.block_table[2:], last.block_table[2:]
    assert swap.swap_out(first) and first.swapped_blocks.keys() == {2}
    assert moves == [BlockMove("out", own[0], 0)]
    pool.give_back_all(first.block_table)
    assert swap.swap_out(last) and last.swapped_blocks.keys() == {0, 1, 2, 3}
    assert moves[1:] == [BlockMove("out", block, i) for i, block in enumerate([*shared, *others], 1)]
    pool.give_back_all(last.block_table)
    # The shared beginning is cached still: one finds it there, and without it could restore nothing.
    assert [swap.restorable_tokens(first, found) for found in (0, 1, 2)] == [0, 4, 10]
    assert [swap.restorable_tokens(last, found) for found in (0, 1, 4)] == [13, 13, 16]
    del moves[:]
    prefix = pool.find_prefix(first.token_ids, 10)
    pool.take_prefix(prefix)
    first.block_table = list(prefix)
    assert prefix == shared and swap.swap_in(first) == 10
    assert moves == [BlockMove("in", 0, first.block_table[2])] and not first.swapped_blocks
    assert swap.swap_in(last) == 13, "with no beginning found, all of it is brought back"
    assert pool.stats().filled_slots == 10 + 13
    pool.check_invariants([first.block_table, last.block_table])
    assert [move.target for move in moves[1:]] == last.block_table and swap.allocator.num_available == 6


def test_a_last_block_that_siblings_share_is_moved_for_each_since_it_cannot_be_found_again() -> None:
    pool, moves = BlockAllocator(4, 4), []
    swap, request = SwapSpace(4, pool, moves), holder(pool, [], 3)
    pool.share(request.block_table[0])
    assert swap.swap_out(request) and moves == [BlockMove("out", request.block_table[0], 0)]


def pair_with_one_in_cpu_memory(**options) -> tuple[LLM, Request]:
    """Two requests in a pool too small for both, right after the younger has given way."""
    llm = tiny_llm(MODEL, num_blocks=8, preemption="swap", admission="greedy", **options)
    ids = [llm.add_request([token] * 20, GREEDY) for token in (1, 2)]
    victim = llm._groups[ids[1]][0]
    while not victim.metrics.preemptions:
        llm.step()
        llm.scheduler.check_invariants()
    return llm, victim


def test_a_request_is_swapped_out_with_all_it_has_computed_and_comes_back_with_it() -> None:
    llm, victim = pair_with_one_in_cpu_memory()
    assert victim.status is RequestStatus.SWAPPED and victim.block_table == []
    assert llm.stats().swap_blocks_used == len(victim.swapped_blocks) == 4
    assert victim.num_swapped_tokens == len(victim.token_ids) - 1
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
    assert victim.status is RequestStatus.FINISHED and victim.swapped_blocks == {}
    assert_right([1] * 20, GREEDY, finish(llm, {})["0"])


@pytest.mark.parametrize("swap_blocks, status", [(3, RequestStatus.WAITING), (4, RequestStatus.SWAPPED)])
def test_what_does_not_fit_the_cpu_blocks_as_a_whole_is_recomputed(swap_blocks: int, status: RequestStatus) -> None:
    llm, victim = pair_with_one_in_cpu_memory(swap_blocks=swap_blocks, enable_prefix_caching=False)
    assert victim.status is status
    assert llm.stats().swap_blocks_used == (4 if status is RequestStatus.SWAPPED else 0)
    outputs = finish(llm, {})
    for token in (1, 2):
        assert_right([token] * 20, GREEDY, outputs[str(token - 1)])
    assert (llm.stats().recomputed_tokens > 0) == (status is RequestStatus.WAITING)


@pytest.mark.parametrize("wait_until_it_is_gone", [True, False])
def test_a_shared_beginning_that_vanished_is_recomputed_with_all_after_it(wait_until_it_is_gone: bool) -> None:
    door = {"open": True}

    def doorkeeper(now: Situation) -> bool:
        return door["open"]

    llm = tiny_llm(MODEL, num_blocks=8, preemption="swap", admission=doorkeeper)
    stem = list(range(16))
    work = {"0": ([50] * 8, SamplingParams(temperature=0, max_tokens=56)),
            "1": (stem + [1], SamplingParams(temperature=0, max_tokens=14)),
            "2": (stem + [2, 3], SamplingParams(temperature=0, max_tokens=40))}
    for prompt, params in work.values():
        llm.add_request(prompt, params)
    long, _, victim = (llm._groups[request_id][0] for request_id in work)
    outputs: dict[str, list[int]] = {}
    while "1" in llm._groups:
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        if victim.status is RequestStatus.SWAPPED:
            door["open"] = False
    assert victim.status is RequestStatus.SWAPPED and min(victim.swapped_blocks) == 2, "the beginning is shared"
    assert len(llm.scheduler.allocator.find_prefix(stem, 16)) == 2, "cached, now that nobody holds it"
    while wait_until_it_is_gone and llm.scheduler.allocator.find_prefix(stem, 16):
        llm.step()
    door["open"] = True
    outputs = finish(llm, outputs)
    for request_id, (prompt, params) in work.items():
        assert_right(prompt, params, outputs[request_id])
    assert long.metrics.preemptions == 0
    if wait_until_it_is_gone:
        assert llm.stats().swapped_in_tokens == 0 and victim.metrics.recomputed_tokens >= 16
    else:
        assert llm.stats().swapped_in_tokens > 0
