"""Why does the system do what a frame shows? The rule behind each kind of event, for one who sees it first."""

from __future__ import annotations

# The rule behind each kind of event.
WHY = {
    "arrives": "It joins the queue, and holds no memory yet.",
    "waits": "Waiting requests are admitted in order. The first that does not fit stops those behind it: nobody "
             "overtakes, and nobody who runs gives way to it.",
    "admitted": "It gets blocks for the tokens that this step computes, and no more: wherever they are free.",
    "shares": "A full block is found by its words and by all that comes before them. Its K and V need not be "
              "computed again, and all block tables that name it point at the same cell.",
    "resumes": "What is left of its blocks in the pool is found again. The rest is computed again: that is the price.",
    "takes": "Only when its last block is full does a request take one more, so at most one block each is partly "
             "empty.",
    "evicts": "Nobody holds a cached block, so it can be reused when none is free: the one used least recently first, "
              "and of one request the last first, since a block is found only if those before it are.",
    "copies": "A block that others hold must not change under them. So the writer gets a copy of its own, and the "
              "others keep theirs.",
    "no copy": "It is the last holder, so nobody could notice: it writes where it is.",
    "gives way": "Of the running requests the last in order gives way, so the first always advances. It keeps its "
                 "words, and waits. Its full blocks stay cached: what is left of them later is found again.",
    "swaps": "Its own blocks are copied to CPU memory, so that they need not be computed again.",
    "computes": "K and V of these tokens are written into their slots, in all layers.",
    "starts": "The prompt is computed once. Each continuation holds all its blocks, the partly filled last one too, "
              "until one of them writes into it.",
    "publishes": "A full block never changes. From here on others find it by its words and by what comes before them.",
    "duplicate": "Two requests computed the same words in the same step. One copy is enough: both hold the first.",
    "finishes": "Full blocks stay findable, as cached blocks, until their memory is needed. Others are free at once.",
    "aborted": "Its blocks go back in the middle of its work.",
    "fails": "A step computes first and records last. So nothing is lost: the same tokens are planned again.",
    "storm": "Goodput, the share of computed tokens that were computed for the first time, is below 0.8: work is "
             "thrown away nearly as fast as it is done.",
}
RARE = [name for name in WHY if name not in ("takes", "computes", "publishes", "arrives")]  # worth a jump
