"""Where does a preempted request's KV wait, if it is not thrown away?

Recomputing costs arithmetic, which grows with model and context; swapping costs two copies over the
bus (vLLM paper, section 4.5). The swap space is a second pool, in CPU memory, with the same
allocator. This file decides which blocks move; `kv_cache` moves their contents.

    table before     │ 4   7 │ 9   2   6 │        4 and 7 are shared: they stay in the pool, and are
    CPU blocks       │ -   - │ 0   1   2 │        found again as a prefix when the request returns
"""

from __future__ import annotations

from typing import NamedTuple

from nanopaged.block_allocator import BlockAllocator, blocks_for
from nanopaged.invariants import InvariantError
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step
from nanopaged.validation import require_int


class Swapped(NamedTuple):
    """What of one request is in CPU memory: logical block i in `blocks[i]`, of `num_tokens` computed tokens."""

    blocks: dict[int, int]
    num_tokens: int


class SwappingScheduler(Scheduler):
    """A scheduler that moves the blocks of preempted requests to `swap_blocks` blocks of CPU memory.

    What does not fit there as a whole is recomputed. The other arguments are those of `Scheduler`.
    """

    def __init__(self, allocator: BlockAllocator, *arguments: object, swap_blocks: int, **options: object) -> None:
        super().__init__(allocator, *arguments, **options)
        self.swap_space = BlockAllocator(require_int("swap_blocks", swap_blocks, 1), self.block_size, False)
        self.swapped: dict[Request, Swapped] = {}

    def _preempt(self, request: Request, step: Step) -> None:
        self._swap_out(request)
        super()._preempt(request, step)

    def _swap_out(self, request: Request) -> None:
        """Plans the move of a request's own computed blocks to the CPU, if all of them fit.

        Blocks that another request still needs are not moved: they are the beginning of the table,
        since a request that holds a block holds the blocks before it.
        """
        pool, table = self.allocator, request.block_table
        used = blocks_for(request.num_computed_tokens, self.block_size)
        stay = 0
        while stay < used and pool.is_published(table[stay]) and pool.ref_count(table[stay]) > 1:
            stay += 1
        if stay == used or self.swap_space.num_available < used - stay:
            return
        blocks = {i: self.swap_space.take() for i in range(stay, used)}
        for i, block in blocks.items():
            self._move("to_host", table[i], block)
        self.swapped[request] = Swapped(blocks, request.num_computed_tokens)

    def _restorable_tokens(self, request: Request, hit: int) -> int:
        """0 if the hit no longer reaches as far as the swapped blocks.

        The gap must be recomputed then, and what follows it too, since one number says how far a request
        is computed.
        """
        swapped = self.swapped.get(request)
        if swapped is None or hit < min(swapped.blocks) * self.block_size:
            return 0
        return max(0, swapped.num_tokens - hit)

    def _seat(self, request: Request, prefix: list[int]) -> None:
        """Plans the way back, behind the prefix; what is restored can be found by other requests again."""
        super()._seat(request, prefix)
        table, size = request.block_table, self.block_size
        request.num_computed_tokens += self._restorable_tokens(request, request.num_computed_tokens)
        for i in range(len(table), blocks_for(request.num_computed_tokens, self.block_size)):
            table.append(self.allocator.take())
            self._move("to_pool", self.swapped[request].blocks[i], table[i])
            filled = min(size, request.num_computed_tokens - i * size)
            self.allocator.fill(table[i], filled)
            if filled == size:
                self._publish(request, i)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        """Frees a request's CPU blocks. Moves that are planned read them before they are written again."""
        if request in self.swapped:
            for block in self.swapped.pop(request).blocks.values():
                self.swap_space.give_back(block)

    def _finish(self, request: Request, reason: str) -> None:
        self._forget(request)
        super()._finish(request, reason)

    def check_invariants(self) -> None:
        super().check_invariants()
        self.swap_space.check_invariants([list(swapped.blocks.values()) for swapped in self.swapped.values()])
        strangers = self.swapped.keys() - set(self.waiting)
        if strangers:
            raise InvariantError(f"blocks in the swap space belong to requests that do not wait: {strangers}")
