"""How can attention over blocks go wrong?"""

from __future__ import annotations

from nanopaged.lab.bugs import Bug

FILE = "torch_attention.py"
CALL = """\
            result = F.scaled_dot_product_attention(rows, k, v, mask, is_causal=n == length > 1, scale=scale,
                                                    enable_gqa=True)  # (1, num_heads, n, head_dim)
"""
TEXTBOOK = """\
            k, v = (x.repeat_interleave(rows.shape[1] // x.shape[1], 1) for x in (k, v))
            seen = torch.ones(n, length, dtype=torch.bool).tril(length - n)
            scores = (rows @ k.mT * scale).masked_fill(~seen, -torch.inf).exp()
            result = (scores / scores.sum(-1, keepdim=True)) @ v
"""

BUGS = (
    Bug("written-into-a-copy", 1,
        "Indexing with a tensor copies. So the second pair of brackets assigns to a copy, which nobody sees, and torch "
        "says nothing.",
        "The pool stays empty, and every request ends without a word.",
        ((FILE, "k_cache[blocks, :, offsets] = k", "k_cache[blocks][torch.arange(len(k)), :, offsets] = k"),
         (FILE, "v_cache[blocks, :, offsets] = v", "v_cache[blocks][torch.arange(len(v)), :, offsets] = v"))),
    Bug("a-slot-counts-heads", 1,
        "In memory a block has num_kv_heads * block_size rows. So somebody divided by that; but a slot counts tokens.",
        "Tokens of different blocks overwrite each other, and the text is another one.",
        ((FILE, "block_size = k_cache.shape[2]\n", "block_size = k_cache.shape[1] * k_cache.shape[2]\n"),
         (FILE, "slots // block_size, slots % block_size",
          "slots // block_size, slots % block_size % k_cache.shape[2]"))),
    Bug("blocks-side-by-side", 2,
        "The first entry of the table says where the context begins, and from there somebody read on. That holds where "
        "a request gets its blocks in one piece, and in a test with one request it does.",
        "A request reads K and V of another one as soon as its blocks are scattered.",
        ((FILE, "gathered = (batch.block_tables[i, : blocks_for(length, block_size)] * num_kv_heads",
          "side_by_side = batch.block_tables[i, :1] + torch.arange(blocks_for(length, block_size))\n"
          "        gathered = (side_by_side.clamp(max=len(k_cache) - 1) * num_kv_heads"),)),
    Bug("the-whole-last-block", 2,
        "Blocks are read as wholes, and nobody cut off the last one. A slot after the length holds nothing, or what "
        "the block's last owner left. In vLLM such a slot held NaN, and a weight of 0 did not help (vLLM #936).",
        "Answers depend on what a block held before, and sometimes they are NaN. Copycat shows it rarely: old tokens "
        "seldom match its window.",
        ((FILE, "k = k_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim)[:, :, :length].float()",
          "k = k_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim).float()"),
         (FILE, "v = v_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim)[:, :, :length].float()\n",
          "v = v_rows.index_select(0, gathered).view(1, num_kv_heads, -1, head_dim).float()\n"
          "        length = k.shape[2]\n"))),
    Bug("one-block-too-many", 2,
        "length // block_size + 1 blocks hold length tokens, except where the last block is just full.",
        "None here, since tables are filled up with 0. Where they are filled up with -1, or not at all, a run ends "
        "with an index error as soon as a length is a multiple of the block size.",
        ((FILE, "blocks_for(length, block_size)]", "length // block_size + 1]"),)),
    Bug("softmax-by-the-book", 2,
        "exp(score) over the sum of exp(score) is what the textbook says. The largest score must be subtracted first.",
        "NaN, as soon as a score is above 88. Copycat's are, and every request ends without a word.",
        ((FILE, CALL, TEXTBOOK),)),
    Bug("a-mask-from-the-start", 3,
        "The mask of a whole prompt is a triangle from the upper left corner, and torch's own is_causal is one. With a "
        "chunk amid a context it must be moved. FlashAttention once had this mask, and "
        "engines switched it off to decode (flash-attention #282).",
        "A prompt that is computed in chunks gets another answer than in one piece.",
        ((FILE, "device=q.device).tril(length - n)", "device=q.device).tril()"),)),
    Bug("a-row-for-each-request", 3,
        "Somebody wrote decoding first, where request i has row i, and kept the index.",
        "After the first chunk of a batch, all requests get each other's rows.",
        ((FILE, "first, last = starts[i], starts[i + 1]", "first, last = i, i + starts[i + 1] - starts[i]"),)),
    Bug("nothing-seen-is-garbage", 3,
        "torch.empty is faster than torch.zeros, and each row is written anyway. Not the rows that see nothing.",
        "None in the text, since nobody reads those rows; but a NaN among them makes every check for NaN useless.",
        ((FILE, "out = torch.zeros(q.shape", "out = torch.empty(q.shape"),)),
    Bug("heads-take-turns", 4,
        "Tensor.repeat repeats the whole row of heads: 0 1 0 1. Neighbours must share: 0 0 1 1.",
        "A model with grouped heads talks nonsense. GPT-2 and copycat have a key-value head for each head: no symptom.",
        ((FILE, "            result = F.scaled_dot_product_attention(rows, k, v, mask,",
          "            k, v = (x.repeat(1, rows.shape[1] // x.shape[1], 1, 1) for x in (k, v))\n"
          "            result = F.scaled_dot_product_attention(rows, k, v, mask,"),)),
    Bug("zero-times-nan", 5,
        "A masked position has the weight 0, so what stands there cannot matter. But 0 * nan is nan. FlashAttention 3 "
        "met it in slots that no token fills (flash-attention #1745), and so did vLLM's Triton kernels (vLLM #47305).",
        "One token whose V overflows spoils the tokens before it, although they are right, and others may share them.",
        ((FILE, "if n > 1 and not (k.sum() + v.sum()).isfinite():", "if False:"),)),
    Bug("faults-are-removed", 5,
        "Somebody replaced what is not finite by 0, and the NaN were gone.",
        "A model that has broken down goes on talking, and nobody learns of it.",
        ((FILE, " + faults.cumsum(2)[:, :, -n:]", ""),)),
)
