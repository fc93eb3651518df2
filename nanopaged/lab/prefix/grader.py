"""What must hold of prefix caching? A request may find exactly the blocks whose whole prefix is its own.

Scenarios from short to long, each beside a naive model that names a block by all tokens from the start of its text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import permutations, product

from nanopaged.block_allocator import BlockAllocator
from nanopaged.lab.blocks.naive import Watched, all_cached, expect_no_slower, fastest_s
from nanopaged.lab.grading import begin, check, expect, expect_equal, numbers
from nanopaged.lab.prefix.serving import (second_request, generated_tokens, chunks, same_step,
                                          engine_with_other_parents, a_crowd)  # from the shortest story to the longest


class Alike(int):
    """Token ids that are different, and have the same hash."""

    def __hash__(self) -> int:
        return 1


# Part 1: find_prefix.

@check(1, "Whole blocks are found, from the start of the text to the first that differs.")
def whole_blocks() -> None:
    watched = Watched(4)
    watched.find([1, 2])
    watched.hold([1, 2, 3, 4, 5, 6, 7])
    for length in range(8):
        watched.find([1, 2, 3, 4, 5, 6, 7, 8][:length])
    for place in range(6):
        watched.find([9 if i == place else i + 1 for i in range(6)])


@check(1, "No more than max_tokens tokens are found, so the last token of a prompt can be left out.")
def at_most_max_tokens() -> None:
    watched = Watched(3)
    watched.hold([1, 2, 3, 4, 5, 6])
    for max_tokens in (5, 6, 4, 3, 2, 1, 0):
        watched.find([1, 2, 3, 4, 5, 6], max_tokens)


@check(1, "Equal tokens after another beginning are no hit: their K and V are different.")
def other_parents() -> None:
    watched = Watched(6)
    watched.hold([1, 1, 9, 9])
    watched.hold([2, 2, 8, 8])
    for text in ([2, 2, 9, 9], [9, 9], [1, 1, 8, 8], [1, 1, 1, 1], [2, 2, 8, 8], [1, 1, 9, 9]):
        watched.find(text)
    watched.hold([7, 7, 7, 7])
    watched.find([7] * 8)


@check(1, "Different tokens with the same hash are no hit.")
def same_hash() -> None:
    watched = Watched(4)
    watched.hold([Alike(5), Alike(6), Alike(5), Alike(5)])
    for text in product((5, 6), repeat=4):
        watched.find([*map(Alike, text)])
    for text in ([6, 5], [4, 7], [1, 10]):  # as many tokens, with the same sum
        watched.find(text)


@check(1, "Of every text of up to six tokens, exactly what is in the pool is found.")
def every_text() -> None:
    for texts in (["010101"], ["0011", "0110"], ["000000", "0001", "1"], ["0110", "1001", "100110"]):
        watched = Watched(12)
        for text in texts:
            watched.hold([*map(int, text)])
        for length in range(7):
            for text in product((0, 1), repeat=length):
                watched.find(text)


@check(1, "Looking changes nothing: neither holders, nor which block is evicted next, nor the text.")
def looking_changes_nothing() -> None:
    watched = Watched(2, with_stats=True)
    for text in ([1, 1], [2, 2]):
        watched.give_back_all(watched.hold(text))
    for make in (list, tuple, lambda text: array("i", text)):
        text = make([1, 1, 3])
        watched.find(text)
        expect_equal("the text after find_prefix", [*text], [1, 1, 3])
    watched.take()  # the block of [1, 1]: it was given back first, and nobody has used it since


@check(1, "Finding takes the same time for each block, in a text of any length.")
def finding_is_linear() -> None:
    def find_s(num_blocks: int) -> float:
        pool, tokens, parent = BlockAllocator(num_blocks, 2), [*range(2 * num_blocks)], None
        for start in range(0, len(tokens), 2):
            block = pool.take()
            pool.fill(block, 2)
            parent = pool.publish(block, parent, tokens[start : start + 2])
        return fastest_s(lambda: pool.find_prefix(tokens, len(tokens)), 5) / num_blocks

    short, long = find_s(50), find_s(2000)
    begin()
    expect(long < 8 * short + 1e-6, f"find_prefix takes {short * 1e6:.1f} us for each block of a text with 50 blocks, "
           f"and {long * 1e6:.1f} us for each of 2000: a block should cost the same anywhere in the text")


# Part 2: share, take_prefix.

@check(2, "A shared block has one more holder, and stays until the last has gone.")
def one_more_holder() -> None:
    for num_tokens in (1, 2):  # a block that is not full can be shared too
        watched = Watched(1, with_stats=True)
        block = watched.hold([1, 2][:num_tokens])[0]
        for _ in range(2):
            watched.share(block)
        for _ in range(3):
            watched.give_back(block)


@check(2, "A free block cannot be shared: ValueError, and nothing is changed.")
def nothing_to_share() -> None:
    watched = Watched(1, with_stats=True)
    watched.refuses(lambda: watched.pool.share(0), "sharing a block that was never taken")
    watched.give_back(watched.take())
    watched.refuses(lambda: watched.pool.share(0), "sharing a block that was given back")
    expect_equal("the block that take gives", watched.take(), 0)


@check(2, "A cached block that is shared is held again: it is not available, and its tokens count.")
def held_again() -> None:
    for size in (1, 2, 3):
        watched = Watched(size, with_stats=True)
        tokens = [*range(2 * size)]
        watched.give_back_all(watched.hold(tokens))
        table = watched.find(tokens, 2)
        watched.take_prefix(table)
        for _ in range(size - 1):
            watched.take()
        expect_equal("num_available with every block held", watched.pool.num_available, 0)
        watched.find(tokens)
        watched.give_back(table[0])


@check(2, "A block that was found and given back is the last to be evicted.")
def used_again_is_recent() -> None:
    for again in range(3):
        watched = Watched(3)
        for text in range(3):
            watched.give_back_all(watched.hold([text, text]))
        block = watched.find([again, again])[0]
        watched.share(block)
        watched.give_back(block)
        for _ in range(3):
            watched.take()


@check(2, "take_prefix holds every block of its argument, and counts the tokens that were found.")
def prefix_is_taken() -> None:
    watched = Watched(4, 4, with_stats=True)
    one = watched.hold([*range(9)])
    watched.take_prefix([])
    watched.take_prefix(watched.find([*range(9)]))
    watched.give_back_all(one)
    watched.take_prefix(watched.find([*range(9)], 7))


# Part 3: publish.

@check(3, "A full block is found once it is published, and not before.")
def found_once_published() -> None:
    watched = Watched(2, with_stats=True)
    first, second = watched.take(), watched.take()
    watched.fill(first, 2)
    watched.find([1, 2])
    watched.publish(first, None, [1, 2])
    watched.find([1, 2, 3, 4])
    watched.fill(second, 2)
    watched.publish(second, first, [3, 4])
    watched.find([1, 2, 3, 4])
    for pair in ([3, 4], [1, 2, 1, 2]):
        watched.find(pair)


@check(3, "Only full blocks are published, after their parents, and never with other contents: else ValueError.")
def refused() -> None:
    watched = Watched(3, with_stats=True)
    block, other, third = watched.take(), watched.take(), watched.take()
    publish, fill = watched.pool.publish, watched.fill
    watched.refuses(lambda: publish(block, None, [1, 2]), "publishing an empty block")
    fill(block, 1)
    watched.refuses(lambda: publish(block, None, [1, 2]), "publishing a block that is not full")
    watched.refuses(lambda: publish(block, None, [1]), "publishing a block that is not full")
    fill(block, 2)
    watched.refuses(lambda: publish(block, None, [1, 2, 3]), "publishing a block with too many tokens")
    fill(other, 2)
    watched.refuses(lambda: publish(other, block, [3, 4]), "publishing a block before its parent")
    watched.publish(block, None, [1, 2])
    watched.publish(other, block, [3, 4])
    watched.refuses(lambda: publish(block, None, [1, 3]), "publishing a block again with other tokens")
    watched.refuses(lambda: publish(other, None, [3, 4]), "publishing a block again with another parent")
    fill(third, 2)
    watched.publish(third, other, [1, 2])
    watched.find([1, 2, 3, 4, 1, 2])


@check(3, "Publishing a block again with the same contents changes nothing.")
def published_twice() -> None:
    watched = Watched(2, with_stats=True)
    table = watched.hold([1, 2, 3, 4])
    watched.publish(table[0], None, [1, 2])
    watched.publish(table[1], table[0], [3, 4])
    watched.find([1, 2, 3, 4])


@check(3, "The same tokens in two texts are two blocks, and the same tokens with one hash too.")
def two_texts_two_blocks() -> None:
    watched = Watched(6, with_stats=True)
    for text in ([1, 1, 9, 9], [2, 2, 9, 9], [9, 9]):
        watched.hold(text)
    for text in ([1, 1, 9, 9], [2, 2, 9, 9], [9, 9, 9, 9]):
        watched.find(text)
    watched = Watched(6, with_stats=True)
    for text in ([5, 6], [6, 5], [5, 6, 5, 5], [6, 5, 5, 5]):
        watched.hold([*map(Alike, text)])
    for text in product((5, 6), repeat=4):
        watched.find([*map(Alike, text)])


def hold_together(watched: Watched, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tables of requests that compute in the same steps: none can find what another has not published yet."""
    size, tables = watched.naive.size, []
    for text in texts:
        table = [watched.take() for _ in range(0, len(text), size)]
        for block in table:
            watched.fill(block, size)
        tables.append(table)
    for i in range(max(len(text) for text in texts) // size):
        for table, text in zip(tables, texts):
            if i < len(text) // size:
                table[i] = watched.publish(table[i], table[i - 1] if i else None, text[i * size : (i + 1) * size])
    return tables


@check(3, "Of two equal blocks one is kept: the second request holds the first one's, and its own is free again.")
def twins() -> None:
    for texts in ([[1, 2]] * 2, [[1, 2]] * 3, [[1, 2, 3, 4]] * 2, [[1, 2, 3, 4], [1, 2, 3, 5]], [[1, 2], [1, 2, 3, 4]]):
        watched = Watched(6, with_stats=True)
        tables = hold_together(watched, texts)
        for text in texts:
            watched.find(text)
        for table in tables:
            watched.give_back_all(table)
        expect_equal("num_available after both have left", watched.pool.num_available, 6)


@check(3, "A twin that nobody holds any more is held again, and cannot be evicted under its finder.")
def twin_is_cached() -> None:
    watched = Watched(2, with_stats=True)
    one, other = watched.take(), watched.take()
    watched.fill(one, 2)
    watched.fill(other, 2)
    watched.publish(one, None, [1, 2])
    watched.give_back(one)
    held = watched.publish(other, None, [1, 2])
    watched.take()
    watched.find([1, 2])
    watched.give_back(held)


@check(3, "Without prefix caching nothing is published: publish returns the block it was given.")
def without_caching() -> None:
    begin("pool = BlockAllocator(num_blocks=2, block_size=2, enable_prefix_caching=False)")
    pool = BlockAllocator(2, 2, False)
    blocks = [pool.take(), pool.take()]
    for block in blocks:
        pool.fill(block, 2)
        expect_equal("what publish(block, None, [1, 2]) returns", pool.publish(block, None, [1, 2]), block)
        expect(not pool.is_published(block), f"block {block} was published without prefix caching")
    expect_equal("find_prefix([1, 2], 2)", pool.find_prefix([1, 2], 2), [])


@check(3, "Whatever requests come and go, the tables are those of a naive model.")
def come_and_go() -> None:
    random = numbers("requests that come and go")
    for size, steps in ((4, 10), (6, 25), (9, 50)):
        watched, tables = Watched(size, 2, with_stats=True), []
        for _ in range(steps):
            texts = [[random.randrange(2) for _ in range(random.choice((2, 4)))] for _ in range(random.choice((1, 2)))]
            if sum(map(len, texts)) // 2 <= watched.pool.num_available:
                tables += hold_together(watched, texts) if random.random() < 0.5 else map(watched.hold, texts)
            elif tables:
                watched.give_back_all(tables.pop(random.randrange(len(tables))))


# Part 4: _evict.

@check(4, "An evicted block is empty, and is not found under its old contents.")
def old_contents() -> None:
    watched = Watched(1, with_stats=True)
    watched.give_back_all(watched.hold([1, 2]))
    block = watched.take()
    expect(not watched.pool.is_published(block), f"block {block} was evicted, and can still be found")
    watched.find([1, 2])
    watched.fill(block, 1)
    watched.fill(block, 2)
    watched.publish(block, None, [3, 4])
    watched.find([1, 2])
    watched.find([3, 4])
    watched.give_back(block)
    watched.hold([1, 2])
    watched.find([3, 4])


@check(4, "The least recently used text goes first, and each from its end.")
def oldest_text_first() -> None:
    for order in permutations(range(3)):
        watched = Watched(6)
        texts = [[text, text, 7, 7] for text in range(3)]
        tables = [watched.hold(text) for text in texts]
        for i in order:
            watched.give_back_all(tables[i])
        for _ in range(6):
            watched.take()
            for text in texts:
                watched.find(text)


@check(4, "A block never goes before one that can be found only through it.")
def children_first() -> None:
    texts = [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 4, 4], [1, 1, 5, 5]]
    for order in permutations(range(3)):
        watched = Watched(5)
        tables = [watched.hold(text) for text in texts]
        for i in order:
            watched.give_back_all(tables[i])
        for left in range(4, -1, -1):
            watched.take()
            found = {block for text in texts for block in watched.find(text)}
            expect(len(found) == left, f"{left} blocks are cached, and only {len(found)} of them can be found")


@check(4, "Evicting takes the same time in a pool of any size.")
def evicting_is_constant() -> None:
    expect_no_slower("take, which evicts,", lambda pool: pool.take(), all_cached(64), all_cached(2**12))


# Part 5: Scheduler._publish. Its checks stand in serving.py.

PART_5 = (second_request, generated_tokens, chunks, same_step, engine_with_other_parents, a_crowd)
