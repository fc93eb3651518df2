"""The torch reference against attention over contexts that were never cut into blocks.

`make_case` and `assert_attends` also serve the tests of the other attentions.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nanopaged.torch_attention import paged_attention_torch, write_kv_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu_too
# Rounding of the output's own dtype, and, for half precision, of the softmax before it meets V.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
RAGGED = [  # (lengths, query_lens): decodes, chunks, whole prompts, an idle request; around block boundaries
    ([1], [1]),
    ([8, 9, 16, 17], [1, 1, 1, 1]),
    ([5, 23], [5, 23]),
    ([30, 1, 12, 9], [7, 1, 0, 1]),
    ([40, 33], [1, 20]),
]


@dataclass
class Case:
    """A ragged batch over a scattered pool, and the contiguous contexts that the pool holds."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch: SimpleNamespace  # a RaggedBatch
    scale: float
    contexts: list[tuple[torch.Tensor, torch.Tensor]]  # each request's K and V, (length, num_kv_heads, head_dim)

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SimpleNamespace, float]:
        return self.q, self.k_cache, self.v_cache, self.batch, self.scale


def make_case(lengths: list[int], query_lens: list[int], num_heads: int = 2, num_kv_heads: int = 2, head_dim: int = 16,
              block_size: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0,
              device: torch.device = DEVICE) -> Case:
    """Random contexts, scattered over a pool whose other slots are all NaN: what is read from these shows."""
    rng = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    order = torch.randperm(num_blocks, generator=rng).tolist()
    k_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    tables, contexts = [], []
    for length in lengths:
        table = [order.pop() for _ in range(-(-length // block_size))]
        k, v = (torch.randn(length, num_kv_heads, head_dim, generator=rng).to(dtype) for _ in range(2))
        for position in range(length):
            block, offset = table[position // block_size], position % block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = k[position], v[position]
        tables.append(table)
        contexts.append((k, v))
    width = max(map(len, tables)) + 1
    padded = [table + [order[0]] * (width - len(table)) for table in tables]  # with a block of nobody's
    q = torch.randn(sum(query_lens), num_heads, head_dim, generator=rng).to(dtype)
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    batch = SimpleNamespace(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        query_start=torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device), num_decodes=num_decodes, plan=None)
    return Case(q.to(device), k_cache.to(device), v_cache.to(device), batch, head_dim**-0.5, contexts)


def strided_case() -> Case:
    """One whose query rows lie between others, as q lies beside k and v in the output of c_attn."""
    case = make_case([9, 12], [2, 12])
    wide = torch.full((len(case.q), 6, 16), torch.nan, device=DEVICE)
    wide[:, 2:4] = case.q
    case.q = wide[:, 2:4]
    return case


def contiguous_attention(case: Case) -> torch.Tensor:
    """torch's own attention in float32, request by request, over contexts that were never cut up."""
    outputs = []
    for i, (k, v) in enumerate(case.contexts):
        q = case.q[case.batch.query_start[i] : case.batch.query_start[i + 1]].float().cpu()  # (n, num_heads, head_dim)
        n, length, group = len(q), len(k), q.shape[1] // k.shape[1]
        allowed = torch.arange(length) <= torch.arange(length - n, length)[:, None]  # (n, length)
        # (num_heads, length, head_dim)
        k, v = (t.float().repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=allowed, scale=case.scale)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def assert_attends(attention: Callable[..., torch.Tensor], case: Case, wanted: torch.Tensor,
                   atol: float | None = None) -> None:
    """Fails if an attention does not compute the wanted values, and says which rows are wrong and what is known."""
    got, wanted = attention(*case.arguments()).float().cpu(), wanted.float().cpu()
    atol = TOLERANCE[case.q.dtype] if atol is None else atol
    wrong = ~((got - wanted).abs() <= atol)  # (num_tokens, num_heads, head_dim); NaN is wrong too
    if not wrong.any():
        return
    starts, lengths = case.batch.query_start.tolist(), case.batch.seq_lens.tolist()
    rows = wrong.flatten(1).any(dim=1).nonzero().flatten().tolist()
    lines = [f"{wrong.sum()} of {wrong.numel()} values are off by more than {atol}, in {len(rows)} of {len(got)} rows:"]
    for row in rows[:5]:
        i = bisect_right(starts, row) - 1
        head, dim = wrong[row].nonzero()[0].tolist()
        lines.append(f"  row {row}, which is position {lengths[i] - starts[i + 1] + row} of request {i} with "
                     f"{lengths[i]} tokens: head {head}, dim {dim} is {got[row, head, dim]:.6g} and not "
                     f"{wanted[row, head, dim]:.6g}; {wrong[row].sum()} of its values are wrong")
    if got.isnan().any():
        finite = replace(case, k_cache=case.k_cache.nan_to_num(), v_cache=case.v_cache.nan_to_num())
        left = attention(*finite.arguments()).isnan().sum()
        lines.append(f"{got.isnan().sum()} values are NaN; with 0 instead of NaN in the slots outside the contexts, "
                     f"{left} are.")
        if left:
            lines.append("So it does not come from these slots alone. Candidates: a row that sees no token of a tile "
                         "(-inf - -inf), a sum over no token (0 / 0), an overflow (inf - inf), an output row that was "
                         "not written.")
        else:
            lines.append("So such a slot was read. Candidates: a wrong block or offset, a length that is too large, "
                         "or a weight of 0 instead of a mask on the load of V (0 * NaN is NaN).")
    pytest.fail("\n".join(lines))


def assert_writes_its_slots_alone(write_kv: Callable[..., None], dtype: torch.dtype) -> None:
    # Each (num_blocks, heads, block_size, head_dim).
    k_cache, v_cache = torch.zeros(2, 4, 3, 8, 16, dtype=dtype, device=DEVICE)
    qkv = torch.randn(5, 9, 16).to(DEVICE, dtype)
    k, v = qkv[:, 3:6], qkv[:, 6:9]  # views, as the model passes them
    slots = torch.tensor([31, 0, 9, 8, 30], dtype=torch.int32, device=DEVICE)
    write_kv(k, v, k_cache, v_cache, slots)
    for name, cache, rows in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        by_slot = cache.transpose(1, 2).flatten(0, 1)  # (slots, heads, head_dim)
        for slot, row in zip(slots.tolist(), rows):
            assert torch.equal(by_slot[slot], row), f"slot {slot} of {name} does not hold its token"
        by_slot[slots] = 0
        others = by_slot.flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert not others, f"slots {others} of {name} were written, which are nobody's"


@pytest.mark.parametrize("lengths, query_lens", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_reference_equals_contiguous_attention(
    lengths: list[int], query_lens: list[int], dtype: torch.dtype
) -> None:
    for num_heads, num_kv_heads in ((2, 2), (4, 2), (12, 1)):
        case = make_case(lengths, query_lens, num_heads, num_kv_heads, dtype=dtype)
        assert_attends(paged_attention_torch, case, contiguous_attention(case))


@pytest.mark.parametrize("block_size, head_dim", [(1, 16), (3, 5), (256, 24)])
def test_the_reference_takes_sizes_that_the_kernels_do_not(block_size: int, head_dim: int) -> None:
    case = make_case([9, 4], [2, 4], head_dim=head_dim, block_size=block_size)
    assert_attends(paged_attention_torch, case, contiguous_attention(case))


def test_entries_of_a_block_table_past_the_requests_length_are_not_read() -> None:
    case = make_case([9, 17, 8], [1, 5, 8])
    for table, length in zip(case.batch.block_tables, [9, 17, 8]):
        table[-(-length // 8) :] = 10**6  # no block of this pool
    assert_attends(paged_attention_torch, case, contiguous_attention(case))


def test_rows_of_a_strided_projection_are_read_where_they_lie() -> None:
    case = strided_case()
    assert_attends(paged_attention_torch, case, contiguous_attention(case))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_token_is_written_to_its_slot_and_no_other_slot_changes(dtype: torch.dtype) -> None:
    assert_writes_its_slots_alone(write_kv_torch, dtype)


def test_a_step_may_have_no_token_to_write() -> None:
    cache, empty = torch.zeros(1, 1, 8, 16, device=DEVICE), torch.zeros(0, 1, 16, device=DEVICE)
    write_kv_torch(empty, empty, cache, cache, torch.zeros(0, dtype=torch.int32, device=DEVICE))
    assert not cache.any()


def read_one_token_too_far(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: SimpleNamespace,
                           scale: float) -> torch.Tensor:
    longer = SimpleNamespace(**vars(batch) | {"seq_lens": batch.seq_lens + 1})
    return paged_attention_torch(q, k_cache, v_cache, longer, scale)


def divide_by_nothing(*arguments: object) -> torch.Tensor:
    out = paged_attention_torch(*arguments)
    out[4, 1] = 0 * out[4, 1] / 0
    return out


@pytest.mark.parametrize("attention, words", [
    (read_one_token_too_far, ["row 0, which is position 8 of request 0 with 9 tokens", "outside the contexts, 0 are",
                              "such a slot was read"]),
    (divide_by_nothing, ["16 of 160 values are off", "in 1 of 5 rows", "row 4, which is position 3 of request 1 with 4 "
                         "tokens: head 1, dim 0 is nan", "16 values are NaN", "contexts, 16 are", "(0 / 0)"]),
    (lambda *arguments: 2 * paged_attention_torch(*arguments), ["in 5 of 5 rows"]),
], ids=["reads too far", "divides by zero", "finite"])
def test_slots_outside_the_contexts_are_blamed_for_a_nan_only_if_they_were_read(
    attention: Callable[..., torch.Tensor], words: list[str]
) -> None:
    case = make_case([9, 4], [1, 4])
    with pytest.raises(pytest.fail.Exception) as caught:
        assert_attends(attention, case, contiguous_attention(case))
    for word in words:
        assert word in str(caught.value)
    assert ("such a slot was read" in str(caught.value)) == (attention is read_one_token_too_far)


FAULTS = [(lengths, query_lens, where) for lengths, query_lens, where in (
    ([30], [30], 20), ([30], [30], 0), ([30], [30], 29), ([40, 33], [1, 20], 25), ([40, 33], [1, 20], 3))]


def assert_faults_stay_where_they_are_seen(
    attention: Callable[..., torch.Tensor], lengths: list[int], query_lens: list[int], where: int, value: float,
    place: str, dtype: torch.dtype = torch.float32, **shape: int
) -> None:
    """Position `where` of the last request gets `value` in K or V: only rows that see it are not finite."""
    case = make_case(lengths, query_lens, dtype=dtype, **shape)
    wanted = attention(*case.arguments())
    block_size = case.k_cache.shape[2]
    block = int(case.batch.block_tables[-1, where // block_size])
    (case.k_cache if place == "k" else case.v_cache)[block, 0, where % block_size, 3] = value
    got = attention(*case.arguments())
    group = got.shape[1] // case.k_cache.shape[1]
    seen_from = max(0, len(got) - (lengths[-1] - where))  # the first row that sees it
    first = len(got) - query_lens[-1]
    seen = torch.zeros(got.shape[:2], dtype=torch.bool, device=got.device)
    seen[max(first, seen_from) :, :group] = True
    finite = got.isfinite().all(dim=-1)  # (num_tokens, num_heads)
    if place == "k" and math.isinf(value):  # a score of -inf is a weight of 0, as in a step of one row
        seen[:, :group] &= case.q[:, :group, 3] * value > 0
    assert torch.equal(finite, ~seen), f"{place}[{where}] = {value}"
    if not (place == "k" and math.isinf(value)):
        torch.testing.assert_close(got[~seen], wanted[~seen], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("lengths, query_lens, where", FAULTS)
@pytest.mark.parametrize("place, value", [("k", math.nan), ("v", math.nan), ("v", math.inf)])
def test_a_position_that_is_not_finite_reaches_no_row_that_does_not_see_it(
    lengths: list[int], query_lens: list[int], where: int, place: str, value: float
) -> None:
    assert_faults_stay_where_they_are_seen(paged_attention_torch, lengths, query_lens, where, value, place)
    assert_faults_stay_where_they_are_seen(paged_attention_torch, lengths, query_lens, where, value, place,
                                           num_heads=6, num_kv_heads=2)


@pytest.mark.parametrize("lengths, query_lens", [([30], [30]), ([40, 33], [1, 20]), ([40, 21], [1, 1])])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_key_counts_the_same_in_a_prompt_and_in_a_decode(
    lengths: list[int], query_lens: list[int], value: float
) -> None:
    assert_faults_stay_where_they_are_seen(paged_attention_torch, lengths, query_lens, 20, value, "k", num_heads=4)


def test_a_row_that_sees_nothing_is_zero_whatever_lay_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written often holds zeros by chance, so here it holds none."""
    case = make_case([0, 9], [1, 2])
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(*shape, fill_value=7.0, **options))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, 7.0))
    out = paged_attention_torch(*case.arguments())
    assert not out[0].any() and out[1:].all(), "the first request has no context, the other one has"
