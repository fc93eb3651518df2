"""Whom to admit, and when? "reserve" and "greedy", and what the choice of a policy costs."""

from __future__ import annotations

import random

import pytest
from tests.crowds import VOCABULARY, request_with, take_step
from tests.oracle import tiny_model
from tests.recount import assert_nothing_is_held
from tests.test_engine import tiny_llm
from tests.test_waiting_policies import context

from nanopaged import SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.admission import by_name, greedy, reserve
from nanopaged.scheduler import Scheduler
from nanopaged.waiting import AdmissionPolicy, watermark

MODEL = tiny_model()


@pytest.mark.policy
@pytest.mark.parametrize("policy, blocks, admitted", [
    (reserve, {"committed": 80}, True),
    (reserve, {"committed": 81}, False),
    (reserve, {"committed": 80, "full": 21}, False),
    (reserve, {"committed": 0, "full": 100, "available": 0}, True),
    (greedy, {"available": 5}, True),
    (greedy, {"available": 4}, False),
    (greedy, {"available": 5, "prompt": 90, "full": 100, "committed": 100}, True),
])
def test_reserve_and_greedy_admit_up_to_their_limits(
        policy: AdmissionPolicy, blocks: dict[str, int], admitted: bool) -> None:
    assert policy(context(**blocks)) is admitted


@pytest.mark.policy
def test_a_policy_is_found_by_its_name() -> None:
    assert by_name("reserve", 0.5) is reserve
    assert by_name("greedy", 0.5) is greedy
    half = by_name("watermark", 0.5)
    assert (half(context(available=60)), half(context(available=59))) == (True, False)
    assert tiny_llm(MODEL, admission="reserve").scheduler.admission is reserve
    assert tiny_llm(MODEL, admission="greedy").scheduler.admission is greedy


def crowd(policy: AdmissionPolicy, seed: int, num_blocks: int = 24) -> tuple[Scheduler, int]:
    """Serves random requests, with random tokens for a model; returns how many ran together at most."""
    rng = random.Random(seed)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4, rng.random() < 0.5), 16, rng.choice([12, 200]), 64, policy)
    together = 0
    for i in range(20):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
        scheduler.add(request_with(i, prompt, rng.randint(1, 20), n=rng.choice([1, 1, 2])))
    while scheduler.has_unfinished():
        take_step(scheduler, rng, f"seed {seed}")
        together = max(together, len(scheduler.running))
    assert_nothing_is_held(scheduler, f"seed {seed}")
    return scheduler, together


@pytest.mark.policy
@pytest.mark.parametrize("seed", range(12))
def test_reserve_never_preempts_and_still_runs_several_requests_together(seed: int) -> None:
    scheduler, together = crowd(reserve, seed)
    assert scheduler.stats.num_preemptions == scheduler.stats.recomputed_tokens == 0, f"seed {seed}"
    assert together > 1, f"seed {seed}"


@pytest.mark.policy
def test_greedy_runs_more_requests_together_than_a_watermark_and_preempts_more() -> None:
    policies = {"greedy": greedy, "watermark": watermark(0.25), "reserve": reserve}
    together, preemptions = {}, {}
    for name, policy in policies.items():
        runs = [crowd(policy, seed) for seed in range(12)]
        together[name] = sum(most for _, most in runs)
        preemptions[name] = sum(scheduler.stats.num_preemptions for scheduler, _ in runs)
    assert together["greedy"] > together["watermark"] > together["reserve"]
    assert preemptions["greedy"] > 1.5 * preemptions["watermark"] > 0 == preemptions["reserve"]


@pytest.mark.policy
@pytest.mark.parametrize("policy, n, fits", [("reserve", 3, True), ("reserve", 4, False), ("greedy", 4, True)])
def test_reserve_refuses_at_once_continuations_that_never_fit_together_and_greedy_takes_them(
        policy: str, n: int, fits: bool) -> None:
    params = SamplingParams(n=n, max_tokens=16)  # 20 + 16 - 1 tokens: 5 blocks, at full length
    llm = tiny_llm(MODEL, num_blocks=15, admission=policy)
    if fits:
        assert len(llm.generate([[1] * 20], params)[0].outputs) == n
    else:
        with pytest.raises(ValueError, match=f"can never fit: the admission policy refuses .*pool=15, .*full={5 * n}"):
            llm.add_request([1] * 20, params)
        assert not llm.has_unfinished_requests()
