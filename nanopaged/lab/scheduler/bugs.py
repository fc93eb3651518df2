"""How can a scheduler go wrong? By part: recorded, admitted, planned, cut, made to give way, aborted."""

from __future__ import annotations

from nanopaged.lab.bugs import Bug
from nanopaged.lab.labs import Scenario

FILE = "scheduler.py"

SMALL = {"num_blocks": 8, "block_size": 8, "watermark": 0.0}
ROOMY = {"num_blocks": 40, "block_size": 8}
ONE, RED = "one two three one two", "red green blue red green"


def scene(options: dict[str, object], *requests: tuple[int, str, int] | tuple[int, str, int, int]) -> Scenario:
    """Each request is (step of its arrival, prompt, max_tokens, and n if it is not 1)."""
    return Scenario(tuple((step, prompt, {"max_tokens": max_tokens} | ({"n": n[0]} if n else {}))
                          for step, prompt, max_tokens, *n in requests), options, "")


THREE = (0, ONE, 6), (0, RED, 24), (4, "up down left up down", 6)
TIGHT = scene(SMALL, (0, ONE, 24), (0, RED, 24), (2, "up down", 4))
NARROW = scene(ROOMY | {"max_num_seqs": 8, "max_num_batched_tokens": 8}, *THREE)

BUGS = (
    Bug("only-prompts-can-be-found", 1,
        "Prefix caching is about prompts, so blocks are published where a prompt is computed. But the answer of one "
        "turn of a chat is in the prompt of the next one, and the output of a request that gave way is in what it "
        "computes again.",
        "A request that comes back computes all its output again; a chat's next turn finds no answer.",
        ((FILE, "if num_tokens > filled:", "if num_tokens > filled and num_tokens > 1:"),),
        scene(ROOMY, (0, ONE, 28), (40, f"{ONE} three {ONE} three {ONE}", 4))),
    Bug("the-new-token-counts-as-computed", 1,
        "After a step everything that is known is computed, it seems. But the token that was just drawn has no K and "
        "V yet: it is computed by the next step, from which the one after it is drawn.",
        "After the first token there is nothing to compute: no request ends, and a step without rows raises.",
        ((FILE, "            request.receive(token_ids[request], now)\n",
          "            request.receive(token_ids[request], now)\n"
          "            request.num_computed_tokens = len(request.token_ids)\n"),), scene(ROOMY, *THREE)),
    Bug("a-batch-ends-together", 1,
        "A batch is computed together, so it is recorded together: rows leave when the last one is done. That is "
        "static batching, in which short requests wait for long ones (Orca's reason for deciding in each step anew).",
        "Short requests get tokens beyond max_tokens, until the longest of their batch has ended.",
        ((FILE, "if request in stopped or len(request.token_ids) == request.max_length:",
          "if request in stopped or all(len(one.token_ids) >= one.max_length for one in step.requests):"),),
        scene(ROOMY, *THREE)),
    Bug("garbage-can-be-found", 1,
        "A request whose logits are not finite ends with an error, and its blocks are recorded like all others. So "
        "the next request with this prompt finds NaN, and ends with an error too: one overflow poisons a system "
        "prompt.",
        "After one error each request with the same beginning ends with an error.",
        ((FILE, "            if request in failed:\n                continue\n", ""),)),
    Bug("room-for-the-whole-prompt", 2,
        "A request is admitted if it fits, and what must fit is its prompt. But this step writes only a chunk of it. "
        "Whether the rest should fit is for the admission policy to say: the greedy one does not ask for it.",
        "A long prompt waits beside blocks that its first chunks could use, whatever the policy says.",
        ((FILE, "end = min(known, hit + self._restorable_tokens(request, hit) + budget)", "end = known"),),
        scene(SMALL | {"admission": "greedy", "max_num_seqs": 4, "max_num_batched_tokens": 8},
              (0, ONE, 24), (2, f"{RED} blue {RED}", 4))),
    Bug("cached-hits-counted-as-room", 2,
        "num_available says how many blocks can be handed out, cached ones included. The ones that the candidate "
        "finds are among them, and once it holds them they cannot be handed out any more.",
        "The engine hangs: in one step a request is admitted and gives way, again and again.",
        ((FILE, "available=allocator.num_available - sum([allocator.ref_count(block) == 0 for block in prefix]),",
          "available=allocator.num_available,"),),
        scene(SMALL, (0, "in the old library of the town", 1), (1, RED, 12),
              (2, "in the old library of the town, the card", 8))),
    Bug("alone-and-refused", 2,
        "The watermark keeps some blocks free for running requests to grow into. With nobody running it protects "
        "nobody; and a request that needs nearly the whole pool is then refused forever. vLLM hung for a related "
        "reason, a prompt that the pool could never hold (vLLM #35541).",
        "A request with a long prompt waits forever, in an engine that does nothing.",
        ((FILE, "if self.running and not self._fits", "if not self._fits"),),
        scene(SMALL | {"watermark": 0.5}, (0, f"{ONE} three {ONE}", 6))),
    Bug("continuations-need-no-seat", 2,
        "A request is admitted, so it takes a seat. That it is n requests as soon as its prompt is computed is "
        "remembered too late.",
        "More requests run in a step than max_num_seqs allows.",
        ((FILE, "if self.committed_seats + request.num_seats > self.max_num_seqs:",
          "if self.committed_seats + 1 > self.max_num_seqs:"),),
        scene(ROOMY | {"max_num_seqs": 3}, (0, "up down left up down", 8), (0, RED, 8, 3))),
    Bug("small-ones-overtake", 2,
        "If the first waiting request does not fit, a smaller one behind it may, and memory should not lie idle. But "
        "then a stream of small requests keeps the large one waiting forever.",
        "A long prompt is answered last, however early it came.",
        ((FILE, "        while self.waiting and step.budget:\n            request = self.waiting.first()\n",
          "        for request in self.waiting:\n            if step.budget == 0:\n                break\n"),
         (FILE, "# alone it fits: `refuse_what_never_fits`\n                break",
          "# alone it fits: `refuse_what_never_fits`\n                continue")),
        scene(SMALL, (0, ONE, 20), (1, f"{RED} blue {RED}", 4), *((i, "up down up", 12) for i in range(2, 40, 6)))),
    Bug("the-budget-counts-requests", 3,
        "A batch has so many places, one for each request: that was so when each request was a row. Here a request is "
        "as many rows as it has tokens, and the budget bounds the rows of a step, and so its time and its memory.",
        "Steps are larger than max_num_batched_tokens: slow for all who decode beside, or out of memory.",
        ((FILE, "step.budget -= num_tokens", "step.budget -= 1"),), NARROW),
    Bug("nobody-joins-a-running-batch", 3,
        "A batch is made, computed to its end, and then the next one is made. So a place that is free waits for the "
        "longest request of its batch. This is what engines did before Orca.",
        "A request that comes a little later waits until all that run have ended.",
        ((FILE, "if len(step.preempted) == num_preempted:",
          "if len(step.preempted) == num_preempted and not self.running:"),),
        scene(ROOMY, *THREE)),
    Bug("admitted-into-the-gap", 3,
        "Somebody gave way, so there are free blocks, and so somebody can be admitted: most likely the one that just "
        "gave way. It begins to compute again, and gives way in the next step. vLLM users met this thrashing (vLLM "
        "#28018).",
        "Under pressure most of the work is done again.",
        ((FILE, "if len(step.preempted) == num_preempted:", "if True:"),),
        scene(SMALL | {"admission": "greedy", "enable_prefix_caching": False, "max_num_seqs": 4,
                       "max_num_batched_tokens": 8}, (0, ONE, 32), (0, f"{RED} blue", 24))),
    Bug("a-failed-plan-is-forgotten", 3,
        "A step that raised has not happened, so the next one is planned from nothing. But its admissions, "
        "preemptions and copies have happened, and nobody is ever told of them.",
        "After an error counters and recordings miss preemptions and copies; nothing in the texts.",
        ((FILE, "        if unrecorded is not None:  # it was not carried out, but these have happened\n"
          "            step.moves, step.admitted, step.preempted = unrecorded.moves, unrecorded.admitted, "
          "unrecorded.preempted\n",
          ""),)),
    Bug("the-whole-length-reserved", 3,
        "A request will need its blocks anyway, so it takes them when it begins. That is what serving systems did "
        "before PagedAttention: most of the memory was reserved, and never or not yet used (section 3 of the vLLM "
        "paper).",
        "Fewer requests run at the same time, in the same memory, and some give way needlessly.",
        ((FILE, "if start + num_tokens > len(request.block_table) * self.block_size or request.may_share_tail:",
          "if request.full_blocks > len(request.block_table) or request.may_share_tail:"),
         (FILE, "if not self._make_room(request, start + num_tokens, step):",
          "if not self._make_room(request, request.full_blocks * self.block_size, step):"),
         (FILE, "chunk=blocks_for(end, self.block_size) - len(prefix),", "chunk=request.full_blocks - len(prefix),")),
        TIGHT),
    Bug("a-prompt-is-not-cut", 4,
        "A prompt is computed in one step, or not yet. One that is longer than the budget is never computed, and "
        "nothing says so (vllm-metal #200: such a prompt stalled the server when chunks were disabled).",
        "A prompt longer than max_num_batched_tokens is never answered: a step without rows raises.",
        ((FILE, "        if num_tokens > step.budget:\n            num_tokens = step.budget\n",
          "        if num_tokens > step.budget:\n            return True\n"),), NARROW),
    Bug("each-has-the-whole-budget", 4,
        "A chunk is as long as the budget allows. The budget of the step, that is, and not what those before have "
        "left.",
        "Steps are larger than max_num_batched_tokens as soon as two long prompts meet.",
        ((FILE, "        if num_tokens > step.budget:\n            num_tokens = step.budget\n",
          "        if num_tokens > self.max_num_batched_tokens:\n            num_tokens = "
          "self.max_num_batched_tokens\n"),
         (FILE, "if step.budget == 0 or not", "if step.budget <= 0 or not"),
         (FILE, "while self.waiting and step.budget:", "while self.waiting and step.budget > 0:")), NARROW),
    Bug("long-prompts-go-first", 4,
        "A prompt that waits to be computed keeps its user waiting for the first token, so it goes first. Then "
        "everybody who decodes stands still while a long prompt is computed: the stall that chunks are there to avoid "
        "(Sarathi-Serve).",
        "Answers stop in the middle of a sentence whenever somebody sends a long prompt.",
        ((FILE, "for request in self.running:  # `_make_room`",
          "for request in sorted(self.running, key=lambda one: one.num_computed_tokens - len(one.token_ids)):"
          "  # `_make_room`"),),
        scene(ROOMY | {"max_num_seqs": 4, "max_num_batched_tokens": 8}, (0, "up up", 12),
              (2, f"{RED} blue {RED} blue {RED}", 4))),
    Bug("the-oldest-gives-way", 5,
        "The first request has run longest, and holds most blocks, so it frees most. It has also waited longest, and "
        "has most to lose; and with the one that is always served goes the promise that there is progress.",
        "Under pressure the oldest request loses its work, and in the end nobody is served.",
        ((FILE, "(last := self.running.pop(), step)", "(last := self.running.pop(0), step)"),),
        TIGHT),
    Bug("to-the-end-of-the-queue", 5,
        "Who gave way waits again, and a queue is joined at its end. So under pressure it is overtaken by all that "
        "came later, and may never end.",
        "A request that gave way ends after requests that came long after it.",
        ((FILE, "        request.waiting_since = self.clock()\n        self.waiting.push(request)",
          "        request.waiting_since = self.clock()\n"
          "        request.key = (request.key[0], next(self._arrivals), 0)\n        self.waiting.push(request)"),),
        scene(SMALL, (0, ONE, 32), (0, RED, 16), (3, "up down", 24))),
    Bug("starts-anew", 5,
        "Its blocks are gone, so it begins again: with its prompt. But its user has read the output already, and with "
        "temperature above 0 the second answer is another one. A vLLM user reports incomplete output after a "
        "preemption (vLLM #16832).",
        "The text of a request that gave way jumps back, and its tokens are drawn twice.",
        ((FILE, "        request.num_computed_tokens = 0\n        request.metrics.preemptions",
          "        request.num_computed_tokens = 0\n        del request.token_ids[request.num_prompt_tokens :]\n"
          "        request.metrics.preemptions"),), TIGHT),
    Bug("a-token-lost-at-a-boundary", 5,
        "Only what is computed is kept, rounded to blocks. The newest token is known, and not computed: if the "
        "computed ones just fill their blocks, it is the only one that no block has a slot for.",
        "Now and then a letter is missing, or comes twice, in a text whose request gave way.",
        ((FILE, "        request.most_computed_tokens = max(",
          "        if request.num_computed_tokens % self.block_size == 0 and request.num_output_tokens:\n"
          "            request.token_ids.pop()\n        request.most_computed_tokens = max("),), TIGHT),
    Bug("a-seat-kept", 5,
        "Who gives way gives back its blocks: that is what it is asked for. Its seat is forgotten, so it takes a "
        "second one when it comes back, until all are taken and nobody sits there. vLLM users met an engine that "
        "admits nobody, since requests that wait count as running (vLLM #53130).",
        "After some preemptions nobody is admitted any more, in an engine that is idle.",
        ((FILE, "        self._leave(request)\n        request.most_computed_tokens",
          "        self.allocator.give_back_all(request.block_table)\n        request.most_computed_tokens"),),
        scene(SMALL | {"max_num_seqs": 2}, (0, ONE, 24), (0, RED, 24), (2, "up down", 4))),
    Bug("taken-twice", 5,
        "A request needs blocks for its new tokens. If the step fails, it needs them again, and takes them again: the "
        "first ones are in its table already, behind which the new ones are never used.",
        "After errors requests hold more blocks than they fill, and the pool is full too early.",
        ((FILE, "missing = max(0, blocks_for(end, self.block_size) - len(table))",
          "missing = blocks_for(end, self.block_size) - blocks_for(request.num_computed_tokens, self.block_size)"),)),
    Bug("asked-before-others-gave-way", 5,
        "Whether the block is shared was asked a few lines above. In between others gave way, and if one of them was "
        "the other holder, there is nobody left to copy for, and no block to copy to.",
        "A step raises in the middle of its plan, or a block is copied that nobody else holds.",
        ((FILE, "        missing = max(0, blocks_for", "        is_shared = self._shares_tail(request)\n"
          "        missing = max(0, blocks_for"),
         (FILE, "        if self._shares_tail(request):  # asked again: the other holder may have given way\n"
          "            self._copy_tail(request)", "        if is_shared:\n"
          "            copy = allocator.take()\n            tail = request.num_computed_tokens // self.block_size\n"
          "            allocator.fill(copy, request.num_computed_tokens % self.block_size)\n"
          "            allocator.give_back(table[tail])\n            self._move(\"copy\", table[tail], copy)\n"
          "            table[tail] = copy")),
        scene(SMALL | {"num_blocks": 3}, (0, ONE, 3, 2))),
    Bug("continuations-survive-an-abort", 6,
        "Who aborts a request means the request. Its other continuations are requests too, which wait for its prompt: "
        "they are in no list, so nobody ever ends them, or tells their user.",
        "A user who asked for n > 1 and aborted gets no end for the others, or an error.",
        ((FILE, "members = [request, *request.followers]", "members = [request]"),)),
    Bug("returned-twice", 6,
        "An abort gives everything back, and so does the end of a request. What was given back twice is counted "
        "twice: vLLM users met \"Double free!\" here (vLLM #1556).",
        "After some aborts more requests run than there are seats.",
        ((FILE, "            del self.running[bisect_left(self.running, request)]\n",
          "            del self.running[bisect_left(self.running, request)]\n            self._leave(request)\n"),)),
    Bug("an-aborted-one-keeps-its-place", 6,
        "The request is finished, and its blocks are free. It is still in `running`, so the next step computes it, in "
        "blocks that it takes anew.",
        "Aborted requests go on computing, and hold blocks that never come back.",
        ((FILE, "            del self.running[bisect_left(self.running, request)]\n", "            pass\n"),)),
)
