"""How else can prefixes be found? In a tree, as in RadixAttention: each published block has a dict of its children.

There are no identities, and no index of all blocks. A block is reached only from the block before it, so nothing needs
to be known of the beginning of its text. Evicting takes a leaf off the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanopaged.block_allocator import BlockAllocator as Base

REPLACES = "block_allocator"
__all__ = ["BlockAllocator"]

Children = dict[tuple[int, ...], int]


class BlockAllocator(Base):
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        del self._index, self._identities, self._next_identity
        self._roots: Children = {}
        self._children: list[Children] = [{} for _ in range(num_blocks)]
        self._siblings: list[Children | None] = [None] * num_blocks  # the dict in which a published block stands

    def is_published(self, block: int) -> bool:
        return self._siblings[block] is not None

    def _evict(self) -> int:
        block = next(iter(self._cached))
        del self._cached[block]
        self._siblings[block].pop(self._keys[block])
        self._siblings[block] = self._keys[block] = None
        self._filled[block] = 0
        self._evicted_blocks += 1
        return block

    def share(self, block: int) -> None:
        if self._ref_counts[block] > 0:
            self._shared_blocks += self._ref_counts[block] == 1
        elif self.is_published(block):
            self._cached.pop(block)
            self._filled_slots += self.block_size
        else:
            raise ValueError(f"nobody holds block {block}, and nobody can find it")
        self._ref_counts[block] += 1

    def publish(self, block: int, parent: int | None, tokens: Sequence[int]) -> int:
        if not self.enable_prefix_caching:
            return block
        piece = tuple(tokens)
        if not len(piece) == self._filled[block] == self.block_size:
            raise ValueError("the block is not full")
        if parent is not None and not self.is_published(parent):
            raise ValueError("the parent is not published")
        siblings = self._roots if parent is None else self._children[parent]
        if self.is_published(block):
            if self._siblings[block] is not siblings or self._keys[block] != piece:
                raise ValueError("the block is published with other contents")
            return block
        if piece not in siblings:
            siblings[piece] = block
            self._siblings[block], self._keys[block] = siblings, piece  # give_back asks whether it has a key
            return block
        self.give_back(block)  # here the block goes back before its twin is held
        self.share(siblings[piece])
        return siblings[piece]

    def find_prefix(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        found: list[int] = []
        children = self._roots
        while (len(found) + 1) * self.block_size <= min(max_tokens, len(token_ids)):
            start = len(found) * self.block_size
            block = children.get(tuple(token_ids[start : start + self.block_size]))
            if block is None:
                break
            found.append(block)
            children = self._children[block]
        return found

    def take_prefix(self, blocks: Sequence[int]) -> None:
        self._prefix_hit_tokens += self.block_size * len(blocks)
        for block in reversed(blocks):
            self.share(block)
