"""What must hold of a block allocator? A naive model beside it: which blocks are held, how often, and which are cached."""

from __future__ import annotations

from nanopaged.block_allocator import BlockAllocator, OutOfBlocks
from nanopaged.lab.grading import Told, begin, check, expect, expect_equal, raising


def pool(num_blocks: int, block_size: int = 2) -> BlockAllocator:
    begin(f"pool = BlockAllocator(num_blocks={num_blocks}, block_size={block_size})")
    return Told("pool", BlockAllocator(num_blocks, block_size))


@check(1, "A block is handed out once: no id twice, and none that does not exist.")
def no_block_twice() -> None:
    for size in (1, 2, 3, 8):
        blocks = pool(size)
        taken = [blocks.take() for _ in range(size)]
        expect(sorted(taken) == list(range(size)), f"{size} calls of take should give the ids 0 to {size - 1}, in any "
               f"order, and gave {taken}")


@check(1, "When every block is held, take raises OutOfBlocks, and nothing is changed.")
def out_of_blocks() -> None:
    for size in (1, 3):
        blocks = pool(size)
        for _ in range(size):
            blocks.take()
        for _ in range(2):
            with raising(OutOfBlocks, "take, with every block held,"):
                blocks.take()
        expect_equal("num_available", blocks.num_available, 0)


@check(2, "A block that was given back is handed out again.")
def given_back() -> None:
    blocks = pool(1)
    block = blocks.take()
    blocks.give_back(block)
    expect_equal("num_available", blocks.num_available, 1)
    expect_equal("the block that take gives", blocks.take(), block)


@check(2, "A block that nobody holds cannot be given back: ValueError, and nothing is changed.")
def double_return() -> None:
    blocks = pool(2)
    block = blocks.take()
    blocks.give_back(block)
    with raising(ValueError, "giving back a block that nobody holds"):
        blocks.give_back(block)
    taken = {blocks.take(), blocks.take()}
    expect(len(taken) == 2, "the pool hands out a block twice after a double return")


@check(3, "A table is empty after give_back_all.")
def all_given_back() -> None:
    blocks = pool(3)
    table = [blocks.take() for _ in range(3)]
    blocks.give_back_all(table)
    expect_equal("the table", table, [])
    expect_equal("num_available", blocks.num_available, 3)


@check(4, "The filled slots are those of referenced blocks.")
def filled() -> None:
    blocks = pool(3, block_size=4)
    block = blocks.take()
    blocks.fill(block, 3)
    expect_equal("filled_slots", blocks.stats().filled_slots, 3)
    blocks.give_back(block)
    expect_equal("filled_slots", blocks.stats().filled_slots, 0)
