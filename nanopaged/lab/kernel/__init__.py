"""Lab: how do kernels attend to scattered blocks, tile by tile and part by part?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

LAB = Lab(
    name="kernel",
    title="Paged attention as Triton kernels",
    hours="8 to 12",
    learns="how a softmax is computed in one walk along a context, why all that was summed must be rescaled, and "
           "how parts of a context are put together",
    parts=(
        Part("writes K and V of a step's tokens into their slots", ("attention_kernels:write_kv_kernel",), (
            "One program has one token: tl.program_id(0). Which addresses does it read, and which does it write?",
            "Heads and dims are two ranges, [:, None] and [None, :]. TILE_HEADS is a power of two, so it may exceed "
            "the number of heads: mask the others.",
            "Within a block, head h and place p begin at h * BLOCK_SIZE * HEAD_DIM + p * HEAD_DIM. Make the slot 64 "
            "bits wide before you multiply it, and return if it is negative.")),
        Part("walks along a context with an online softmax", ("attention_kernels:_attend",), (
            "Do it on paper for scores 1, 5, 2: keep a maximum, a sum and a weighted sum, and forget each score.",
            "If the maximum grows, both sums must be multiplied by exp2(old - new). `_raised` gives that factor, and "
            "the pivot. Each lane of a tile has its own block: load table + place // BLOCK_SIZE for all of them.",
            "Loop from begin to end in steps of TILE_KV. Load K and V where place < end, with other=0.0. The scores "
            "are _dot(q_tile, tl.trans(k_tile), WIDEN) * scale_log2, and -inf where a row does not look; then the two "
            "sums. Return weighted / total and maximum + tl.log2(total), with 1 for a total of 0.")),
        Part("computes one token of each request", ("attention_kernels:decode_kernel",), (
            "A program has a request, a key-value head and a part. Which rows of q read this head, and where does the "
            "part begin and end?",
            "The rows are the GROUP query heads that share the head; the other rows of the tile are masked. "
            "`_part_tokens` says how long parts are: the last one ends with the context, and programs beyond it "
            "return.",
            "Call _attend(q_tile, rows, begin, end, end, ..., False, ...), since one row sees everything: compare "
            "prompt_kernel. Store the mean at ((request * num_heads + head) * num_parts + part) * HEAD_DIM, and, where "
            "SPLIT, log_sum at the same place without HEAD_DIM.")),
        Part("puts the parts of a context together", ("attention_kernels:merge_kernel",), (
            "A part of 128 tokens and a part of 2: how much does each mean count?",
            "log_sum is log2 of a part's sum of exponentials, and that sum is its weight. Subtract the largest one "
            "first. Which parts were written at all?",
            "Walk over the parts in tiles of TILE_PARTS as _attend walks over tokens, with log_sum for scores and "
            "means for V. Load where part < used.")),
        Part("keeps what is not finite from rows that do not see it", ("attention_kernels:_attend",), (
            "A masked position has the weight 0. What is 0 times NaN?",
            "In masked tiles, a V that is not finite must not take part in the product. But rows that see it must show "
            "it.",
            "faults = v_tile * 0.0 is NaN where V is not finite. Put 0 in place of those V, and add the faults' sums "
            "to the scores of their positions: the mask then hides them from rows that do not see them.")),
    ),
    scenario=Scenario(
        requests=((0, "Nine doves on a roof! Nine doves on a r", {"max_tokens": 3}),
                  (1, "Nine doves on a roof! Nine doves on a r", {"max_tokens": 2})),
        options={"num_blocks": 8, "device": "auto", "attention": "triton", "enforce_eager": True},
        watch="Every number of this run comes from the kernels. The rest of the second prompt runs beside a decode."),
    launchers=("paged_attention",),
)
