"""How is attention computed over scattered blocks, on a GPU? The kernels.

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

    prompt_kernel   a program owns up to 64 rows of one request, and walks their whole context
    decode_kernel   one token a request; few requests would leave most of a GPU idle, so a long context
                     is split, and each program walks one part of it
    merge_kernel    puts the parts together (Flash-Decoding: Dao et al., 2023)

`torch_attention` specifies what is computed, `paged_attention` launches these. docs/kernel.md goes through them tile by
tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS and Windows; the torch reference runs everywhere
    triton = tl = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # read when the kernels below are defined


def jit(*unspecialized: str) -> Callable[[Callable], Any]:
    """`triton.jit`, where there is Triton.

    It compiles a kernel again for an integer that is 1 or divisible by 16, or a pointer that is aligned,
    but not for the arguments named here: so no batch is the first of its kind.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=unspecialized)


@jit("slots")
def write_kv_kernel(
    k, v, k_cache, v_cache, slots, k_stride_token, k_stride_head, v_stride_token, v_stride_head, k_stride_block,
    v_stride_block,
    NUM_KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
):
    """Program t copies token t, all its heads; argument layouts as in `write_kv_torch`.

    A negative slot is nowhere: that of a row that only fills up a recorded batch (`fast/cuda_graphs.py`).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)  # an element's place in a large pool passes 2**31
    if slot < 0:
        return
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
    if a.shape[0] == 1:  # too few rows for tl.dot, which would multiply fifteen rows of padding
        return tl.sum(tl.trans(a) * b, axis=0)[None, :]
    return tl.dot(a, b, input_precision="ieee")


@jit()
def _raised(maximum, another):
    """A row's larger maximum, the factor for what was summed at the one before, and the pivot of its exponentials.

    A row that has seen nothing yet has the maximum -inf; -inf - -inf would be NaN, so its pivot is 0.
    """
    larger = tl.maximum(maximum, another)
    pivot = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, tl.exp2(maximum - pivot), pivot


@jit()
def _part_tokens(seq_len, num_parts, SMALLEST_PART: tl.constexpr):
    """Tokens of each part of a context but the last: a multiple of SMALLEST_PART. The grid has `num_parts` for each
    request; each divides its own length by them, so a short context may need fewer."""
    return tl.cdiv(tl.maximum(tl.cdiv(seq_len, num_parts), 1), SMALLEST_PART) * SMALLEST_PART


@jit()
def _attend(
    q_tile, last_position, begin, seen_by_all, end, table, kv_head, k_cache, v_cache, k_stride_block, v_stride_block,
    scale_log2, CAUSAL: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_KV: tl.constexpr, NUM_STAGES: tl.constexpr, WIDEN: tl.constexpr,
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
    MASKED_STAGES: tl.constexpr = 1 if k_cache.dtype.element_ty.primitive_bitwidth == 16 else 2
    for MASKED in tl.static_range(1 + CAUSAL):
        for start in tl.range(seen_by_all if MASKED else begin, end if MASKED else seen_by_all, TILE_KV,
                              num_stages=MASKED_STAGES if MASKED else NUM_STAGES):
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
            maximum, shrink, pivot = _raised(maximum, tl.max(scores, axis=1))
            probs = tl.exp2(scores - pivot[:, None])
            total = total * shrink + tl.sum(probs, axis=1)
            weighted = weighted * shrink[:, None] + _dot(probs.to(v_tile.dtype), v_tile, WIDEN)
    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing: its mean is 0, and its log -inf
    return weighted / total[:, None], maximum + tl.log2(total)


@jit("block_tables", "seq_lens", "table_stride", "query_start", "first_row", "num_requests")
def prompt_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, scale_log2, q_stride_token, q_stride_head, k_stride_block,
    v_stride_block, table_stride, out, query_start, first_row, num_requests,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr,
    NUM_STAGES: tl.constexpr, WIDEN: tl.constexpr, TILE_Q: tl.constexpr, TILE_ROWS: tl.constexpr,
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
        if (tl.load(query_start + middle) - first_row) // TILE_Q + middle <= number:
            low = middle
        else:
            high = middle
    request = low
    first = tl.load(query_start + request) - first_row
    query_len = tl.load(query_start + request + 1) - first_row - first
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
                      True, BLOCK_SIZE, HEAD_DIM, TILE_ROWS, TILE_KV, NUM_STAGES, WIDEN)
    num_heads = tl.num_programs(1) * GROUP
    tl.store(out + ((at * num_heads + head) * HEAD_DIM)[:, None] + dims[None, :], mean.to(out.dtype.element_ty),
             mask=row_is_real[:, None])


@jit("block_tables", "seq_lens", "table_stride", "num_parts")
def decode_kernel(
    q, k_cache, v_cache, block_tables, seq_lens, scale_log2, q_stride_token, q_stride_head, k_stride_block,
    v_stride_block, table_stride, out, log_sums, num_parts,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KV: tl.constexpr,
    NUM_STAGES: tl.constexpr, WIDEN: tl.constexpr, TILE_ROWS: tl.constexpr, SPLIT: tl.constexpr,
    SMALLEST_PART: tl.constexpr,
):
    """Program (i, h, p) computes request i's one query token for kv head h, over part p of its context.

    `out` is (num_requests, num_heads, num_parts, head_dim), `log_sums` the same without its last
    dimension, float32, and used only where SPLIT. Otherwise as in `prompt_kernel`.
    """
    request, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    begin, end = 0, seq_len
    if SPLIT:
        tokens = _part_tokens(seq_len, num_parts, SMALLEST_PART)
        begin = part * tokens
        if begin >= seq_len:
            return  # this context needs fewer parts; `merge_kernel` reads none of the others
        end = tl.minimum(begin + tokens, seq_len)

    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, HEAD_DIM)
    row_is_real = rows < GROUP
    head = kv_head * GROUP + rows
    q_tile = tl.load(q + (request.to(tl.int64) * q_stride_token + head * q_stride_head)[:, None] + dims[None, :],
                     mask=row_is_real[:, None], other=0.0)  # (TILE_ROWS, HEAD_DIM)
    mean, log_sum = _attend(q_tile, rows, begin, end, end, block_tables + request.to(tl.int64) * table_stride, kv_head,
                            k_cache, v_cache, k_stride_block, v_stride_block, scale_log2,
                            False, BLOCK_SIZE, HEAD_DIM, TILE_ROWS, TILE_KV, NUM_STAGES, WIDEN)
    num_heads = tl.num_programs(1) * GROUP
    at = (request.to(tl.int64) * num_heads + head) * num_parts + part  # (TILE_ROWS,)
    tl.store(out + (at * HEAD_DIM)[:, None] + dims[None, :], mean.to(out.dtype.element_ty), mask=row_is_real[:, None])
    if SPLIT:
        tl.store(log_sums + at, log_sum, mask=row_is_real)


@jit("seq_lens", "num_parts")
def merge_kernel(parts, log_sums, out, seq_lens, num_parts,
                  HEAD_DIM: tl.constexpr, TILE_PARTS: tl.constexpr, SMALLEST_PART: tl.constexpr):
    """Program (i, h) merges the parts of request i, query head h: their means, weighted by their sums.

    `parts` and `log_sums` as `decode_kernel` leaves them, `out` (num_requests, num_heads, head_dim).
    """
    request, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    seq_len = tl.load(seq_lens + request)
    used = tl.cdiv(seq_len, _part_tokens(seq_len, num_parts, SMALLEST_PART))  # the other parts were not written
    row = request * num_heads + head
    dims = tl.arange(0, HEAD_DIM)
    maximum, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    weighted = tl.zeros((HEAD_DIM,), tl.float32)
    for start in range(0, used, TILE_PARTS):  # the online softmax again, over parts instead of tokens
        part = start + tl.arange(0, TILE_PARTS)
        log_sum = tl.load(log_sums + row * num_parts + part, mask=part < used, other=float("-inf"))
        mean = tl.load(parts + ((row * num_parts + part) * HEAD_DIM)[:, None] + dims[None, :],
                       mask=(part < used)[:, None], other=0.0)  # (TILE_PARTS, HEAD_DIM)
        maximum, shrink, pivot = _raised(maximum, tl.max(log_sum, axis=0))
        weight = tl.exp2(log_sum - pivot)  # (TILE_PARTS,)
        total = total * shrink + tl.sum(weight, axis=0)
        weighted = weighted * shrink + tl.sum(mean * weight[:, None], axis=0)
    total = tl.where(total == 0.0, 1.0, total)  # an empty context has a mean of 0
    tl.store(out + row * HEAD_DIM + dims, (weighted / total).to(out.dtype.element_ty))
