"""Another right attention: row by row and block by block, with a running softmax, and nothing gathered.

Each row reads only what it sees. So there is no mask, and what is not finite needs no care.
"""

from __future__ import annotations

import torch

from nanopaged.attention_arguments import AttentionBackend, RaggedBatch, check_attention, check_write

REPLACES = "torch_attention"
__all__ = ["write_kv_torch", "paged_attention_torch", "TORCH"]


def write_kv_torch(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                   slots: torch.Tensor) -> None:
    check_write(k, v, k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, k_cache.shape[2])
        k_cache[block, :, place].copy_(k[token])
        v_cache[block, :, place].copy_(v[token])


def paged_attention_torch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch,
                          scale: float) -> torch.Tensor:
    check_attention(q, k_cache, v_cache, batch)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rows = iter(range(len(q)))
    starts = batch.query_start.tolist()
    for table, length, n in zip(batch.block_tables.tolist(), batch.seq_lens.tolist(),
                                [last - first for first, last in zip(starts, starts[1:])]):
        for seen in range(length - n + 1, length + 1):
            row = next(rows)
            if length:
                out[row] = _attend(q[row].float() * scale, k_cache, v_cache, table, seen).to(q.dtype)
    return out


def _attend(row: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: list[int],
            seen: int) -> torch.Tensor:
    """(num_heads, head_dim): of one row, (num_heads, head_dim), that sees the first `seen` positions."""
    num_kv_heads, block_size = k_cache.shape[1:3]
    row = row.unflatten(0, (num_kv_heads, -1))  # (num_kv_heads, group, head_dim)
    maximum = row.new_full((*row.shape[:2], 1), -torch.inf)
    total, weighted = torch.zeros_like(maximum), torch.zeros_like(row)
    for number in range(-(-seen // block_size)):
        here = min(block_size, seen - number * block_size)
        k, v = (cache[table[number], :, :here].float() for cache in (k_cache, v_cache))
        scores = torch.einsum("hgd,htd->hgt", row, k)  # heads, group, tokens here
        larger = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - larger).exp(), (maximum - larger).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        weighted = weighted * shrink + torch.einsum("hgt,htd->hgd", weights, v)
        maximum = larger
    return (weighted / total).flatten(0, 1)


TORCH = AttentionBackend(write_kv_torch, paged_attention_torch)
