"""Lab: who runs in this step?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

LAB = Lab(
    name="scheduler",
    title="Rebuild the batch in every step",
    hours="8 to 12",
    learns="how requests of any length join and leave a batch step by step, and why one that gives way loses no token",
    needs_torch=False,
    parts=(
        Part("records a step", (
            "scheduler:Scheduler.update", "scheduler:Scheduler._finish", "request:Request.receive"), (
            "Three things end up in a step's record: tokens that are computed, blocks that became full, and tokens "
            "that were drawn. In which order can the rest of the class rely on them?",
            "Go over `requests`, `starts` and `num_tokens` together. Each row ends at start + num_tokens; divmod with "
            "the block size says which block that is in. Then start the followers of `step.leaders`: only after that "
            "can all of `step.sampled` receive their tokens.",
            "First take failed requests out of `step.sampled` and `step.leaders`. For each other row: set "
            "`num_computed_tokens`, count what lies below `most_computed_tokens`, fill and `_publish` the blocks that "
            "the row has made full, fill the last one. Then followers, tokens and ends, failures, `running`, "
            "`referenced_blocks`, `_unrecorded = None`, and the listeners last.")),
        Part("admits waiting requests", ("scheduler:Scheduler._admit", "scheduler:Scheduler._fits"), (
            "A queue is served from its front. Which four things can stop the first request?",
            "Seats, budget, room and the policy. A request that is alone is asked about seats only: it fits the pool, "
            "or `add` had refused it. And it finds less than it knows: the last token is computed in any case.",
            "Loop while somebody waits and the budget lasts: first(), seats, find_prefix of at most known - 1 tokens, "
            "`_fits` if others run, `_seat`, note an Admission, `_plan`. In `_fits`, blocks of the prefix that nobody "
            "holds are counted in num_available, and are not room any longer once the candidate holds them.")),
        Part("plans a step", ("scheduler:Scheduler.schedule", "scheduler:Scheduler._plan"), (
            "Who is asked first, and what is left when the last one was asked?",
            "Running requests first, in their order, each with min(its tokens that are not computed, the budget that "
            "is left). `_make_room` may take requests off the end of `running` while you go over it. Then `_admit`, "
            "unless somebody gave way in this plan.",
            "A plan that was never recorded has still happened: hand its moves, admitted and preempted on to the new "
            "Step, and set `_unrecorded`. `_plan` calls `_make_room` if the table is too short for start + "
            "num_tokens, or if `may_share_tail`. End with `step.arrange()`.")),
        Part("cuts prompts into chunks", ("scheduler:Scheduler.schedule", "scheduler:Scheduler._plan"), (
            "Where would a prefill phase be in your code? There should be none.",
            "A chunk is a row like any other: it begins at num_computed_tokens, and ends where the budget ends.",
            "Cut num_tokens down to step.budget, not to max_num_batched_tokens, and never to nothing: a request that "
            "cannot have all its tokens in this step takes what is left.")),
        Part("gives way", ("scheduler:Scheduler._make_room", "scheduler:Scheduler._preempt"), (
            "Which running request has waited least for what it would lose?",
            "The last of `running`. Take requests off its end until there is room, or until it was the request "
            "itself. Ask again each time: who gave way may have held the block that would have been copied.",
            "Missing are blocks_for(end) less those of the table. While num_available is less than these and the "
            "copy: pop the last, `_preempt` it, and return False if it was the request. `_preempt` keeps token_ids "
            "and the key; it leaves, notes most_computed_tokens, has computed nothing, and is pushed into "
            "`waiting`.")),
        Part("aborts a request", ("scheduler:Scheduler.abort",), (
            "In which two places can a request be, and who else is there that is in neither?",
            "It is in `running` or in `waiting`. Its followers are in neither, and end with it. `_finish` gives "
            "blocks back only if the status is RUNNING.",
            "Take it out of `running` or let it leave `waiting`, which raises ValueError for a request that is not "
            "there; then `_finish` it and its followers with \"abort\", and tell the listeners last.")),
    ),
    scenario=Scenario(
        requests=((0, "The lamp was lit, and the door stood open. The lamp was lit, and", {"max_tokens": 24}),
                  (0, "Who reads at night sleeps by day. Who reads at night", {"max_tokens": 44}),
                  (3, "up and down, up and", {"max_tokens": 8}),
                  (6, "left and right, left", {"max_tokens": 36})),
        options={"num_blocks": 20, "block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 16, "watermark": 0.0},
        watch="No step computes more than 16 tokens, so prompts come in chunks. The third request joins and leaves "
              "while others run. When all 20 blocks are held, the last one gives way, and comes back with its text.",
    ),
)
