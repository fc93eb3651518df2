"""How can kernels of attention go wrong?"""

from __future__ import annotations

from dataclasses import replace

from nanopaged.lab.bugs import Bug
from nanopaged.lab.kernel import LAB

FILE = "attention_kernels.py"
SMALL_BLOCKS = replace(LAB.scenario, options=LAB.scenario.options | {"block_size": 8, "num_blocks": 16},
                       watch="Copycat's heads are large, so its tiles have 16 tokens: two blocks.")
UNSPLIT = "The lab's scenario splits no context, and does not show it."

BUGS = (
    Bug("padding-rows-are-written", 1,
        "A slot is a slot, so somebody left out the branch. But a recorded batch has rows that only fill it up, and "
        "their slot is -1. Rows that CUDA graphs add also broke this kernel in vLLM (vLLM #13922).",
        "A token of another request is overwritten now and then, with CUDA graphs only.",
        ((FILE, "    if slot < 0:\n        return\n", ""),)),
    Bug("heads-rounded-up", 1,
        "A range in Triton has a power of two elements. Somebody forgot to mask those after the last head: with 12 "
        "heads, GPT-2's, four are written that do not exist.",
        "The first heads of the next block are overwritten, often another request's. With 4 heads, copycat's, nothing.",
        ((FILE, "real = (heads < NUM_KV_HEADS)", "real = (heads < TILE_HEADS)"),)),
    Bug("only-the-sum-is-rescaled", 2,
        "The sum of exponentials must be rescaled when the maximum grows, and it was. The weighted sum of V must be, "
        "too.",
        "Answers are too large wherever scores rise along the context.",
        ((FILE, "weighted = weighted * shrink[:, None] +", "weighted = weighted +"),)),
    Bug("a-maximum-that-begins-at-zero", 2,
        "A maximum over positive numbers may begin at 0. Scores are not positive: below -150 all exponentials become "
        "0, and so does their sum.",
        "A row whose scores are all very negative becomes 0, as if it had seen nothing. Copycat has no such row.",
        ((FILE, 'maximum = tl.full((TILE_ROWS,), float("-inf"), tl.float32)',
          "maximum = tl.zeros((TILE_ROWS,), tl.float32)"),)),
    Bug("one-block-for-a-tile", 2,
        "Somebody looked the block up once for each tile. That holds while a tile is no wider than a block.",
        "Right with block_size=64, wrong with 16: a tile reads its first block four times, and the other three never.",
        ((FILE, "tl.load(table + place // BLOCK_SIZE, mask=inside",
          "tl.load(table + start // BLOCK_SIZE + 0 * place, mask=inside"),), SMALL_BLOCKS),
    Bug("the-tail-of-v-is-loaded", 2,
        "Positions after the end have the score -inf and the weight 0, so V was loaded without a mask. But 0 * nan is "
        "nan, and those slots hold whatever was there. vLLM's first kernel met it (vLLM #936), and its Triton kernels "
        "years later (vLLM #47305).",
        "NaN, in requests whose last block held something that was not finite.",
        ((FILE, "v_tile = tl.load(v_cache + (block * v_stride_block + in_block)[:, None] + dims[None, :],\n"
                "                             mask=inside[:, None], other=0.0)",
          "v_tile = tl.load(v_cache + (block * v_stride_block + in_block)[:, None] + dims[None, :])"),)),
    Bug("the-natural-logarithm", 2,
        "log is log. But the kernels' exponentials are powers of two, and the maximum is a score times log2(e).",
        "Right while no context is split. Then parts get wrong weights, and long contexts drift. " + UNSPLIT,
        ((FILE, "maximum + tl.log2(total)", "maximum + tl.log(total)"),)),
    Bug("the-last-part-reads-on", 3,
        "All parts have the same length, somebody thought. The last one ends with the context.",
        "A split context also reads what its last block held before; sometimes NaN. " + UNSPLIT,
        ((FILE, "end = tl.minimum(begin + tokens, seq_len)", "end = begin + tokens"),)),
    Bug("heads-without-their-group", 3,
        "With one query head for each key-value head, their numbers are the same. With groups, the first query head of "
        "a group is kv_head * GROUP.",
        "A model with grouped heads talks nonsense. GPT-2 and copycat have no groups: no symptom.",
        ((FILE, "head = kv_head * GROUP + rows\n", "head = kv_head + rows\n"),)),
    Bug("a-row-without-a-context-is-nan", 3,
        "The sum of exponentials is never 0, since each row sees itself. A row that only fills up a batch sees "
        "nothing.",
        "None in the text, but NaN in rows of a recorded batch: a check for NaN finds them in each step.",
        ((FILE, "    total = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing: its mean is 0, and its "
                "log -inf\n", ""),)),
    Bug("parts-are-averaged", 4,
        "Each part is a mean, and the mean of means is the mean: if all weigh the same.",
        "The few tokens of the last part, the newest, count as much as 128 others. " + UNSPLIT,
        ((FILE, "weight = tl.exp2(log_sum - pivot)", "weight = tl.where(part < used, 1.0, 0.0)"),)),
    Bug("parts-that-nobody-wrote", 4,
        "The grid has num_parts for each request, so all were merged. A short context needs fewer, and the rest of the "
        "memory is what it was.",
        "Garbage or NaN in short requests that run beside a long one. " + UNSPLIT,
        ((FILE, "used = tl.cdiv(seq_len, _part_tokens(seq_len, num_parts, SMALLEST_PART))", "used = num_parts"),)),
    Bug("an-empty-merge-is-nan", 4,
        "A merge of nothing divides 0 by 0. FlashInfer's merge of empty states gives NaN, too (FlashInfer #4051).",
        "None in the text, but NaN in rows of a recorded batch, where its contexts are split.",
        ((FILE, "    total = tl.where(total == 0.0, 1.0, total)  # an empty context has a mean of 0\n", ""),)),
    Bug("a-merge-without-rescaling", 4,
        "With 16 parts or fewer the loop runs once, and nothing need be rescaled. So nobody saw that it was missing.",
        "Contexts of more than 16 parts, and no shorter ones, get wrong answers. " + UNSPLIT,
        ((FILE, "weighted = weighted * shrink + tl.sum(mean", "weighted = weighted + tl.sum(mean"),)),
    Bug("zero-times-nan-on-the-diagonal", 5,
        "A masked position has the weight 0, so its V cannot matter. But 0 * nan is nan.",
        "One token whose V overflows spoils the tokens before it in its tile, although they are right.",
        ((FILE, "                v_tile = tl.where(faults == 0.0, v_tile, 0.0).to(v_tile.dtype)\n", ""),)),
    Bug("faults-vanish-on-the-diagonal", 5,
        "Somebody replaced what is not finite by 0, and the NaN were gone.",
        "A model that has broken down goes on talking, and nobody learns of it.",
        ((FILE, "                scores += tl.sum(faults, axis=1)[None, :]\n", ""),)),
)
