"""Lab: how do requests of different lengths become one input of the model?"""

from __future__ import annotations

from nanopaged.lab.labs import Lab, Part, Scenario

FROM_STEP = ("batch:Batch.from_step",)
FORWARD = ("gpt2:GPT2.forward",)
CAT = "The cat sat on a mat. The cat sat on a"

LAB = Lab(
    name="batch",
    title="Lay a step out flat, and compute it",
    hours="3 to 6",
    learns="that prefill and decode are one mechanism, and how requests of different lengths share a batch without "
           "padding",
    parts=(
        Part("lays a step's tokens out as rows, each with its position and its slot", FROM_STEP, (
            "Request i of the step computes `num_tokens[i]` tokens from position `starts[i]` on. A decode is the case "
            "of one token: do you need to treat it separately?",
            "A position counts from the beginning of the request, not of the chunk. Which block holds position p, and "
            "where in this block does p lie?",
            "The slot is `block_table[p // block_size] * block_size + p % block_size`. Put all values into one "
            "array('i'), in the order in which `__init__` splits them, and hand torch.frombuffer(...) to cls. Fill "
            "what later parts ask for with zeros, and give each request a table of one entry at least.")),
        Part("says which rows belong to which request, how long its context is, and where it lies", FROM_STEP, (
            "Where do request i's rows begin if the requests before it have 1, 3 and 2 rows?",
            "Attention may read what is computed after this step: no more, or it reads slots that nobody has "
            "written, and no less, or a token does not see itself.",
            "query_start is a running sum that begins with 0. seq_lens is start + num_tokens. All tables have the "
            "width of the longest: append zeros to a copy, never to `request.block_table` itself.")),
        Part("says which rows a token is drawn from", FROM_STEP, (
            "The next token follows the last one. In which row of the request is the last one?",
            "`step.sampled` names a request once for each continuation that gets its first token from it. `step.cut` "
            "has the others, and comes after it.",
            "logits_rows is query_start[i + 1] - 1, first for each (i, request) in step.sampled, then for each i in "
            "step.cut. num_cut is the length of the latter.")),
        Part("computes the logits of a batch through a paged cache", FORWARD, (
            "Read `dense`. Which of its lines knows that there is only one request, and that nothing is cached?",
            "Only embedding of positions and attention differ. `attend` gets this layer's q, k and v: first write k "
            "and v into their slots, then attend through the block tables, with the scale 1 / sqrt(head_dim).",
            "kv_cache[layer] is a pair, K and V. After the blocks select the rows `batch.logits_rows`, and apply ln_f "
            "and head to these alone.")),
        Part("keeps a number that is not finite within its own request", FORWARD, (
            "A row may be NaN although the last row of its request is not. Who would read what that row has written?",
            "Count the faulty rows before each row, with a cumulative sum. How many does each request have?",
            "torch.searchsorted(query_start, logits_rows, right=True) tells where the request of each logits row ends. "
            "Fill the selected rows of spoiled requests with NaN before the head.")),
    ),
    scenario=Scenario(
        requests=((0, CAT, {"max_tokens": 30, "n": 2}),
                  (0, "She kept a card for every family, and on it she wrote. She kept a card for every",
                   {"max_tokens": 30}),
                  (3, "A town kept its letters in a library once. A town kept its letters in a", {"max_tokens": 30})),
        options={"num_blocks": 24, "max_num_batched_tokens": len(CAT) + 1},
        watch="The budget is one token more than the first prompt has. So the second prompt begins with a chunk of a "
              "single row, and its next chunk starts in the middle of a block, beside rows that decode."),
)
