"""Is every block accounted for? Everything counted again from scratch, for tests and for debugging; O(pool).

`BlockAllocator.check_invariants` and `Scheduler.check_invariants` are implemented here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopaged.block_allocator import BlockAllocator
    from nanopaged.scheduler import Scheduler


class InvariantError(RuntimeError):
    """The counts are inconsistent: a block is leaked, or held without being counted. Always a bug in nanopaged."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise InvariantError(what)


def check_pool(pool: BlockAllocator, block_tables: Iterable[Sequence[int]] | None) -> None:
    """The counts, lists and keys of one pool.

    Given every block table there is, each block must have exactly as many holders as there are tables
    that name it. Raises InvariantError with the first inconsistency.
    """
    counts, keys, filled = pool._ref_counts, pool._keys, pool._filled
    referenced = {block for block, holders in enumerate(counts) if holders}
    places = Counter([*pool._free, *pool._cached, *referenced])
    expect(min(counts) >= 0, "a reference count is negative")
    for block in range(pool.num_blocks):
        expect(places[block] == 1, f"block {block} is in {places[block]} of free, cached and referenced, not in one")
    expect(all(keys[block] is None and filled[block] == 0 for block in pool._free), "a free block is not empty")
    expect(all(keys[block] is not None for block in pool._cached), "a cached block cannot be found")
    expect(pool._filled_slots == sum(filled[block] for block in referenced), "filled slots are miscounted")
    expect(pool._shared_blocks == sum(holders > 1 for holders in counts), "shared blocks are miscounted")

    published = {block: key for block, key in enumerate(keys) if key is not None}
    expect(pool._index == {key: block for block, key in published.items()}, "index and published blocks differ")
    by_identity = {pool._identities[block]: block for block in published}
    expect(len(by_identity) == len(published), "two published blocks have one identity")
    age = {block: place for place, block in enumerate(pool._cached)}  # 0 is evicted first
    for block, (parent_identity, tokens) in published.items():
        expect(len(tokens) == pool.block_size == filled[block], f"block {block} is published but not full")
        if parent_identity != 0:
            expect(parent_identity in by_identity, f"block {block} has outlived its parent")
            parent = by_identity[parent_identity]
            expect(counts[parent] > 0 or (counts[block] == 0 and age[block] < age[parent]),
                   f"block {parent} could be evicted before its child, block {block}")
    if block_tables is not None:
        holders = Counter(block for table in block_tables for block in table)
        for block in range(pool.num_blocks):
            expect(counts[block] == holders[block],
                   f"block {block} counts {counts[block]} holders, but {holders[block]} tables name it")


def check_scheduler(scheduler: Scheduler) -> None:
    """The pool against every block table, and each table against its request."""
    running, waiting = scheduler.running, list(scheduler.waiting)
    scheduler.allocator.check_invariants([request.block_table for request in running + waiting])
    keys = [request.key for request in running]
    expect(keys == sorted(keys), f"the running requests are not in order: {running}")
    for name, got, wanted in (("blocks", scheduler.committed_blocks, sum(r.full_blocks * r.num_seats for r in running)),
                              ("seats", scheduler.committed_seats, sum(r.num_seats for r in running))):
        expect(got == wanted, f"{got} {name} are counted as committed, but {wanted} are")
    for request in running + waiting:
        room = len(request.block_table) * scheduler.block_size
        expect(request.num_computed_tokens <= room, f"{request} has computed more tokens than its blocks hold")
    for request in waiting:
        expect(not request.block_table, f"{request} holds blocks, but does not run")
