"""What memory does the pool live in, how large is it, and how do whole blocks move?

One tensor holds all layers, (n_layer, K and V, num_blocks, num_kv_heads, block_size, head_dim), so that
a block moves in one operation. Blocks that are kept in CPU memory are a second one, with the blocks
first: there a block is contiguous, and beside a GPU pinned, so that it crosses the bus at once.
"""

from __future__ import annotations

import logging
import math
import os
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from nanopaged.batch import upload
from nanopaged.block_allocator import blocks_for
from nanopaged.gpt2 import GPT2Config
from nanopaged.step import BlockMove
from nanopaged.validation import require_int

if TYPE_CHECKING:
    from nanopaged.config import EngineConfig

logger = logging.getLogger(__name__)


def block_bytes(shape: GPT2Config, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: K and V of `block_size` tokens in all layers."""
    return shape.n_layer * 2 * shape.num_kv_heads * block_size * shape.head_dim * dtype.itemsize


def free_bytes(device: torch.device, utilization: float) -> int:
    """Memory that pool and steps may take, once the model is loaded."""
    if device.type == "cpu":
        try:
            return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * utilization / 4)
        except (AttributeError, ValueError, OSError):  # not every system reports it
            return 2**30
    torch.cuda.empty_cache()  # what torch keeps of tensors that are gone, of another LLM perhaps, counts as free
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - utilization) * total)


def blocks_that_fit(shape: GPT2Config, config: EngineConfig, device: torch.device, dtype: torch.dtype,
                    reserved_bytes: int) -> int:
    """Blocks in the free memory, less `reserved_bytes`; no more than all seats can use at full length.

    Raises ValueError if there is no room for one.
    """
    room = free_bytes(device, config.gpu_memory_utilization) - reserved_bytes
    useful = config.max_num_seqs * blocks_for(config.max_model_len, config.block_size)
    num_blocks = min(useful, room // block_bytes(shape, config.block_size, dtype))
    if num_blocks < 1:
        raise ValueError(f"{device} has no memory left for a single block: free some, raise gpu_memory_utilization, "
                         "or set num_blocks")
    return num_blocks


class KVCache:
    """The contents of the pool, `blocks`, and of the blocks in CPU memory, `host_blocks`.

    blocks: (n_layer, 2, num_blocks, num_kv_heads, block_size, head_dim)
    host_blocks: (host_blocks, n_layer, 2, num_kv_heads, block_size, head_dim)

    Raises ValueError if there is no memory for them.
    """

    def __init__(self, shape: GPT2Config, block_size: int, num_blocks: int, host_blocks: int, device: torch.device,
                 dtype: torch.dtype) -> None:
        layers, block = (shape.n_layer, 2), (shape.num_kv_heads, block_size, shape.head_dim)
        self.blocks = self._allocate("num_blocks", (*layers, num_blocks, *block), num_blocks, device, dtype)
        self.host_blocks = self._allocate("swap_blocks", (host_blocks, *layers, *block), host_blocks,
                                          torch.device("cpu"), dtype, pinned=device.type == "cuda" and host_blocks > 0)

    @classmethod
    def of(cls, shape: GPT2Config, config: EngineConfig, device: torch.device, dtype: torch.dtype,
           reserved_bytes: int) -> KVCache:
        """As large as a settled config says, or as fits the free memory less `reserved_bytes`."""
        num_blocks = config.num_blocks or blocks_that_fit(shape, config, device, dtype, reserved_bytes)
        return cls(shape, config.block_size, num_blocks, config.host_blocks, device, dtype)

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[2]

    @staticmethod
    def _allocate(name: str, shape: tuple[int, ...], num_blocks: int, device: torch.device, dtype: torch.dtype,
                  pinned: bool = False) -> torch.Tensor:
        require_int(name, num_blocks, 0, 2**31 // shape[-2])  # slots are int32
        what = f"{num_blocks} blocks, {math.prod(shape) * dtype.itemsize / 2**20:.1f} MiB on {device}"
        logger.info("KV cache: %s: %s", name, what)
        try:
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ValueError(f"there is no memory for a KV cache of {what}: lower {name}") from error

    def carry_out(self, moves: list[BlockMove]) -> None:
        """Makes planned moves, in order, and takes them off the list as they are done.

        Copies that follow each other are one operation, which reads all sources before it writes. On a
        GPU the moves across the bus are queued in the same order as all its work, and the host does not wait.
        """
        for kind, group in groupby(list(moves), key=lambda move: move.kind):
            run = list(group)
            if kind == "copy":
                # A target occurs twice if a step failed, and its block was given to another request since.
                latest = {move.target: move.source for move in run}
                targets, sources = upload(torch.tensor([[*latest.keys()], [*latest.values()]]), self.blocks.device)
                self.blocks[:, :, targets] = self.blocks[:, :, sources]
            elif kind == "to_host":
                for _, source, target in run:
                    self.host_blocks[target].copy_(self.blocks[:, :, source], non_blocking=True)
            else:
                for _, source, target in run:
                    self.blocks[:, :, target].copy_(self.host_blocks[source], non_blocking=True)
            del moves[: len(run)]
