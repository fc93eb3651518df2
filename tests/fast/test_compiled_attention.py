"""Decode attention as one expression over blocks: right in torch's own operations, and once compiled."""

from __future__ import annotations

import random
import shutil
from functools import partial

import pytest
import torch

from nanopaged import LLM, SamplingParams
from nanopaged.attention_arguments import AttentionBackend
from nanopaged.batch import Batch
from nanopaged.fast import compiled_attention
from nanopaged.fast.compiled_attention import COMPILED, Plan, decode_attention, paged_attention_compiled
from nanopaged.request import Request
from nanopaged.step import Step
from nanopaged.torch_attention import paged_attention_torch, write_kv_torch
from tests.oracle import continue_densely, tiny_model
from tests.test_torch_attention import Case, assert_attends, make_case

CPU = torch.device("cpu")
attend = partial(paged_attention_compiled, decode=decode_attention)  # as it stands, not compiled


def tight_case(*arguments: object, **options: object) -> Case:
    """One on the CPU whose block tables are no wider than the longest context needs."""
    case = make_case(*arguments, device=CPU, **options)
    case.batch.block_tables = case.batch.block_tables[:, :-1]
    return case


@pytest.mark.parametrize("seq_lens, query_lens", [
    ([5, 17, 8, 1, 40], [1, 1, 1, 1, 1]),  # within, past and at the ends of blocks
    ([3, 8], [1, 1]),  # tables of one block
    ([64, 1, 1, 1], [1, 1, 1, 1]),  # one context is nearly all of the work
    ([9, 12, 20, 30, 7], [1, 1, 1, 30, 4]),  # chunks of prompts behind the decodes
    ([9, 6, 12], [1, 1, 0]),  # a request with no row
    ([12, 9], [1, 9]),  # one decode: left to the reference
    ([9, 12], [9, 3]),  # none
], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2)], ids=str)
def test_the_expression_agrees_with_the_reference(seq_lens: list[int], query_lens: list[int],
                                                  heads: tuple[int, int]) -> None:
    case = tight_case(seq_lens, query_lens, *heads, head_dim=24)
    assert_attends(attend, case, paged_attention_torch(*case.arguments()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_expression_sums_low_precision_in_float32(dtype: torch.dtype) -> None:
    case = tight_case([33, 8, 19], [1, 1, 1], 4, 2, dtype=dtype)
    wanted = paged_attention_torch(*case.arguments())
    assert attend(*case.arguments()).dtype == dtype
    # The query is scaled before it is multiplied here, and after there: they may differ by one rounding of it.
    assert_attends(attend, case, wanted, atol=2 * torch.finfo(dtype).eps)


def test_a_single_decode_and_steps_without_any_are_left_to_the_reference() -> None:
    def never(*arguments: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"decode was called for {len(arguments[0])} requests")

    for query_lens in ([1, 9], [9, 1]):
        case = tight_case([12, 9], query_lens)
        paged_attention_compiled(*case.arguments(), decode=never)
        assert case.batch.plan is None


def test_every_block_in_use_is_listed_once_and_no_padding_is() -> None:
    case = tight_case([40, 3, 17, 30], [1, 1, 1, 2])
    plan = Plan.of(case.batch, block_size=8)
    tables = case.batch.block_tables.tolist()
    blocks, owner, filled, place, used = plan.block_list
    assert blocks.tolist() == tables[0][:5] + tables[1][:1] + tables[2][:3]
    assert owner.tolist() == [0] * 5 + [1] + [2] * 3
    assert filled.tolist() == [40, 32, 24, 16, 8, 3, 17, 9, 1]
    assert [row[mask].tolist() for row, mask in zip(place, used)] == [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
    assert plan.chunks.query_start.tolist() == [0, 2] and plan.chunks.seq_lens.tolist() == [30]
    assert plan.chunks.block_tables.tolist() == tables[3:] and plan.chunks.num_decodes == 0


def test_only_the_blocks_in_use_are_computed() -> None:
    listed: list[torch.Tensor] = []

    def decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor,
               *rest: torch.Tensor) -> torch.Tensor:
        listed.append(blocks)
        return decode_attention(q, k_cache, v_cache, blocks, *rest)

    case = tight_case([40, 3, 17], [1, 1, 1])
    paged_attention_compiled(*case.arguments(), decode=decode)
    tables = case.batch.block_tables.tolist()
    assert [blocks.tolist() for blocks in listed] == [tables[0][:5] + tables[1][:1] + tables[2][:3]]


def decode_batch(*block_tables: list[int]) -> Batch:
    """A request with one token in each block of 8, for each table; the last token is computed."""
    requests = [Request(str(table), [1] * (8 * len(table) - 7), SamplingParams()) for table in block_tables]
    for request, table in zip(requests, block_tables):
        request.block_table.extend(table)
    step = Step(0, requests, [len(request.token_ids) - 1 for request in requests], [1] * len(requests))
    step.arrange()
    return Batch.from_step(step, 8, CPU)


def test_a_plan_is_computed_once_for_all_layers_and_no_two_batches_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[object] = []

    class Counted(Plan):
        @classmethod
        def of(cls, batch: Batch, block_size: int) -> Plan:
            planned.append(batch)
            return Plan.of(batch, block_size)

    monkeypatch.setattr(compiled_attention, "Plan", Counted)
    model = tiny_model()
    pool = torch.randn(2, 2, 8, 2, 8, 16)  # n_layer is 2
    assert model.config.n_layer == len(pool) > 1
    plans = []
    for tables in ([[0, 1], [2]], [[2], [3, 1]], [[0, 1], [2]]):  # the third is as the first, but another step's
        compiled, reference = decode_batch(*tables), decode_batch(*tables)
        backends = (AttentionBackend(write_kv_torch, attend), AttentionBackend(write_kv_torch, paged_attention_torch))
        got, wanted = (model(batch, pool.clone(), backend) for batch, backend in zip((compiled, reference), backends))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert planned[len(plans) :] == [compiled] and isinstance(compiled.plan, Plan) and reference.plan is None
        plans.append(compiled.plan)
    assert len(set(map(id, plans))) == 3


def test_compiling_is_refused_where_it_does_not_apply() -> None:
    with pytest.raises(ValueError, match="compile=True is for the torch attention on a CPU"):
        LLM(tiny_model(), device="cpu", attention="triton", compile=True)
    with pytest.raises(TypeError, match="compile must be a bool"):
        LLM(tiny_model(), device="cpu", compile=1)


def test_a_missing_compiler_is_named_before_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compiled_attention, "_compiled", lambda: fails)
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
