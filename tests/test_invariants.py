"""Does the check of the invariants see every inconsistency? Their state is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from nanopaged.block_allocator import BlockAllocator
from nanopaged.invariants import InvariantError
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from tests.test_block_allocator import cache, hold, states


class Busy(NamedTuple):
    """A pool of 8 blocks of 2 in which every state occurs."""

    allocator: BlockAllocator
    one: list[int]  # holds [1, 2], [3, 4], [5]
    two: list[int]  # holds the same [1, 2], and [6, 7]
    parent: int  # cached
    child: int  # cached
    free: int


def busy_pool() -> Busy:
    allocator = BlockAllocator(8, 2)
    one, two = hold(allocator, [1, 2, 3, 4, 5]), hold(allocator, [1, 2, 6, 7])
    parent, child = cache(allocator, [8, 9, 10, 11])
    return Busy(allocator, one, two, parent, child, allocator._free[-1])


def unpublish(pool: BlockAllocator, block: int) -> None:
    del pool._index[pool._keys[block]]
    pool._keys[block] = None


def publish_a_free_block(pool: Busy) -> None:
    pool.allocator._keys[pool.free] = (0, (7, 7))
    pool.allocator._index[(0, (7, 7))] = pool.free
    pool.allocator._filled[pool.free] = 2


def forget_the_holders_of_a_parent(pool: Busy) -> None:
    pool.allocator._ref_counts[pool.one[0]] = 0
    pool.allocator._cached[pool.one[0]] = None
    pool.allocator._shared_blocks -= 1
    pool.allocator._filled_slots -= 2


# Each breaks one rule and keeps the others, so that no rule's check stands in for another's.
CORRUPT_POOLS: dict[str, Callable[[Busy], Any]] = {
    "a free block is lost": lambda p: p.allocator._free.pop(),
    "a cached block is lost": lambda p: p.allocator._cached.pop(p.parent),
    "a block is free twice": lambda p: p.allocator._free.append(p.free),
    "a cached block is free": lambda p: p.allocator._free.append(p.child),
    "a held block is free": lambda p: p.allocator._free.append(p.allocator.take()),
    "a held block is cached": lambda p: p.allocator._cached.setdefault(p.one[0]),
    "a count is below zero": lambda p: p.allocator._ref_counts.__setitem__(p.allocator._free.pop(), -1),
    "a free block can be found": publish_a_free_block,
    "a free block counts as filled": lambda p: p.allocator._filled.__setitem__(p.free, 1),
    "a cached block cannot be found": lambda p: unpublish(p.allocator, p.child),
    "the index has lost a block": lambda p: p.allocator._index.popitem(),
    "the index names another block": lambda p: p.allocator._index.update({(0, (1, 2)): p.parent}),
    "the index has a block under two keys": lambda p: p.allocator._index.update({(0, (7, 7)): p.one[0]}),
    "two blocks have one identity": lambda p: p.allocator._identities.__setitem__(
        p.child, p.allocator._identities[p.one[1]]),
    "a published block is not full": lambda p: p.allocator._filled.__setitem__(p.child, 1),
    "a child outlives its parent": lambda p: p.allocator._identities.__setitem__(p.parent, 99),
    "a child is held, but not its parent": forget_the_holders_of_a_parent,
    "a parent is evicted before its child": lambda p: p.allocator._cached.move_to_end(p.parent, last=False),
    "filled slots are miscounted": lambda p: setattr(p.allocator, "_filled_slots", 6),
    "shared blocks are miscounted": lambda p: setattr(p.allocator, "_shared_blocks", 2),
}
WRONG_TABLES: dict[str, Callable[[Busy], Any]] = {
    "a block was shared for no table": lambda p: p.allocator.share(p.one[2]),
    "a block was taken for no table": lambda p: p.allocator.take(),
    "a table names a block that was given back": lambda p: p.allocator.give_back(p.one[0]),
    "a table has lost a block": lambda p: p.one.pop(),
    "a table names a free block": lambda p: p.two.append(p.free),
    "two tables have one private block": lambda p: p.two.append(p.one[2]),
}


def test_a_busy_pool_keeps_the_invariants() -> None:
    pool = busy_pool()
    pool.allocator.check_invariants([pool.one, pool.two])
    assert states(pool.allocator) == (2, 4, 2)


@pytest.mark.parametrize("what", CORRUPT_POOLS)
def test_the_invariant_check_raises_when(what: str) -> None:
    pool = busy_pool()
    CORRUPT_POOLS[what](pool)
    with pytest.raises(InvariantError):
        pool.allocator.check_invariants()


@pytest.mark.parametrize("what", WRONG_TABLES)
def test_the_invariant_check_knows_from_the_tables_when(what: str) -> None:
    pool = busy_pool()
    WRONG_TABLES[what](pool)
    pool.allocator.check_invariants()
    with pytest.raises(InvariantError, match="holders"):
        pool.allocator.check_invariants([pool.one, pool.two])


def busy_scheduler() -> Scheduler:
    """Two requests run, a third waits."""
    scheduler = Scheduler(BlockAllocator(8, 2), 2, 64, 64)
    for first in (10, 20, 30):
        scheduler.add(Request(str(first), [first, first + 1, first + 2], SamplingParams(max_tokens=4)))
    step = scheduler.schedule()
    scheduler.update(step, {request: 1 for _, request in step.sampled})
    return scheduler


# Each leaves the pool itself consistent.
CORRUPT_SCHEDULERS: dict[str, Callable[[Scheduler], Any]] = {
    "a request runs that has left the list": lambda s: s.running.pop(),
    "a table has lost a block": lambda s: s.running[0].block_table.pop(),
    "the running requests are out of order": lambda s: s.running.reverse(),
    "a seat is counted that no request has": lambda s: setattr(s, "committed_seats", 3),
    "a request's blocks are not counted": lambda s: setattr(s, "committed_blocks", 0),
    "a request has computed more than its blocks hold": lambda s: setattr(s.running[0], "num_computed_tokens", 5),
    "a waiting request holds a block": lambda s: s.waiting.first().block_table.append(s.allocator.take()),
}


def test_a_busy_scheduler_keeps_the_invariants() -> None:
    scheduler = busy_scheduler()
    scheduler.check_invariants()
    assert (len(scheduler.running), len(scheduler.waiting)) == (2, 1)


@pytest.mark.parametrize("what", CORRUPT_SCHEDULERS)
def test_the_invariant_check_of_the_scheduler_raises_when(what: str) -> None:
    scheduler = busy_scheduler()
    CORRUPT_SCHEDULERS[what](scheduler)
    with pytest.raises(InvariantError):
        scheduler.check_invariants()
