"""Which physical block holds which tokens, and who shares it? What BlockAllocator promises."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from itertools import product
from types import FrameType
from typing import Any

import pytest

from nanopaged.block_allocator import BlockAllocator, OutOfBlocks, blocks_for
from nanopaged.invariants import InvariantError
from nanopaged.outputs import AllocatorStats


def hold(allocator: BlockAllocator, tokens: list[int]) -> list[int]:
    """A block table for `tokens`, made as a request makes it: share what is found, compute the rest, publish."""
    size = allocator.block_size
    table = allocator.find_prefix(tokens, len(tokens))
    allocator.take_prefix(table)
    for start in range(len(table) * size, len(tokens), size):
        piece = tokens[start : start + size]
        block = allocator.take()
        allocator.fill(block, len(piece))
        if len(piece) == size:
            block = allocator.publish(block, table[-1] if table else None, piece)
        table.append(block)
    return table


def cache(allocator: BlockAllocator, tokens: list[int]) -> list[int]:
    """The blocks of `tokens`, held once and given back: full ones are cached now."""
    table = hold(allocator, tokens)
    allocator.give_back_all(list(table))
    return table


def found(allocator: BlockAllocator, tokens: list[int]) -> list[int]:
    return allocator.find_prefix(tokens, len(tokens))


def states(allocator: BlockAllocator) -> tuple[int, int, int]:
    """How many blocks are (free, referenced, cached)."""
    stats = allocator.stats()
    return stats.free_blocks, stats.referenced_blocks, stats.cached_blocks


# Take and give back.


@pytest.mark.parametrize("num_tokens, num_blocks", [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_partly_filled_block_is_a_block_too(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for(num_tokens, 16) == num_blocks


def test_every_block_is_taken_once_and_then_the_pool_is_out_of_blocks() -> None:
    allocator = BlockAllocator(5, 2)
    assert sorted(allocator.take() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert allocator.num_available == 0
    with pytest.raises(OutOfBlocks, match="5"):
        allocator.take()
    allocator.check_invariants([[0, 1, 2, 3, 4]])


def test_a_block_that_was_given_back_can_be_taken_again() -> None:
    allocator = BlockAllocator(2, 2)
    first, second = allocator.take(), allocator.take()
    allocator.give_back(first)
    assert allocator.num_available == 1
    assert allocator.take() == first
    allocator.check_invariants([[first, second]])


def test_giving_back_a_block_twice_is_an_error_and_changes_nothing() -> None:
    allocator = BlockAllocator(4, 2)
    private, published = allocator.take(), hold(allocator, [1, 2])[0]
    for block in (private, published):
        allocator.give_back(block)
        before = allocator.stats()
        with pytest.raises(ValueError, match=f"block {block} "):
            allocator.give_back(block)
        assert allocator.stats() == before
    allocator.check_invariants([])


def test_a_block_is_held_until_its_last_holder_gives_it_back() -> None:
    allocator = BlockAllocator(1, 2)
    block = allocator.take()
    allocator.share(block)
    allocator.share(block)
    for holders in (3, 2, 1):
        assert allocator.ref_count(block) == holders
        assert allocator.num_available == 0
        allocator.check_invariants([[block]] * holders)
        allocator.give_back(block)
    assert allocator.ref_count(block) == 0
    assert allocator.num_available == 1


def test_giving_back_a_table_empties_it_and_evicts_its_last_block_first() -> None:
    allocator = BlockAllocator(3, 2)
    table = hold(allocator, [1, 2, 3, 4, 5, 6])
    parent_first = list(table)
    allocator.give_back_all(table)
    assert table == []
    assert [allocator.take() for _ in range(3)] == parent_first[::-1]


def test_sharing_a_free_block_is_an_error() -> None:
    allocator = BlockAllocator(2, 2)
    block = allocator.take()
    allocator.give_back(block)
    for free in (0, 1):
        with pytest.raises(ValueError, match="free"):
            allocator.share(free)
    assert states(allocator) == (2, 0, 0)
    allocator.check_invariants([])


def test_a_published_block_goes_from_free_to_referenced_to_cached_and_back() -> None:
    allocator = BlockAllocator(1, 2)
    assert states(allocator) == (1, 0, 0)
    table = hold(allocator, [1, 2])
    assert states(allocator) == (0, 1, 0)
    allocator.give_back_all(table)
    assert states(allocator) == (0, 0, 1)
    table = hold(allocator, [1, 2])
    assert states(allocator) == (0, 1, 0)
    allocator.give_back_all(table)
    block = allocator.take()
    assert states(allocator) == (0, 1, 0)
    allocator.give_back(block)
    assert states(allocator) == (1, 0, 0), "evicted and not published again, it is free, not cached"


def test_an_unpublished_block_is_free_again_once_given_back() -> None:
    allocator = BlockAllocator(1, 2)
    block = allocator.take()
    allocator.fill(block, 2)
    allocator.give_back(block)
    assert states(allocator) == (1, 0, 0)
    allocator.check_invariants([])


# Share: common prefixes are stored once.


def test_a_published_block_is_found_by_its_exact_content_while_held_and_while_cached() -> None:
    allocator = BlockAllocator(4, 2)
    table = hold(allocator, [1, 2, 3, 4])
    blocks = list(table)
    for _ in range(2):
        assert found(allocator, [1, 2, 3, 4]) == blocks
        assert found(allocator, [1, 2, 3, 5]) == blocks[:1]
        assert found(allocator, [1, 3, 3, 4]) == found(allocator, [2, 1]) == found(allocator, []) == []
        allocator.give_back_all(table)


def test_nothing_is_found_before_it_is_published() -> None:
    allocator = BlockAllocator(4, 2)
    block = allocator.take()
    allocator.fill(block, 2)
    assert found(allocator, [1, 2]) == []
    assert allocator.publish(block, None, [1, 2]) == block
    assert found(allocator, [1, 2]) == [block]


def test_equal_tokens_after_another_prefix_are_not_found() -> None:
    allocator = BlockAllocator(8, 2)
    one = hold(allocator, [1, 2, 9, 9])
    other = hold(allocator, [3, 4, 9, 9])
    assert one[1] != other[1]
    assert found(allocator, [9, 9]) == []
    assert found(allocator, [3, 4, 9, 9]) == other
    hold(allocator, [5, 6])
    assert len(found(allocator, [5, 6, 9, 9])) == 1


def test_at_most_as_many_tokens_are_found_as_were_asked_for() -> None:
    allocator = BlockAllocator(4, 2)
    table = hold(allocator, [1, 2, 3, 4, 5])
    hits = [len(allocator.find_prefix([1, 2, 3, 4, 5], limit)) for limit in range(6)]
    assert hits == [0, 0, 1, 1, 2, 2]
    assert allocator.find_prefix([1, 2, 3, 4, 5], 5) == table[:2]


def test_finding_a_prefix_changes_nothing() -> None:
    allocator = BlockAllocator(4, 2)
    cache(allocator, [1, 2, 3, 4])
    before = allocator.stats()
    assert len(found(allocator, [1, 2, 3, 4])) == 2
    assert allocator.stats() == before


class SameHash(int):
    """A token id that collides with every other in a dict, and yet equals only its own number."""

    def __hash__(self) -> int:
        return 7


@pytest.mark.parametrize("kind", [int, SameHash])
def test_colliding_hashes_never_serve_the_kv_of_other_tokens(kind: type[int]) -> None:
    assert hash(-1) == hash(-2), "CPython's own collision, which needs no attacker"
    allocator = BlockAllocator(64, 2)
    beginnings = [[kind(token) for token in tokens] for tokens in product((-1, -2), repeat=4)]
    tables = [hold(allocator, beginning) for beginning in beginnings]
    assert len({table[-1] for table in tables}) == 16
    assert len({table[0] for table in tables}) == 4
    for beginning, table in zip(beginnings, tables):
        assert found(allocator, beginning) == table
        assert len(found(allocator, [*beginning[:3], kind(-3)])) == 1
    allocator.check_invariants(tables)


def test_a_reused_block_is_not_found_under_its_old_content() -> None:
    allocator = BlockAllocator(2, 2)
    parent, child = cache(allocator, [1, 2, 3, 4])
    reused = cache(allocator, [5, 6, 7, 8])
    assert sorted(reused) == sorted([parent, child])
    assert found(allocator, [1, 2, 3, 4]) == []
    assert found(allocator, [5, 6, 3, 4]) == found(allocator, [5, 6]) == reused[:1]
    assert found(allocator, [5, 6, 7, 8]) == reused


def test_a_reused_block_is_not_found_while_it_is_written() -> None:
    allocator = BlockAllocator(1, 2)
    cache(allocator, [1, 2])
    block = allocator.take()
    assert found(allocator, [1, 2]) == []
    allocator.fill(block, 1)
    assert found(allocator, [1, 2]) == []
    assert allocator.stats().filled_slots == 1


def test_a_prefix_that_is_computed_again_does_not_bring_its_old_children_back() -> None:
    allocator = BlockAllocator(3, 2)
    _, child = cache(allocator, [1, 2, 3, 4])
    blocks = [allocator.take() for _ in range(3)]
    allocator.give_back_all(blocks)
    assert len(hold(allocator, [1, 2])) == 1
    assert len(found(allocator, [1, 2, 3, 4])) == 1
    allocator.check_invariants()


def test_a_child_that_wrongly_outlives_its_parent_is_not_found_behind_its_replacement() -> None:
    allocator = BlockAllocator(2, 2)
    parent, child = hold(allocator, [1, 2, 3, 4])
    allocator.give_back(parent)  # before its child, which no request does
    allocator.give_back(child)
    assert allocator.take() == parent
    allocator.fill(parent, 2)
    allocator.publish(parent, None, [5, 6])
    assert found(allocator, [5, 6, 3, 4]) == [parent]


def test_publishing_equal_content_twice_hands_back_the_first_block_and_frees_the_second() -> None:
    allocator = BlockAllocator(4, 2)
    first, second = allocator.take(), allocator.take()
    for block in (first, second):
        allocator.fill(block, 2)
    assert allocator.publish(first, None, [1, 2]) == first
    assert allocator.publish(second, None, [1, 2]) == first
    assert (allocator.ref_count(first), allocator.ref_count(second)) == (2, 0)
    assert states(allocator) == (3, 1, 0)
    allocator.check_invariants([[first], [first]])


def test_publishing_content_that_is_cached_already_gives_the_cached_block() -> None:
    allocator = BlockAllocator(4, 2)
    late = allocator.take()
    allocator.fill(late, 2)
    [first] = cache(allocator, [1, 2])
    assert allocator.publish(late, None, [1, 2]) == first
    assert states(allocator) == (3, 1, 0)
    assert allocator.stats().filled_slots == 2
    allocator.check_invariants([[first]])


def test_publishing_the_same_block_again_changes_nothing() -> None:
    allocator = BlockAllocator(4, 2)
    parent, child = hold(allocator, [1, 2, 3, 4])
    assert allocator.publish(parent, None, [1, 2]) == parent
    assert found(allocator, [1, 2, 3, 4]) == [parent, child]
    allocator.check_invariants([[parent, child]])


def test_a_block_is_published_from_then_on_until_it_is_evicted() -> None:
    allocator = BlockAllocator(1, 2)
    block = allocator.take()
    allocator.fill(block, 2)
    assert allocator.is_published(block) is False
    allocator.publish(block, None, [1, 2])
    assert allocator.is_published(block) is True
    allocator.give_back(block)
    assert allocator.is_published(block) is True, "it is cached"
    allocator.take()
    assert allocator.is_published(block) is False


def test_a_published_block_is_not_published_with_other_contents() -> None:
    allocator = BlockAllocator(4, 2)
    [block] = hold(allocator, [1, 2])
    with pytest.raises(ValueError, match=f"block {block} is published already, with other contents"):
        allocator.publish(block, None, [1, 3])
    assert (found(allocator, [1, 2]), found(allocator, [1, 3])) == ([block], [])
    allocator.check_invariants([[block]])


def test_a_block_is_not_published_before_its_parent() -> None:
    allocator = BlockAllocator(4, 2)
    parent, child = allocator.take(), allocator.take()
    for block in (parent, child):
        allocator.fill(block, 2)
    with pytest.raises(ValueError, match="parent"):
        allocator.publish(child, parent, [3, 4])
    allocator.check_invariants([[parent, child]])


@pytest.mark.parametrize("num_filled, tokens", [(1, [1, 2]), (0, [1, 2]), (2, [1]), (2, [1, 2, 3])])
def test_only_a_full_block_is_published(num_filled: int, tokens: list[int]) -> None:
    allocator = BlockAllocator(4, 2)
    block = allocator.take()
    allocator.fill(block, num_filled)
    with pytest.raises(ValueError, match="full"):
        allocator.publish(block, None, tokens)
    assert found(allocator, [1, 2]) == []
    allocator.check_invariants([[block]])


def test_without_prefix_caching_nothing_is_found_and_what_is_given_back_is_free() -> None:
    allocator = BlockAllocator(4, 2, enable_prefix_caching=False)
    one, two = hold(allocator, [1, 2, 3, 4]), hold(allocator, [1, 2, 3, 4])
    assert not set(one) & set(two)
    allocator.check_invariants([one, two])
    allocator.give_back_all(one)
    allocator.give_back_all(two)
    assert states(allocator) == (4, 0, 0)
    assert allocator.stats().prefix_hit_tokens == 0


# Evict.


@pytest.mark.policy
def test_lru_takes_free_blocks_before_it_evicts_cached_ones() -> None:
    allocator = BlockAllocator(4, 2)
    cached = cache(allocator, [1, 2, 3, 4])
    taken = [allocator.take(), allocator.take()]
    assert not set(taken) & set(cached)
    assert found(allocator, [1, 2, 3, 4]) == cached
    assert allocator.stats().evicted_blocks == 0


@pytest.mark.policy
def test_lru_evicts_the_least_recently_used_block_first() -> None:
    allocator = BlockAllocator(3, 2)
    blocks = {token: cache(allocator, [token, token])[0] for token in (1, 2, 3)}
    cache(allocator, [1, 1])
    assert [allocator.take() for _ in range(3)] == [blocks[2], blocks[3], blocks[1]]
    assert allocator.stats().evicted_blocks == 3


def test_children_are_evicted_before_their_parents() -> None:
    allocator = BlockAllocator(4, 2)
    chain = cache(allocator, [1, 2, 3, 4, 5, 6, 7, 8])
    for left in (3, 2, 1, 0):
        assert allocator.take() == chain[left]
        assert found(allocator, [1, 2, 3, 4, 5, 6, 7, 8]) == chain[:left]


@pytest.mark.policy
def test_lru_keeps_a_parent_that_was_used_since_longer_than_its_child() -> None:
    allocator = BlockAllocator(3, 2)
    parent, child = cache(allocator, [1, 2, 3, 4])
    [other] = cache(allocator, [5, 6])
    cache(allocator, [1, 2])
    assert [allocator.take() for _ in range(3)] == [child, other, parent]


def test_a_cached_child_can_be_evicted_while_its_parent_is_held() -> None:
    allocator = BlockAllocator(2, 2)
    parent, child = cache(allocator, [1, 2, 3, 4])
    table = hold(allocator, [1, 2])
    assert table == [parent]
    assert allocator.take() == child
    with pytest.raises(OutOfBlocks):
        allocator.take()


@pytest.mark.parametrize("seed", range(20))
def test_in_a_random_tree_no_block_is_evicted_before_its_children(seed: int) -> None:
    rng = random.Random(seed)
    allocator = BlockAllocator(60, 1)
    held: list[list[int]] = []
    names: dict[int, tuple[int, ...]] = {}  # block -> all tokens from the first to its own
    for _ in range(60):
        if held and rng.random() < 0.5:
            allocator.give_back_all(held.pop(rng.randrange(len(held))))
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 5))]  # at most 2 + 4 + ... + 32 = 62 blocks
        if allocator.num_available < 5:
            continue
        held.append(hold(allocator, tokens))
        names.update((block, tuple(tokens[: i + 1])) for i, block in enumerate(held[-1]))
    while held:
        allocator.give_back_all(held.pop(rng.randrange(len(held))))
    left = {names[block] for block in names if found(allocator, list(names[block]))[-1:] == [block]}
    assert len(left) == allocator.stats().cached_blocks > 20, seed
    for _ in range(allocator.num_available):
        evicted = names.get(allocator.take())
        left.discard(evicted)
        assert evicted is None or not [name for name in left if name[: len(evicted)] == evicted], (seed, evicted)
    assert not left, seed


# Copy-on-write.


def test_an_unpublished_block_with_one_holder_is_written_in_place() -> None:
    allocator = BlockAllocator(2, 4)
    block = allocator.take()
    allocator.fill(block, 3)
    before = allocator.stats()
    assert allocator.fork(block) == block
    assert allocator.stats() == before


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    allocator = BlockAllocator(2, 4)
    block = allocator.take()
    allocator.fill(block, 3)
    allocator.share(block)
    copy = allocator.fork(block)
    assert copy != block
    assert (allocator.ref_count(block), allocator.ref_count(copy)) == (1, 1)
    assert allocator.stats().filled_slots == 6, "the copy holds as much as the original"
    allocator.check_invariants([[block], [copy]])


def test_a_published_block_is_copied_even_if_it_has_no_other_holder() -> None:
    allocator = BlockAllocator(2, 2)
    [block] = hold(allocator, [1, 2])
    copy = allocator.fork(block)
    assert copy != block
    assert found(allocator, [1, 2]) == [block], "the original stays findable, and cached"
    assert states(allocator) == (0, 1, 1)
    assert allocator.fork(copy) == copy, "the copy is not published"
    allocator.check_invariants([[copy]])


@pytest.mark.parametrize("published", [False, True])
def test_a_copy_without_room_changes_nothing(published: bool) -> None:
    allocator = BlockAllocator(2, 2)
    [block] = hold(allocator, [1, 2] if published else [1])
    tables = [[block], [allocator.take()]]
    if not published:
        allocator.share(block)
        tables.append([block])
    before = allocator.stats()
    with pytest.raises(OutOfBlocks):
        allocator.fork(block)
    assert allocator.stats() == before
    assert found(allocator, [1, 2]) == ([block] if published else [])
    allocator.check_invariants(tables)


# Look.


def test_the_statistics_are_exact() -> None:
    allocator = BlockAllocator(8, 4)
    one = hold(allocator, list(range(10)))  # two full blocks and half of one
    two = hold(allocator, [*range(8), 99])  # shares the full ones
    assert two[:2] == one[:2]
    assert allocator.stats() == AllocatorStats(
        num_blocks=8, referenced_blocks=4, cached_blocks=0, free_blocks=4, shared_blocks=2,
        reserved_slots=16, filled_slots=4 + 4 + 2 + 1, prefix_hit_tokens=8, evicted_blocks=0)
    allocator.give_back_all(one)
    assert allocator.stats() == AllocatorStats(
        num_blocks=8, referenced_blocks=3, cached_blocks=0, free_blocks=5, shared_blocks=0,
        reserved_slots=12, filled_slots=4 + 4 + 1, prefix_hit_tokens=8, evicted_blocks=0)
    allocator.give_back_all(two)
    three = hold(allocator, list(range(4)))
    assert allocator.stats() == AllocatorStats(
        num_blocks=8, referenced_blocks=1, cached_blocks=1, free_blocks=6, shared_blocks=0,
        reserved_slots=4, filled_slots=4, prefix_hit_tokens=12, evicted_blocks=0)
    three += [allocator.take() for _ in range(7)]
    assert allocator.stats() == AllocatorStats(
        num_blocks=8, referenced_blocks=8, cached_blocks=0, free_blocks=0, shared_blocks=0,
        reserved_slots=32, filled_slots=4, prefix_hit_tokens=12, evicted_blocks=1)


def test_available_blocks_are_the_free_and_the_cached_ones() -> None:
    allocator = BlockAllocator(8, 2)
    table = hold(allocator, [1, 2, 3])
    cache(allocator, [4, 5, 6, 7])
    assert states(allocator) == (4, 2, 2)
    assert allocator.num_available == 6
    assert len([allocator.take() for _ in range(6)]) == 6
    assert allocator.num_available == 0
    allocator.give_back_all(table)
    assert allocator.num_available == 2


def test_a_block_that_no_table_names_breaks_the_invariants() -> None:
    allocator = BlockAllocator(4, 2)
    leaked = allocator.take()
    with pytest.raises(InvariantError, match=f"block {leaked} counts 1 holders, but 0 tables name it"):
        allocator.check_invariants([])


@pytest.mark.parametrize("name, arguments, error", [
    ("num_blocks", (0, 16), ValueError),
    ("num_blocks", (-1, 16), ValueError),
    ("num_blocks", (8.0, 16), TypeError),
    ("num_blocks", (True, 16), TypeError),
    ("num_blocks", ("8", 16), TypeError),
    ("block_size", (8, 0), ValueError),
    ("block_size", (8, -16), ValueError),
    ("block_size", (8, 1.5), TypeError),
    ("block_size", (8, None), TypeError),
    ("enable_prefix_caching", (8, 16, "yes"), TypeError),
    ("enable_prefix_caching", (8, 16, 1), TypeError),
])
def test_an_invalid_argument_of_the_pool_is_named(
    name: str, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error, match=name):
        BlockAllocator(*arguments)


# Every operation is O(1) for each block.


def every_operation(allocator: BlockAllocator) -> None:
    """Takes, fills, publishes, finds, shares, forks and gives back a few blocks; evicts if none is free."""
    one, two = hold(allocator, [-1, -2, -3, -4, -5]), hold(allocator, [-1, -2, -3, -4, -6])
    late = allocator.take()
    allocator.fill(late, 2)
    two.append(allocator.publish(late, None, [-1, -2]))
    allocator.share(one[2])
    one.append(allocator.fork(one[2]))
    allocator.stats()
    allocator.give_back_all(one)
    allocator.give_back_all(two)


def large_pool(num_blocks: int, state: str) -> BlockAllocator:
    allocator = BlockAllocator(num_blocks, 2)
    if state == "cached":
        for table in [hold(allocator, [i, i]) for i in range(num_blocks)]:
            allocator.give_back_all(table)
    return allocator


@pytest.mark.parametrize("state", ["free", "cached"])
def test_no_operation_runs_more_lines_in_a_larger_pool(state: str) -> None:
    def lines_run(allocator: BlockAllocator) -> int:
        lines = 0

        def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal lines
            lines += event == "line"
            return trace

        tracer_before = sys.gettrace()
        sys.settrace(trace)
        try:
            every_operation(allocator)
        finally:
            sys.settrace(tracer_before)
        return lines

    small, large = lines_run(large_pool(10, state)), lines_run(large_pool(10_000, state))
    assert small == large
    assert small > 100


@pytest.mark.parametrize("num_blocks, state", [(500_000, "free"), (20_000, "cached")])
def test_no_operation_takes_longer_in_a_larger_pool(num_blocks: int, state: str) -> None:
    """What lines do not show: a scan inside of one call, like `list.remove`."""

    def fastest_s(allocator: BlockAllocator) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            every_operation(allocator)
            times.append(time.perf_counter() - start)
        return min(times)

    small, large = fastest_s(large_pool(10, state)), fastest_s(large_pool(num_blocks, state))
    assert large < 5 * small, f"{small * 1e6:.0f} us with 10 blocks, {large * 1e6:.0f} us with {num_blocks}"


# Anything, in any order.


class NaivePool:
    """The allocator's promises with no thought for speed: everything follows from the tables."""

    def __init__(self, num_blocks: int, block_size: int, sharing: bool) -> None:
        self.num_blocks, self.block_size, self.sharing = num_blocks, block_size, sharing
        self.tables: list[list[int]] = []
        self.filled: dict[int, int] = {}
        self.beginnings: dict[int, tuple[int, ...]] = {}  # published block -> all tokens from the first to its last
        self.cached: list[int] = []  # least recently used first
        self.prefix_hit_tokens = self.evicted_blocks = 0

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    def free(self) -> set[int]:
        return {b for b in range(self.num_blocks) if b not in self.cached and not self.holders(b)}

    def find(self, tokens: list[int], limit: int) -> list[int]:
        blocks = []
        for end in range(self.block_size, limit + 1, self.block_size):
            twins = [b for b, beginning in self.beginnings.items() if beginning == tuple(tokens[:end])]
            if not twins:
                break
            blocks += twins
        return blocks

    def takeable(self, lru: bool) -> set[int]:
        """Blocks that `take` may return: any free one, and any cached one that has no child left to be found."""
        if lru:
            return self.free() or set(self.cached[:1])
        parents = {beginning[: -self.block_size] for beginning in self.beginnings.values()}
        return self.free() | {block for block in self.cached if self.beginnings[block] not in parents}

    def take(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
            del self.beginnings[block]
            self.evicted_blocks += 1
        self.filled[block] = 0

    def released(self, block: int) -> None:
        if not self.holders(block):
            if block in self.beginnings:
                self.cached.append(block)
            else:
                del self.filled[block]

    def stats(self) -> AllocatorStats:
        referenced = {block for table in self.tables for block in table}
        return AllocatorStats(
            num_blocks=self.num_blocks, referenced_blocks=len(referenced), cached_blocks=len(self.cached),
            free_blocks=len(self.free()), shared_blocks=sum(self.holders(block) > 1 for block in referenced),
            reserved_slots=len(referenced) * self.block_size, filled_slots=sum(self.filled[b] for b in referenced),
            prefix_hit_tokens=self.prefix_hit_tokens, evicted_blocks=self.evicted_blocks)


@pytest.mark.parametrize("seed", range(10))
def test_thousands_of_random_operations_agree_with_a_naive_pool(seed: int) -> None:
    compare_with_a_naive_pool(seed, lru=False)


@pytest.mark.policy
@pytest.mark.parametrize("seed", range(10))
def test_lru_evicts_what_a_naive_pool_evicts_in_thousands_of_random_operations(seed: int) -> None:
    compare_with_a_naive_pool(seed, lru=True)


def compare_with_a_naive_pool(seed: int, lru: bool) -> None:
    rng = random.Random(seed)
    num_blocks, size, sharing = rng.randint(4, 16), rng.randint(1, 3), seed % 5 > 0
    allocator, naive = BlockAllocator(num_blocks, size, sharing), NaivePool(num_blocks, size, sharing)
    texts: list[list[int]] = []  # texts[i] is in the blocks of naive.tables[i]

    def begin() -> None:
        tokens = [rng.randrange(2) for _ in range(rng.randint(0, 4 * size))]
        limit = rng.randint(0, len(tokens))
        blocks = allocator.find_prefix(tokens, limit)
        assert blocks == naive.find(tokens, limit), where
        allocator.take_prefix(blocks)
        naive.cached = [block for block in naive.cached if block not in blocks]
        naive.prefix_hit_tokens += len(blocks) * size
        naive.tables.append(blocks)
        texts.append(tokens[: len(blocks) * size])

    def branch(i: int) -> None:
        for block in naive.tables[i]:
            allocator.share(block)
        naive.tables.append(list(naive.tables[i]))
        texts.append(list(texts[i]))

    def taken(take: Callable[[], int]) -> int | None:
        """The block that `take` takes, checked; None if there is none, as there must be."""
        expected = naive.takeable(lru)
        if not expected:
            with pytest.raises(OutOfBlocks):
                take()
            return None
        block = take()
        assert block in expected, where
        naive.take(block)
        return block

    def write(i: int, num_kept: int) -> None:
        """Keeps the last block's first tokens and writes another behind them, in a copy where needed."""
        table, tokens = naive.tables[i], texts[i]
        if num_kept == 0:
            block = taken(allocator.take)
            if block is None:
                return
            table.append(block)
        else:
            old = table[-1]
            if naive.holders(old) > 1 or old in naive.beginnings:
                block = taken(lambda: allocator.fork(old))
                if block is None:
                    return
                table[-1] = block
                naive.released(old)
            else:
                assert allocator.fork(old) == old, where
            del tokens[(len(table) - 1) * size + num_kept :]
        tokens.append(rng.randrange(2))
        allocator.fill(table[-1], num_kept + 1)
        naive.filled[table[-1]] = num_kept + 1
        if num_kept + 1 == size:
            publish(table, tokens)

    def publish(table: list[int], tokens: list[int]) -> None:
        block, twins = table[-1], naive.find(tokens, len(tokens))[len(table) - 1 :]
        kept = allocator.publish(block, table[-2] if len(table) > 1 else None, tokens[-size:])
        assert kept == (twins[0] if twins else block), where
        if twins:
            table[-1] = kept
            if kept in naive.cached:
                naive.cached.remove(kept)
            naive.released(block)
        elif sharing:
            naive.beginnings[block] = tuple(tokens)

    def end(i: int) -> None:
        table = naive.tables.pop(i)
        texts.pop(i)
        blocks = table[::-1]
        allocator.give_back_all(table)
        for block in blocks:
            naive.released(block)

    for operation in range(2000):
        where = f"seed {seed}, operation {operation}"
        if not texts or (len(texts) < 6 and rng.random() < 0.1):
            begin()
        i = rng.randrange(len(texts))
        in_last_block = len(texts[i]) - size * max(0, len(naive.tables[i]) - 1)
        match rng.choice(["write"] * 10 + ["rewrite", "branch", "end"]):
            case "write":
                write(i, in_last_block % size)
            case "rewrite" if in_last_block > 1:
                write(i, rng.randrange(1, in_last_block))
            case "branch" if len(texts) < 6:
                branch(i)
            case "end":
                end(i)
        allocator.check_invariants(naive.tables)
        assert allocator.stats() == naive.stats(), where
        assert allocator.cached_blocks() == set(naive.cached), where
        assert all(allocator.ref_count(block) == naive.holders(block) for block in range(num_blocks)), where
    if sharing:
        assert naive.evicted_blocks > 20 and naive.prefix_hit_tokens > 20, f"seed {seed} evicts or shares too little"
