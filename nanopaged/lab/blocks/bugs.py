"""How can handing out blocks go wrong?"""

from __future__ import annotations

from nanopaged.lab.bugs import Bug
from nanopaged.lab.labs import Scenario

FILE = "block_allocator.py"
UNPUBLISHED = "            if self._keys[block] is None:\n"  # in give_back
CARD = "She kept a card for every family, and on it she wrote. She kept a card for"
LETTERS = "A town kept its letters in a library once. A town kept its letters in"
SHELVES = "So the shelves stood empty, and the doors were shut. So the shelves stood"

# The same question again, after the pool was filled with something else.
ASKED_AGAIN = Scenario(
    requests=((0, CARD, {"max_tokens": 8}), (12, SHELVES, {"max_tokens": 8}), (24, CARD, {"max_tokens": 8})),
    options={"num_blocks": 8, "max_num_seqs": 1},
    watch="The third request has the prompt of the first. How many of its blocks are found?")

IN_THE_CARD = Scenario(
    requests=((0, CARD, {"max_tokens": 30}), (3, CARD, {"max_tokens": 6}), (14, SHELVES, {"max_tokens": 20})),
    options={"num_blocks": 24},
    watch="Two requests hold the same blocks, and one of them ends. Who gets its blocks?")

BUGS = (
    Bug("cached-blocks-are-not-room", 1,
        "A cached block is in use: there is something in it. So only free blocks count as available. In truth a cached "
        "block is held by nobody, and `take` may empty it.",
        "A request waits although there is room. Once the pool has filled with cached blocks, it waits for ever.",
        ((FILE, "return len(self._free) + len(self._cached)", "return len(self._free)"),),
        Scenario(
            requests=((0, CARD, {"max_tokens": 30}), (0, SHELVES, {"max_tokens": 4}),
                      (24, "Who keeps the mice away? Who keeps the mi", {"max_tokens": 4})),
            options={"num_blocks": 13},
            watch="The last request needs three blocks. Two are free, and four are cached.")),
    Bug("cached-before-free", 1,
        "Reusing what is there looks thrifty. But it throws away contents while empty blocks lie beside it. vLLM had a "
        "milder form: blocks that could never be found again waited in one queue with cached ones, and pushed these "
        "out (vLLM #42656).",
        "Prefixes are computed again although the pool is nearly empty.",
        ((FILE, "self._free.pop() if self._free else self._evict()",
          "self._evict() if self._cached else self._free.pop()"),),
        Scenario(
            requests=((0, CARD, {"max_tokens": 4}), (8, SHELVES, {"max_tokens": 4}), (16, CARD, {"max_tokens": 4})),
            options={"num_blocks": 64},
            watch="The pool is never more than half full. Which blocks does the second request get?")),
    Bug("lowest-id-first", 1,
        "Low ids first keeps the pool tidy, and `min` finds them. It also walks over the whole pool for every block. "
        "vLLM's second block manager searched all its cached blocks for the oldest one, and was slower than the first "
        "(vLLM #7193).",
        "Nothing is wrong with the texts. The larger the pool, the slower each step.",
        ((FILE, "        block = self._free.pop() if self._free else self._evict()\n",
          "        block = min(self._free) if self._free else self._evict()\n"
          "        if block in self._free:\n            self._free.remove(block)\n"),)),
    Bug("double-return-is-ignored", 2,
        "A block that nobody holds is given back: there is nothing to do, so do nothing. When vLLM raised \"Double "
        "free!\" (#1556), a user's remedy was to return instead (#1584). The error was elsewhere, in how shared "
        "blocks were counted, and stayed there (repaired in #3347).",
        "Nothing shows, until a caller's mistake takes a block away from somebody who holds it.",
        ((FILE, 'raise ValueError(f"block {block} was given back, but has no holder")', "return"),)),
    Bug("counts-down-before-it-looks", 2,
        "The count goes down first, and then a negative one is an error. The error is raised, but the count stays "
        "wrong.",
        "After one error that was caught, a cached block has -1 holders. The next request that finds it makes that 0: "
        "it believes that it holds the block, and the pool hands it to somebody else.",
        ((FILE, '        if holders == 0:\n            raise ValueError(f"block {block} was given back',
          '        self._ref_counts[block] = holders - 1\n        if holders < 1:\n'
          '            raise ValueError(f"block {block} was given back'),)),
    Bug("free-with-the-first-return", 2,
        "A request has ended, so its blocks are free. But another request may hold the same blocks.",
        "When the other request ends, the engine raises that a block has no holder. Until then its text may go wrong.",
        ((FILE, "        self._ref_counts[block] = holders - 1\n        if holders == 2:",
          "        self._ref_counts[block] = 0\n        if holders > 1:\n            self._shared_blocks -= 1\n"
          "            holders = 1\n        if holders == 2:"),),
        IN_THE_CARD),
    Bug("erased-when-freed", 2,
        "What is given back is gone: so the block leaves the index, and is free. A user of vLLM concluded from a usage "
        "of 0% that the cache had been emptied (vLLM #12077). In truth nothing needs to be erased until somebody needs "
        "the memory.",
        "The same prompt after the first has ended is computed from the start.",
        ((FILE, f"{UNPUBLISHED}                self._filled[block] = 0\n                self._free",
          "            if self._keys[block] is not None:\n                del self._index[self._keys[block]]\n"
          f"                self._keys[block] = None\n{UNPUBLISHED}                self._filled[block] = 0\n"
          "                self._free"),),
        Scenario(
            requests=((0, CARD, {"max_tokens": 4}), (8, CARD, {"max_tokens": 4})), options={"num_blocks": 64},
            watch="The second request has the prompt of the first, which has ended. Is it computed again?")),
    Bug("free-but-still-in-the-index", 2,
        "A block without holders is free, whatever is in it. Its entry in the index stays, and promises contents that "
        "the next holder overwrites (the same hole as in nano-vllm #163).",
        "A prefix hit leads to a block that is free: the engine fails, or reads what another request wrote.",
        ((FILE, f"{UNPUBLISHED}                self._filled[block] = 0\n                self._free",
          "            if self._keys[block] is None or True:\n                self._free"),),
        ASKED_AGAIN),
    Bug("front-of-the-table-first", 3,
        "A table is a list, and the natural loop over it begins at its front. Then a parent is cached before its "
        "children, and evicted before them: the children stay in the pool, and nobody can find them. A simulator of "
        "vLLM evicted a text's blocks in any order, and its hit rates were wrong (llm-d-inference-sim #704).",
        "Prefixes are computed again although most of their blocks are in the pool.",
        ((FILE, "self.give_back(block_table.pop())", "self.give_back(block_table.pop(0))"),),
        Scenario(
            requests=((0, CARD, {"max_tokens": 4}), (8, LETTERS, {"max_tokens": 4}), (16, CARD, {"max_tokens": 4})),
            options={"num_blocks": 6},
            watch="The second request needs two blocks. Which blocks of the first does it push out?")),
    Bug("a-copy-of-the-table-is-emptied", 3,
        "The blocks go back, last one first, but out of a copy. The caller's table still names them.",
        "The request that gave way comes back with a table that names blocks of others.",
        ((FILE, "        while block_table:\n            self.give_back(block_table.pop())\n",
          "        for block in list(block_table)[::-1]:\n            self.give_back(block)\n"),),
        Scenario(
            requests=((0, CARD, {"max_tokens": 60}), (0, SHELVES, {"max_tokens": 60})), options={"num_blocks": 12},
            watch="The second request gives way, and resumes. Whose blocks are in its table?")),
    Bug("old-tokens-still-count", 4,
        "A free block is empty because nobody holds it; why set a number to zero? Because `fill` adds the difference "
        "to what was there.",
        "The share of filled slots falls with every request, and goes below zero.",
        ((FILE, "                self._filled[block] = 0\n                self._free", "                self._free"),)),
    Bug("filled-again-and-again", 4,
        "`fill` adds its slots to the sum. But it is called once for every token of a block, with all tokens that are "
        "in it: 1, 2, 3 ... count as 6.",
        "More slots are filled than there are.",
        ((FILE, "self._filled_slots += num_slots - self._filled[block]", "self._filled_slots += num_slots"),)),
    Bug("counted-by-walking", 4,
        "A sum over all blocks is right, and short. The engine asks for it in every step, and a real pool has tens of "
        "thousands of blocks.",
        "Nothing is wrong with the figures. The larger the pool, the slower each step.",
        ((FILE, "shared_blocks=self._shared_blocks,", "shared_blocks=sum(count > 1 for count in self._ref_counts),"),)),
    Bug("shared-for-ever", 4,
        "The second holder makes a block shared. That it stops being shared, when one of two leaves, was forgotten.",
        "The number of shared blocks only grows.",
        ((FILE, "        if holders == 2:\n            self._shared_blocks -= 1\n        elif", "        if"),),
        IN_THE_CARD),
)
