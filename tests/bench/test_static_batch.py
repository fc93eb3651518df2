"""The static baseline of `python -m nanopaged.bench engine`: its tokens, and the memory that it takes."""

from __future__ import annotations

import pytest
from tests.oracle import continue_densely, tiny_model

from nanopaged import SamplingParams
from nanopaged.bench.static_batch import generate_static, static_cache, static_cache_tokens
from nanopaged.fast.cpu import use_cpu_kernels
from nanopaged.gpt2 import GPT2Config

GROUPED = GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2, n_kv_head=1)


@pytest.mark.parametrize("cpu_kernels", [False, True])
@pytest.mark.parametrize("prefill_rows", [1, 26, 1000])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_a_static_batch_gives_each_request_the_tokens_of_the_dense_model(prefill_rows: int, n_kv_head: int,
                                                                         cpu_kernels: bool) -> None:
    config = GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2, n_kv_head=n_kv_head)
    model, dense = tiny_model(config), tiny_model(config)
    if cpu_kernels:
        use_cpu_kernels(model)
    prompts = [[1], [7, 3, 9, 60, 2], list(range(13)), [5, 5, 5]]
    output_lens = [9, 1, 20, 4]
    outputs = generate_static(model, prompts, output_lens, static_cache(model, prompts, output_lens), prefill_rows)
    assert outputs == [continue_densely(dense, prompt, SamplingParams(temperature=0.0, max_tokens=length))
                       for prompt, length in zip(prompts, output_lens)]


def test_finished_output_tokens_are_counted_after_each_step() -> None:
    model, prompts, output_lens, counted = tiny_model(GROUPED), [[1], [7, 3]], [4, 2], []
    cache = static_cache(model, prompts, output_lens)
    generate_static(model, prompts, output_lens, cache, 1000, counted.append)
    assert counted == [2, 4, 5]


def test_a_static_batch_takes_memory_for_each_request_at_the_longest() -> None:
    prompts, output_lens = [[1] * 3, [1] * 10], [7, 2]
    assert static_cache_tokens(prompts, output_lens) == 2 * (10 + 7 - 1)
    assert static_cache(tiny_model(GROUPED), prompts, output_lens).shape == (2, 2, 2, 1, 16, 16)
