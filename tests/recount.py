"""What must always hold, counted from the block tables alone, through public methods alone; not `check_invariants`."""

from __future__ import annotations

from collections import defaultdict

from nanopaged.request import Request, RequestStatus
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step


def assert_consistent(scheduler: Scheduler, where: str = "") -> None:
    """No block is leaked, none is held without being counted, and what is shared is equal."""
    pool, running = scheduler.allocator, scheduler.running
    holders: dict[int, list[tuple[Request, int]]] = defaultdict(list)  # of each block: (request, logical block)
    for request in running:
        for i, block in enumerate(request.block_table):
            holders[block].append((request, i))
    for request in scheduler.waiting:
        assert request.status is RequestStatus.WAITING, f"{request} is in the queue {where}"
        assert not request.block_table, f"{request} waits, and holds blocks {where}"
        assert not request.num_computed_tokens, f"{request} waits, and has computed tokens in the pool {where}"

    filled_slots = 0
    for block, places in holders.items():
        request, i = places[0]
        slots = min(pool.block_size, max(0, request.num_computed_tokens - i * pool.block_size))
        filled_slots += slots
        end = i * pool.block_size + slots
        for other, j in places[1:]:
            assert (j, other.token_ids[:end]) == (i, request.token_ids[:end]), \
                f"block {block} is shared, but holds different tokens for {request} and {other} {where}"
    stats = pool.stats()
    for block in range(stats.num_blocks):
        names = [request.request_id for request, _ in holders[block]]
        assert pool.ref_count(block) == len(names), \
            f"block {block} has a reference count of {pool.ref_count(block)}, and is in the tables of {names} {where}"
    referenced = {block for block, places in holders.items() if places}
    assert not referenced & pool.cached_blocks(), f"blocks are both cached and held {where}"
    assert stats.free_blocks + stats.cached_blocks + len(referenced) == stats.num_blocks, f"a block is leaked {where}"
    assert stats.cached_blocks == len(pool.cached_blocks()), f"cached blocks are miscounted {where}"
    assert stats.referenced_blocks == len(referenced), f"referenced blocks are miscounted {where}"
    shared = sum(len(places) > 1 for places in holders.values())
    assert stats.shared_blocks == shared, f"shared blocks are miscounted {where}"
    assert stats.filled_slots == filled_slots, f"{stats.filled_slots} slots count as filled, {filled_slots} are {where}"
    for request in running:
        assert request.status is RequestStatus.RUNNING, f"{request} is among the running {where}"
        assert len(set(request.block_table)) == len(request.block_table), f"{request} holds a block twice {where}"
        room = len(request.block_table) * pool.block_size
        assert request.num_computed_tokens <= room, f"{request} has computed more tokens than its blocks hold {where}"
        prefix = pool.find_prefix(request.token_ids, request.num_computed_tokens)
        own = request.block_table[: len(prefix)].tolist()
        assert prefix in ([], own), f"{request} is found in other blocks {where}"
    keys = [request.key for request in running]
    assert keys == sorted(keys), f"the running requests are not in the order of their keys {where}"


def assert_writes_are_exclusive(scheduler: Scheduler, step: Step, where: str = "") -> None:
    """Each block that a step writes has one holder and cannot be found; no slot is written twice."""
    size, written = scheduler.block_size, set()
    for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens, strict=True):
        for block in request.block_table[start // size : -(-(start + num_tokens) // size)]:
            others = [other.request_id for other in scheduler.running
                      if other is not request and block in other.block_table]
            assert not others, f"request {request.request_id} writes block {block} while {others} hold it {where}"
            assert not scheduler.allocator.is_published(block), \
                f"request {request.request_id} writes block {block}, which other requests can find {where}"
        slots = {request.block_table[p // size] * size + p % size for p in range(start, start + num_tokens)}
        assert not slots & written, f"a slot is written twice {where}"
        written |= slots


def assert_nothing_is_held(scheduler: Scheduler, where: str = "") -> None:
    """After the last request: all blocks are free or cached."""
    assert_consistent(scheduler, where)
    stats = scheduler.allocator.stats()
    held = stats.referenced_blocks, stats.filled_slots, stats.shared_blocks
    assert held == (0, 0, 0), f"blocks are still held {where}"
    assert stats.free_blocks + stats.cached_blocks == stats.num_blocks, f"a block is leaked {where}"
    assert not scheduler.running and not len(scheduler.waiting), f"requests are left {where}"
