"""How is decode attention made fast on a CPU? As one expression over blocks, handed to a compiler.

In torch's own operations, each block must be copied out of the pool before it can be multiplied, and
each request is a handful of small calls. `torch.compile` (Ansel et al., ASPLOS 2024) turns the whole
expression below into C++ loops which read the blocks where they lie: the gather disappears into the sums.

Nothing is padded to the longest request. The list of all the batch's blocks is what is computed over, each
block giving the partial result of a softmax over its own tokens; these, a block_size-th as many
numbers, are then combined request by request (Flash-Decoding's split over the context: Dao et al., 2023):

    block tables        A: 7 2 9    B: 4    C: 1 8        place   [[0, 1, 2],  where the partial results of
    blocks              7 2 9 4 1 8                                [3, -, -],  each request stand in the list;
    owner               A A A B C C                                [4, 5, -]]  "-" is masked
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanopaged.attention_arguments import RaggedBatch, check_attention
from nanopaged.torch_attention import AttentionBackend, paged_attention_torch, write_kv_torch

logger = logging.getLogger(__name__)

COLUMNS = 16  # of float32: a cache line


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor,
                     owner: torch.Tensor, filled: torch.Tensor, place: torch.Tensor,
                     used: torch.Tensor) -> torch.Tensor:
    """Attention of B requests with one row each, over the N blocks that they hold together.

    Args:
        q: (B, num_kv_heads, group, head_dim), scaled.
        k_cache, v_cache: (num_blocks, num_kv_heads, block_size, head_dim).
        blocks, owner, filled: (N,) int64; the block, the request that reads it, and how many of its
            slots are in that request's context (block_size or more: all).
        place, used: (B, longest table) int64 and bool; entry (i, j) says where block j of request i
            stands in `blocks`, if it has that many.

    Returns (B, num_kv_heads, group, head_dim) float32. Right as it stands; fast once it is compiled.
    """
    outside = torch.arange(k_cache.shape[2], device=q.device) >= filled[:, None]  # (N, block_size)
    k = k_cache[blocks].float()[:, :, None]  # (N, num_kv_heads, 1, block_size, head_dim)
    scores = (q[owner].float()[:, :, :, None] * k).sum(-1)  # (N, num_kv_heads, group, block_size)
    scores = scores.masked_fill(outside[:, None, None], -torch.inf)
    maximum = scores.amax(-1)  # (N, num_kv_heads, group)
    probs = (scores - maximum[..., None]).exp()  # (N, num_kv_heads, group, block_size)
    total = probs.sum(-1)  # (N, num_kv_heads, group)
    # What stands outside the context may be anything, and 0 * nan is nan.
    v = v_cache[blocks].float().masked_fill(outside[:, None, :, None], 0.0)[:, :, None]
    # A sum for each few columns: the compiler makes one loop over the rows of V of them all, and reads
    # each row whole. Of a single sum it makes a loop over the columns, which goes through memory in jumps.
    weighted = torch.cat([(probs[..., None] * columns).sum(-2) for columns in v.split(COLUMNS, dim=-1)],
                         dim=-1)  # (N, num_kv_heads, group, head_dim)

    largest = maximum[place].masked_fill(~used[:, :, None, None], -torch.inf)  # (B, longest, num_kv_heads, group)
    shrink = (largest - largest.amax(1, keepdim=True)).exp()  # to the request's maximum; 0 where unused
    sums = (shrink[..., None] * weighted[place]).sum(1)  # (B, num_kv_heads, group, head_dim)
    return sums / (shrink * total[place]).sum(1)[..., None]


def paged_attention_compiled(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch,
                             scale: float, decode: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """As `paged_attention_torch`, with the rows of decoding requests computed by `decode`.

    `decode` is `decode_attention`; None: compiled. One decoding request alone has little to gain, and for
    sizes of 1 the compiler makes special versions; so it is left to torch.
    """
    check_attention(q, k_cache, v_cache, batch)
    decodes = batch.num_decodes
    if decodes < 2:
        return paged_attention_torch(q, k_cache, v_cache, batch, scale)
    if batch.plan is None:  # by the first layer
        batch.plan = Plan.of(batch, k_cache.shape[2])
    decode = decode or _compiled()
    rows = (q[:decodes] * scale).unflatten(1, (k_cache.shape[1], -1))  # (B, num_kv_heads, group, head_dim)
    decoded = decode(rows, k_cache, v_cache, *batch.plan.block_list)  # (B, num_kv_heads, group, head_dim)
    decoded = decoded.flatten(1, 2).to(q.dtype)  # (B, num_heads, head_dim)
    if decodes == len(batch.seq_lens):
        return decoded
    return torch.cat([decoded, paged_attention_torch(q[decodes:], k_cache, v_cache, batch.plan.chunks, scale)])


class Chunks(NamedTuple):
    """The requests behind the decoding ones: a `RaggedBatch` of their own."""

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int = 0
    plan: object = None


class Plan(NamedTuple):
    """What all layers of a step have in common."""

    block_list: tuple[torch.Tensor, ...]  # `decode_attention`'s blocks, owner, filled, place and used
    chunks: Chunks

    @classmethod
    def of(cls, batch: RaggedBatch, block_size: int) -> Plan:
        n = batch.num_decodes
        return cls(_block_list(batch.block_tables[:n], batch.seq_lens[:n], block_size),
                   Chunks(batch.block_tables[n:], batch.query_start[n:] - n, batch.seq_lens[n:]))


def _block_list(block_tables: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> tuple[torch.Tensor, ...]:
    """Of (B, any width) tables and (B,) lengths."""
    if block_tables.shape[1] == 1:
        block_tables = F.pad(block_tables, (0, 1))  # no size of 1
    starts = torch.arange(block_tables.shape[1], device=seq_lens.device) * block_size  # (width,) of each block's tokens
    used = starts < seq_lens[:, None]  # (B, width)
    owner, column = used.nonzero(as_tuple=True)  # (N,), request by request
    place = (used.flatten().cumsum(0) - 1).clamp(min=0).view_as(used)  # (B, width)
    return block_tables[owner, column].long(), owner, seq_lens[owner] - starts[column], place, used


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(decode_attention)


@torch.inference_mode()
def compile_now(kv_cache: torch.Tensor, group: int) -> None:
    """Compiles before the first request needs it: half a minute once, seconds when torch's cache has it.

    `kv_cache` is the pool, (n_layer, 2, num_blocks, num_kv_heads, block_size, head_dim), `group` the
    query heads of each key-value head. Raises ValueError where there is no C++ compiler that works.
    """
    k_cache, v_cache = kv_cache[0]
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    # torch.compile turns coincidences in the example inputs into guards: equal sizes, sizes of 0 and 1, one tensor
    # given twice. So all sizes differ here, from each other and from the cache's.
    batch, width, listed = [size for size in range(19, 40) if size not in (*k_cache.shape, group)][:3]
    q = torch.zeros(batch, num_kv_heads, group, head_dim, dtype=kv_cache.dtype)
    blocks, owner, filled = (torch.zeros(listed, dtype=torch.int64) for _ in range(3))
    place = torch.zeros(batch, width, dtype=torch.int64)
    used = place == 0
    # Variables of the C++ code, which so serves every batch, length and pool. The model's own sizes stay numbers.
    for tensor in (q, k_cache, v_cache, blocks, owner, filled, place, used):
        torch._dynamo.mark_dynamic(tensor, [0, 1] if tensor.dim() == 2 else 0)
    logger.info("compiling decode attention, which takes half a minute unless torch's cache has it")
    try:
        _compiled()(q, k_cache, v_cache, blocks, owner, filled, place, used)
    except RuntimeError as error:
        raise ValueError("compile=True needs a C++ compiler that torch can use, g++, clang++ or what the environment "
                         f"variable CXX names: install one, or leave compile out. {error!r:.300}") from error


COMPILED = AttentionBackend(write_kv_torch, paged_attention_compiled)
