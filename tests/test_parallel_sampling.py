"""Several continuations of one prompt: computed once, shared until written, and each sampled for itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tests.crowds import by_arrival, check_every_plan, members_of, whatever_fits
from tests.oracle import assert_dense_continuation, tiny_model
from tests.recount import assert_consistent, assert_nothing_is_held
from tests.test_engine import tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.outputs import RequestOutput
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import continuation_seed
from nanopaged.step import BlockMove

MODEL = tiny_model()
PROMPT = list(range(20))  # with blocks of 8: two full ones, and one with 4 tokens


def four(**changes: object) -> SamplingParams:
    return SamplingParams(**{"n": 4, "seed": 5, "max_tokens": 8, **changes})


def engine(**options: object) -> LLM:
    """One in which a copy-on-write that is missing is named as such: a block is written while others hold it."""
    llm = tiny_llm(MODEL, **options)
    check_every_plan(llm.scheduler)
    return llm


def start(params: SamplingParams, prompt: list[int] = PROMPT, **options: object) -> tuple[LLM, list[Request]]:
    """An engine with one request, and its continuations."""
    llm = engine(**options)
    return llm, members_of(llm, llm.add_request(prompt, params))


def finish(llm: LLM) -> dict[str, RequestOutput]:
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler)
    assert_nothing_is_held(llm.scheduler)
    return outputs


def assert_right(output: RequestOutput, params: SamplingParams, where: str = "") -> None:
    for i, completion in enumerate(output.outputs):
        assert_dense_continuation(
            MODEL, output.prompt_token_ids, params, continuation_seed(params.seed or 0, i), completion.token_ids,
            completion.finish_reason in ("stop", "length"), f"continuation {i} {where}")


@pytest.mark.parametrize("budget", [100, 7])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared_by_all_continuations(budget: int) -> None:
    llm, members = start(four(), max_num_batched_tokens=budget)
    while not members[0].output_token_ids:
        assert llm.scheduler.running in ([], members[:1]), "a continuation started before its prompt was computed"
        llm.step()
    stats = llm.stats()
    assert llm.scheduler.running == members
    assert (stats.computed_tokens, stats.output_tokens) == (20, 4)
    assert stats.referenced_blocks == stats.shared_blocks == 3
    assert all(member.block_table == members[0].block_table for member in members)
    assert [llm.scheduler.allocator.ref_count(block) for block in members[0].block_table] == [4, 4, 4]
    assert_right(finish(llm)["0"], four())
    assert llm.stats().computed_tokens == 20 + 4 * 7, "the last token is never computed"


def test_the_shared_last_block_is_copied_for_each_writer_but_the_last_which_writes_in_place() -> None:
    llm, members = start(four())
    llm.step()
    first, second, shared = members[0].block_table
    scheduler, blocks = llm.scheduler, llm.kv_cache.blocks
    scheduler.schedule()
    own = [member.block_table[2] for member in members]
    assert len(set(own)) == 4 and own[3] == shared
    assert scheduler.moves == [BlockMove("copy", shared, block) for block in own[:3]]
    assert all(member.block_table[:2].tolist() == [first, second] for member in members)
    assert [scheduler.allocator.ref_count(block) for block in (first, second, *own)] == [4, 4, 1, 1, 1, 1]
    wanted = blocks[:, :, shared].clone()
    wanted[..., 4:, :] = 0
    blocks[:, :, own[:3]] = 0
    llm.kv_cache.carry_out(scheduler.moves)
    for block in own[:3]:
        assert torch.equal(blocks[:, :, block, :, :4], wanted[..., :4, :]), "a layer was not copied"
    scheduler.schedule()
    assert scheduler.moves == [], "a block with one holder is not copied again"
    assert_right(finish(llm)["0"], four())


def test_a_continuation_copies_the_shared_block_in_the_step_in_which_it_first_writes() -> None:
    llm, members = start(four(max_tokens=3), [1, 2, 3, 4], max_num_batched_tokens=2)
    llm.step(), llm.step()
    (shared,) = members[0].block_table
    held, copies, carry_out = [], [], llm.kv_cache.carry_out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.kv_cache, "carry_out", lambda moves: (copies.append(len(moves)), carry_out(moves)))
        while llm.scheduler.has_unfinished():
            (output,) = llm.step()
            held.append([i for i, member in enumerate(members) if member.block_table.tolist() == [shared]])
    # The budget lets two of them run in each step, until they have finished.
    assert copies == [2, 0, 1, 0]
    assert held == [[2, 3], [2, 3], [3], []]
    assert_right(output, four(max_tokens=3))


def test_a_prompt_that_fills_its_blocks_copies_nothing() -> None:
    llm, members = start(four(), PROMPT[:16])
    llm.step()
    full = list(members[0].block_table)
    llm.scheduler.schedule()
    assert llm.scheduler.moves == []
    assert [member.block_table[:2].tolist() for member in members] == [full] * 4
    assert len({member.block_table[2] for member in members}) == 4
    assert_right(finish(llm)["0"], four())


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_first_continuation_writes_in_place_if_its_siblings_were_preempted(preemption: str) -> None:
    params = four(n=2, max_tokens=4)
    llm, _ = start(params, PROMPT[:12], num_blocks=2, preemption=preemption, admission=whatever_fits)
    assert_right(finish(llm)["0"], params)
    assert llm.stats().num_preemptions > 0


@pytest.mark.parametrize("seed", range(6))
def test_one_continuation_may_be_preempted_and_all_get_the_right_tokens(seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(61) for _ in range(rng.randint(3, 20))]
    params = four(max_tokens=rng.randint(18, 25), seed=seed)
    shared, full = len(prompt) // 8, -(-(len(prompt) + params.max_tokens - 1) // 8)
    one_short = shared + 4 * (full - shared) - 1
    llm, _ = start(params, prompt, num_blocks=one_short, preemption=rng.choice(["recompute", "swap"]),
                   admission=whatever_fits, enable_prefix_caching=False)  # equal outputs would be stored once
    output = finish(llm)["0"]
    preemptions = [completion.metrics.preemptions for completion in output.outputs]
    assert preemptions[:3] == [0, 0, 0] and preemptions[3] > 0, f"seed {seed}"
    assert_right(output, params, f"seed {seed}")


def test_a_continuation_may_stop_early_while_the_others_go_on() -> None:
    (plain,) = engine().generate([PROMPT], four(max_tokens=12))
    texts = [completion.token_ids for completion in plain.outputs]
    stop = next(t for t in texts[1] if all(t not in other for other in (texts[0], *texts[2:])))
    llm, _ = start(four(max_tokens=12, stop_token_ids=[stop]))
    shown = []
    while llm.has_unfinished_requests():
        shown += llm.step()
    end = texts[1].index(stop) + 1
    assert [completion.index for completion in shown[-1].outputs] == [0, 1, 2, 3]
    assert [completion.token_ids for completion in shown[-1].outputs] == [texts[0], texts[1][:end], *texts[2:]]
    assert [completion.finish_reason for completion in shown[-1].outputs] == ["length", "stop", "length", "length"]
    assert [completion.finish_reason for completion in shown[end - 1].outputs] == [None, "stop", None, None]
    assert [output.finished for output in shown] == [False] * 11 + [True]


@pytest.mark.parametrize("seed", [0, 5, -3, 2**70])
def test_a_continuation_is_what_the_request_gives_alone_with_its_derived_seed(seed: int) -> None:
    (together,) = engine().generate([PROMPT], four(seed=seed))
    alone = engine().generate([PROMPT] * 4, [four(n=1, seed=continuation_seed(seed, i)) for i in range(4)])
    assert continuation_seed(seed, 0) == seed
    assert [c.token_ids for c in together.outputs] == [output.outputs[0].token_ids for output in alone]
    assert len({tuple(c.token_ids) for c in together.outputs}) == 4


def test_continuations_without_a_seed_differ_and_greedy_ones_do_not() -> None:
    unseeded, greedy = engine().generate([PROMPT] * 2, [four(seed=None), four(temperature=0.0)])
    assert len({tuple(c.token_ids) for c in unseeded.outputs}) == 4
    assert len({tuple(c.token_ids) for c in greedy.outputs}) == 1


def test_more_continuations_than_seats_are_refused_with_both_numbers() -> None:
    llm = engine(max_num_seqs=3)
    with pytest.raises(ValueError, match="n=4 .*max_num_seqs is 3"):
        llm.add_request(PROMPT, four())
    assert not llm.has_unfinished_requests()
    assert_right(llm.generate([PROMPT], four(n=3))[0], four(n=3))


def test_seats_are_kept_for_the_continuations_of_a_prompt_that_is_still_computed() -> None:
    llm, members = start(four(n=3), max_num_seqs=4, max_num_batched_tokens=8, order=by_arrival)
    _, third = (members_of(llm, llm.add_request([n], four(n=n, max_tokens=2))) for n in (1, 2))
    while llm.scheduler.has_unfinished():
        llm.step()
        assert len(llm.scheduler.running) <= 4
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler)
        assert third[0] not in llm.scheduler.running or members[0].output_token_ids


def test_a_missing_copy_is_named_as_a_block_written_while_others_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "fork", lambda self, block: block)
    llm, members = start(four())
    llm.step()
    shared = members[0].block_table[-1]
    with pytest.raises(AssertionError, match=f"request 0.0 writes block {shared} while .*0.1.*0.2.*0.3.* hold it"):
        llm.step()


def waiting(members: list[Request]) -> bool:
    return members[0].status is RequestStatus.WAITING and not members[0].output_token_ids


def computed_in_part(members: list[Request]) -> bool:
    return 0 < members[0].num_computed_tokens < 20 and members[1].status is RequestStatus.WAITING


def running(members: list[Request]) -> bool:
    return all(member.status is RequestStatus.RUNNING and member.num_output_tokens == 3 for member in members)


def one_finished(members: list[Request]) -> bool:
    return sum(member.status is RequestStatus.FINISHED for member in members) == 1


def one_preempted(members: list[Request]) -> bool:
    return members[3].status is RequestStatus.WAITING and members[0].num_output_tokens > 1


@pytest.mark.parametrize("phase, options", [
    (waiting, {"max_num_seqs": 4}), (computed_in_part, {"max_num_batched_tokens": 8}), (running, {}),
    (one_finished, {}), (one_preempted, {"num_blocks": 9, "admission": whatever_fits}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_aborting_ends_all_continuations_in_every_phase(
        phase: Callable[[list[Request]], bool], options: dict[str, object]) -> None:
    company, stops = SamplingParams(temperature=0.0, max_tokens=20), []
    if phase is one_finished:
        texts = [c.token_ids for c in engine().generate([PROMPT], four(max_tokens=20))[0].outputs]
        stops = [next(t for t in texts[2] if all(t not in other for other in (*texts[:2], texts[3])))]
    params = four(max_tokens=20, stop_token_ids=stops)
    llm = engine(**options, order=by_arrival)
    other = llm.add_request([9] * 5, company)
    victim = llm.add_request(PROMPT, params)
    members = members_of(llm, victim)
    while not phase(members):
        assert llm.step()
    output = llm.abort_request(victim)
    llm.scheduler.check_invariants()
    assert_consistent(llm.scheduler)
    assert output.finished and [*llm.scheduler.running, *llm.scheduler.waiting] == members_of(llm, other)
    assert llm.scheduler.stats.num_finished == 4
    reasons = [completion.finish_reason for completion in output.outputs]
    assert reasons == (["abort", "abort", "stop", "abort"] if stops else ["abort"] * 4)
    assert_right(output, params, phase.__name__)
    outputs = finish(llm)
    assert outputs.keys() == {other}
    assert_right(outputs[other], company)
