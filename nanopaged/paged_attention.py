"""How is attention computed over scattered blocks?

Two operations, each as a Triton kernel and as a torch reference with the same signature: `write_kv`
puts the K and V of a step's tokens into their slots, `paged_attention` reads them through the tables.

The batch is ragged: request i has `query_start[i + 1] - query_start[i]` rows, one (decode) or many (a
chunk of a prompt), the *last* of its `seq_lens[i]` tokens. Row r of n attends to positions 0 up to
seq_lens[i] - n + r. A layer's cache is a pair of tensors (num_blocks, num_kv_heads, block_size,
head_dim): one head's keys of one block lie together, so a program, which works on one head, reads
whole runs of block_size * head_dim elements.

The kernel is FlashAttention's online softmax (Dao et al., 2022; Milakov and Gimelshein, 2018) with
one step of indirection, the page table, before each load (Kwon et al., SOSP 2023, section 4.1). A
program owns a tile of query rows that share one key-value head, and walks that head's context:

                 context, TILE_KV tokens at a time, from anywhere in the pool ->
                 ┌────────┬────────┬────────┬────────┐
    query rows   │ block 7│ block 2│ block 9│ blk 4 /│   each tile: scores = Q K^T, masked above
    of one       │        │        │      / │/ masked│   the diagonal; rescale what was summed so
    kv head      │        │        │ / masked        │   far to the larger maximum; add P V
                 └────────┴────────┴────────┴────────┘
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; the torch reference runs everywhere
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # read when the kernels below are defined
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)  # these and the next are the kernels' limits;
HEAD_DIMS = (16, 32, 64, 128, 256)  # the torch reference takes any


class AttentionBackend(NamedTuple):
    write_kv: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]


def write_kv_torch(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                   slots: torch.Tensor) -> None:
    """Writes each token's K and V into its slot, in place.

    Args:
        k, v: (num_tokens, num_kv_heads, head_dim), last dimension contiguous; the cache's dtype.
        k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim), each block contiguous.
        slots: (num_tokens,) int64, block id * block_size + place in the block; no slot twice.

    Raises TypeError or ValueError for a dtype, shape, layout or device that does not fit.
    """
    _check_write(k, v, k_cache, v_cache, slots)
    block_size = k_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size  # (num_tokens,)
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def paged_attention_torch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                          query_start: torch.Tensor, seq_lens: torch.Tensor, max_query_len: int,
                          scale: float) -> torch.Tensor:
    """Causal attention of a ragged batch over its block tables, accumulated in float32.

    Grouped-query attention (Ainslie et al., 2023): with num_heads = group * num_kv_heads, query
    head h reads key-value head h // group.

    Args:
        q: (num_tokens, num_heads, head_dim), last dimension contiguous; float32, float16 or
            bfloat16. The rows of request i are query_start[i] .. query_start[i + 1] - 1.
        k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim), each block contiguous;
            q's dtype. The K and V of this step's tokens are already in them.
        block_tables: (num_requests, any width) int32, last dimension contiguous; entry j holds
            positions j * block_size and up. Entries past a request's length are not read.
        query_start: (num_requests + 1,) int32, from 0 to num_tokens, not falling.
        seq_lens: (num_requests,) int32, tokens in the context, with this step's rows.
        max_query_len: the most rows that one request has; the kernel leaves further rows unwritten.
        scale: multiplies the scores; 1 / sqrt(head_dim) in GPT-2.

    Returns (num_tokens, num_heads, head_dim), contiguous, q's dtype. Raises TypeError or ValueError
    for a dtype, shape, layout or device that does not fit.
    """
    _check_attention(q, k_cache, v_cache, block_tables, query_start, seq_lens)
    num_kv_heads, head_dim = k_cache.shape[1], q.shape[2]
    group, block_size = q.shape[1] // num_kv_heads, k_cache.shape[2]
    # Head h of block b is row b * num_kv_heads + h of these: one copy gathers head after head.
    k_rows, v_rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # (num_blocks * num_kv_heads, block_size, head_dim)
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]  # (num_kv_heads, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for i, length in enumerate(lengths):
        first, last = starts[i], starts[i + 1]
        if (n := last - first) == 0:
            continue
        # Gather the scattered blocks into one contiguous context: what the kernel never does.
        gathered = (block_tables[i, : -(-length // block_size)] * num_kv_heads + heads).flatten()
        k = k_rows.index_select(0, gathered).view(num_kv_heads, -1, head_dim)[:, :length].float()
        v = v_rows.index_select(0, gathered).view(num_kv_heads, -1, head_dim)[:, :length].float()
        rows = q[first:last].float().unflatten(1, (num_kv_heads, group))  # (n, num_kv_heads, group, head_dim)
        rows = rows.permute(1, 2, 0, 3).flatten(1, 2)  # (num_kv_heads, group * n, head_dim)
        scores = rows @ k.transpose(1, 2) * scale  # (num_kv_heads, group * n, length)
        if n > 1:
            future = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)  # (n, length)
            scores = scores.masked_fill(future.repeat(group, 1), -torch.inf)
        result = scores.softmax(dim=-1) @ v  # (num_kv_heads, group * n, head_dim)
        result = result.unflatten(1, (group, n)).permute(2, 0, 1, 3)  # (n, num_kv_heads, group, head_dim)
        out[first:last] = result.flatten(1, 2).to(q.dtype)
    return out


def write_kv_triton(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                    slots: torch.Tensor) -> None:
    """As `write_kv_torch`; one program for each token and head."""
    _check_write(k, v, k_cache, v_cache, slots)
    check_kernel_sizes(*k_cache.shape[2:])
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens:
        with _device_of(k):
            _write_kv_kernel[(num_tokens, num_kv_heads)](
                k, v, k_cache, v_cache, slots,
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(0), v_cache.stride(0),
                BLOCK_SIZE=k_cache.shape[2], HEAD_DIM=head_dim,
            )


def paged_attention_triton(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                           query_start: torch.Tensor, seq_lens: torch.Tensor, max_query_len: int,
                           scale: float) -> torch.Tensor:
    """As `paged_attention_torch`, without gathering: the kernel reads the blocks where they lie."""
    _check_attention(q, k_cache, v_cache, block_tables, query_start, seq_lens)
    check_kernel_sizes(*k_cache.shape[2:])
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    group = q.shape[1] // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if max_query_len == 0:
        return out
    tile_rows, tile_q = query_tile(group, max_query_len)
    grid = (len(seq_lens), num_kv_heads, triton.cdiv(max_query_len, tile_q))
    with _device_of(q):
        _paged_attention_kernel[grid](
            q, k_cache, v_cache, out, block_tables, query_start, seq_lens, scale * LOG2_E,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), k_cache.stride(0), v_cache.stride(0),
            block_tables.stride(0),
            GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            TILE_Q=tile_q, TILE_ROWS=tile_rows, TILE_KV=max(16, min(64, 16384 // (head_dim * q.element_size()))),
            # A tensor on the CPU means Triton's interpreter, whose dot takes bfloat16's bits for integers.
            WIDEN=q.dtype == torch.bfloat16 and not q.is_cuda,
        )
    return out


def _device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


TORCH = AttentionBackend(write_kv_torch, paged_attention_torch)
TRITON = AttentionBackend(write_kv_triton, paged_attention_triton)
LOG2_E = 1.4426950408889634  # the kernel's exponentials are powers of two, which the hardware has


def query_tile(group: int, max_query_len: int) -> tuple[int, int]:
    """(rows, query tokens) of a program's tile.

    A row is one query head of one token. The `group` heads that share K and V are in one tile, so a
    block is read once for all of them. A matrix product on tensor cores has at least 16 rows.
    """
    most_rows = 16 if max_query_len == 1 else 64
    rows = max(16, triton.next_power_of_2(group), min(most_rows, triton.next_power_of_2(group * max_query_len)))
    return rows, rows // group


jit = triton.jit if triton is not None else lambda function: function  # so that this file can be read anywhere


@jit
def _write_kv_kernel(
    k, v, k_cache, v_cache, slots,
    k_stride_token, k_stride_head, v_stride_token, v_stride_head, k_stride_block, v_stride_block,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Program (t, h) copies head h of token t; argument layouts as in `write_kv_torch`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)  # int64: an element's place in a large pool passes 2**31
    inside = head * (BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)
    block = slot // BLOCK_SIZE
    tl.store(k_cache + block * k_stride_block + inside + dims,
             tl.load(k + token * k_stride_token + head * k_stride_head + dims))
    tl.store(v_cache + block * v_stride_block + inside + dims,
             tl.load(v + token * v_stride_token + head * v_stride_head + dims))


@jit
def _dot(a, b, WIDEN: tl.constexpr):
    """Matrix product summed in float32; "ieee" keeps float32 inputs from being cut to TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _paged_attention_kernel(
    q, k_cache, v_cache, out, block_tables, query_start, seq_lens, scale_log2,
    q_stride_token, q_stride_head, out_stride_token, out_stride_head, k_stride_block, v_stride_block, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KV: tl.constexpr, WIDEN: tl.constexpr,
):
    """Program (i, h, t) computes query tokens t * TILE_Q and up of request i, for kv head h.

    Argument layouts as in `paged_attention_torch`. Row r of the tile is query token r // GROUP,
    query head h * GROUP + r % GROUP.
    """
    request, kv_head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - first
    if tile * TILE_Q >= query_len:
        return  # the grid is sized for the longest request
    seq_len = tl.load(seq_lens + request)

    rows = tl.arange(0, TILE_ROWS)
    token = tile * TILE_Q + rows // GROUP  # (TILE_ROWS,) of the request's query tokens
    row_is_real = (rows < TILE_Q * GROUP) & (token < query_len)
    position = seq_len - query_len + token  # (TILE_ROWS,) the last position that the row attends to
    head = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, HEAD_DIM)
    q_row = (first + token).to(tl.int64) * q_stride_token + head * q_stride_head
    q_tile = tl.load(q + q_row[:, None] + dims[None, :], mask=row_is_real[:, None], other=0.0)  # (TILE_ROWS, HEAD_DIM)

    maximum = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    weighted = tl.zeros((TILE_ROWS, HEAD_DIM), tl.float32)
    tokens = tl.arange(0, TILE_KV)
    # The tile's last query token sees this far; what comes after is masked for every row.
    context = tl.minimum(seq_len, seq_len - query_len + (tile + 1) * TILE_Q)
    for start in range(0, context, TILE_KV):
        place = start + tokens  # (TILE_KV,) positions in the request's sequence
        inside = place < context
        block = tl.load(block_tables + request * table_stride + place // BLOCK_SIZE, mask=inside, other=0)
        block = block.to(tl.int64)  # an element's place in a large pool passes 2**31
        in_block = kv_head * (BLOCK_SIZE * HEAD_DIM) + (place % BLOCK_SIZE) * HEAD_DIM
        k_tile = tl.load(k_cache + (block * k_stride_block + in_block)[:, None] + dims[None, :],
                         mask=inside[:, None], other=0.0)  # (TILE_KV, HEAD_DIM)
        scores = _dot(q_tile, tl.trans(k_tile), WIDEN) * scale_log2  # (TILE_ROWS, TILE_KV)
        scores = tl.where(place[None, :] <= position[:, None], scores, float("-inf"))
        # Every row sees position 0, in the first tile: its maximum is finite from there on.
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp2(maximum - larger)  # what was summed so far, at the larger maximum
        probs = tl.exp2(scores - larger[:, None])
        maximum = larger
        total = total * shrink + tl.sum(probs, axis=1)
        v_tile = tl.load(v_cache + (block * v_stride_block + in_block)[:, None] + dims[None, :],
                         mask=inside[:, None], other=0.0)  # (TILE_KV, HEAD_DIM)
        weighted = weighted * shrink[:, None] + _dot(probs.to(v_tile.dtype), v_tile, WIDEN)

    out_row = (first + token).to(tl.int64) * out_stride_token + head * out_stride_head
    tl.store(out + out_row[:, None] + dims[None, :], (weighted / total[:, None]).to(out.dtype.element_ty),
             mask=row_is_real[:, None])


def check_kernel_sizes(block_size: int, head_dim: int) -> None:
    if triton is None:
        raise ValueError("the Triton kernels need the triton package, which is not installed: use attention='torch'")
    if block_size not in BLOCK_SIZES or head_dim not in HEAD_DIMS:
        raise ValueError(f"the Triton kernels take a block_size of {BLOCK_SIZES} and a head_dim of {HEAD_DIMS}, "
                         f"got {block_size} and {head_dim}: use attention='torch'")


# Shapes, dtypes and layouts are checked before any launch; values are not, since that would wait for the device.


def _check_write(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                 slots: torch.Tensor) -> None:
    _check_cache("k", k, k_cache, v_cache)
    for name, rows in (("k", k), ("v", v)):
        _check(name, rows, (len(k), k_cache.shape[1], k_cache.shape[3]), k_cache)
    _check("slots", slots, (len(k),), k_cache, torch.int64)


def _check_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
                     query_start: torch.Tensor, seq_lens: torch.Tensor) -> None:
    _check_cache("q", q, k_cache, v_cache)
    if q.dim() != 3 or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"num_kv_heads must divide num_heads, got {k_cache.shape[1]} and q {tuple(q.shape)}")
    _check("q", q, (*q.shape[:2], k_cache.shape[3]), k_cache)
    _check("seq_lens", seq_lens, (len(seq_lens),), k_cache, torch.int32)
    _check("query_start", query_start, (len(seq_lens) + 1,), k_cache, torch.int32)
    _check("block_tables", block_tables, (len(seq_lens), block_tables.shape[-1]), k_cache, torch.int32)


def _check_cache(name: str, rows: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if rows.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {rows.dtype}")
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache must be (num_blocks, num_kv_heads, block_size, head_dim), got {tuple(k_cache.shape)}")
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
