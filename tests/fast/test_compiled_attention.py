"""Decode attention as one expression over blocks: right in torch's own operations, and once compiled."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from tests.oracle import continue_densely, tiny_model

from nanopaged import LLM, SamplingParams
from nanopaged.fast.compiled_attention import COMPILED, decode_attention, paged_attention_compiled
from nanopaged.torch_attention import paged_attention_torch


def ragged_batch(seq_lens: list[int], query_lens: list[int], num_kv_heads: int = 2, group: int = 1, head_dim: int = 8,
                 block_size: int = 8, dtype: torch.dtype = torch.float32) -> tuple:
    """`paged_attention`'s arguments; whatever stands in the pool outside the contexts is nan."""
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    num_blocks = 3 + sum(-(-length // block_size) for length in seq_lens)
    free = rng.sample(range(num_blocks), num_blocks)
    k_cache, v_cache = torch.full((2, num_blocks, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    tables = [[free.pop() for _ in range(-(-length // block_size))] for length in seq_lens]
    for table, length in zip(tables, seq_lens):
        for position in range(length):
            block, offset = table[position // block_size], position % block_size
            for cache in (k_cache, v_cache):
                cache[block, :, offset] = torch.randn(num_kv_heads, head_dim, generator=generator).to(dtype)
    longest = max(map(len, tables))
    block_tables = torch.tensor([table + [0] * (longest - len(table)) for table in tables], dtype=torch.int32)
    query_start = torch.tensor([0, *query_lens]).cumsum(0, dtype=torch.int32)
    q = torch.randn(sum(query_lens), num_kv_heads * group, head_dim, generator=generator).to(dtype)
    return (q, k_cache, v_cache, block_tables, query_start, torch.tensor(seq_lens, dtype=torch.int32), max(query_lens),
            head_dim**-0.5)


@pytest.mark.parametrize("seq_lens, query_lens", [
    ([5, 17, 8, 1, 40], [1, 1, 1, 1, 1]),  # within, past and at the ends of blocks
    ([3, 8], [1, 1]),  # tables of one block
    ([64, 1, 1, 1], [1, 1, 1, 1]),  # one context is nearly all of the work
    ([9, 30, 12, 7, 20], [1, 30, 1, 4, 1]),  # chunks of prompts between the decodes
    ([9, 12, 6], [1, 0, 1]),  # a request with no row
    ([9, 12], [9, 1]),  # one decode: left to the reference
    ([9, 12], [9, 3]),  # none
], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 3)], ids=str)
def test_the_expression_agrees_with_the_reference(seq_lens: list[int], query_lens: list[int],
                                                  heads: tuple[int, int]) -> None:
    batch = ragged_batch(seq_lens, query_lens, *heads)
    torch.testing.assert_close(paged_attention_compiled(*batch, decode=decode_attention), paged_attention_torch(*batch),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_expression_sums_low_precision_in_float32(dtype: torch.dtype) -> None:
    batch = ragged_batch([33, 8, 19], [1, 1, 1], group=2, dtype=dtype)
    out, wanted = paged_attention_compiled(*batch, decode=decode_attention), paged_attention_torch(*batch)
    assert out.dtype == dtype
    # The query is scaled before it is multiplied here, and after there: they may differ by one rounding of it.
    torch.testing.assert_close(out, wanted, rtol=4 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_every_block_in_use_is_listed_once_and_no_padding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[torch.Tensor] = []

    def decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor,
               *rest: torch.Tensor) -> torch.Tensor:
        listed.append(blocks)
        return decode_attention(q, k_cache, v_cache, blocks, *rest)

    batch = ragged_batch([40, 3, 17], [1, 1, 1])
    paged_attention_compiled(*batch, decode=decode)
    tables = batch[3].tolist()
    assert listed[0].tolist() == tables[0] + tables[1][:1] + tables[2][:3]


def test_compiling_is_refused_where_it_does_not_apply() -> None:
    with pytest.raises(ValueError, match="compile=True is for the torch attention on a CPU"):
        LLM(tiny_model(), device="cpu", attention="triton", compile=True)
    with pytest.raises(TypeError, match="compile must be a bool"):
        LLM(tiny_model(), device="cpu", compile=1)


def test_a_missing_compiler_is_named_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("nanopaged.fast.compiled_attention._compiled", lambda: fails)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        LLM(tiny_model(), device="cpu", num_blocks=8, compile=True)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_one_compilation_serves_every_batch_length_and_pool() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    model, rng = tiny_model(), random.Random(0)
    for num_blocks in (200, 64):
        llm = LLM(model, device="cpu", num_blocks=num_blocks, block_size=8, max_num_batched_tokens=64, compile=True)
        assert llm.attention is COMPILED
        if num_blocks == 200:
            compiled = counters["unique_graphs"]
        for num_requests in (1, 2, 3, 20):  # with prompts longer than a step, and contexts of one block and of twelve
            prompts = [[rng.randrange(61) for _ in range(rng.choice([1, 7, 66]))] for _ in range(num_requests)]
            params = [SamplingParams(temperature=0.0, max_tokens=rng.randint(2, 30)) for _ in prompts]
            for output, prompt, wish in zip(llm.generate(prompts, params), prompts, params):
                assert output.outputs[0].token_ids == continue_densely(model, prompt, wish)
    assert compiled > 0 and counters["unique_graphs"] == compiled
