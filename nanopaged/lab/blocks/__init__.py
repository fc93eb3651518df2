"""Lab: who holds which block?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

LAB = Lab(
    name="blocks",
    title="Hand out blocks, and take them back",
    hours="3 to 5",
    learns="how a pool of equal blocks serves requests of any length with hardly any waste, and why a freed block is "
           "not erased",
    needs_torch=False,
    parts=(
        Part("hands out blocks", ("block_allocator:BlockAllocator.num_available", "block_allocator:BlockAllocator.take"), (
            "Which two collections of __init__ hold the blocks that nobody holds?",
            "A free block comes first. Only when none is free does `_evict` empty a cached one.",
            "Raise OutOfBlocks before anything is changed. Then take a block from one of the two, and count its "
            "holder.")),
        Part("takes a block back", ("block_allocator:BlockAllocator.give_back",), (
            "Count down first. What becomes of the block depends on how many holders are left, and on `_keys`.",
            "A block with no holder is free if it is not published, else cached, as the last of `_cached`.",
            "Keep the two running counts too: `_shared_blocks` when the second holder leaves, `_filled_slots` when the "
            "last one does. A free block has no filled slot.")),
        Part("takes a whole table back", ("block_allocator:BlockAllocator.give_back_all",), (
            "Which end of the table must become the least recently used?",
            "A child must be evicted before its parent, so it must be given back before it.",
            "Take blocks off the end of the table until it is empty.")),
        Part("counts", ("block_allocator:BlockAllocator.fill", "block_allocator:BlockAllocator.stats"), (
            "`fill` says how many slots of one block hold tokens; the pool's sum must follow it.",
            "Only the difference to what the block had before is added.",
            "Nothing in `stats` walks over the pool: every figure is a length or a running count.")),
    ),
    scenario=Scenario(
        requests=((0, "She kept a card for every family, and on it she wrote. She kept a card for", {"max_tokens": 20}),
                  (0, "A town kept its letters in a library once. A town kept its letters in", {"max_tokens": 40}),
                  (24, "So the shelves stood empty, and the doors were shut. So the shelves stood", {"max_tokens": 24})),
        options={"num_blocks": 20},
        watch="The third request comes when the first has left: it gets blocks that were given back, in any order."),
)
