"""What does attention take, and do these tensors fit each other? The same for Triton and for torch.

Kinds, shapes, layouts and devices are checked, which costs microseconds; values are not, since to read
them would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from nanopaged.validation import require_int, shown


class AttentionBackend(NamedTuple):
    """The two operations, in one implementation, see `torch_attention`."""

    write_kv: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]


class RaggedBatch(Protocol):
    """Whose rows are whose, and where their contexts lie. `batch.Batch` is one.

    Attributes:
        block_tables: (num_requests, any width) int32, last dimension contiguous; entry j holds
            positions j * block_size and up. Entries past a request's length are not read.
        query_start: (num_requests + 1,) int32, from 0 to num_tokens, not falling; request i has the
            rows query_start[i] .. query_start[i + 1] - 1.
        seq_lens: (num_requests,) int32, tokens in the context, with this step's rows; rows that see none become 0.
        num_decodes: the first `num_decodes` requests have one row each.
        plan: None, or what an attention has computed from these, for all layers.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    plan: object


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                slots: torch.Tensor) -> None:
    _check_dims(k=(k, 3), v=(v, 3), k_cache=(k_cache, 4), v_cache=(v_cache, 4), slots=(slots, 1))
    _check_cache("k", k, k_cache, v_cache)
    for name, rows in (("k", k), ("v", v)):
        _check(name, rows, (len(k), k_cache.shape[1], k_cache.shape[3]), k_cache)
    _check("slots", slots, (len(k),), k_cache, torch.int32)


def check_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch) -> None:
    block_tables, query_start, seq_lens = batch.block_tables, batch.query_start, batch.seq_lens
    _check_dims(q=(q, 3), k_cache=(k_cache, 4), v_cache=(v_cache, 4), block_tables=(block_tables, 2),
                query_start=(query_start, 1), seq_lens=(seq_lens, 1))
    _check_cache("q", q, k_cache, v_cache)
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"num_kv_heads must divide num_heads, got {k_cache.shape[1]} and q {tuple(q.shape)}")
    _check("q", q, (*q.shape[:2], k_cache.shape[3]), k_cache)
    _check("seq_lens", seq_lens, (len(seq_lens),), k_cache, torch.int32)
    _check("query_start", query_start, (len(seq_lens) + 1,), k_cache, torch.int32)
    _check("block_tables", block_tables, (len(seq_lens), block_tables.shape[1]), k_cache, torch.int32)
    if 0 in (q.shape[1], block_tables.shape[1]):
        raise ValueError(f"there must be a head and a block at least, got q {tuple(q.shape)} and block_tables "
                         f"{tuple(block_tables.shape)}")
    require_int("num_decodes", batch.num_decodes, 0, len(seq_lens))
    if batch.num_decodes == len(seq_lens) and len(q) != len(seq_lens):
        raise ValueError(f"num_decodes says that {len(seq_lens)} requests have one row each, got q {tuple(q.shape)}")


def _check_dims(**tensors: tuple[torch.Tensor, int]) -> None:
    for name, (tensor, dims) in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(tensor)}")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")


def _check_cache(name: str, rows: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if rows.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {rows.dtype}")
    if 0 in k_cache.shape:
        raise ValueError(f"k_cache, (num_blocks, num_kv_heads, block_size, head_dim), is empty: {tuple(k_cache.shape)}")
    for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check(cache_name, cache, tuple(k_cache.shape), k_cache, rows.dtype)
        if not cache[:1].is_contiguous():
            raise ValueError(f"{cache_name}'s blocks must each be contiguous, got strides {cache.stride()}")


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], cache: torch.Tensor,
           dtype: torch.dtype | None = None) -> None:  # None: the cache's
    dtype = dtype or cache.dtype
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(f"{name} must have shape {shape} and a contiguous last dimension, got shape "
                         f"{tuple(tensor.shape)}, strides {tensor.stride()}")
    if tensor.device != cache.device:
        raise ValueError(f"{name} must be on the cache's device, {cache.device}, got {tensor.device}")
