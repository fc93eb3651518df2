"""Whatever is wrong with a call, the error says so at once, and the engine goes on as if it had not been made."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nanopaged import LLM, SamplingParams
from nanopaged.gpt2 import GPT2, GPT2Config
from tests.oracle import TINY, continue_densely, tiny_model
from tests.test_config import assert_refused, needs_pressure

BYTES = GPT2Config(vocab_size=257, n_positions=96, n_embd=32, n_layer=2, n_head=2, eos_token_id=256)
MODEL, NO_TOKENIZER = tiny_model(BYTES), tiny_model(TINY)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
HUGE, NAN = 10**30, math.nan


def build(model: GPT2 = MODEL, **options: object) -> LLM:
    return LLM(model, **{"device": "cpu", "block_size": 8, "num_blocks": 40, "max_num_seqs": 8} | options)


@pytest.fixture(scope="module")
def shared() -> LLM:
    return build()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must be as good after the test as before it."""
    yield shared
    left = [shared.abort_request(request_id) for request_id in list(shared._groups)]  # so that only one test fails
    assert not left and not shared.has_unfinished_requests()
    shared.scheduler.check_invariants()
    stats = shared.stats()
    assert stats.referenced_blocks == 0 and stats.cached_blocks + stats.free_blocks == stats.num_blocks
    (output,) = shared.generate("ab", GREEDY)
    assert output.outputs[0].token_ids == continue_densely(MODEL, [97, 98], GREEDY)


PROMPT_WORDS = "a prompt must be a str or a list of token ids"


@pytest.mark.parametrize(("prompt", "error", "words"), [
    ("", ValueError, "the prompt is empty"),
    ([], ValueError, "the prompt is empty"),
    ((), ValueError, "the prompt is empty"),
    ("x" * 96, ValueError, "the prompt has at least 96 tokens; with max_model_len=96 at most 95"),
    ("x" * 10**5, ValueError, "the prompt has at least 100000 tokens; with max_model_len=96 at most 95"),
    ([7] * 96, ValueError, "the prompt has 96 tokens"),
    ([257], ValueError, "token id must be from 0 to 256, got 257"),
    ([1, -1], ValueError, "token id must be from 0 to 256, got -1"),
    ([HUGE], ValueError, "token id must be from 0 to 256"),
    ([1.0], TypeError, "token id must be an int, got 1.0"),
    ([NAN], TypeError, "token id must be an int, got nan"),
    ([True], TypeError, "token id must be an int, got True"),
    ([None], TypeError, "token id must be an int, got None"),
    (["a"], TypeError, "token id must be an int, got 'a'"),
    ([[1]], TypeError, "token id must be an int, got [1]"),
    ([np.int64(1)], TypeError, "token id must be an int, got np.int64(1)"),
    (b"bytes", TypeError, f"{PROMPT_WORDS}, got bytes"),
    (None, TypeError, f"{PROMPT_WORDS}, got NoneType"),
    ({"prompt": "x"}, TypeError, f"{PROMPT_WORDS}, got dict"),
    ({1, 2}, TypeError, f"{PROMPT_WORDS}, got set"),
    (np.array([1, 2]), TypeError, f"{PROMPT_WORDS}, got ndarray"),
    (torch.tensor([1, 2]), TypeError, f"{PROMPT_WORDS}, got Tensor"),
    (range(3), TypeError, f"{PROMPT_WORDS}, got range"),
    (object(), TypeError, f"{PROMPT_WORDS}, got object"),
    (1.5, TypeError, f"{PROMPT_WORDS}, got float"),
    ("half a \ud83d character", ValueError, "lone surrogate"),
])
def test_an_invalid_prompt_is_named_and_the_others_are_not_run(
    llm: LLM, prompt: object, error: type, words: str
) -> None:
    assert_refused(lambda: llm.add_request(prompt), error, words)
    assert not llm.has_unfinished_requests()
    assert_refused(lambda: llm.generate([[1, 2], prompt, "ab"], GREEDY), error, words)


@pytest.mark.parametrize("prompts", [
    [1, 2, 3], (1, 2, 3), [[1], 2], [True], 7, 1.5, None, b"x", {"a": 1}, {1, 2}, object(), np.array([[1]]),
    torch.tensor([[1]]),
], ids=["ints", "tuple", "mixed", "bool", "int", "float", "None", "bytes", "dict", "set", "object", "array", "tensor"])
def test_prompts_of_the_wrong_shape_say_what_is_right(llm: LLM, prompts: object) -> None:
    assert_refused(lambda: llm.generate(prompts, GREEDY), TypeError,
                   "prompts must be a str, or a list of str and of lists of token ids", "[[1, 2, 3]] is one prompt")


@pytest.mark.parametrize(("params", "error", "words"), [
    ({"temperature": 0}, TypeError, "sampling_params must be a SamplingParams, got dict"),
    ("greedy", TypeError, "got str"),
    (5, TypeError, "got int"),
    (SamplingParams, TypeError, "got type"),
    ([GREEDY, {}], TypeError, "got dict"),
    ([GREEDY], ValueError, "got 1 sampling_params for 2 prompts"),
    ([], ValueError, "got 0 sampling_params for 2 prompts"),
    ((GREEDY,) * 3, ValueError, "got 3 sampling_params for 2 prompts"),
    (SamplingParams(n=9), ValueError, "n=9 continuations need as many seats, max_num_seqs is 8"),
    ([GREEDY, SamplingParams(n=1024)], ValueError, "n=1024 continuations need as many seats"),
    (SamplingParams(stop_token_ids=[257]), ValueError, "stop_token_ids must be from 0 to 256, got 257"),
    (SamplingParams(stop_token_ids=[HUGE]), ValueError, "from 0 to 256"),
], ids=["dict", "str", "int", "class", "one dict", "one of two", "none of two", "three of two", "n", "n of one",
        "stop token", "huge stop token"])
def test_sampling_params_that_do_not_fit_the_call_say_why(llm: LLM, params: object, error: type, words: str) -> None:
    assert_refused(lambda: llm.generate(["ab", [1, 2]], params), error, words)


@pytest.mark.parametrize("params", [
    {"max_tokens": HUGE}, {"seed": HUGE}, {"seed": -HUGE}, {"top_k": HUGE}, {"temperature": 5e-324},
    {"temperature": 10**6}, {"stop": ["x" * 1000] * 100}, {"top_p": 5e-324}, {"top_p": 1e-46, "temperature": 0.5},
], ids=["max_tokens", "seed", "negative seed", "top_k", "cold", "hot", "stop", "top_p", "top_p and temperature"])
def test_extreme_parameters_that_are_allowed_are_served(llm: LLM, params: dict[str, object]) -> None:
    (output,) = llm.generate([[1, 2]], SamplingParams(**{"max_tokens": 4} | params))
    assert output.finished and all(0 <= token_id < 257 for token_id in output.outputs[0].token_ids)


@pytest.mark.parametrize(("priority", "error", "words"), [
    ("high", TypeError, "priority must be a number, got 'high'"), (None, TypeError, "priority must be a number"),
    (True, TypeError, "priority must be a number"), (NAN, ValueError, "priority must be finite, got nan"),
    (-math.inf, ValueError, "priority must be finite, got -inf"),
])
def test_an_invalid_priority_is_named(llm: LLM, priority: object, error: type, words: str) -> None:
    assert_refused(lambda: llm.add_request([1], GREEDY, priority=priority), error, words)


@pytest.mark.parametrize(("options", "prompt", "params", "words"), [
    pytest.param({"model": NO_TOKENIZER}, "text", GREEDY,
                 "this model came with no tokenizer: give prompts as token ids", id="text"),
    pytest.param({"model": NO_TOKENIZER}, [1], SamplingParams(stop="x"),
                 "stop_token_ids instead of text, or LLM(tokenizer=...)", id="stop string"),
    pytest.param({"num_blocks": 5}, [1] * 90, SamplingParams(max_tokens=5),
                 "can never fit: its 90 prompt tokens and up to 5 output tokens need 12 blocks of 8, and the whole "
                 "pool has 5", id="pool"),
    pytest.param({"num_blocks": 5, "admission": "reserve"}, [1] * 16, SamplingParams(n=2, max_tokens=9),
                 "the admission policy refuses it even in an empty pool", marks=needs_pressure, id="reserve"),
    pytest.param({"admission": lambda context: False}, [1], GREEDY, "can never fit", id="own policy"),
])
def test_a_request_that_this_engine_can_never_serve_says_what_it_would_take(
    options: dict[str, object], prompt: object, params: SamplingParams, words: str
) -> None:
    engine = build(**options)
    assert_refused(lambda: engine.generate([prompt], params), ValueError, words)
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("request_id", [
    "0", "99", "", "0.0", 0, -1, HUGE, None, b"0", NAN, ("0",), ["0"], {"id": "0"}, {"0"},
], ids=repr)
def test_an_id_that_no_unfinished_request_has_is_named(llm: LLM, request_id: object) -> None:
    llm.generate("x", GREEDY)  # request 0, at the latest, has finished
    assert_refused(lambda: llm.abort_request(request_id), (TypeError, ValueError), f"id {request_id!r}")


@pytest.mark.parametrize(("options", "words"), [
    ({"model": 3}, "model"), ({"model": "gpt5"}, "unknown model 'gpt5'"), ({"device": "tpu"}, "device"),
    ({"block_size": 12}, "block_size"), ({"max_model_len": 97}, "max_model_len"), ({"num_blocks": HUGE}, "num_blocks"),
    ({"preemption": "drop"}, "preemption"), ({"nonsense": 1}, "nonsense"),
], ids=str)
def test_an_engine_that_cannot_be_built_leaves_others_as_they_are(
    llm: LLM, options: dict[str, object], words: str
) -> None:
    assert_refused(lambda: build(**options), (TypeError, ValueError), words)


@pytest.mark.parametrize("prompt", ["x" * 10**6, [7] * 10**6], ids=["text", "ids"])
def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_encoded_or_copied(
    llm: LLM, prompt: str | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text: pytest.fail("it was encoded"))
    tracemalloc.start()
    assert_refused(lambda: llm.add_request(prompt, SamplingParams(n=8)), ValueError, "with max_model_len=96 at most 95")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10**6, "one copy of the ids takes 8 MB"
