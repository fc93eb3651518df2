"""Which request is next, and may it be admitted? Policies of the user's own, the watermark, and a full queue."""

from __future__ import annotations

import math
import random

import pytest
from tests.crowds import by_arrival, whatever_fits
from tests.oracle import continue_densely, tiny_model
from tests.recount import assert_nothing_is_held
from tests.test_engine import tiny_llm

from nanopaged import LLM, SamplingParams, TooManyWaiting
from nanopaged.request import Request
from nanopaged.waiting import AdmissionContext, AdmissionPolicy, PolicyError, fcfs, watermark

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def context(**blocks: int) -> AdmissionContext:
    defaults = {"pool": 100, "available": 50, "committed": 40, "chunk": 5, "prompt": 10, "full": 20}
    return AdmissionContext(**{**defaults, **blocks})


@pytest.mark.policy
@pytest.mark.parametrize("share, blocks, admitted", [
    (0.25, {"available": 35}, True),
    (0.25, {"available": 34}, False),
    (0.25, {"available": 36, "prompt": 12}, False),
    (0.25, {"available": 35, "chunk": 30, "full": 100, "committed": 100}, True),
    (0.0, {"available": 10}, True),
    (0.0, {"available": 9}, False),
    (0.01, {"pool": 99, "available": 10}, True),
    (1.0, {"available": 110}, True),
    (1.0, {"available": 109}, False),
])
def test_a_watermark_leaves_its_share_of_the_pool_free(share: float, blocks: dict[str, int], admitted: bool) -> None:
    assert watermark(share)(context(**blocks)) is admitted


@pytest.mark.parametrize("options, error, words", [
    ({"admission": "eager"}, ValueError, "admission must be one of 'watermark', 'reserve', 'greedy', got 'eager'"),
    ({"admission": None}, TypeError, "admission must be a str, got None"),
    ({"watermark": 1.5}, ValueError, "watermark must be from 0.0 to 1.0, got 1.5"),
    ({"watermark": "0.1"}, TypeError, "watermark must be a number, got '0.1'"),
    ({"watermark": -0.1, "admission": "reserve"}, ValueError, "watermark must be from 0.0 to 1.0, got -0.1"),
    ({"order": "lifo"}, ValueError, "order must be one of 'fcfs', 'priority', 'shortest', got 'lifo'"),
    ({"order": None}, TypeError, "order must be a str, got None"),
    ({"max_waiting": 0}, ValueError, "max_waiting must be at least 1, got 0"),
    ({"max_waiting": 2.0}, TypeError, "max_waiting must be an int, got 2.0"),
])
def test_an_invalid_policy_is_refused_and_named(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny_llm(MODEL, **options)


def test_a_function_is_taken_as_a_policy_as_it_is() -> None:
    def order(request: Request) -> float:
        return 0

    def admission(now: AdmissionContext) -> bool:
        return True

    scheduler = tiny_llm(MODEL, admission=admission, order=order).scheduler
    assert scheduler.admission is admission and scheduler.order is order
    assert tiny_llm(MODEL).scheduler.order is fcfs


def test_an_admission_policy_sees_the_blocks_of_the_pool_the_running_requests_and_the_candidate() -> None:
    seen: list[AdmissionContext] = []
    llm = tiny_llm(MODEL, admission=lambda now: bool(seen.append(now)) or True, max_num_batched_tokens=30)
    llm.add_request([1] * 20, GREEDY)
    llm.step()
    llm.add_request([1] * 16 + [2] * 24, SamplingParams(temperature=0.0, max_tokens=5, n=2))
    llm.step()
    # 20 + 8 - 1 tokens are 4 blocks of 8, 40 + 5 - 1 are 6, of which two are shared; the budget leaves 29 tokens.
    assert seen == [
        AdmissionContext(pool=40, available=40, committed=0, chunk=0, prompt=0, full=4),
        AdmissionContext(pool=40, available=40, committed=0, chunk=0, prompt=0, full=12),
        AdmissionContext(pool=40, available=37, committed=4, chunk=3, prompt=3, full=12),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_an_admission_policy_of_ones_own_is_obeyed_but_never_keeps_a_lone_request_out(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [[rng.randrange(61) for _ in range(rng.randint(1, 30))] for _ in range(4)]
    llm = tiny_llm(MODEL, admission=lambda now: now.prompt == 0)  # true when a request is added, never of a candidate
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        assert len(llm.scheduler.running) <= 1, f"seed {seed}"
    assert [outputs[i] for i in ids] == [continue_densely(MODEL, prompt, GREEDY) for prompt in prompts], f"seed {seed}"


def test_an_admission_policy_cannot_admit_what_does_not_fit_at_this_moment() -> None:
    asked: list[AdmissionContext] = []

    def willing(now: AdmissionContext) -> bool:
        asked.append(now)
        assert len(asked) < 100, "admitted, preempted and asked about without end"
        return True

    llm = tiny_llm(MODEL, num_blocks=4, admission=willing)
    outputs = llm.generate([[1] * 20, [2] * 20], GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == [
        continue_densely(MODEL, [token] * 20, GREEDY) for token in (1, 2)]
    assert llm.stats().num_preemptions == 0, "the second waits, for its three blocks never fit beside the first"


@pytest.mark.parametrize("admission, n, fits", [
    pytest.param("watermark", 4, True, marks=pytest.mark.policy),
    pytest.param(lambda now: False, 1, False, id="nobody"),
])
def test_a_request_that_could_never_be_admitted_is_refused_at_once(
        admission: str | AdmissionPolicy, n: int, fits: bool) -> None:
    params = SamplingParams(n=n, max_tokens=16)  # 20 + 16 - 1 tokens: 5 blocks, at full length
    llm = tiny_llm(MODEL, num_blocks=15, admission=admission)
    if fits:
        assert len(llm.generate([[1] * 20], params)[0].outputs) == n
    else:
        with pytest.raises(ValueError, match=f"can never fit: the admission policy refuses .*pool=15, .*full={5 * n}"):
            llm.add_request([1] * 20, params)
        assert not llm.has_unfinished_requests()


def finish(llm: LLM) -> dict[str, list[int]]:
    """Steps to the end; returns each request's tokens, in the order in which they finished."""
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output.outputs[0].token_ids for output in llm.step() if output.finished}
    assert_nothing_is_held(llm.scheduler)
    return outputs


def test_an_order_of_ones_own_is_asked_once_for_each_request_when_it_is_added() -> None:
    asked: list[str] = []

    def last_come_first_served(request: Request) -> float:
        asked.append(request.request_id)
        return -len(asked)

    llm = tiny_llm(MODEL, num_blocks=6, max_num_seqs=2, order=last_come_first_served, admission=whatever_fits)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    ids = [llm.add_request([token] * 9, params) for token in range(6)]
    wanted = [continue_densely(MODEL, [token] * 9, params) for token in range(6)]
    assert finish(llm) == dict(zip(ids[::-1], wanted[::-1]))
    assert llm.stats().num_preemptions > 0
    llm.generate([[1, 2]], SamplingParams(n=2, max_tokens=2))
    assert asked == [f"{i}.0" for i in range(7)], "the continuations of a prompt have one place"


def test_requests_of_equal_place_are_served_by_arrival() -> None:
    llm = tiny_llm(MODEL, max_num_seqs=1, order=lambda request: request.num_prompt_tokens % 2)
    ids = [llm.add_request([1] * length, GREEDY) for length in (3, 2, 5, 4, 1, 8)]
    assert list(finish(llm)) == [ids[i] for i in (1, 3, 5, 0, 2, 4)]


@pytest.mark.parametrize("place, error", [
    (None, TypeError), ("1", TypeError), (True, TypeError), (1j, TypeError), ([1], TypeError),
    (math.nan, ValueError), (math.inf, ValueError), (-math.inf, ValueError),
])
def test_an_order_that_returns_no_finite_number_is_named_and_nothing_is_changed(
        place: object, error: type[Exception]) -> None:
    places = [0, place, 0]
    llm = tiny_llm(MODEL, seed=3, order=lambda request: places.pop())
    undisturbed = tiny_llm(MODEL, seed=3)
    unseeded = SamplingParams(max_tokens=4)
    llm.add_request([1, 2], GREEDY), undisturbed.add_request([1, 2], GREEDY)
    with pytest.raises(error, match="`order` gives a request must be"):
        llm.add_request([3], unseeded)
    assert llm.stats() == undisturbed.stats()
    assert llm.add_request([4], unseeded) == undisturbed.add_request([4], unseeded) == "1"
    assert finish(llm) == finish(undisturbed)


def test_an_order_that_raises_changes_nothing() -> None:
    class Broken:
        def __call__(self, request: Request) -> float:
            raise ZeroDivisionError

    llm = tiny_llm(MODEL, order=Broken())
    before = llm.stats()
    words = r"order policy raised ZeroDivisionError\(\).*a Request, whose fields are request_id"
    with pytest.raises(PolicyError, match=words):
        llm.add_request([1], GREEDY)
    with pytest.raises(PolicyError):
        llm.generate([[1], [2]], GREEDY)
    assert llm.stats() == before and not llm.has_unfinished_requests()


@pytest.mark.parametrize("priority, error", [
    ("high", TypeError), (None, TypeError), (True, TypeError), (1j, TypeError), (math.nan, ValueError),
    (math.inf, ValueError),
])
def test_an_invalid_priority_is_refused_whatever_the_order_and_nothing_is_changed(
        priority: object, error: type[Exception]) -> None:
    llm = tiny_llm(MODEL)
    before = llm.stats()
    with pytest.raises(error, match="priority must be"):
        llm.add_request([1], GREEDY, priority=priority)
    assert llm.stats() == before and not llm.has_unfinished_requests()
    assert llm.add_request([1], GREEDY, priority=-1.5) == "0"


def full_queue() -> LLM:
    llm = tiny_llm(MODEL, max_num_seqs=1, max_waiting=2, seed=3, order=by_arrival)
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
    for engine in (llm, undisturbed):
        assert [request.request_id for request in engine.scheduler.waiting] == ["1.0", "2.0"]
    outputs = []
    for engine in (llm, undisturbed):
        while engine.scheduler.queue_is_full():
            engine.step()
        assert engine.add_request([5], SamplingParams()) == "3"  # its seed is the engine's, and of its number
        while engine.has_unfinished_requests():
            shown = engine.step()
        outputs.append(shown[0].outputs[0].token_ids)
    assert outputs[0] == outputs[1]


def test_a_preempted_request_always_finds_room_in_the_queue() -> None:
    llm = tiny_llm(MODEL, num_blocks=6, max_waiting=1, admission=whatever_fits)
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
