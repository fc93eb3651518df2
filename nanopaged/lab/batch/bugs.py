"""How can a batch be wrong? Mostly where prefill and decode are taken for two things, or a chunk for a whole prompt."""

from __future__ import annotations

from nanopaged.lab.bugs import Bug

SPOILED = "spoiled = faults[batch.query_start[ends]] > faults[batch.query_start[ends - 1]]"

BUGS = (
    Bug("slots-from-the-chunks-start", 1,
        "A prompt's slots are those of the positions 0 and up: true for a whole prompt, and for the first chunk. The "
        "second chunk then overwrites what the first has written. vLLM #36580 repaired the slots of chunks in a newer "
        "model runner, as the \"cause of insidious correctness issues\".",
        "Prompts that are longer than the budget are continued with nonsense. Short ones are right.",
        (("batch.py", "p % block_size for p in range(start, end)]", "p % block_size for p in range(num_tokens)]"),)),
    Bug("positions-from-the-chunks-start", 1,
        "The slots are right, and positions are taken for the row's number in its chunk. A prefix that was found in "
        "the cache moves the start of a prompt in the same way.",
        "The model takes the middle of a long prompt for its beginning.",
        (("batch.py", "positions += range(start, end)", "positions += range(num_tokens)"),)),
    Bug("lengths-of-all-known-tokens", 2,
        "A request's length is the number of its tokens: true in every step but that of a chunk. Attention then reads "
        "slots that nobody has written yet, and takes the chunk's rows for the last ones. nano-vllm #212 is this bug.",
        "A prompt that is longer than the budget raises an error in attention, whose table has no blocks so far ahead. "
        "Where it has some, the chunk is computed with what others have left there.",
        (("batch.py", "seq_lens = [start + num_tokens for _, start, num_tokens in rows]",
          "seq_lens = [len(request.token_ids) for request, _, _ in rows]"),)),
    Bug("the-newest-token-unseen", 2,
        "The length is what the cache held before the step. But K and V of this step's tokens are written before they "
        "are read, and a token attends to itself.",
        "Every text is wrong from its first token on.",
        (("batch.py", "seq_lens = [start + num_tokens for _, start, num_tokens in rows]",
          "seq_lens = [start for _, start, num_tokens in rows]"),)),
    Bug("padding-the-requests-own-table", 2,
        "The tables must have one width, so each is filled up with zeros in place. The scheduler reads the same list: "
        "it believes that the request has room already, and lets it write into block 0, which belongs to another.",
        "Requests write into block 0 together, until publishing it raises an error.",
        (("batch.py", "            values += request.block_table + padding[len(request.block_table) :]",
          "            request.block_table += padding[len(request.block_table) :]\n"
          "            values += request.block_table"),)),
    Bug("one-row-for-all-continuations", 3,
        "A prompt has one last row, so one row of logits. But a token is drawn from row i for the i-th sampled "
        "request, and each continuation counts as one.",
        "Of several continuations, all but the first draw their first token from another row, if there is one.",
        (("batch.py", "logits_rows = [query_start[i + 1] - 1 for i, _ in step.sampled] +",
          "logits_rows = [query_start[i + 1] - 1 for i in dict.fromkeys(i for i, _ in step.sampled)] +"),)),
    Bug("logits-in-the-order-of-rows", 3,
        "Sorted rows read memory in order. And a request that the budget has cut off is the last one anyway, unless "
        "its chunk has one row: then it stands among the decodes, before the prompts.",
        "Now and then a prompt's first token is drawn from another prompt's logits.",
        (("batch.py", "seq_lens + logits_rows)", "seq_lens + sorted(logits_rows))"),)),
    Bug("positions-are-row-numbers", 4,
        "`dense` says torch.arange, and so it was copied. It is right for one request, in one step.",
        "The first request of a step is right while it is alone; every other text is wrong.",
        (("gpt2.py", "self.wpe(batch.positions)", "self.wpe(torch.arange(len(batch.token_ids)))"),)),
    Bug("attention-before-the-write", 4,
        "Attend first, remember afterwards: so a cache works in many programs. Here attention reads everything from "
        "the pool, this step's own tokens too.",
        "A token sees whatever lay in its slot before, instead of itself.",
        (("gpt2.py", "            attention.write_kv(k, v, k_cache, v_cache, batch.slots)\n"
          "            return attention.paged_attention(q, k_cache, v_cache, batch, self.config.head_dim**-0.5)",
          "            y = attention.paged_attention(q, k_cache, v_cache, batch, self.config.head_dim**-0.5)\n"
          "            attention.write_kv(k, v, k_cache, v_cache, batch.slots)\n"
          "            return y"),)),
    Bug("one-layers-cache-for-all", 4,
        "One layer is computed after the other, so they could take turns with one cache. In the step of a prompt "
        "nothing shows it: each layer writes all K and V before it reads them.",
        "The first token of each request is right, and everything after it is not.",
        (("gpt2.py", "zip(self.h, kv_cache):", "zip(self.h, kv_cache[:1].expand_as(kv_cache)):"),)),
    Bug("minus-nothing", 4,
        "The last `num_cut` rows are [-num_cut:]. If num_cut is 0, these are all rows.",
        "In each step in which a prompt ends and none is cut off, every request gets the same senseless token.",
        (("gpt2.py", "last[len(last) - batch.num_cut :] = 0.0", "last[-batch.num_cut :] = 0.0"),)),
    Bug("only-the-last-row-counts", 5,
        "A token is drawn from the last row, so that is the row to look at. But the others have written K and V too, "
        "and a full block with a NaN in it is published like any other.",
        "Nothing, with a model that is finite. Else a request gets its text, and later requests that find its blocks "
        "do not.",
        (("gpt2.py", SPOILED, "spoiled = ~last.isfinite().all(dim=1)"),)),
    Bug("one-fault-fails-the-step", 5,
        "One question about the whole step is the cheapest: is there a fault anywhere?",
        "Nothing, with a model that is finite. Else one bad prompt ends every request that shares a step with it.",
        (("gpt2.py", SPOILED, "spoiled = (faults[-1] > 0).expand(len(last))"),)),
    Bug("the-edge-belongs-to-the-neighbour", 5,
        "A binary search has two sides, and the default one is wrong for a request of one row: its only row is also "
        "its first, so the search stops at the request before it.",
        "Nothing, with a model that is finite. Else a decode is blamed for its neighbour, and its own fault is missed.",
        (("gpt2.py", "torch.searchsorted(batch.query_start, batch.logits_rows, right=True)",
          "torch.searchsorted(batch.query_start, batch.logits_rows)"),)),
)
