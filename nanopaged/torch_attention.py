"""What is paged attention? Plain torch: the answer that the kernels must give, and what runs on a CPU.

Two operations, which `paged_attention` has as Triton kernels with the same signatures: `write_kv` puts
the K and V of a step's tokens into their slots, `paged_attention` reads them through the block tables.

The batch is ragged: request i has `query_start[i + 1] - query_start[i]` rows, one (decode) or many (a
chunk of a prompt), the *last* of its `seq_lens[i]` tokens. Row r of n attends to positions 0 up to
seq_lens[i] - n + r.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanopaged.attention_arguments import AttentionBackend, RaggedBatch, check_attention, check_write
from nanopaged.block_allocator import blocks_for


def write_kv_torch(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                   slots: torch.Tensor) -> None:
    """Writes each token's K and V into its slot, in place.

    Args:
        k, v: (num_tokens, num_kv_heads, head_dim), last dimension contiguous; the cache's dtype.
        k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim), each block contiguous.
        slots: (num_tokens,) int32, block id * block_size + place in the block; no slot twice.

    Raises TypeError or ValueError for a dtype, shape, layout or device that does not fit.
    """
    check_write(k, v, k_cache, v_cache, slots)
    block_size = k_cache.shape[2]
    slots = slots.long()  # what indexing wants: once here, and not in each of the four uses
    blocks, offsets = slots // block_size, slots % block_size  # (num_tokens,)
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def paged_attention_torch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch,
                          scale: float) -> torch.Tensor:
    """Causal attention of a ragged batch over its block tables, in float32; a NaN reaches only rows that see it.

    Grouped-query attention (Ainslie et al., 2023): with num_heads = group * num_kv_heads, query
    head h reads key-value head h // group.

    Args:
        q: (num_tokens, num_heads, head_dim), last dimension contiguous; float32, float16 or
            bfloat16. The rows of request i are query_start[i] .. query_start[i + 1] - 1.
        k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim), each block contiguous;
            q's dtype. The K and V of this step's tokens are already in them.
        batch: whose rows these are, and where their contexts lie, see `RaggedBatch`.
        scale: multiplies the scores; 1 / sqrt(head_dim) in GPT-2.

    Returns (num_tokens, num_heads, head_dim), contiguous, q's dtype. Raises as `write_kv_torch` does.
    """
    check_attention(q, k_cache, v_cache, batch)
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    # Head h of block b is row b * num_kv_heads + h of these: one copy gathers head after head.
    k_rows, v_rows = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # (num_blocks * num_kv_heads, block_size, head_dim)
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]  # (num_kv_heads, 1)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # a row that sees nothing stays 0
    starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
    for i, length in enumerate(lengths):
        first, last = starts[i], starts[i + 1]
        if 0 in ((n := last - first), length):
            continue
        # Gather the scattered blocks into one contiguous context: what the kernels never do.
        gathered = (batch.block_tables[i, : blocks_for(length, block_size)] * num_kv_heads + heads).flatten()
        k = k_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim)[:, :, :length].float()
        v = v_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim)[:, :, :length].float()
        rows = q[first:last].transpose(0, 1)[None].float()  # (1, num_heads, n, head_dim)
        mask = None
        if 1 < n < length:  # causal, counted from the context's end; torch's own is_causal counts from its beginning
            mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)  # (n, length)
        if n > 1 and not (k.sum() + v.sum()).isfinite():
            result = _attend_around_faults(rows, k, v, scale)
        else:
            result = F.scaled_dot_product_attention(rows, k, v, mask, is_causal=n == length > 1, scale=scale,
                                                    enable_gqa=True)  # (1, num_heads, n, head_dim)
        out[first:last] = result[0].transpose(0, 1).to(q.dtype)
    return out


def _attend_around_faults(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """For rows (1, num_heads, n, head_dim), where some K or V, (1, num_kv_heads, length, head_dim), is not finite."""
    # A masked position has the weight 0, but 0 * nan is nan: V's faults are taken out, and added to rows that see them.
    k, v = (x.repeat_interleave(rows.shape[1] // k.shape[1], dim=1) for x in (k, v))
    n, length = rows.shape[2], k.shape[2]
    seen = torch.ones(n, length, dtype=torch.bool, device=k.device).tril(length - n)  # (n, length)
    probs = (rows @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    faults = (v - v).sum(-1, keepdim=True)  # nan at a fault, else 0
    return probs @ v.masked_fill(faults.isnan(), 0.0) + faults.cumsum(2)[:, :, -n:]  # (1, num_heads, n, head_dim)


TORCH = AttentionBackend(write_kv_torch, paged_attention_torch)
