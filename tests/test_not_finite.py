"""One bad request harms only itself: what the model computes for it is not finite, and nobody else notices."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from tests.crowds import by_arrival, whatever_fits
from tests.oracle import TINY, continue_densely, tiny_model
from tests.recount import assert_nothing_is_held

from nanopaged import LLM, RequestOutput, SamplingParams
from nanopaged.gpt2 import GPT2
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler

PLACE = 20  # the position at which the broken models are not finite
MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
LONG, SHORT = [7 * i % 61 for i in range(30)], [3, 1, 4, 1, 5]


def broken_model(value: float = torch.nan) -> GPT2:
    model = tiny_model()
    model.wpe.weight[PLACE, 3] = value
    return model


def engine(model: GPT2 | None = None, **options: object) -> LLM:
    return LLM(model or broken_model(), **{"device": "cpu", "block_size": 8, "num_blocks": 40} | options)


def assert_failed(output: RequestOutput, num_tokens: int = 0) -> None:
    assert output.finished
    for completion in output.outputs:
        assert completion.finish_reason == "error" and len(completion.token_ids) == num_tokens
        assert re.match(r"the model's output is not finite \(tokens: \d+, from position \d+\): a weight is "
                        "not, or torch.float32 overflows", completion.error)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"max_num_batched_tokens": 3}, {"num_blocks": 5, "admission": whatever_fits}, {"preemption": "swap"},
    {"max_num_seqs": 1}, {"enable_prefix_caching": False},
], ids=["default", "small budget", "small pool", "swap", "one at a time", "no caching"])
def test_a_bad_request_ends_with_an_error_and_all_others_get_their_tokens(
    options: dict[str, object], value: float
) -> None:
    llm = engine(broken_model(value), **options)
    prompts = [SHORT, LONG, LONG[:9], LONG, SHORT[::-1]]
    outputs = llm.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt is LONG:
            assert_failed(output)
        else:
            (completion,) = output.outputs
            assert (completion.finish_reason, completion.error) == ("length", None)
            assert completion.token_ids == continue_densely(MODEL, prompt, GREEDY)
    assert_nothing_is_held(llm.scheduler)
    assert llm.stats().num_finished == 5 and llm.stats().output_tokens == 3 * 8


def test_a_request_that_goes_bad_on_its_way_keeps_the_tokens_it_has() -> None:
    llm = engine()
    prompt, params = LONG[:15], SamplingParams(temperature=0.7, seed=3, max_tokens=30)
    bad, good = llm.generate([prompt, SHORT], [params, GREEDY])
    assert_failed(bad, PLACE - 15 + 1)
    assert bad.outputs[0].token_ids == continue_densely(MODEL, prompt, params)[: PLACE - 15 + 1]
    assert good.outputs[0].token_ids == continue_densely(MODEL, SHORT, GREEDY)


@pytest.mark.parametrize("budget", [512, 4], ids=["at once", "in chunks"])
def test_all_continuations_of_a_bad_prompt_end_with_it(budget: int) -> None:
    llm = engine(max_num_batched_tokens=budget)
    params = SamplingParams(n=3, seed=1, max_tokens=4)
    bad, good = llm.generate([LONG, SHORT], params)
    assert_failed(bad)
    assert [completion.finish_reason for completion in good.outputs] == ["length"] * 3
    assert llm.scheduler.committed_seats == llm.scheduler.committed_blocks == 0
    assert_nothing_is_held(llm.scheduler)


def test_continuations_fail_one_by_one_once_they_have_started() -> None:
    llm = engine()
    params = SamplingParams(n=3, seed=1, max_tokens=12)
    request_id = llm.add_request(LONG[:15], params)
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
        llm.scheduler.check_invariants()
    assert {output.request_id for output in outputs} == {request_id}
    assert_failed(outputs[-1], PLACE - 15 + 1)
    with pytest.raises(ValueError, match="no unfinished request has the id"):
        llm.abort_request(request_id)


def test_a_batch_of_bad_requests_alone_ends_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.h[1].mlp.c_fc.bias[0] = torch.nan
    llm = engine(model)
    with caplog.at_level(logging.WARNING, logger="nanopaged"):
        for output in llm.generate([LONG, SHORT, [1]], GREEDY):
            assert_failed(output)
        assert_failed(llm.generate([[2, 3]], GREEDY)[0])
    (record,) = caplog.records
    assert re.match("request [012] ends with an error, and others may: the model's output is not", record.getMessage())


def test_logits_that_alone_overflow_end_the_request_too() -> None:
    model = tiny_model()
    model.ln_f.bias[:] = 1e38
    for output in engine(model).generate([LONG, SHORT], GREEDY):
        assert_failed(output)


@pytest.mark.parametrize("budget", [1, 4, 7])
def test_what_a_row_that_is_not_sampled_predicts_may_overflow(budget: int) -> None:
    """A chunk may end anywhere: whether it does must not decide whether the request fails."""

    def finish_reasons(**options: object) -> list[str]:
        llm = engine(MODEL, enable_prefix_caching=False, **options)
        head = llm.model.head
        empty = int(head(llm.model.ln_f.bias[None]).argmax())

        def overflowing(x: torch.Tensor) -> torch.Tensor:  # for about half of the rows
            logits = head(x)
            return logits.masked_fill((logits.argmax(dim=1, keepdim=True) - empty) % 2 == 1, torch.inf)

        llm.model.head = overflowing
        prompts = [[7 * i % 61 for i in range(length)] for length in range(5, 25)]
        params = SamplingParams(temperature=0.0, max_tokens=1)
        return [output.outputs[0].finish_reason for output in llm.generate(prompts, params)]

    wanted = finish_reasons()
    assert finish_reasons(max_num_batched_tokens=budget) == wanted and set(wanted) == {"error", "length"}


def test_a_prompt_on_which_float16_overflows_is_the_only_one_to_end() -> None:
    model = broken_model(1e5)
    assert all(output.outputs[0].error is None for output in engine(model).generate([LONG, SHORT], GREEDY))
    bad, good = engine(model, dtype="float16").generate([LONG, SHORT], GREEDY)
    assert bad.outputs[0].finish_reason == "error" and "torch.float16 overflows" in bad.outputs[0].error
    assert good.outputs[0].finish_reason == "length" and good.outputs[0].error is None


@pytest.mark.parametrize(("budget", "shared"), [(512, 0), (8, 16), (12, 8)], ids=str)
def test_what_a_bad_step_computed_is_not_found_by_another_request(budget: int, shared: int) -> None:
    llm = engine(max_num_batched_tokens=budget)
    prompt = LONG[:16] + [9]
    assert_failed(llm.generate([LONG], GREEDY)[0])
    assert llm.stats().prefix_hit_tokens == 0
    params = SamplingParams(temperature=0.0, max_tokens=3)
    (output,) = llm.generate([prompt], params)
    assert output.outputs[0].token_ids == continue_densely(MODEL, prompt, params)
    assert llm.stats().prefix_hit_tokens == shared, "blocks of earlier steps are good, and shared"


def test_a_fault_that_shows_in_a_row_that_is_not_sampled_keeps_its_blocks_from_others() -> None:
    llm = engine(MODEL)

    def spoil(_: object, __: object, output: torch.Tensor) -> None:
        if len(output) == len(LONG):
            output[5] = torch.inf  # after all K and V were computed: no later row sees it

    with llm.model.h[-1].register_forward_hook(spoil):
        assert_failed(llm.generate([LONG], GREEDY)[0])
    assert llm.scheduler.allocator.find_prefix(LONG, len(LONG)) == []
    assert llm.generate([LONG], GREEDY)[0].outputs[0].token_ids == continue_densely(MODEL, LONG, GREEDY)


def test_a_failed_request_leaves_the_scheduler_as_an_aborted_one_does() -> None:
    llm = engine(MODEL, order=by_arrival)
    for start in range(3):
        llm.add_request([start, *SHORT], SamplingParams(n=2, max_tokens=4, temperature=0))
    scheduler: Scheduler = llm.scheduler
    step = scheduler.schedule()
    ended: list[Request] = []
    scheduler.listeners.append(type("Ends", (), {"ended": lambda self, request: ended.append(request)})())
    leader = step.requests[1]
    followers = leader.followers
    scheduler.update(step, {request: 7 for _, request in step.sampled}, (), {leader: "because"})
    assert ended == [leader, *followers] == step.ended and len(followers) == 1
    assert [(member.finish_reason, member.error) for member in ended] == [("error", "because")] * 2
    assert {request.num_output_tokens for request in ended} == {0}
    assert [request.num_output_tokens for request in scheduler.running] == [1] * 4
    assert scheduler.stats.output_tokens == 4 and scheduler.stats.num_finished == 2
    scheduler.check_invariants()


def test_the_vocabulary_of_the_tests_is_small_and_the_broken_place_inside_the_context() -> None:
    assert PLACE < len(LONG) < TINY.n_positions and len(SHORT) + GREEDY.max_tokens < PLACE
