"""What does a pool promise, in the plainest terms? A model that counts everything again, and a pool watched beside it.

Labs `blocks` and `prefix` grade with it. The model never says which free block is handed out: it asks whether the one
that was handed out was allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from nanopaged.block_allocator import BlockAllocator, OutOfBlocks
from nanopaged.lab.grading import Failed, Told, begin, expect, expect_equal, raising, story
from nanopaged.outputs import AllocatorStats


ALSO_KEPT_IN = {"filled_slots": "give_back and share", "shared_blocks": "give_back and share"}  # besides fill


class NaivePool:
    """A block is named by its id, and a published one also by all tokens from the start of the text to its end."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.holders, self.filled = [0] * num_blocks, [0] * num_blocks
        self.prefixes: list[tuple[int, ...] | None] = [None] * num_blocks  # of published blocks
        self.cached: list[int] = []  # least recently used first
        self.hit_tokens = self.evicted = 0

    def free(self) -> list[int]:
        return [block for block, holders in enumerate(self.holders) if not holders and block not in self.cached]

    def candidates(self) -> list[int]:
        """Which blocks `take` may hand out."""
        return self.free() or self.cached[:1]

    def take(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
            self.evicted += 1
        self.holders[block], self.filled[block], self.prefixes[block] = 1, 0, None

    def share(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
        self.holders[block] += 1

    def give_back(self, block: int) -> None:
        self.holders[block] -= 1
        if self.holders[block] == 0:
            if self.prefixes[block] is None:
                self.filled[block] = 0
            else:
                self.cached.append(block)

    def publish(self, block: int, parent: int | None, tokens: Sequence[int]) -> int:
        prefix = (() if parent is None else self.prefixes[parent]) + tuple(tokens)
        if prefix not in self.prefixes:
            self.prefixes[block] = prefix
        twin = self.prefixes.index(prefix)
        if twin != block:
            self.share(twin)
            self.give_back(block)
        return twin

    def find(self, tokens: Sequence[int], max_tokens: int) -> list[int]:
        ends = range(self.size, max_tokens + 1, self.size)
        found = []
        for prefix in [tuple(tokens[:end]) for end in ends]:
            if prefix not in self.prefixes:
                break
            found.append(self.prefixes.index(prefix))
        return found

    def stats(self) -> dict[str, int]:
        held = [block for block, holders in enumerate(self.holders) if holders]
        return dict(num_blocks=len(self.holders), referenced_blocks=len(held), cached_blocks=len(self.cached),
                    free_blocks=len(self.free()), shared_blocks=sum(self.holders[block] > 1 for block in held),
                    reserved_slots=len(held) * self.size, filled_slots=sum(self.filled[block] for block in held),
                    prefix_hit_tokens=self.hit_tokens, evicted_blocks=self.evicted)


class Watched:
    """A pool of the student's, and the model beside it: every operation is done to both, and what shows is compared."""

    def __init__(self, num_blocks: int, block_size: int = 2, with_stats: bool = False) -> None:
        begin(f"pool = BlockAllocator(num_blocks={num_blocks}, block_size={block_size})")
        self.pool, self.naive = Told("pool", BlockAllocator(num_blocks, block_size)), NaivePool(num_blocks, block_size)
        self.with_stats = with_stats

    def take(self) -> int:
        candidates = self.naive.candidates()
        if not candidates:
            with raising(OutOfBlocks, "take, with every block held,"):
                self.pool.take()
            self.compare("after an error")
            raise Failed("a block was asked for, and none can be had")  # a scenario of the grader's that is wrong
        block = self.pool.take()
        if not (isinstance(block, int) and block in candidates):
            raise Failed(self._why_not(block, candidates))
        self.naive.take(block)
        self.compare("after take")
        return block

    def _why_not(self, block: object, candidates: list[int]) -> str:
        naive = self.naive
        if not (isinstance(block, int) and 0 <= block < len(naive.holders)):
            return f"take should hand out one of the {len(naive.holders)} blocks, and gave {block!r}"
        if naive.holders[block]:
            return f"take gave block {block}, which is held already"
        if block in naive.cached and naive.free():
            return f"take gave block {block}, which is cached, although block {candidates[0]} is free"
        return f"take gave block {block}: block {candidates[0]} is the least recently used of the cached ones"

    def share(self, block: int) -> None:
        self.pool.share(block)
        self.naive.share(block)
        self.compare("after share")

    def give_back(self, block: int) -> None:
        self.pool.give_back(block)
        self.naive.give_back(block)
        self.compare("after give_back")

    def give_back_all(self, table: list[int]) -> None:
        before = [*table]
        self.pool.give_back_all(table)
        for block in reversed(before):
            self.naive.give_back(block)
        expect_equal("a table after give_back_all", [*table], [])
        self.compare("after give_back_all")

    def fill(self, block: int, num_slots: int) -> None:
        self.pool.fill(block, num_slots)
        self.naive.filled[block] = num_slots
        self.compare("after fill")

    def publish(self, block: int, parent: int | None, tokens: Sequence[int]) -> int:
        expected = self.naive.publish(block, parent, tokens)
        got = self.pool.publish(block, parent, tokens)
        expect_equal("the block that publish returns", got, expected)
        self.compare("after publish")
        return expected

    def find(self, tokens: Sequence[int], max_tokens: int | None = None) -> list[int]:
        """Told only if it is wrong: finding changes nothing, so that a story is shorter without it."""
        limit = len(tokens) if max_tokens is None else max_tokens
        found = self.pool.find_prefix(tokens, limit)
        expect_equal(f"find_prefix({_short(tokens)}, {limit})", found, self.naive.find(tokens, limit))
        self.compare("after find_prefix")
        story.pop()
        return found

    def take_prefix(self, blocks: list[int]) -> None:
        self.pool.take_prefix(blocks)
        for block in blocks:
            self.naive.share(block)
        self.naive.hit_tokens += len(blocks) * self.naive.size
        self.compare("after take_prefix")

    def hold(self, tokens: Sequence[int]) -> list[int]:
        """A table for tokens, made as a request makes it: what is found is shared, the rest computed and published."""
        size = self.naive.size
        table = self.find(tokens)
        if table:
            self.take_prefix(table)
        table = [*table]
        for start in range(len(table) * size, len(tokens), size):
            piece = tokens[start : start + size]
            block = self.take()
            self.fill(block, len(piece))
            if len(piece) == size:
                block = self.publish(block, table[-1] if table else None, piece)
            table.append(block)
        return table

    def refuses(self, call: Callable[[], object], what: str) -> None:
        """`call` must raise ValueError and change nothing."""
        with raising(ValueError, what):
            call()
        self.compare(f"after {what}, which raised,")

    def compare(self, when: str) -> None:
        """The pool against the model, without a word in the story."""
        pool, naive = self.pool._subject, self.naive
        expect_equal(f"num_available {when}", pool.num_available, len(naive.free()) + len(naive.cached))
        for block, holders in enumerate(naive.holders):
            expect_equal(f"the number of holders of block {block} {when}", pool.ref_count(block), holders)
            expect_equal(f"is_published({block}) {when}", pool.is_published(block), naive.prefixes[block] is not None)
        expect_equal(f"cached_blocks() {when}", pool.cached_blocks(), set(naive.cached))
        if self.with_stats:
            stats = pool.stats()
            expect(isinstance(stats, AllocatorStats), f"stats() should return AllocatorStats, and gave {stats!r}")
            for name, figure in asdict(stats).items():
                right, kept = naive.stats()[name], ALSO_KEPT_IN.get(name)
                expect(figure == right, f"{name} in stats() {when} should be {right!r}, and is {figure!r}"
                       + (f": look at {kept} too, which keep this sum" if kept else ""))


def _short(tokens: Sequence[int]) -> str:
    return repr([*tokens]) if len(tokens) <= 12 else f"[{len(tokens)} tokens]"


def fastest_s(operation: Callable[[], object], times: int = 40) -> float:
    fastest = 1.0
    for _ in range(times):
        start = time.perf_counter()
        operation()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def expect_no_slower(what: str, operation: Callable[[BlockAllocator], object], small: BlockAllocator,
                     large: BlockAllocator) -> None:
    """The fastest of many calls, so noise does not count. A walk over the large pool takes hundreds of times longer."""
    one, other = fastest_s(lambda: operation(small)), fastest_s(lambda: operation(large))
    begin()
    expect(other < 25 * one + 5e-6,
           f"the time of {what} is {one * 1e6:.1f} us in a pool of {small.num_blocks} blocks, and {other * 1e6:.0f} us "
           f"in one of {large.num_blocks}: it should be the same, so nothing may walk over the pool")


def all_cached(num_blocks: int) -> BlockAllocator:
    """A pool in which every block is cached."""
    pool = BlockAllocator(num_blocks, 1)
    blocks = [pool.take() for _ in range(num_blocks)]
    for token, block in enumerate(blocks):
        pool.fill(block, 1)
        pool.publish(block, None, [token])
    for block in blocks:
        pool.give_back(block)
    return pool
