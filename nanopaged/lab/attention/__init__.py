"""Lab: what does attention read, if a context lies in scattered blocks?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

LAB = Lab(
    name="attention",
    title="Attend to scattered blocks",
    hours="4 to 6",
    learns="how a block table turns positions into places in the pool, and why the causal mask counts from a context's "
           "end",
    parts=(
        Part("writes K and V of a step's tokens into their slots", ("torch_attention:write_kv_torch",), (
            "A slot is one number for two things: which block, and which place in it.",
            "Division and remainder by block_size give both, for all tokens at once. Check the arguments first: "
            "`check_write` raises for those that do not fit.",
            "`cache[blocks, :, offsets] = rows` assigns in place, with two index tensors (num_tokens,) of int64. "
            "`cache[blocks][...] = rows` assigns to a copy.")),
        Part("attends with one row of each request", ("torch_attention:paged_attention_torch",), (
            "Begin with one request. In which order must its blocks be put side by side?",
            "`cache[table]` gathers blocks in the table's order. Then (blocks, heads, block_size, head_dim) must "
            "become (heads, positions, head_dim), cut off at the request's length. `blocks_for` says how many entries "
            "count.",
            "Call `check_attention`. For each request: gather K and V, convert them and the row to float32, and call "
            "F.scaled_dot_product_attention(..., scale=scale), or write softmax(scale * q k) v with torch.softmax.")),
        Part("attends with any number of rows of each request", ("torch_attention:paged_attention_torch",), (
            "Draw the mask for 2 rows at the end of 5 tokens. Where does its diagonal end?",
            "query_start says where a request's rows begin and end. Row r of n is at position length - n + r. Requests "
            "without rows, or without tokens, need a branch: their rows are 0.",
            "torch.ones(n, length, dtype=torch.bool).tril(length - n) is the mask, True where a row may look. "
            "torch.zeros for the result leaves rows of a request without tokens at 0.")),
        Part("lets several query heads share K and V", ("torch_attention:paged_attention_torch",), (
            "With 4 query heads and 2 key-value heads, which heads share? The docstring says.",
            "Either repeat each key-value head group times, one beside the other, or let torch do it.",
            "k.repeat_interleave(group, dim) repeats neighbours, and k.repeat does not. "
            "scaled_dot_product_attention(..., enable_gqa=True) does without copies.")),
        Part("keeps what is not finite from rows that do not see it",
             ("torch_attention:paged_attention_torch", "torch_attention:_attend_around_faults"), (
                 "A masked position has the weight 0. What is 0 times NaN?",
                 "Such a V must not take part in the product. But the rows that see it must show it. If each of your "
                 "rows reads only what it sees, you need no `_attend_around_faults`: leave it as it is, nothing calls "
                 "it.",
                 "Compute the product with another number in place of each V that is not finite. Afterwards spoil the "
                 "rows that see one: those at its position and after it. A NaN in K shows in the scores, where the "
                 "mask can replace it.")),
    ),
    scenario=Scenario(
        requests=((0, "The key hung by the door, and the door was open. The key hung by", {"max_tokens": 24}),
                  (0, "Nine doves sat in a row on the roof. Nine doves sat in", {"max_tokens": 24}),
                  (3, "She kept a card for each family, and on it she wrote. She kept a card for", {"max_tokens": 20})),
        options={"num_blocks": 24, "max_num_batched_tokens": 40},
        watch="Prompts are computed in chunks, and blocks are taken as chunks need them. Follow the table of request 1 "
              "by its positions: whose blocks lie between its own?"),
)
