"""Lab: what may two requests share?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

POOL = "block_allocator:BlockAllocator"
LETTER = "Dear librarian, a town kept its letters in a library. A town kept its letters"

LAB = Lab(
    name="prefix",
    title="Find a common prefix instead of computing it again",
    hours="4 to 6",
    learns="when two requests may share a block, how it is found, and which cached block is given up first",
    needs_torch=False,
    parts=(
        Part("finds a prefix", (f"{POOL}.find_prefix",), (
            "A block is found under a key of two things. Its tokens are one. What else do its K and V depend on?",
            "Walk over the text block by block. The first block's parent is ROOT_IDENTITY. What is the parent of the "
            "block after one that was found?",
            "Look up (identity so far, tuple of the block's tokens) in `_index`. If it is there, append it and go on "
            "with `_identities` of it, else stop. A block counts only if it ends at `max_tokens` or before.")),
        Part("shares what was found", (f"{POOL}.share", f"{POOL}.take_prefix"), (
            "A found block may be in two states. In which of them may `take` hand it out to somebody else?",
            "A cached block must leave `_cached`, and its filled slots count again. A block without holders and a key "
            "is free: there is nothing to share.",
            "Ask for the number of holders first. 0: raise, or take it out of `_cached` and add its filled slots to "
            "the sum. 1: one more block is shared. Then count up. `take_prefix` shares each block, and counts "
            "tokens.")),
        Part("publishes a full block", (f"{POOL}.publish",), (
            "What if another request has published the same tokens after the same beginning, one line earlier?",
            "First everything that raises. Then the key: the parent's identity and the tokens. Then ask which block "
            "stands under that key: none, this very block, or a twin.",
            "`dict.setdefault` answers and enters in one call. None: give the block its key and the next identity. A "
            "twin: share the twin, give your own block back, and return the twin.")),
        Part("evicts a block", (f"{POOL}._evict",), (
            "Everything that was written down when the block was published must be undone. What was that?",
            "`_cached` is in the order in which blocks were given back. Which end is the least recently used?",
            "Pop the first of `_cached`; delete its key from `_index`; set its key to None and its filled slots to 0; "
            "count it; return it.")),
        Part("publishes what a step has filled", ("scheduler:Scheduler._publish",), (
            "`publish` answers with a block. Is it always the one you passed?",
            "The parent of logical block i is logical block i - 1 of the same table. Block 0 has none.",
            "The tokens of logical block i begin at position i * block_size. Write the answer of `publish` into the "
            "table.")),
    ),
    scenario=Scenario(
        requests=(
            (0, f"{LETTER} in", {"max_tokens": 24}),
            (0, LETTER, {"max_tokens": 12}),
            (8, "Dear librarian, the shelves stood empty. Where the shelves stood", {"max_tokens": 16}),
            (25, "So the shelves stood empty, and the doors were shut. So the shelves stood", {"max_tokens": 4}),
            (31, f"{LETTER} in", {"max_tokens": 8})),
        options={"num_blocks": 11},
        watch="The first two requests compute the same four blocks in one step, and hold one copy of each after it. "
              "The third finds one block. The fourth evicts three. The last asks what the first one asked, and finds "
              "what is left."),
)
