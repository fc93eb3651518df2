"""What must hold of the pool's blocks? Scenarios from short to long, each beside a model that counts everything again.

Which free block is handed out is left open.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from functools import partial

from nanopaged.block_allocator import BlockAllocator, OutOfBlocks
from nanopaged.lab.blocks.naive import Watched, all_cached, expect_no_slower
from nanopaged.lab.grading import check, expect, expect_equal, numbers, raising

LARGE = 2**18  # blocks
MANY_CACHED = 2**12


# Part 1: num_available, take.

@check(1, "take hands out each block once, until all are held.")
def each_block_once() -> None:
    for size in (1, 2, 3, 8):
        watched = Watched(size)
        expect_equal("num_available at first", watched.pool.num_available, size)
        for _ in range(size):
            watched.take()


@check(1, "When every block is held, take raises OutOfBlocks and changes nothing.")
def out_of_blocks() -> None:
    for size in (1, 3):
        watched = Watched(size)
        for _ in range(size):
            watched.take()
        for _ in range(2):
            with raising(OutOfBlocks, "take, with every block held,"):
                watched.pool.take()
            watched.compare("after take, which raised,")


@check(1, "A cached block can be handed out too: it counts as available, and is empty when it is taken.")
def cached_blocks_are_available() -> None:
    for size in (1, 2):
        watched = Watched(size)
        table = watched.hold([*range(2 * size)])
        watched.give_back_all(table)
        for _ in range(size):
            block = watched.take()
            expect(not watched.pool.is_published(block), f"block {block} was taken, and can still be found")


@check(1, "Free blocks go first; then the cached block that was used least recently.")
def free_before_cached() -> None:
    for size, cached in ((2, 1), (3, 1), (3, 2), (4, 3)):
        watched = Watched(size)
        tables = [watched.hold([token, token]) for token in range(cached)]
        for table in tables[1:] + tables[:1]:
            watched.give_back_all(table)
        for _ in range(size):
            watched.take()


@check(1, "take and num_available take the same time in a pool of any size.")
def taking_is_constant() -> None:
    def take(pool: BlockAllocator) -> None:
        pool.take()
        pool.num_available

    expect_no_slower("take", take, BlockAllocator(64, 2), BlockAllocator(LARGE, 2))
    expect_no_slower("take, which evicts,", take, all_cached(64), all_cached(MANY_CACHED))


# Part 2: give_back.

@check(2, "A block that was given back can be taken again.")
def given_back() -> None:
    for size in (1, 2, 3):
        for place in range(size):
            watched = Watched(size)
            blocks = [watched.take() for _ in range(size)]
            watched.give_back(blocks[place])
            expect_equal("the block that take gives", watched.take(), blocks[place])


@check(2, "A shared block stays held until its last holder gives it back.")
def last_holder() -> None:
    for holders in (2, 3):
        watched = Watched(2)
        block = watched.take()
        for _ in range(holders - 1):
            watched.share(block)
        for _ in range(holders - 1):
            watched.give_back(block)
            expect(watched.take() != block, f"block {block} still has a holder, and was handed out")
            watched.give_back(1 - block)
        watched.give_back(block)


@check(2, "Giving back erases nothing: a published block is cached, and found again with its contents.")
def not_erased() -> None:
    watched = Watched(3)
    table = watched.hold([1, 2, 3, 4])
    for block in reversed(table):
        watched.give_back(block)
    expect_equal("find_prefix after everything was given back", watched.find([1, 2, 3, 4]), table)
    again = watched.hold([1, 2, 3, 4])
    expect_equal("the blocks of a second request with the same tokens", again, table)


@check(2, "A block that nobody holds cannot be given back: ValueError, and nothing is changed.")
def double_return() -> None:
    watched = Watched(1)
    watched.refuses(lambda: watched.pool.give_back(0), "giving back a block that was never taken")
    watched = Watched(2)
    block = watched.take()
    watched.give_back(block)
    watched.refuses(lambda: watched.pool.give_back(block), "giving back a block twice")
    expect({watched.take(), watched.take()} == {0, 1}, "the two blocks of the pool should be handed out once each")
    watched = Watched(2)
    block = watched.hold([1, 2])[0]
    watched.give_back(block)
    watched.refuses(lambda: watched.pool.give_back(block), "giving back a cached block")
    watched.find([1, 2])


@check(2, "Of cached blocks, the one that was given back first is handed out first, also if it was used again before.")
def order_of_use() -> None:
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        watched = Watched(3)
        blocks = [watched.hold([token, token])[0] for token in range(3)]
        for i in order:
            watched.give_back(blocks[i])
        watched.share(blocks[order[0]])  # used again: it is the most recent one then
        watched.give_back(blocks[order[0]])
        for _ in range(3):
            watched.take()


Operation = Callable[[Watched, list[int]], object]


def possible(watched: Watched, held: list[int]) -> Iterator[tuple[str, Operation]]:
    """What can be done next. `held` has a block for each holder."""
    naive = watched.naive
    if naive.candidates():
        yield "take", lambda watched, held: held.append(watched.take())
    for i, block in enumerate(held):
        if block not in held[:i]:
            yield f"give back {i}", lambda watched, held, i=i: watched.give_back(held.pop(i))
            if held.count(block) < 2:
                yield f"share {i}", lambda watched, held, i=i: (watched.share(held[i]), held.append(held[i]))
            if naive.prefixes[block] is None:
                yield f"publish {i}", partial(_publish, i=i)
    for block in naive.cached[:1]:
        yield "find", lambda watched, held, block=block: (watched.share(block), held.append(block))


def _publish(watched: Watched, held: list[int], i: int) -> None:
    block = held[i]
    watched.fill(block, watched.naive.size)
    token = 1 + max((prefix[0] for prefix in watched.naive.prefixes if prefix), default=0)
    watched.publish(block, None, [token] * watched.naive.size)


def explore(length: int, with_stats: bool = False) -> None:
    """Every sequence of up to `length` operations on a pool of two blocks, the short ones first."""
    scripts: list[list[Operation]] = [[]]
    for _ in range(length):
        longer = []
        for script in scripts:
            watched, held = Watched(2, with_stats=with_stats), []
            for operation in script:
                operation(watched, held)
            longer += [[*script, operation] for _, operation in possible(watched, held)]
        scripts = longer


@check(2, "After any few operations every block is free, held or cached, as a naive count says.")
def any_few_operations() -> None:
    explore(5)


@check(2, "give_back takes the same time in a pool of any size.")
def giving_back_is_constant() -> None:
    def round_trip(pool: BlockAllocator) -> None:
        pool.give_back(pool.take())

    def found_again(pool: BlockAllocator) -> None:
        pool.share(0)  # which is cached, as all are
        pool.give_back(0)

    expect_no_slower("take, followed by give_back,", round_trip, BlockAllocator(64, 2), BlockAllocator(LARGE, 2))
    expect_no_slower("give_back of a published block", found_again, all_cached(64), all_cached(MANY_CACHED))


# Part 3: give_back_all.

@check(3, "give_back_all gives every block back and leaves the table empty, be it a list or an array.")
def table_is_empty() -> None:
    for size in (0, 1, 3):
        for make in (list, partial(array, "i")):
            watched = Watched(3)
            table = make([watched.take() for _ in range(size)])
            watched.give_back_all(table)


@check(3, "Blocks that another table names too stay held by it.")
def others_keep_theirs() -> None:
    watched = Watched(4)
    one, other = watched.hold([1, 2, 3, 4, 5]), watched.hold([1, 2, 3, 4])
    expect_equal("the second table", other, one[:2])
    watched.give_back_all(one)
    watched.find([1, 2, 3, 4])
    watched.give_back_all(other)


@check(3, "The front of a text stays findable longest: blocks are evicted from its end.")
def front_stays_longest() -> None:
    for size in (2, 3, 4):
        watched = Watched(size)
        tokens = [*range(2 * size)]
        watched.give_back_all(watched.hold(tokens))
        for left in range(size - 1, -1, -1):
            watched.take()
            found = len(watched.find(tokens))
            expect(found == left, f"with {left} blocks of the text left in the pool, {found} of them can be found: a "
                   "block is of use only with all blocks before it")


@check(3, "Whatever requests come and go, no block is lost.")
def no_block_is_lost() -> None:
    come_and_go(with_stats=False)


def come_and_go(with_stats: bool) -> None:
    """Requests with common beginnings, in pools that are too small for all of them."""
    random = numbers("requests that come and go")
    for size, steps in ((3, 8), (5, 20), (8, 60)):
        watched, tables = Watched(size, 2, with_stats), []
        for _ in range(steps):
            tokens = [random.randrange(2) for _ in range(random.randint(1, 6))]
            if len(tokens) / 2 + 1 <= watched.pool.num_available:
                tables.append(watched.hold(tokens))
            elif tables:
                watched.give_back_all(tables.pop(random.randrange(len(tables))))
        while tables:
            watched.give_back_all(tables.pop())
        expect_equal("num_available after every request has left", watched.pool.num_available, size)


# Part 4: fill, stats.

@check(4, "stats counts free, referenced and cached blocks, and the slots of referenced ones.")
def states_are_counted() -> None:
    watched = Watched(4, 2, with_stats=True)
    watched.compare("of an untouched pool")
    table = watched.hold([1, 2, 3])
    watched.give_back(table.pop())
    watched.give_back_all(table)


@check(4, "fill says how many slots are filled, not how many more.")
def fill_is_not_more() -> None:
    watched = Watched(2, 4, with_stats=True)
    one, other = watched.take(), watched.take()
    for block, num_slots in ((one, 1), (one, 2), (other, 4), (one, 4)):
        watched.fill(block, num_slots)


@check(4, "A shared block counts once, as long as it has two holders or more.")
def shared_blocks() -> None:
    watched = Watched(2, 4, with_stats=True)
    block = watched.take()
    watched.fill(block, 3)
    for _ in range(2):
        watched.share(block)
    for _ in range(3):
        watched.give_back(block)


@check(4, "A free block has no filled slots; those of a cached block count again when it is found.")
def filled_again() -> None:
    watched = Watched(1, 4, with_stats=True)
    watched.fill(watched.take(), 3)
    watched.give_back(0)
    watched.fill(watched.take(), 1)
    watched.fill(0, 4)
    watched.publish(0, None, [1, 2, 3, 4])
    watched.give_back(0)
    watched.take_prefix(watched.find([1, 2, 3, 4]))
    watched.give_back(0)
    watched.fill(watched.take(), 2)


@check(4, "After any few operations the figures are those of a naive count.")
def figures_of_any_few_operations() -> None:
    explore(4, with_stats=True)


@check(4, "Whatever requests come and go, the figures are those of a naive count.")
def figures_of_requests() -> None:
    come_and_go(with_stats=True)


@check(4, "fill and stats take the same time in a pool of any size.")
def counting_is_constant() -> None:
    small, large = BlockAllocator(64, 2), BlockAllocator(LARGE, 2)
    blocks = {id(pool): pool.take() for pool in (small, large)}
    expect_no_slower("fill", lambda pool: pool.fill(blocks[id(pool)], 1), small, large)
    expect_no_slower("stats", lambda pool: pool.stats(), small, large)
    expect_no_slower("stats", lambda pool: pool.stats(), all_cached(64), all_cached(MANY_CACHED))
