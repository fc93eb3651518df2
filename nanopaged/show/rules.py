"""Why does the system do what a frame shows? The rule behind each kind of event, in a sentence or two."""

from __future__ import annotations

# The rule behind each kind of event.
WHY = {
    "begins": "What happened before is not in the recording.",
    "arrives": "A request that arrives joins the queue, and holds no memory yet.",
    "waits": "Waiting requests are admitted in order. The first that does not fit stops those behind it, and no "
             "running request gives way to it.",
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
    "swaps": "Blocks that it holds alone are copied to CPU memory, and back when it resumes, instead of being computed "
             "again.",
    "computes": "K and V of these tokens are written into their slots, in all layers.",
    "gains": "The logits of a request's last row give its next token. It is known, and computed in a later step.",
    "starts": "The prompt is computed once. Each continuation holds all its blocks, the partly filled last one too, "
              "until one of them writes into it.",
    "publishes": "A full block never changes. From here on others find it by its words and by what comes before them.",
    "duplicate": "Two requests computed the same words in the same step. One copy is enough: both hold the first.",
    "finishes": "Full blocks stay findable, as cached blocks, until their memory is needed. Others are free at once.",
    "aborted": "Its blocks go back in the middle of its work.",
    "error": "Its logits are not finite: a weight is not, or half precision overflows. Its last blocks are not shared.",
    "fails": "A step computes first and records last. So nothing is lost: the same tokens are planned again.",
    "storm": "Goodput, the share of computed tokens that were computed for the first time, is below 0.8.",
}
RARE = [name for name in WHY if name not in ("takes", "computes", "gains", "publishes", "arrives")]  # worth a jump
