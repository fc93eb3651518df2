"""Whom to let in: the three policies, a policy of one's own, and a queue that may be full."""

from __future__ import annotations

import random

import pytest
from tests.oracle import continue_densely, tiny_model
from tests.test_engine import tiny_llm

from nanopaged import LLM, SamplingParams, TooManyWaiting, admission
from nanopaged.pressure.admission import Policy, Situation
from nanopaged.block_allocator import BlockAllocator
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def situation(**blocks: int) -> Situation:
    return Situation(**{"pool": 100, "available": 50, "committed": 40, "chunk": 5, "prompt": 10, "full": 20, **blocks})


@pytest.mark.parametrize("policy, blocks, admitted", [
    (admission.watermark(0.25), {"available": 35}, True),
    (admission.watermark(0.25), {"available": 34}, False),
    (admission.watermark(0.25), {"available": 36, "prompt": 12}, False),
    (admission.watermark(0.25), {"available": 35, "chunk": 30, "full": 100, "committed": 100}, True),
    (admission.watermark(0.0), {"available": 10}, True),
    (admission.watermark(0.0), {"available": 9}, False),
    (admission.watermark(0.01), {"pool": 99, "available": 10}, True),
    (admission.watermark(1.0), {"available": 110}, True),
    (admission.watermark(1.0), {"available": 109}, False),
    (admission.reserve, {"committed": 80}, True),
    (admission.reserve, {"committed": 81}, False),
    (admission.reserve, {"committed": 80, "full": 21}, False),
    (admission.reserve, {"committed": 0, "full": 100, "available": 0}, True),
    (admission.greedy, {"available": 5}, True),
    (admission.greedy, {"available": 4}, False),
    (admission.greedy, {"available": 5, "prompt": 90, "full": 100, "committed": 100}, True),
])
def test_a_policy_admits_up_to_its_limit_and_not_beyond(policy: Policy, blocks: dict[str, int], admitted: bool) -> None:
    assert policy(situation(**blocks)) is admitted


def test_a_policy_is_found_by_its_name_and_a_function_is_taken_as_it_is() -> None:
    assert admission.policy("reserve", 0.5) is admission.reserve
    assert admission.policy("greedy", 0.5) is admission.greedy
    half = admission.policy("watermark", 0.5)
    assert (half(situation(available=60)), half(situation(available=59))) == (True, False)
    own = bool
    assert admission.policy(own, 0.5) is own


@pytest.mark.parametrize("options, error, words", [
    ({"admission": "eager"}, ValueError, "admission must be one of 'watermark', 'reserve', 'greedy', got 'eager'"),
    ({"admission": None}, TypeError, "admission must be a str, got None"),
    ({"watermark": 1.5}, ValueError, "watermark must be from 0.0 to 1.0, got 1.5"),
    ({"watermark": "0.1"}, TypeError, "watermark must be a number, got '0.1'"),
    ({"watermark": -0.1, "admission": "reserve"}, ValueError, "watermark must be from 0.0 to 1.0, got -0.1"),
    ({"max_waiting": 0}, ValueError, "max_waiting must be at least 1, got 0"),
    ({"max_waiting": 2.0}, TypeError, "max_waiting must be an int, got 2.0"),
])
def test_an_admission_that_cannot_be_is_refused_by_name(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny_llm(MODEL, **options)


def crowd(policy: Policy, seed: int, num_blocks: int = 24) -> tuple[Scheduler, int]:
    """Serves random requests, with random tokens for a model; returns how many ran together at most."""
    rng = random.Random(seed)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4, rng.random() < 0.5), 16, rng.choice([12, 200]), 64, policy)
    together = 0
    for i in range(20):
        params = SamplingParams(n=rng.choice([1, 1, 2]), max_tokens=rng.randint(1, 20))
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
        members = [Request(f"{i}.{j}", prompt, params) for j in range(params.n)]
        for member in members:
            member.has_siblings = params.n > 1
        members[0].followers = members[1:]
        scheduler.add(members[0])
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        together = max(together, len(scheduler.running))
        scheduler.update(step, [rng.randrange(3) for _ in step.sampled()])
        scheduler.check_invariants()
    return scheduler, together


@pytest.mark.parametrize("seed", range(12))
def test_under_reserve_nobody_ever_gives_way_and_still_several_run_together(seed: int) -> None:
    scheduler, together = crowd(admission.reserve, seed)
    assert scheduler.stats.num_preemptions == scheduler.stats.recomputed_tokens == 0, f"seed {seed}"
    assert together > 1, f"seed {seed}"


def test_greedy_admits_more_at_once_than_a_watermark_and_pays_with_preemptions() -> None:
    policies = {"greedy": admission.greedy, "watermark": admission.watermark(0.25), "reserve": admission.reserve}
    together, preemptions = {}, {}
    for name, policy in policies.items():
        runs = [crowd(policy, seed) for seed in range(12)]
        together[name] = sum(most for _, most in runs)
        preemptions[name] = sum(scheduler.stats.num_preemptions for scheduler, _ in runs)
    assert together["greedy"] > together["watermark"] > together["reserve"]
    assert preemptions["greedy"] > 1.5 * preemptions["watermark"] > 0 == preemptions["reserve"]


def test_a_policy_sees_the_blocks_of_the_pool_the_running_and_the_candidate() -> None:
    seen: list[Situation] = []
    llm = tiny_llm(MODEL, admission=lambda now: bool(seen.append(now)) or True, max_num_batched_tokens=30)
    llm.add_request([1] * 20, GREEDY)
    llm.step()
    llm.add_request([1] * 16 + [2] * 24, SamplingParams(temperature=0.0, max_tokens=5, n=2))
    llm.step()
    # 20 + 8 - 1 tokens are 4 blocks of 8, 40 + 5 - 1 are 6, of which two are shared; the budget leaves 29 tokens.
    assert seen == [
        Situation(pool=40, available=40, committed=0, chunk=0, prompt=0, full=4),
        Situation(pool=40, available=40, committed=0, chunk=0, prompt=0, full=12),
        Situation(pool=40, available=37, committed=4, chunk=3, prompt=3, full=12),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_policy_of_ones_own_is_obeyed_but_never_keeps_a_lone_request_out(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(61) for _ in range(rng.randint(1, 30))] for _ in range(4)]
    llm = tiny_llm(MODEL, admission=lambda now: now.prompt == 0)  # true before anybody came, and never of a candidate
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        assert len(llm.scheduler.running) <= 1, f"seed {seed}"
    assert [outputs[i] for i in ids] == [continue_densely(MODEL, prompt, GREEDY) for prompt in prompts], f"seed {seed}"


def test_a_policy_cannot_admit_what_does_not_fit_this_instant() -> None:
    asked: list[Situation] = []

    def willing(now: Situation) -> bool:
        asked.append(now)
        assert len(asked) < 100, "let in, sent away and asked about without end"
        return True

    llm = tiny_llm(MODEL, num_blocks=4, admission=willing)
    outputs = llm.generate([[1] * 20, [2] * 20], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [
        continue_densely(MODEL, [token] * 20, GREEDY) for token in (1, 2)]
    assert llm.stats().num_preemptions == 0, "the second waits, for its three blocks never fit beside the first"


@pytest.mark.parametrize("admission, n, fits", [
    ("reserve", 3, True), ("reserve", 4, False), ("watermark", 4, True), ("greedy", 4, True),
    pytest.param(lambda now: False, 1, False, id="nobody"),
])
def test_a_request_that_could_never_be_admitted_is_refused_at_once(admission: str | Policy, n: int, fits: bool) -> None:
    params = SamplingParams(n=n, max_tokens=16)  # 20 + 16 - 1 tokens: 5 blocks, at full length
    llm = tiny_llm(MODEL, num_blocks=15, admission=admission)
    if fits:
        assert len(llm.generate([[1] * 20], params)[0].outputs) == n
    else:
        with pytest.raises(ValueError, match=f"can never fit: the admission policy refuses .*pool=15, .*full={5 * n}"):
            llm.add_request([1] * 20, params)
        assert not llm.has_unfinished_requests()


def full_queue() -> LLM:
    llm = tiny_llm(MODEL, max_num_seqs=1, max_waiting=2, seed=3)
    llm.add_request([1, 2], GREEDY)
    llm.step()
    for token in (3, 4):
        llm.add_request([token], GREEDY)
    return llm


def test_a_full_queue_refuses_a_request_and_nothing_else_changes() -> None:
    llm, undisturbed = full_queue(), full_queue()
    for n in (1, 2):
        with pytest.raises(TooManyWaiting, match="2 requests wait already, max_waiting is 2"):
            llm.add_request([5], SamplingParams(n=n))
    assert llm.stats() == undisturbed.stats()
    assert list(llm.scheduler.waiting) == list(undisturbed.scheduler.waiting) == ["1.0", "2.0"]
    outputs = []
    for engine in (llm, undisturbed):
        while engine.scheduler.queue_is_full():
            engine.step()
        assert engine.add_request([5], SamplingParams()) == "3"  # its seed is the engine's, and of its number
        while engine.has_unfinished_requests():
            shown = engine.step()
        outputs.append(shown[0].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


def test_a_request_that_was_preempted_always_finds_room_in_the_queue() -> None:
    llm = tiny_llm(MODEL, num_blocks=6, max_waiting=1, admission="greedy")
    params = SamplingParams(temperature=0.0, max_tokens=24)
    ids = []
    for token in (1, 2, 3):
        ids.append(llm.add_request([token] * 9, params))
        llm.step()
    longest, outputs = 0, {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        longest = max(longest, len(llm.scheduler.waiting))
    assert longest == 2
    assert [outputs[i] for i in ids] == [continue_densely(MODEL, [token] * 9, params) for token in (1, 2, 3)]


@pytest.mark.parametrize("before", [0, 2])
def test_generate_sends_its_prompts_in_as_the_queue_has_room(before: int) -> None:
    llm = tiny_llm(MODEL, max_num_seqs=2, max_waiting=2)
    others = [llm.add_request([50 + i], GREEDY) for i in range(before)]
    waiting: list[int] = []
    schedule = llm.scheduler.schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.scheduler, "schedule", lambda: (waiting.append(len(llm.scheduler.waiting)), schedule())[1])
        outputs = llm.generate([[i, i + 1] for i in range(9)], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [
        continue_densely(MODEL, [i, i + 1], GREEDY) for i in range(9)]
    assert max(waiting) == 2
    assert {output.request_id for output in llm.step()} == set(others)
