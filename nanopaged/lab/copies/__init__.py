"""Lab: how can several continuations share what they have in common?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

CAT_OR_BAT = ("In the garden sat a cat, black as night. In the garden sat a bat, white as snow. "
              "In the garden sat a")

LAB = Lab(
    name="copies",
    title="Share blocks until somebody writes",
    hours="4 to 7",
    learns="how several continuations share one prompt, and why n writers of one block need n - 1 copies",
    parts=(
        Part("starts the other continuations of a prompt", ("scheduler:Scheduler._start_followers",), (
            "What does a follower need, so that it looks as if it had computed the prompt itself?",
            "It runs, has as many computed tokens as the leader, and holds the same blocks. Its table is its own list, "
            "and each block counts one more holder.",
            "Nothing is copied here. Set `may_share_tail` for all of them, the leader too, and keep `running` sorted "
            "with insort. Then the leader has no followers any more.")),
        Part("answers which block a request may write into", ("block_allocator:BlockAllocator.fork",), (
            "Who could notice if this block changed? There are two kinds of readers: those of now, and those to come.",
            "If the caller is the only holder, and nobody can find the block, it may write into it as it is.",
            "Else take a block first, since that may raise. It holds as many tokens as the old one. Then give the old "
            "one back, once.")),
        Part("gives a writer its own copy of a shared tail",
             ("scheduler:Scheduler._shares_tail", "scheduler:Scheduler._copy_tail"), (
                 "The next token is written at position `num_computed_tokens`. Which block of the table is that, and "
                 "is anything in it yet?",
                 "A tail is shared if it is partly filled, and has more than one holder at this moment. A full block "
                 "is never written again, so it is never copied.",
                 "fork gives the copy. The contents do not move now: plan it with `_move`, from the old block to the "
                 "copy, and put the copy into the table.")),
        Part("carries planned moves out", ("kv_cache:KVCache.carry_out",), (
            "One move is one block: how many numbers is that, in a tensor of the shape that `blocks` has?",
            "`blocks[:, :, i]` is K and V of all layers of block i, and `host_blocks[i]` is the same. Moves of one "
            "kind that follow each other are a group.",
            "For a group of copies, index the third dimension with all targets and all sources at once. If a target "
            "occurs twice, its last source counts. Delete moves from the front of the same list once they are made.")),
    ),
    scenario=Scenario(
        requests=((0, CAT_OR_BAT, {"max_tokens": 20, "n": 3, "seed": 10, "temperature": 2.0}),
                  (2, "The cat sat on a mat. The cat sat on a", {"max_tokens": 20, "n": 2})),
        options={"num_blocks": 26},
        watch="All three continuations hold the prompt's blocks (×3). In the step in which they write, two get a copy "
              "of the last block, which is not full, and the third keeps it."),
)
