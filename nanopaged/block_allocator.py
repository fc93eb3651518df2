"""Which physical block holds which tokens, and who shares it?

The KV cache is one pool, cut into blocks of `block_size` token positions. A request owns no
memory, only a *block table*: the list of the blocks that hold its tokens, in order. So a request
wastes at most the end of its last block, and two requests with an equal beginning can hold the
same blocks (Kwon et al., SOSP 2023, sections 4.2 to 4.4).

Every block is in exactly one of three states:

    ┌──────┐            take            ┌────────────┐   give_back, published   ┌────────┐
    │ free │ ─────────────────────────> │ referenced │ ───────────────────────> │ cached │
    └──────┘ <───────────────────────── └────────────┘ <─────────────────────── └────────┘
              give_back, not published         ^          share (prefix hit)        │
                                               └────────────────────────────────────┘
                                             take, when none is free: least recently used first

Prefix sharing is exact. A full block is *published* under the key (identity of its parent, its own
tokens). A dict compares keys, not only hashes, and an identity is never given twice, so a block is
found only by a request whose whole beginning is equal, token for token. The keys make a tree, like
RadixAttention's (Zheng et al., 2023). Every operation is O(1) for each block; only
`check_invariants` walks the pool.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from nanopaged.validation import require_choice, require_int

ROOT_IDENTITY = 0  # stands for "nothing before": the parent of every first block


class OutOfBlocks(RuntimeError):
    """A block was asked for while every block is referenced."""


class InvariantError(RuntimeError):
    """The books do not add up: a block is lost, or owned unawares. Always a bug in nanopaged."""


@dataclass(kw_only=True)
class AllocatorStats:
    """The pool at one moment. A slot is the room for one token's K and V."""

    num_blocks: int
    referenced_blocks: int
    cached_blocks: int
    free_blocks: int
    shared_blocks: int  # referenced by more than one holder
    reserved_slots: int  # in referenced blocks, each counted once however many share it
    filled_slots: int  # those of them that hold a computed token; the rest is internal fragmentation
    prefix_hit_tokens: int  # since the start: tokens found in the pool instead of computed
    evicted_blocks: int  # since the start: cached blocks that were given to somebody else


class BlockAllocator:
    """Hands out the `num_blocks` blocks of one pool, 0 and up, and counts who holds them.

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
        self._shared_blocks = 0
        self._filled_slots = 0
        self._prefix_hit_tokens = 0
        self._evicted_blocks = 0

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    def cached_blocks(self) -> set[int]:  # those that nobody holds, but that can still be found
        return set(self._cached)

    def is_published(self, block: int) -> bool:  # whether `find_prefix` can find it
        return self._keys[block] is not None

    def ref_count(self, block: int) -> int:
        """How many holders a block has; 0 for a free or cached one."""
        return self._ref_counts[block]

    def take(self) -> int:
        """A block of one's own, with nothing in it. Raises OutOfBlocks where all are referenced.

        Free blocks go first, so that what is cached stays findable as long as possible; then the
        least recently used cached block. Children go before their parents: whoever holds a block
        holds its parents too and gives back the last block first, so a parent never enters the
        list of cached blocks before its children.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
            self._evicted_blocks += 1
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are referenced: end a request, or enlarge the pool")
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Holds a block that is referenced or cached already."""
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
        """Lets go of a block. With its last holder gone it is cached if published, else free."""
        holders = self._ref_counts[block]
        if holders == 0:
            raise ValueError(f"block {block} was given back, but nobody holds it")
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

    def give_back_all(self, block_table: list[int]) -> None:
        """Empties a block table, last block first (see `take` for why)."""
        while block_table:
            self.give_back(block_table.pop())

    def fill(self, block: int, num_slots: int) -> None:
        """Records that the first `num_slots` slots of a referenced block hold computed tokens."""
        self._filled_slots += num_slots - self._filled[block]
        self._filled[block] = num_slots

    def fork(self, block: int) -> int:
        """The block to write into instead of `block`: itself, or a fresh one (copy-on-write).

        A block that others hold, or can find, must not change under them. The caller gives up its
        hold on `block`, and where the answer is another block, copies the contents there before it
        writes. Raises OutOfBlocks, with nothing changed, where there is no room for a copy.
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
        tokens in the same step; the second is handed the first one's block and its own goes back,
        so equal contents are held once, and a child's holder always holds its parent.
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
        if twin == block:
            if self._keys[block] is None:
                self._keys[block] = key
                self._identities[block] = next(self._next_identity)
        else:
            self.share(twin)
            self.give_back(block)
        return twin

    def find_prefix(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The published blocks that hold the beginning of `token_ids`, at most `max_tokens` of it; only looks."""
        blocks, identity, size = [], ROOT_IDENTITY, self.block_size
        for start in range(0, max_tokens - size + 1, size):
            block = self._index.get((identity, tuple(token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            identity = self._identities[block]
        return blocks

    def take_prefix(self, blocks: Sequence[int]) -> None:
        """Holds blocks that `find_prefix` has found."""
        for block in blocks:
            self.share(block)
        self._prefix_hit_tokens += len(blocks) * self.block_size

    def _unpublish(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None
            self._filled[block] = 0

    def stats(self) -> AllocatorStats:
        """The pool's figures; O(1)."""
        referenced = self.num_blocks - self.num_available
        return AllocatorStats(
            num_blocks=self.num_blocks, referenced_blocks=referenced, cached_blocks=len(self._cached),
            free_blocks=len(self._free), shared_blocks=self._shared_blocks,
            reserved_slots=referenced * self.block_size, filled_slots=self._filled_slots,
            prefix_hit_tokens=self._prefix_hit_tokens, evicted_blocks=self._evicted_blocks)

    def check_invariants(self, block_tables: Iterable[Sequence[int]] | None = None) -> None:
        """Adds everything up; O(pool), for tests and for debugging.

        Where the caller knows every block table there is, each block must have exactly as many
        holders as tables name it. Raises InvariantError with the first thing that is wrong.
        """

        def expect(condition: bool, what: str) -> None:
            if not condition:
                raise InvariantError(what)

        counts, keys, filled = self._ref_counts, self._keys, self._filled
        referenced = {block for block, holders in enumerate(counts) if holders}
        places = Counter([*self._free, *self._cached, *referenced])
        expect(min(counts) >= 0, "a reference count is negative")
        for block in range(self.num_blocks):
            expect(places[block] == 1, f"block {block} is in {places[block]} of free, cached and referenced, not in one")
        expect(all(keys[block] is None and filled[block] == 0 for block in self._free), "a free block is not empty")
        expect(all(keys[block] is not None for block in self._cached), "a cached block cannot be found")
        expect(self._filled_slots == sum(filled[block] for block in referenced), "filled slots are miscounted")
        expect(self._shared_blocks == sum(holders > 1 for holders in counts), "shared blocks are miscounted")

        published = {block: key for block, key in enumerate(keys) if key is not None}
        expect(self._index == {key: block for block, key in published.items()}, "index and published blocks differ")
        by_identity = {self._identities[block]: block for block in published}
        expect(len(by_identity) == len(published), "two published blocks have one identity")
        age = {block: place for place, block in enumerate(self._cached)}  # 0 is evicted first
        for block, (parent_identity, tokens) in published.items():
            expect(len(tokens) == self.block_size == filled[block], f"block {block} is published but not full")
            if parent_identity != ROOT_IDENTITY:
                expect(parent_identity in by_identity, f"block {block} has outlived its parent")
                parent = by_identity[parent_identity]
                expect(counts[parent] > 0 or (counts[block] == 0 and age[block] < age[parent]),
                       f"block {parent} could be evicted before its child, block {block}")
        if block_tables is not None:
            holders = Counter(block for table in block_tables for block in table)
            for block in range(self.num_blocks):
                expect(counts[block] == holders[block],
                       f"block {block} counts {counts[block]} holders, but {holders[block]} tables name it")
