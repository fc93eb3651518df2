"""How else can a pool be right? With one queue of all blocks that nobody holds, linked both ways, as in vLLM's V1.

Free blocks enter it at the front, cached ones at the back, and `take` is served from the front. So free blocks go
first, then the least recently used, and a cached block that is found leaves from the middle in constant time. Whether a
block in the queue is free or cached follows from whether it is published.
"""

from __future__ import annotations

from collections.abc import MutableSequence

from nanopaged.block_allocator import BlockAllocator as Base
from nanopaged.block_allocator import OutOfBlocks
from nanopaged.outputs import AllocatorStats

REPLACES = "block_allocator"
__all__ = ["BlockAllocator"]


class BlockAllocator(Base):
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        del self._free, self._cached
        self._end = num_blocks  # a link of its own: behind it the queue begins, and before it the queue ends
        self._next = [*range(1, num_blocks + 1), 0]
        self._last = [num_blocks, *range(num_blocks)]
        self._in_queue = num_blocks
        self._cached_in_queue = 0

    @property
    def num_available(self) -> int:
        return self._in_queue

    def cached_blocks(self) -> set[int]:
        cached, block = set(), self._next[self._end]
        while block != self._end:
            if self.is_published(block):
                cached.add(block)
            block = self._next[block]
        return cached

    def take(self) -> int:
        block = self._next[self._end]
        if block == self._end:
            raise OutOfBlocks("the queue is empty")
        self._unlink(block)
        if self.is_published(block):
            del self._index[self._keys[block]]
            self._keys[block] = None
            self._evicted_blocks += 1
        self._filled[block] = 0  # here, and not when it was given back
        self._ref_counts[block] += 1
        return block

    def _unlink(self, block: int) -> None:
        before, after = self._last[block], self._next[block]
        self._next[before], self._last[after] = after, before
        self._in_queue -= 1
        self._cached_in_queue -= self.is_published(block)

    def _link_behind(self, before: int, block: int) -> None:
        after = self._next[before]
        self._next[before] = self._last[after] = block
        self._last[block], self._next[block] = before, after
        self._in_queue += 1
        self._cached_in_queue += self.is_published(block)

    def share(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            if not self.is_published(block):
                raise ValueError(f"block {block} is free")
            self._unlink(block)
            self._filled_slots += self._filled[block]
        self._ref_counts[block] += 1
        self._shared_blocks += self._ref_counts[block] == 2

    def give_back(self, block: int) -> None:
        if not self._ref_counts[block]:
            raise ValueError(f"nobody holds block {block}")
        self._ref_counts[block] -= 1
        self._shared_blocks -= self._ref_counts[block] == 1
        if not self._ref_counts[block]:
            self._filled_slots -= self._filled[block]
            self._link_behind(self._last[self._end] if self.is_published(block) else self._end, block)

    def give_back_all(self, block_table: MutableSequence[int]) -> None:
        for block in reversed(block_table):
            self.give_back(block)
        del block_table[:]

    def fill(self, block: int, num_slots: int) -> None:
        before, self._filled[block] = self._filled[block], num_slots
        self._filled_slots += num_slots - before

    def stats(self) -> AllocatorStats:
        held = self.num_blocks - self._in_queue
        return AllocatorStats(
            num_blocks=self.num_blocks, referenced_blocks=held, cached_blocks=self._cached_in_queue,
            free_blocks=self._in_queue - self._cached_in_queue, shared_blocks=self._shared_blocks,
            reserved_slots=held * self.block_size, filled_slots=self._filled_slots,
            prefix_hit_tokens=self._prefix_hit_tokens, evicted_blocks=self._evicted_blocks)
