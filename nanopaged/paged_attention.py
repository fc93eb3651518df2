"""How is attention computed over scattered blocks, on a GPU?

A layer's cache is a pair of tensors (num_blocks, num_kv_heads, block_size, head_dim). One head's keys
of one block are one run of block_size * head_dim elements (2 KiB for 16 tokens of 64 half floats), and
a program works on one head: so neighbouring threads load neighbouring 16 bytes, and every byte that is loaded is used.

The kernels are FlashAttention's online softmax (Dao et al., 2022; Milakov and Gimelshein, 2018) with
one step of indirection, the page table, before each load (Kwon et al., SOSP 2023, section 4.1):

                 context, TILE_KV tokens at a time, from anywhere in the pool ->
                 ┌────────┬────────┬────────┬────────┐
    query rows   │ block 7│ block 2│ block 9│ blk 4 /│   each tile: scores = Q K^T, masked above
    of one       │        │        │      / │/ masked│   the diagonal; rescale what was summed so
    kv head      │        │        │ / masked        │   far to the larger maximum; add P V
                 └────────┴────────┴────────┴────────┘

A row is one query head of one token. The heads that share K and V (grouped-query attention) are rows of
one tile, so a block is read once for all of them. Three kernels walk or finish such tiles:

    _prompt_kernel   a program owns up to 64 rows of one request, and walks their whole context
    _decode_kernel   one token a request; few requests would leave most of a GPU idle, so a long context
                     is split, and each program walks one part of it
    _merge_kernel    puts the parts together (Flash-Decoding: Dao et al., 2023)

`torch_attention` specifies what is computed. docs/kernel.md goes through this file tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from nanopaged.attention_arguments import AttentionBackend, RaggedBatch, check_attention, check_write

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; the torch reference runs everywhere
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # read when the kernels below are defined
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)  # these and the next are the kernels' limits;
HEAD_DIMS = (16, 32, 64, 128, 256)  # the torch reference takes any
MIN_SPLIT_TOKENS = 128  # a shorter part of a context costs more to merge than it saves
PROGRAMS_PER_MULTIPROCESSOR = 4  # decode programs that wait for memory at once, so that it is never idle
LOG2_E = 1.4426950408889634  # the kernels' exponentials are powers of two, which the hardware has


def write_kv_triton(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                    slots: torch.Tensor) -> None:
    """As `write_kv_torch`; one program for each token."""
    check_write(k, v, k_cache, v_cache, slots)
    check_launch(k_cache)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens:
        with device_of(k):
            _write_kv_kernel[(num_tokens,)](
                k, v, k_cache, v_cache, slots,
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(0), v_cache.stride(0),
                NUM_KV_HEADS=num_kv_heads, TILE_HEADS=triton.next_power_of_2(num_kv_heads),
                BLOCK_SIZE=k_cache.shape[2], HEAD_DIM=head_dim,
            )


def paged_attention_triton(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch,
                           scale: float) -> torch.Tensor:
    """As `paged_attention_torch`, without gathering: the kernels read the blocks where they lie."""
    check_attention(q, k_cache, v_cache, batch)
    check_launch(k_cache)
    block_tables, query_start, seq_lens = batch.block_tables, batch.query_start, batch.seq_lens
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (num_tokens, num_heads, head_dim)
    if len(q) == 0:
        return out
    num_requests, (num_tokens, num_heads, head_dim), num_kv_heads = len(seq_lens), q.shape, k_cache.shape[1]
    group, block_size = num_heads // num_kv_heads, k_cache.shape[2]
    inputs = (q, k_cache, v_cache, block_tables, seq_lens, scale * LOG2_E, q.stride(0), q.stride(1),
              k_cache.stride(0), v_cache.stride(0), block_tables.stride(0))
    constants = dict(GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
                     TILE_KV=max(16, min(64, 8192 // (head_dim * q.element_size()))),  # 8 KiB of K
                     WIDEN=INTERPRETED and q.dtype == torch.bfloat16)  # its dot takes bfloat16's bits for integers
    with device_of(q):
        if batch.num_decodes < num_requests:
            rows, tile_q = prompt_tile(group, q.element_size())
            # Request i's tiles begin at number query_start[i] // tile_q + i, or a little later than they could.
            _prompt_kernel[(num_tokens // tile_q + num_requests, num_kv_heads)](
                *inputs, out, query_start, num_requests, TILE_Q=tile_q, TILE_ROWS=rows, **constants,
                # What fits the registers: docs/kernel.md has the compiler's figures.
                num_stages=2 if q.element_size() == 2 else 3, num_warps=4 if head_dim * q.element_size() <= 256 else 8)
            return out
        longest = block_tables.shape[1] * block_size  # what the tables have room for; lengths are the device's to know
        tokens = split_tokens(num_requests * num_kv_heads, longest, _multiprocessors(q.device))
        num_splits, rows = triton.cdiv(longest, tokens), max(16, triton.next_power_of_2(group))
        grid = (num_requests, num_kv_heads, num_splits)
        if num_splits == 1:
            _decode_kernel[grid](*inputs, out, out, tokens, num_splits, TILE_ROWS=rows, SPLIT=False, **constants)
            return out
        parts = q.new_empty((num_requests, num_heads, num_splits, head_dim), dtype=torch.float32)
        log_sums = q.new_empty((num_requests, num_heads, num_splits), dtype=torch.float32)
        _decode_kernel[grid](*inputs, parts, log_sums, tokens, num_splits, TILE_ROWS=rows, SPLIT=True, **constants)
        _merge_kernel[(num_requests, num_heads)](parts, log_sums, out, seq_lens, tokens, num_splits,
                                                 HEAD_DIM=head_dim, TILE_SPLITS=16)
    return out


TRITON = AttentionBackend(write_kv_triton, paged_attention_triton)


def prompt_tile(group: int, element_bytes: int) -> tuple[int, int]:
    """(rows, query tokens) of a prompt program's tile."""
    # Hopper's tensor cores take 64 rows of half floats at once. Exact float32 has none, and fills more registers.
    rows = max(128 // element_bytes, triton.next_power_of_2(group))
    return rows, rows // group


def split_tokens(num_contexts: int, longest: int, num_multiprocessors: int) -> int:
    """How many tokens of a context one decode program walks: all of them, where there are programs enough.

    `num_contexts` are requests times key-value heads, `longest` is the tokens in a context at most.
    Returns a multiple of MIN_SPLIT_TOKENS.
    """
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors, num_contexts)  # programs for a context
    return triton.cdiv(triton.cdiv(longest, wanted), MIN_SPLIT_TOKENS) * MIN_SPLIT_TOKENS


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # in the interpreter: some number, small enough that a test meets both sides of the rule


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_kernel_sizes(block_size: int, head_dim: int) -> None:
    if triton is None:
        raise ValueError("the Triton kernels need the triton package, which is not installed: use attention='torch'")
    if block_size not in BLOCK_SIZES or head_dim not in HEAD_DIMS:
        raise ValueError(f"the Triton kernels take a block_size of {BLOCK_SIZES} and a head_dim of {HEAD_DIMS}, "
                         f"got {block_size} and {head_dim}: use attention='torch'")


def check_launch(cache: torch.Tensor) -> None:
    check_kernel_sizes(*cache.shape[2:])
    if not (cache.is_cuda or INTERPRETED):
        raise ValueError(f"the Triton kernels run on CUDA, and these tensors are on {cache.device}: use "
                         "attention='torch', or set the environment variable TRITON_INTERPRET=1 before starting Python")


def jit(*unspecialized: str) -> Callable[[Callable], Any]:
    """`triton.jit`, where there is Triton.

    It compiles a kernel again for an integer that is 1 or divisible by 16, or a pointer that is aligned,
    but not for the arguments named here: so no batch is the first of its kind.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=unspecialized)


@jit("slots")
def _write_kv_kernel(
    k, v, k_cache, v_cache, slots, k_stride_token, k_stride_head, v_stride_token, v_stride_head, k_stride_block,
    v_stride_block,
    NUM_KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Program t copies token t, all its heads; argument layouts as in `write_kv_torch`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)  # an element's place in a large pool passes 2**31
    heads = tl.arange(0, TILE_HEADS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    real = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)  # (TILE_HEADS, HEAD_DIM)
    inside = heads * (BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM + dims
    block = slot // BLOCK_SIZE
    k_row = tl.load(k + token * k_stride_token + heads * k_stride_head + dims, mask=real)  # (TILE_HEADS, HEAD_DIM)
    v_row = tl.load(v + token * v_stride_token + heads * v_stride_head + dims, mask=real)
    tl.store(k_cache + block * k_stride_block + inside, k_row, mask=real)
    tl.store(v_cache + block * v_stride_block + inside, v_row, mask=real)


@jit()
def _dot(a, b, WIDEN: tl.constexpr):
    """Matrix product summed in float32; "ieee" keeps float32 inputs from being cut to TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit()
def _attend(
    q_tile, last_position, begin, seen_by_all, end, table, kv_head, k_cache, v_cache, k_stride_block, v_stride_block,
    scale_log2, CAUSAL: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_KV: tl.constexpr, WIDEN: tl.constexpr,
):
    """A tile of rows attends to positions begin .. end - 1 of one context.

    All rows see the positions before `seen_by_all`, in whole tiles; if CAUSAL, each row sees the others up to its
    last position. `q_tile` is (TILE_ROWS, HEAD_DIM), `last_position` (TILE_ROWS,); `table` points at the block table.
    Returns the weighted means of V (TILE_ROWS, HEAD_DIM) and log2 of the sums of exponentials (TILE_ROWS,), float32.
    """
    maximum = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    weighted = tl.zeros((TILE_ROWS, HEAD_DIM), tl.float32)
    tokens, dims = tl.arange(0, TILE_KV), tl.arange(0, HEAD_DIM)
    # Masked tiles are one or two: too few to load ahead of, and in need of registers.
    STAGES: tl.constexpr = 1 if k_cache.dtype.element_ty.primitive_bitwidth == 16 else 2
    for MASKED in tl.static_range(1 + CAUSAL):
        for start in tl.range(seen_by_all if MASKED else begin, end if MASKED else seen_by_all, TILE_KV,
                              num_stages=STAGES if MASKED else None):
            place = start + tokens  # (TILE_KV,) positions in the request's sequence
            inside = place < end
            block = tl.load(table + place // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)  # elements pass 2**31
            in_block = kv_head * (BLOCK_SIZE * HEAD_DIM) + (place % BLOCK_SIZE) * HEAD_DIM
            k_tile = tl.load(k_cache + (block * k_stride_block + in_block)[:, None] + dims[None, :],
                             mask=inside[:, None], other=0.0)  # (TILE_KV, HEAD_DIM)
            v_tile = tl.load(v_cache + (block * v_stride_block + in_block)[:, None] + dims[None, :],
                             mask=inside[:, None], other=0.0)  # (TILE_KV, HEAD_DIM)
            scores = _dot(q_tile, tl.trans(k_tile), WIDEN) * scale_log2  # (TILE_ROWS, TILE_KV)
            seen = inside[None, :]
            if MASKED:
                seen = place[None, :] <= last_position[:, None]  # (TILE_ROWS, TILE_KV)
                # The weight of a masked position is 0, but 0 * nan is nan. So a V that is not finite is taken out,
                # and spoils the scores instead, of which only the rows that see it take any notice.
                faults = v_tile.to(tl.float32) * 0.0  # (TILE_KV, HEAD_DIM) nan where V is not finite, else 0
                v_tile = tl.where(faults == 0.0, v_tile, 0.0).to(v_tile.dtype)
                scores += tl.sum(faults, axis=1)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            # Every row sees `begin`, in the first tile: its maximum is finite from there on.
            larger = tl.maximum(maximum, tl.max(scores, axis=1))
            shrink = tl.exp2(maximum - larger)  # what was summed so far, at the larger maximum
            probs = tl.exp2(scores - larger[:, None])
            maximum = larger
            total = total * shrink + tl.sum(probs, axis=1)
            weighted = weighted * shrink[:, None] + _dot(probs.to(v_tile.dtype), v_tile, WIDEN)
    return weighted / total[:, None], maximum + tl.log2(total)


@jit("block_tables", "seq_lens", "table_stride", "query_start", "num_requests")
def _prompt_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, scale_log2, q_stride_token, q_stride_head, k_stride_block,
    v_stride_block, table_stride, out, query_start, num_requests,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr, WIDEN: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_ROWS: tl.constexpr,
):
    """Program (t, h) computes kv head h of tile t: TILE_Q query tokens of one request.

    Argument layouts as in `paged_attention_torch`. Row r of the tile is query token r // GROUP,
    query head h * GROUP + r % GROUP.
    """
    number, kv_head = tl.program_id(0), tl.program_id(1)
    # Whose tile is it? The last request's whose tiles begin at or before this number.
    low, high = 0, num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TILE_Q + middle <= number:
            low = middle
        else:
            high = middle
    request = low
    first = tl.load(query_start + request)
    query_len = tl.load(query_start + request + 1) - first
    tile = number - (first // TILE_Q + request)  # of this request's
    if tile * TILE_Q >= query_len:
        return  # tiles are numbered with room for every request's last one, which not all need
    seq_len = tl.load(seq_lens + request)

    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, HEAD_DIM)
    token = tile * TILE_Q + rows // GROUP  # (TILE_ROWS,) of the request's query tokens
    row_is_real = (rows < TILE_Q * GROUP) & (token < query_len)
    last_position = seq_len - query_len + token  # (TILE_ROWS,)
    head = kv_head * GROUP + rows % GROUP
    at = (first + token).to(tl.int64)  # (TILE_ROWS,) row of q and out
    q_tile = tl.load(q + (at * q_stride_token + head * q_stride_head)[:, None] + dims[None, :],
                     mask=row_is_real[:, None], other=0.0)  # (TILE_ROWS, HEAD_DIM)
    # The tile's first query token sees a little less than its last, which sees up to `end`.
    seen_by_all = (seq_len - query_len + tile * TILE_Q + 1) // TILE_KV * TILE_KV
    end = tl.minimum(seq_len, seq_len - query_len + (tile + 1) * TILE_Q)
    mean, _ = _attend(q_tile, last_position, 0, seen_by_all, end, block_tables + request.to(tl.int64) * table_stride,
                      kv_head, k_cache, v_cache, k_stride_block, v_stride_block, scale_log2,
                      True, BLOCK_SIZE, HEAD_DIM, TILE_ROWS, TILE_KV, WIDEN)
    num_heads = tl.num_programs(1) * GROUP
    tl.store(out + ((at * num_heads + head) * HEAD_DIM)[:, None] + dims[None, :], mean.to(out.dtype.element_ty),
             mask=row_is_real[:, None])


@jit("block_tables", "seq_lens", "table_stride", "tokens_per_split", "num_splits")
def _decode_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, scale_log2, q_stride_token, q_stride_head, k_stride_block,
    v_stride_block, table_stride, out, log_sums, tokens_per_split, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr, WIDEN: tl.constexpr,
    TILE_ROWS: tl.constexpr, SPLIT: tl.constexpr,
):
    """Program (i, h, s) computes request i's one query token for kv head h, over part s of its context.

    `out` is (num_requests, num_heads, num_splits, head_dim), `log_sums` the same without its last
    dimension, float32, and used only where SPLIT. Otherwise as in `_prompt_kernel`.
    """
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    begin = split * tokens_per_split
    if begin >= seq_len:
        return  # the grid is sized for the longest context
    end = tl.minimum(begin + tokens_per_split, seq_len)

    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, HEAD_DIM)
    row_is_real = rows < GROUP  # a tensor core's product has at least 16
    head = kv_head * GROUP + rows
    q_tile = tl.load(q + (request.to(tl.int64) * q_stride_token + head * q_stride_head)[:, None] + dims[None, :],
                     mask=row_is_real[:, None], other=0.0)  # (TILE_ROWS, HEAD_DIM)
    mean, log_sum = _attend(q_tile, rows, begin, end, end, block_tables + request.to(tl.int64) * table_stride, kv_head,
                            k_cache, v_cache, k_stride_block, v_stride_block, scale_log2,
                            False, BLOCK_SIZE, HEAD_DIM, TILE_ROWS, TILE_KV, WIDEN)
    num_heads = tl.num_programs(1) * GROUP
    at = (request.to(tl.int64) * num_heads + head) * num_splits + split  # (TILE_ROWS,)
    tl.store(out + (at * HEAD_DIM)[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=row_is_real[:, None])
    if SPLIT:
        tl.store(log_sums + at, log_sum, mask=row_is_real)


@jit("seq_lens", "tokens_per_split", "num_splits")
def _merge_kernel(parts, log_sums, out, seq_lens, tokens_per_split, num_splits,
                  HEAD_DIM: tl.constexpr, TILE_SPLITS: tl.constexpr):
    """Program (i, h) merges the parts of request i, query head h: their means, weighted by their sums.

    `parts` and `log_sums` as `_decode_kernel` leaves them, `out` (num_requests, num_heads, head_dim).
    """
    request, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    used = tl.cdiv(tl.load(seq_lens + request), tokens_per_split)  # the other parts were not written
    row = request * num_heads + head
    dims = tl.arange(0, HEAD_DIM)
    maximum, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    weighted = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(0, used, TILE_SPLITS):  # the online softmax again, over parts instead of tokens
        split = start + tl.arange(0, TILE_SPLITS)
        log_sum = tl.load(log_sums + row * num_splits + split, mask=split < used, other=float("-inf"))
        part = tl.load(parts + ((row * num_splits + split) * HEAD_DIM)[:, None] + dims[None, :],
                       mask=(split < used)[:, None], other=0.0)  # (TILE_SPLITS, HEAD_DIM)
        larger = tl.maximum(maximum, tl.max(log_sum, axis=0))
        shrink = tl.exp2(maximum - larger)
        weight = tl.exp2(log_sum - larger)  # (TILE_SPLITS,)
        maximum = larger
        total = total * shrink + tl.sum(weight, axis=0)
        weighted = weighted * shrink + tl.sum(part * weight[:, None], axis=0)
    tl.store(out + row * HEAD_DIM + dims, (weighted / total).to(out.dtype.element_ty))
