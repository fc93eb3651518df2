"""What the kernels compute where a row, a part or a position is unusual; test_paged_attention.py has whole batches.

Without a GPU the kernels run in Triton's interpreter, so shapes are tiny.
"""

from __future__ import annotations

import math

import pytest
import torch

from nanopaged import attention_kernels
from nanopaged.paged_attention import SMALLEST_PART, paged_attention_triton, write_kv_triton
from tests.test_torch_attention import (
    DEVICE,
    assert_attends,
    assert_faults_stay_where_they_are_seen,
    contiguous_attention,
    make_case,
)

triton = pytest.importorskip("triton", reason="there is no Triton on this system")
pytestmark = pytest.mark.gpu_too  # there the kernels are compiled


@triton.jit
def part_size_kernel(out, length, num_parts, SMALLEST: triton.language.constexpr = SMALLEST_PART):
    triton.language.store(out, attention_kernels._part_tokens(length, num_parts, SMALLEST))


@triton.jit
def masked_kernel(q, last, k_cache, v_cache, table, mean, log_sum, k_stride):
    """Sixteen rows over 40 positions in tiles of 16, in blocks of 8; row r sees them up to last[r]."""
    tl = triton.language
    rows, dims = tl.arange(0, 16), tl.arange(0, 16)
    q_tile = tl.load(q + rows[:, None] * 16 + dims[None, :])
    found, logs = attention_kernels._attend(q_tile, tl.load(last + rows), 0, 0, 40, table, 0, k_cache, v_cache,
                                            k_stride, k_stride, 1.0, True, 8, 16, 16, 16, 2, False)
    tl.store(mean + rows[:, None] * 16 + dims[None, :], found)
    tl.store(log_sum + rows, logs)


@pytest.mark.parametrize("length", [127, 128, 129, 300, 5000])
@pytest.mark.parametrize("num_parts", [1, 3, 8, 100])
def test_each_context_is_divided_by_its_own_length_into_as_many_parts_as_pay(length: int, num_parts: int) -> None:
    sizes = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    part_size_kernel[(1,)](sizes, length, num_parts)
    size = int(sizes)
    assert size % SMALLEST_PART == 0 and size >= SMALLEST_PART
    used = -(-length // size)
    assert used <= num_parts and (size - SMALLEST_PART) * num_parts < length  # the smallest size that is enough


def test_a_row_that_sees_nothing_is_zero_and_does_not_become_nan() -> None:
    """With a mask that hides the first tile from some rows; the engine has none that does."""
    case = make_case([40], [1], 1, 1)
    last = torch.tensor([-1, 5, 39, *[39] * 13], dtype=torch.int32, device=DEVICE)
    mean, log_sum = torch.full((16, 16), torch.nan, device=DEVICE), torch.full((16,), torch.nan, device=DEVICE)
    masked_kernel[(1,)](case.q.expand(16, 1, 16).contiguous(), last, case.k_cache, case.v_cache,
                        case.batch.block_tables, mean, log_sum, case.k_cache.stride(0))
    assert not mean[0].any() and log_sum[0] == -torch.inf
    assert mean[1:].isfinite().all() and log_sum[1:].isfinite().all()


def test_a_token_with_a_negative_slot_is_written_nowhere() -> None:
    cache, rows = torch.zeros(2, 1, 8, 16, device=DEVICE), torch.ones(3, 1, 16, device=DEVICE)
    write_kv_triton(rows, rows, cache, cache, torch.tensor([-1, 3, -1], dtype=torch.int32, device=DEVICE))
    assert cache[0, 0, 3].all() and cache.count_nonzero() == 16


@pytest.mark.parametrize("lengths, query_lens, where", [
    ([30], [30], 20), ([40, 33], [1, 20], 25), ([5, 150], [5, 70], 120), ([5, 150], [5, 70], 60),
], ids=str)
@pytest.mark.parametrize("place, value", [("k", math.nan), ("v", math.nan), ("v", math.inf), ("k", -math.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_keep_a_position_that_is_not_finite_from_rows_that_do_not_see_it(
    lengths: list[int], query_lens: list[int], where: int, place: str, value: float, dtype: torch.dtype
) -> None:
    assert_faults_stay_where_they_are_seen(paged_attention_triton, lengths, query_lens, where, value, place, dtype,
                                           num_heads=2, num_kv_heads=1)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = make_case([20, 20], [20, 1])
    case.q *= 1000.0  # scores in the thousands: exp() of one is infinite, exp() of its negative zero
    assert_attends(paged_attention_triton, case, contiguous_attention(case), 1e-4)
