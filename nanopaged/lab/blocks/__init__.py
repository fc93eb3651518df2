"""Lab: who holds which block?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

POOL = "block_allocator:BlockAllocator"

LAB = Lab(
    name="blocks",
    title="Hand out blocks, and take them back",
    hours="3 to 5",
    learns="how a pool of equal blocks serves requests of any length with hardly any waste, and why a freed block is "
           "not erased",
    needs_torch=False,
    parts=(
        Part("hands out blocks", (f"{POOL}.num_available", f"{POOL}.take"), (
            "Look at the three states in the module's docstring. In which of them does nobody hold the block? Each of "
            "these has a collection of its own in `__init__`.",
            "Raise OutOfBlocks before you change anything. Free blocks go first. Only when there is none does `_evict` "
            "empty a cached one for you.",
            "`num_available` adds two lengths. `take` removes a block from the end of `_free`, or else asks `_evict`. "
            "Then it sets the block's reference count to 1 and returns its id.")),
        Part("takes a block back", (f"{POOL}.give_back",), (
            "What becomes of the block depends on two things: how many holders are left, and whether it can still be "
            "found.",
            "Look before you count down: a block without a holder is an error, and an error must change nothing. A "
            "block with holders left only counts down.",
            "When the last holder leaves, a block with a key becomes the last of `_cached`, and keeps its filled "
            "slots. Another block goes to `_free`, with 0 filled slots. Keep the sums right for part 4: "
            "`_filled_slots` is over held blocks, `_shared_blocks` counts those with more than one holder.")),
        Part("takes a whole table back", (f"{POOL}.give_back_all",), (
            "`_evict` takes the block that was cached first. Which block of a table should that be?",
            "A block is found only through all blocks before it. So the last block of a table must go first.",
            "Take blocks off the end of the table until it is empty. `pop` without an argument works on a list and on "
            "an array.")),
        Part("counts", (f"{POOL}.fill", f"{POOL}.stats"), (
            "Which of the figures are lengths of something, and which need a running sum? `__init__` has the sums.",
            "`fill` is called with 1, then 2, then 3 for the same block. What must be added to the sum each time?",
            "`fill` adds the difference to what the block had before. In `stats` a referenced block is one that is not "
            "available, and each of them reserves `block_size` slots. Nothing may walk over the pool. If a sum is "
            "wrong only after a block was given back, repair `give_back`: part 2 could not see the sums.")),
    ),
    scenario=Scenario(
        requests=(
            (0, "She kept a card for every family, and on it she wrote. She kept a card for", {"max_tokens": 20}),
            (0, "A town kept its letters in a library once. A town kept its letters in", {"max_tokens": 40}),
            (24, "So the shelves stood empty, and the doors were shut. So the shelves stood", {"max_tokens": 24})),
        options={"num_blocks": 12},
        watch="The third request comes when the first has left. Which blocks does it get, and what was in them?"),
)
