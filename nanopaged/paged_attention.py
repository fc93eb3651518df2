"""Which kernels compute a step's attention, with how many programs, and how large are their tiles?

A step has decoding requests, one row each, and chunks of prompts, with many rows. Decodes stand first; each kind has a
kernel of its own (see `attention_kernels`), so that a decode beside a prompt costs what it costs alone:

    rows of q   │ a │ b │ c │ d d d d d d d d │ e e e e │
                  decode_kernel: a program      prompt_kernel: a program
                  for each request, head        for each tile of rows,
                  and part of the context       and head

What these choices depend on is known to the host: shapes, dtypes and the GPU. Lengths lie on the device, and asking for
them would mean waiting; so what depends on them is decided there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nanopaged.attention_arguments import AttentionBackend, RaggedBatch, check_attention, check_write
from nanopaged.attention_kernels import (INTERPRETED, decode_kernel, merge_kernel, prompt_kernel, triton,
                                         write_kv_kernel)

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)  # these and the next are the kernels' limits;
HEAD_DIMS = (16, 32, 64, 128, 256)  # the torch reference takes any
LOG2_E = 1.4426950408889634  # the kernels' exponentials are powers of two, which the hardware has
SMALLEST_PART = 128  # tokens; a shorter part of a context costs more to merge than it saves
PROGRAMS_PER_MULTIPROCESSOR = 4  # decode programs that wait for memory at once, so that it is never idle


class Choice(NamedTuple):
    """How a program walks along a context, and how the contexts of decodes are split."""

    tile_kv: int  # tokens whose K and V are loaded together
    num_stages: int  # of the loop's pipeline: before a product, 3 load one tile of K and V ahead, and 5 load two
    num_warps: int
    smallest_part: int = SMALLEST_PART
    programs: int = PROGRAMS_PER_MULTIPROCESSOR  # at least, where contexts are long enough to be split


# By kernel and bytes of a number, for each of HEAD_DIMS: tile_kv, num_stages, num_warps. No GPU was seen: they follow
# from bytes under way and registers, as compiled (docs/kernel.md). `bench kernel --tune` tries others on a GPU. Decodes
# wait for memory: they have two tiles of K and of V under way, 8 KiB each, where four programs have room (three in
# float32). Prompts compute: theirs is what fits the registers.
CHOICES = {
    ("decode", 2): [(64, 5, 4), (64, 5, 4), (64, 5, 4), (32, 5, 4), (16, 5, 4)],
    ("decode", 4): [(64, 3, 4), (64, 3, 4), (32, 3, 4), (16, 3, 8), (16, 1, 4)],
    ("prompt", 2): [(64, 2, 4), (64, 2, 4), (64, 2, 4), (32, 2, 4), (16, 3, 8)],
    ("prompt", 4): [(64, 3, 4), (64, 3, 4), (32, 3, 4), (16, 3, 8), (16, 3, 8)],
}
ON_AMD = torch.version.hip is not None  # its 64 KiB of shared memory hold three programs with 3 stages, one with 5


def choice_for(kernel: str, head_dim: int, element_bytes: int) -> Choice:
    """The present choice; `kernel` is "decode" or "prompt"."""
    choice = Choice(*CHOICES[kernel, element_bytes][HEAD_DIMS.index(head_dim)])
    return choice._replace(num_stages=min(choice.num_stages, 3)) if ON_AMD else choice


def write_kv_triton(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                    slots: torch.Tensor) -> None:
    """As `write_kv_torch`; one program for each token."""
    check_write(k, v, k_cache, v_cache, slots)
    check_launch(k_cache)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens:
        with device_of(k):
            write_kv_kernel[(num_tokens,)](
                k, v, k_cache, v_cache, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_cache.stride(0),
                v_cache.stride(0), NUM_KV_HEADS=num_kv_heads, TILE_HEADS=triton.next_power_of_2(num_kv_heads),
                BLOCK_SIZE=k_cache.shape[2], HEAD_DIM=head_dim)


def paged_attention_triton(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: RaggedBatch,
                           scale: float, choice: Choice | None = None) -> torch.Tensor:
    """As `paged_attention_torch`, without gathering: the kernels read the blocks where they lie. `choice` is for tests
    and measurements: it takes the place of what CHOICES has."""
    check_attention(q, k_cache, v_cache, batch)
    check_launch(k_cache)
    block_tables, query_start, seq_lens = batch.block_tables, batch.query_start, batch.seq_lens
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (num_tokens, num_heads, head_dim)
    if len(q) == 0:
        return out
    num_requests, (_, num_heads, head_dim), num_kv_heads = len(seq_lens), q.shape, k_cache.shape[1]
    common = dict(GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=k_cache.shape[2],
                  WIDEN=INTERPRETED and q.dtype == torch.bfloat16)  # its dot takes bfloat16's bits for integers
    with device_of(q):
        # Decodes stand first. Each is one row, where a prompt's tile has 64, and its context may be split.
        if decodes := batch.num_decodes:
            chosen = choice or choice_for("decode", head_dim, q.element_size())
            _decodes(q[:decodes], k_cache, v_cache, block_tables[:decodes], seq_lens, scale, out, chosen, common)
        if decodes < num_requests:
            chosen = choice or choice_for("prompt", head_dim, q.element_size())
            _prompts(q[decodes:], k_cache, v_cache, block_tables[decodes:], seq_lens[decodes:], scale, out[decodes:],
                     query_start[decodes:], decodes, chosen, common)
    return out


def _decodes(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
             seq_lens: torch.Tensor, scale: float, out: torch.Tensor, choice: Choice, common: dict[str, Any]) -> None:
    """One row of each request: q and out are (num_requests, num_heads, head_dim)."""
    (num_requests, num_heads, head_dim), num_kv_heads, group = q.shape, k_cache.shape[1], common["GROUP"]
    longest = block_tables.shape[1] * k_cache.shape[2]  # what the tables have room for
    num_parts = parts_of_contexts(num_requests * num_kv_heads, longest, choice.programs * num_multiprocessors(q.device),
                                  choice.smallest_part)
    # A tensor core's product has 16 rows at least. Exact float32 has no tensor core: one row is one row.
    rows = 1 if group == 1 and q.dtype == torch.float32 else max(16, triton.next_power_of_2(group))
    split = num_parts > 1
    parts = q.new_empty((num_requests, num_heads, num_parts, head_dim), dtype=torch.float32) if split else out
    log_sums = q.new_empty((num_requests, num_heads, num_parts), dtype=torch.float32) if split else out
    decode_kernel[(num_requests, num_kv_heads, num_parts)](
        q, k_cache, v_cache, block_tables, seq_lens, scale * LOG2_E, q.stride(0), q.stride(1), k_cache.stride(0),
        v_cache.stride(0), block_tables.stride(0), parts, log_sums, num_parts,
        TILE_ROWS=rows, SPLIT=split, SMALLEST_PART=choice.smallest_part, TILE_KV=choice.tile_kv,
        NUM_STAGES=choice.num_stages, num_warps=choice.num_warps, **common)
    if split:
        merge_kernel[(num_requests, num_heads)](parts, log_sums, out, seq_lens, num_parts, HEAD_DIM=head_dim,
                                                 TILE_PARTS=16, SMALLEST_PART=choice.smallest_part)


def _prompts(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
             seq_lens: torch.Tensor, scale: float, out: torch.Tensor, query_start: torch.Tensor, first_row: int,
             choice: Choice, common: dict[str, Any]) -> None:
    """Any number of rows of each request. `query_start` counts from `first_row` rows before those of q and out."""
    rows, tile_q = prompt_tile(common["GROUP"], q.element_size())
    # Request i's tiles begin at number query_start[i] // tile_q + i, or a little later than they could.
    prompt_kernel[(len(q) // tile_q + len(seq_lens), k_cache.shape[1])](
        q, k_cache, v_cache, block_tables, seq_lens, scale * LOG2_E, q.stride(0), q.stride(1), k_cache.stride(0),
        v_cache.stride(0), block_tables.stride(0), out, query_start, first_row, len(seq_lens),
        TILE_Q=tile_q, TILE_ROWS=rows, TILE_KV=choice.tile_kv, NUM_STAGES=choice.num_stages,
        num_warps=choice.num_warps, **common)


TRITON = AttentionBackend(write_kv_triton, paged_attention_triton)


def prompt_tile(group: int, element_bytes: int) -> tuple[int, int]:
    """(rows, query tokens) of a prompt program's tile."""
    # Hopper's tensor cores take 64 rows of half floats at once. Exact float32 has none, and fills more registers.
    rows = max(128 // element_bytes, triton.next_power_of_2(group))
    return rows, rows // group


def parts_of_contexts(num_contexts: int, longest: int, num_programs: int, smallest_part: int = SMALLEST_PART) -> int:
    """How many decode programs walk each context: one, where there are contexts enough to keep the GPU busy.

    `num_contexts` are requests times key-value heads, `longest` is the tokens that a context has at most, and
    `num_programs` are wanted in all. A shorter context is divided into as many parts, or fewer: see `_part_tokens`.
    """
    return min(triton.cdiv(num_programs, num_contexts), triton.cdiv(longest, smallest_part))


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
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
