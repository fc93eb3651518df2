"""How can sharing go wrong?"""

from __future__ import annotations

from nanopaged.lab.bugs import Bug
from nanopaged.lab.labs import Scenario

POOL, SCHEDULER = "block_allocator.py", "scheduler.py"
LETTER = "Dear librarian, a town kept its letters in a library. A town kept its letters"
SHELVES = "So the shelves stood empty, and the doors were shut. So the shelves stood"
KEY_WRITTEN = "(ROOT_IDENTITY if parent is None else self._identities[parent], tuple(tokens))"
KEY_READ = "self._index.get((identity, tuple(token_ids[start : start + size])))"

ASKED_TWICE = Scenario(
    requests=((0, f"{LETTER} in", {"max_tokens": 4}), (8, f"{LETTER} in", {"max_tokens": 4})),
    options={"num_blocks": 32},
    watch="The prompt has 80 tokens: five whole blocks. How many of them may the second request find?")

BUGS = (
    Bug("tokens-without-their-past", 1,
        "Equal tokens have equal K and V, so the tokens of a block are key enough. But a token's position is in them, "
        "and from the second layer on every token before it.",
        "A request continues another request's text.",
        ((POOL, KEY_WRITTEN, "(ROOT_IDENTITY, tuple(tokens))"),
         (POOL, "            identity = self._identities[block]\n", "")),
        Scenario(
            requests=((0, "In a small town where is my book? In a small town ", {"max_tokens": 16}),
                      (4, "Dear physician, where is my book? Dear physicist, who are you? Dear physician, ",
                       {"max_tokens": 16})),
            options={"num_blocks": 32},
            watch="\"where is my book\" fills the second block of both prompts. Do they share it?")),
    Bug("a-checksum-for-a-key", 1,
        "A number is quicker to compare than sixteen tokens. Two blocks with the same number are taken for one. vLLM "
        "keyed its blocks by Python's hash, and a user suspected it when answers got mixed up (vLLM #12621); "
        "openvino.genai compares hashes alone too (#3722), and vllm-mlx hashed the last byte of each token (#444). "
        "Here it is the sum, so that you can see it.",
        "Rarely, and never in a test: an answer to somebody else's question.",
        ((POOL, KEY_WRITTEN, "(ROOT_IDENTITY if parent is None else self._identities[parent], (sum(tokens),))"),
         (POOL, KEY_READ, "self._index.get((identity, (sum(token_ids[start : start + size]),)))")),
        Scenario(
            requests=((0, "Dear librarian, the mouse, a cat. Dear librarian, ", {"max_tokens": 16}),
                      (4, "Dear librarian, the cat, a mouse. Dear librarian, ", {"max_tokens": 16})),
            options={"num_blocks": 32},
            watch="The second blocks of the two prompts have the same letters in another order.")),
    Bug("the-block-that-begins-before-the-end", 1,
        "The loop goes over all blocks that begin before `max_tokens`. The last one may end behind it, and the whole "
        "prompt is a hit.",
        "A prompt that is in the pool to its last token computes nothing, so there are no logits to draw from.",
        ((POOL, "range(0, max_tokens - size + 1, size)", "range(0, max_tokens, size)"),),
        ASKED_TWICE),
    Bug("held-and-evictable", 2,
        "A holder more, so the count goes up. That the block still stands among the cached ones was forgotten: it is "
        "evicted while a request reads it.",
        "A request that found its prefix continues another text, some steps later.",
        ((POOL, "            del self._cached[block]\n", ""),),
        Scenario(
            requests=((0, f"{LETTER} in", {"max_tokens": 4}), (8, f"{LETTER} in", {"max_tokens": 36}),
                      (12, SHELVES, {"max_tokens": 12})),
            options={"num_blocks": 12},
            watch="The second request finds the blocks of the first. The third needs more than are free.")),
    Bug("hits-in-blocks", 2,
        "What is found are blocks, so blocks are counted. But the figure is in tokens, like all others beside it (vLLM "
        "changed its own from blocks to tokens in #18003).",
        "The hit rate is a sixteenth of what it is.",
        ((POOL, "tokens += len(blocks) * self.block_size", "tokens += len(blocks)"),)),
    Bug("the-own-block-instead-of-the-twin", 3,
        "`publish` finds a twin, holds it and gives the own block back. Then it returns the own block, by habit.",
        "The engine raises that a block's parent is not published. A short text turns into another one instead.",
        ((POOL, "        return twin\n", "        return block\n"),)),
    Bug("the-last-one-stands-in-the-index", 3,
        "Each request writes its block into the index, and the later one replaces the earlier. So equal contents are "
        "stored twice, and the first copy cannot be found, as in nano-vllm (#219). When both are evicted, the second "
        "finds its entry gone.",
        "More blocks are held than needed, and some time later an eviction raises KeyError.",
        ((POOL, "twin = self._index.setdefault(key, block)", "twin = self._index[key] = block"),)),
    Bug("found-under-its-old-contents", 4,
        "The block is empty now, and has no key. The index was forgotten: it still leads there, and the next holder "
        "writes something else. nano-vllm #163 describes it.",
        "A request reads what was written for another one.",
        ((POOL, "        del self._index[self._keys[block]]\n", ""),),
        Scenario(
            requests=((0, f"{LETTER} in", {"max_tokens": 8}), (12, SHELVES, {"max_tokens": 8}),
                      (24, f"{LETTER} in", {"max_tokens": 8})),
            options={"num_blocks": 7, "max_num_seqs": 1},
            watch="The third request has the prompt of the first, whose blocks the second has overwritten in part.")),
    Bug("the-newest-goes-first", 4,
        "`popitem` without an argument takes the last one. That is the most recently used block, and the beginning of "
        "its text. All blocks after it stay in the pool, and cannot be found.",
        "The hit rate drops as soon as the pool is full.",
        ((POOL, "self._cached.popitem(last=False)", "self._cached.popitem()"),),
        Scenario(
            requests=((0, f"{LETTER} in", {"max_tokens": 4}), (8, "Who keeps the mice away?", {"max_tokens": 4}),
                      (16, f"{LETTER} in", {"max_tokens": 4})),
            options={"num_blocks": 6},
            watch="The second request needs a little room. Which blocks of the first does it push out?")),
    Bug("evicted-and-still-full", 4,
        "The key is gone, so the block is empty. The number of its filled slots stayed: the next holder's first token "
        "adds 1 - 16.",
        "The pool says that fewer slots are filled than are, in the end fewer than none.",
        ((POOL, "self._keys[block], self._filled[block] = None, 0", "self._keys[block] = None"),)),
    Bug("the-table-names-the-freed-twin", 5,
        "`publish` is called for what it does. Its answer, the block to hold from here on, is dropped. The table goes "
        "on naming a block that was given back.",
        "The engine raises that a block's parent is not published. A short text turns into another one instead.",
        ((SCHEDULER, "table[i] = self.allocator.publish(", "self.allocator.publish("),)),
    Bug("every-block-is-a-first-block", 5,
        "The parent of a block is optional, so None is passed. Then a text is found no further than its first block; "
        "and a block from the middle of a text is found at the beginning of another.",
        "Few hits, and some of them wrong.",
        ((SCHEDULER, "table[i - 1] if i else None, tokens)", "None, tokens)"),)),
    Bug("the-newest-tokens", 5,
        "The block that has just become full holds the newest tokens. That is so while decoding. A prompt fills many "
        "blocks at once, and each gets the last block's tokens.",
        "Prompts of more than one block are never found.",
        ((SCHEDULER, "request.token_ids[i * block_size : (i + 1) * block_size]", "request.token_ids[-block_size:]"),)),
    Bug("found-to-the-last-token", 5,
        "The whole prompt is in the pool, so nothing is left to compute. But the pool has K and V, and the next "
        "token is drawn from logits. vLLM met it (#3193, repaired in #3239), and so did nano-vllm (#199).",
        "The second request with a prompt of whole blocks makes the engine fail.",
        ((SCHEDULER, "self.allocator.find_prefix(request.token_ids, known - 1)",
          "self.allocator.find_prefix(request.token_ids, known)"),),
        ASKED_TWICE),
)
