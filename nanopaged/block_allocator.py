"""Which physical block holds which tokens, and which requests share it?

The KV cache is one pool, cut into blocks of `block_size` token positions. A request owns no
memory, only a *block table*: the list of the blocks that hold its tokens, in order. So a request
wastes at most the end of its last block, and two requests with a common prefix can hold the
same blocks (Kwon et al., SOSP 2023, sections 4.2 to 4.4).

Every block is in exactly one of three states:

    ┌──────┐            take            ┌────────────┐   give_back, published   ┌────────┐
    │ free │ ─────────────────────────> │ referenced │ ───────────────────────> │ cached │
    └──────┘ <───────────────────────── └────────────┘ <─────────────────────── └────────┘
              give_back, not published         ^          share (prefix hit)        │
                                               └────────────────────────────────────┘
                                             take, when none is free: least recently used first

Prefix sharing is exact. A full block is *published* under the key (identity of its parent, its own
tokens). A dict compares keys, not only hashes, and an identity is never used twice, so a block is
found only by a request whose whole prefix is equal, token for token. The keys make a tree, like
RadixAttention's (Zheng et al., 2023). Every operation is O(1) for each block; only
`check_invariants` walks the pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence
from itertools import count

from nanopaged.invariants import check_pool
from nanopaged.outputs import AllocatorStats
from nanopaged.validation import require_choice, require_int

ROOT_IDENTITY = 0  # stands for "nothing before": the parent of every first block


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)  # rounded up


class OutOfBlocks(RuntimeError):
    """A block was requested while every block is referenced."""


class BlockAllocator:
    """Hands out the `num_blocks` blocks of one pool, 0 and up, and counts the holders of each.

    A block has room for `block_size` tokens. Without `enable_prefix_caching` nothing is published.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = require_int("num_blocks", num_blocks, 1)
        self.block_size = require_int("block_size", block_size, 1)
        self.enable_prefix_caching = require_choice("enable_prefix_caching", enable_prefix_caching, (True, False))
        self._ref_counts = [0] * num_blocks
        self._filled = [0] * num_blocks  # slots of each block that hold a computed token
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}  # key -> published block
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_blocks
        self._identities = [ROOT_IDENTITY] * num_blocks  # of published blocks
        self._next_identity = count(ROOT_IDENTITY + 1)
        self._shared_blocks = self._filled_slots = self._prefix_hit_tokens = self._evicted_blocks = 0

    @property
    def num_available(self) -> int:  # blocks that `take` can hand out
        return len(self._free) + len(self._cached)

    def cached_blocks(self) -> set[int]:  # with no holder, but still findable
        return set(self._cached)

    def is_published(self, block: int) -> bool:  # whether `find_prefix` can find it
        return self._keys[block] is not None

    def ref_count(self, block: int) -> int:  # 0 for a free or cached block
        return self._ref_counts[block]

    def take(self) -> int:
        """An empty block with one holder, the caller. Raises OutOfBlocks if all blocks are referenced.

        Free blocks go first, so that cached ones stay findable as long as possible.
        """
        if self.num_available == 0:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are referenced: end a request, or enlarge the pool")
        block = self._free.pop() if self._free else self._evict()
        self._ref_counts[block] = 1
        return block

    def _evict(self) -> int:
        """Empties the least recently used cached block. Children go before their parents: a request that holds a block
        holds its parents too, and gives back the last one first, so a parent is never cached before its children."""
        block, _ = self._cached.popitem(last=False)
        del self._index[self._keys[block]]
        self._keys[block], self._filled[block] = None, 0
        self._evicted_blocks += 1
        return block

    def share(self, block: int) -> None:
        """Adds a holder to a block that is referenced or cached. ValueError for a free one: there is nothing in it."""
        holders = self._ref_counts[block]
        if holders == 0:
            if self._keys[block] is None:
                raise ValueError(f"block {block} is free: there is nothing in it to share")
            del self._cached[block]
            self._filled_slots += self._filled[block]
        elif holders == 1:
            self._shared_blocks += 1
        self._ref_counts[block] = holders + 1

    def give_back(self, block: int) -> None:
        """Removes a holder; ValueError if it has none. A block without holders is cached if published, else free."""
        holders = self._ref_counts[block]
        if holders == 0:
            raise ValueError(f"block {block} was given back, but has no holder")
        self._ref_counts[block] = holders - 1
        if holders == 2:
            self._shared_blocks -= 1
        elif holders == 1:
            self._filled_slots -= self._filled[block]
            if self._keys[block] is None:
                self._filled[block] = 0
                self._free.append(block)
            else:
                self._cached[block] = None

    def give_back_all(self, block_table: MutableSequence[int]) -> None:
        """Empties a block table, last block first (see `_evict` for why)."""
        while block_table:
            self.give_back(block_table.pop())

    def fill(self, block: int, num_slots: int) -> None:
        """Records that the first `num_slots` slots of a referenced block hold computed tokens."""
        self._filled_slots += num_slots - self._filled[block]
        self._filled[block] = num_slots

    def fork(self, block: int) -> int:
        """The block to write into instead of `block`: itself, or an empty one (copy-on-write).

        A block that others hold, or can find, must not change under them. If the answer is another
        block, the caller holds that one instead, and must copy the contents before it writes. Raises
        OutOfBlocks, with nothing changed, if there is no room for a copy.
        """
        if self._ref_counts[block] == 1 and self._keys[block] is None:
            return block
        copy = self.take()
        self.fill(copy, self._filled[block])
        self.give_back(block)
        return copy

    def publish(self, block: int, parent: int | None, tokens: Sequence[int]) -> int:
        """Makes a full block, whose KV has been computed, findable.

        Args:
            block: the block, held by the caller.
            parent: the published block before it in the caller's block table; None for the first.
            tokens: the `block_size` tokens in it.

        Returns the block that the caller holds from here on. Two requests may compute the same
        tokens in the same step; the second then holds the first one's block and its own goes back,
        so equal contents are stored once, and a request that holds a child always holds its parent. Publishing the
        same again changes nothing. ValueError for a block that is not full, other contents, or an unpublished parent.
        """
        if not self.enable_prefix_caching:
            return block
        if self._filled[block] != self.block_size or len(tokens) != self.block_size:
            raise ValueError(f"only a full block can be shared: block {block} holds {self._filled[block]} computed "
                             f"tokens and {len(tokens)} were named, block_size is {self.block_size}")
        if parent is not None and self._keys[parent] is None:
            raise ValueError(f"block {block} cannot be published before its parent, block {parent}")
        key = (ROOT_IDENTITY if parent is None else self._identities[parent], tuple(tokens))
        if self._keys[block] not in (None, key):
            raise ValueError(f"block {block} is published already, with other contents")
        twin = self._index.setdefault(key, block)
        if twin != block:
            self.share(twin)
            self.give_back(block)
        elif self._keys[block] is None:
            self._keys[block], self._identities[block] = key, next(self._next_identity)
        return twin

    def find_prefix(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The published blocks that hold a prefix of `token_ids`, of at most `max_tokens` tokens; changes nothing."""
        blocks, identity, size = [], ROOT_IDENTITY, self.block_size
        for start in range(0, max_tokens - size + 1, size):
            block = self._index.get((identity, tuple(token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            identity = self._identities[block]
        return blocks

    def take_prefix(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks that `find_prefix` has found, and counts their tokens as hits."""
        for block in blocks:
            self.share(block)
        self._prefix_hit_tokens += len(blocks) * self.block_size

    def stats(self) -> AllocatorStats:
        """The pool's figures; O(1)."""
        referenced = self.num_blocks - self.num_available
        return AllocatorStats(
            num_blocks=self.num_blocks, referenced_blocks=referenced, cached_blocks=len(self._cached),
            free_blocks=len(self._free), shared_blocks=self._shared_blocks,
            reserved_slots=referenced * self.block_size, filled_slots=self._filled_slots,
            prefix_hit_tokens=self._prefix_hit_tokens, evicted_blocks=self._evicted_blocks)

    def check_invariants(self, block_tables: Iterable[Sequence[int]] | None = None) -> None:
        """Counts everything again, also against all block tables if they are given; O(pool)."""
        check_pool(self, block_tables)
