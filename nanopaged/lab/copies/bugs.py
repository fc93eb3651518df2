"""How can sharing go wrong? Copies too early, too many, too late, of half a block; and holders that nobody counts."""

from __future__ import annotations

from nanopaged.lab.bugs import Bug
from nanopaged.lab.copies import CAT_OR_BAT
from nanopaged.lab.labs import Scenario

FULL_POOL = Scenario(
    requests=((0, "The cat sat on a mat. The cat sat on a", {"max_tokens": 10, "n": 2}),),
    options={"num_blocks": 3},
    watch="The prompt fills the pool: for a copy there is no room. So the second continuation must give way.")
ONE_SLOT_LEFT = Scenario(
    requests=((0, f"And once: {CAT_OR_BAT} ", {"max_tokens": 20, "n": 2, "seed": 0, "temperature": 2.0}),),
    options={"num_blocks": 24},
    watch="The prompt has 111 tokens: one less than seven blocks.")
ONE_WRITES_FIRST = Scenario(
    requests=((0, CAT_OR_BAT, {"max_tokens": 20, "n": 2, "seed": 10, "temperature": 2.0}),),
    options={"num_blocks": 24, "max_num_batched_tokens": 1},
    watch="The budget is one token. So the first continuation comes to its end before the second one writes.")
FULL_BLOCKS = Scenario(
    requests=((0, "A mat for a cat. A mat for a cat", {"max_tokens": 12, "n": 2}),),
    options={"num_blocks": 12},
    watch="The prompt has 32 tokens: two blocks, both full.")

BUGS = (
    Bug("tail-not-counted", 1,
        "Only full blocks are shared, one reads everywhere. So the holders of the last block, which is not full, were "
        "not counted. All continuations have it in their tables, and each believes that it is alone. A Rust engine "
        "gave a partly filled block to a second writer like this, atlas #692; its sign was identical wrong text in "
        "several requests.",
        "The continuations overwrite each other's first tokens, and a block is given back that nobody holds.",
        (("scheduler.py", "            for block in follower.block_table:\n",
          "            for block in follower.block_table[: leader.num_computed_tokens // self.block_size]:\n"),)),
    Bug("one-table-for-all", 1,
        "The tables are equal, so one list could serve all of them. It is equal until the first of them grows.",
        "The continuations overwrite each other, and the first that ends gives all blocks back.",
        (("scheduler.py", "follower.block_table = leader.block_table[:]",
          "follower.block_table = leader.block_table"),)),
    Bug("the-first-believes-it-is-alone", 1,
        "The followers share somebody else's block, so they must copy. The leader computed it, so it may write. Others "
        "do not read what it writes behind their own tokens. But when it has filled the block, it publishes it, with "
        "its words, while others still hold it, and believe that they may write into it.",
        "Seldom anything: only if the first continuation is far ahead of the others.",
        (("scheduler.py", "        leader.may_share_tail = True\n", ""),),
        ONE_WRITES_FIRST),
    Bug("followers-at-the-end", 1,
        "They start last, so they are appended to the running requests. But these are sorted by key: the last one "
        "gives way first, and a request is looked up in them with a binary search.",
        "Seldom anything. Then another request gives way than should, or one that was aborted goes on.",
        (("scheduler.py", "insort(self.running, follower)", "self.running.append(follower)"),)),
    Bug("copies-at-the-fork", 1,
        "A fork copies: so does the word in an operating system's book, on the first page about it. Copies at once "
        "need room at once, also for continuations that end before they write.",
        "A prompt that fits exactly fails, and a busy pool is short of blocks earlier than it should be.",
        (("scheduler.py", "                self.allocator.share(block)\n            insort(self.running, follower)",
          "                self.allocator.share(block)\n            if leader.num_computed_tokens % self.block_size:\n"
          "                self._copy_tail(follower)\n            insort(self.running, follower)"),),
        FULL_POOL),
    Bug("followers-for-ever", 1,
        "The leader keeps the list of those that follow it: it may be of use. But a follower is one that has not "
        "started. The others are started again in each step in which the leader gets a token, and an abort of one ends "
        "them all.",
        "The followers stand in the batch more and more often, their texts are spoiled, and the pool fills up.",
        (("scheduler.py", "followers, leader.followers = leader.followers, []", "followers = leader.followers"),)),
    Bug("fork-keeps-the-old-block", 2,
        "The caller gets a block, and that seems to be all. But its old one counts it as a holder for ever.",
        "With each request that has several continuations a few blocks are lost, until the pool is full of them.",
        (("block_allocator.py", "        self.fill(copy, self._filled[block])\n        self.give_back(block)\n",
          "        self.fill(copy, self._filled[block])\n"),)),
    Bug("fork-gives-back-before-it-takes", 2,
        "First let go, then take: so the block itself could be the one that is taken. If there is none to take, the "
        "caller has lost its block, and does not know it.",
        "Nothing in this engine, which makes room before it forks. A caller that handles OutOfBlocks gives its block "
        "back twice.",
        (("block_allocator.py", "        copy = self.take()\n        self.fill(copy, self._filled[block])\n"
          "        self.give_back(block)\n",
          "        filled = self._filled[block]\n        self.give_back(block)\n        copy = self.take()\n"
          "        self.fill(copy, filled)\n"),)),
    Bug("fork-counts-holders-alone", 2,
        "One holder, so nobody else reads it. But a published block has readers to come: they find it by the tokens "
        "that it held.",
        "Nothing in this engine, which forks partly filled blocks only. One that forks a full block poisons the cache.",
        (("block_allocator.py", "if self._ref_counts[block] == 1 and self._keys[block] is None:",
          "if self._ref_counts[block] == 1:"),)),
    Bug("the-last-holder-copies-too", 3,
        "Who shared the block must copy it: so all n did. The last one is alone by then. It copies the block onto "
        "itself, and asks for room that it does not need.",
        "In a full pool no continuation can go on: all give way, and the engine fails with an empty step.",
        (("scheduler.py", "self.allocator.ref_count(request.block_table[tail]) > 1",
          "self.allocator.ref_count(request.block_table[tail]) > 0"),),
        FULL_POOL),
    Bug("asking-before-others-gave-way", 3,
        "Whether the tail is shared is asked once, and remembered. Then the other holder gives way, and the request "
        "still looks for a block for its copy: at last it gives way itself.",
        "In a full pool no continuation can go on: all give way, and the engine fails with an empty step.",
        (("scheduler.py", "        while allocator.num_available < missing + self._shares_tail(request):\n",
          "        shares = self._shares_tail(request)\n        while allocator.num_available < missing + shares:\n"),
         ("scheduler.py", "        if self._shares_tail(request):  # asked again: the other holder may have given way",
          "        if shares:")),
        FULL_POOL),
    Bug("copied-the-wrong-way", 3,
        "Source and target, or target and source? memcpy has one order, and cp the other.",
        "The shared block is overwritten with what lay in a free one: all continuations lose the end of their prompt.",
        (("scheduler.py", "self._move(\"copy\", table[tail], copy)", "self._move(\"copy\", copy, table[tail])"),)),
    Bug("table-still-names-the-shared-block", 3,
        "The copy is taken, and planned, and never used: the table was not changed.",
        "The continuations overwrite each other; one block is never given back, another one once too often.",
        (("scheduler.py", "        self._move(\"copy\", table[tail], copy)\n        table[tail] = copy\n",
          "        self._move(\"copy\", table[tail], copy)\n"),)),
    Bug("the-tail-of-the-known-tokens", 3,
        "A request's tail lies where its tokens end. But the newest token is known and not computed: it may be the "
        "first of the next block.",
        "If a prompt lacks one token to a full block, its continuations overwrite each other.",
        (("scheduler.py", "tail, filled = divmod(request.num_computed_tokens, self.block_size)\n        return",
          "tail, filled = divmod(len(request.token_ids), self.block_size)\n        return"),),
        ONE_SLOT_LEFT),
    Bug("every-prompt-has-a-tail", 3,
        "The block that is written next is shared if it has several holders. After a full block there is no such block "
        "yet.",
        "A request with several continuations fails if its prompt fills its blocks exactly: one prompt in 16.",
        (("scheduler.py", "return request.may_share_tail and filled > 0 and", "return request.may_share_tail and"),),
        FULL_BLOCKS),
    Bug("keys-without-values", 4,
        "The first half of the tensor looks like all of it. A copy of half a block goes unnoticed while its memory "
        "happens to hold the rest. In a hybrid model vLLM's copy moved a part of each block only: vLLM #55112.",
        "The continuations look at the right places, and find nothing there.",
        (("kv_cache.py", "self.blocks[:, :, targets] = self.blocks[:, :, sources]",
          "self.blocks[:, 0, targets] = self.blocks[:, 0, sources]"),)),
    Bug("moves-are-made-again", 4,
        "The list is read, and not emptied. Each later step copies the same blocks again, over what was written since.",
        "The continuations begin as they should, and go on with the words of the one that kept the block.",
        (("kv_cache.py", "            del moves[: len(run)]\n", ""),)),
    Bug("carry-out-after-the-forward", 4,
        "The copies belong to the step, and so does the model: the order did not seem to matter. But the step writes "
        "into the copies, and then they are overwritten.",
        "Each continuation but the last reads an empty block first, and then loses its first token.",
        (("engine.py", "        self.kv_cache.carry_out(self.scheduler.moves)\n"
          "        logits = self.logits_of(step)  # (num_logits, vocab_size)\n",
          "        logits = self.logits_of(step)  # (num_logits, vocab_size)\n"
          "        self.kv_cache.carry_out(self.scheduler.moves)\n"),)),
)
