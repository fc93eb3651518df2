"""Where does a preempted request's KV wait, if not in the bin?

Recomputing costs arithmetic, which grows with model and context; swapping costs two copies over the
bus (vLLM paper, section 4.5). The swap space is a second pool, in CPU memory, with the same
allocator. This file keeps the books; `kv_cache` moves the contents.

    table before     │ 4   7 │ 9   2   6 │        4 and 7 are held by others too: they stay where they
    CPU blocks       │ -   - │ 0   1   2 │        are, and on return are found again as a shared prefix
"""

from __future__ import annotations

from typing import NamedTuple

from nanopaged.block_allocator import BlockAllocator
from nanopaged.request import Request


class BlockMove(NamedTuple):
    """All layers of one block, to be copied: within the pool ("copy"), to the CPU ("out"), back ("in")."""

    kind: str
    source: int
    target: int


class SwapSpace:
    """The CPU blocks of requests that were preempted.

    Args:
        num_blocks: blocks in CPU memory; 0 turns swapping off.
        pool: the allocator of the device's blocks.
        moves: where planned moves are appended, in the order in which they must happen.
    """

    def __init__(self, num_blocks: int, pool: BlockAllocator, moves: list[BlockMove]) -> None:
        self.pool, self.moves = pool, moves
        self.allocator = BlockAllocator(num_blocks, pool.block_size, False) if num_blocks else None

    def swap_out(self, request: Request) -> bool:
        """Plans the move of a request's own computed blocks to the CPU; False where they do not fit.

        Blocks that another request still needs are not moved: they are the beginning of the table,
        since whoever holds a block holds the blocks before it.
        """
        table, used = request.block_table, -(-request.num_computed_tokens // self.pool.block_size)
        stay = 0
        while stay < used and self.pool.is_published(table[stay]) and self.pool.ref_count(table[stay]) > 1:
            stay += 1
        if self.allocator is None or stay == used or self.allocator.num_available < used - stay:
            return False
        for i in range(stay, used):
            request.swapped_blocks[i] = self.allocator.take()
            self.moves.append(BlockMove("out", table[i], request.swapped_blocks[i]))
        request.num_swapped_tokens = request.num_computed_tokens
        return True

    def restorable_tokens(self, request: Request, prefix_blocks: int) -> int:
        """Tokens that need not be recomputed, if the first `prefix_blocks` blocks are found in the pool.

        Where these no longer reach as far as the swapped blocks, the gap must be recomputed; and what
        follows it too, since one number says how far a request is computed.
        """
        found = prefix_blocks * self.pool.block_size
        gap = not request.swapped_blocks or prefix_blocks < min(request.swapped_blocks)
        return found if gap else max(found, request.num_swapped_tokens)

    def swap_in(self, request: Request) -> int:
        """Plans the way back, behind the prefix in the block table; returns the tokens that are computed then."""
        table, size = request.block_table, self.pool.block_size
        computed = self.restorable_tokens(request, len(table))
        for i in range(len(table), -(-computed // size)):
            table.append(self.pool.take())
            self.moves.append(BlockMove("in", request.swapped_blocks[i], table[i]))
            self.pool.fill(table[i], min(size, computed - i * size))
        self.drop(request)
        return computed

    def drop(self, request: Request) -> None:
        """Forgets what a request has in CPU memory. Planned moves still read it before it is written again."""
        for block in request.swapped_blocks.values():
            self.allocator.give_back(block)
        request.swapped_blocks.clear()
