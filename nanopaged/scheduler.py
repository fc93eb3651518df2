"""Who runs this step, and who must wait or give way?

Continuous batching (Orca: Yu et al., OSDI 2022): the batch is made anew for every step, so a
request joins when there is room and leaves when it is done. There is no prefill phase and no
decode phase. A step has a budget of tokens; each request computes as many of its known tokens as
the budget allows, so a long prompt is cut into chunks and computed while others decode beside it
(Sarathi-Serve: Agrawal et al., OSDI 2024).

    running   [A, B, C, D]      in order of arrival; served first, A before all others
                        ↑└──── the youngest: the first to give way when the pool is full
    waiting   [E, F, ...]       in order of arrival; E is admitted before F, preempted ones re-enter in front

`schedule` plans a step and takes the blocks that it writes, the engine runs the model, `update`
records what was computed. After a plan that was not carried out (the model raised) the requests
hold a few blocks early, and the next `schedule` plans the same work again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from nanopaged.block_allocator import BlockAllocator, InvariantError
from nanopaged.request import Request, RequestStatus
from nanopaged.validation import require_int, require_number


@dataclass
class Step:
    """One step's plan: `requests[i]` computes its next `num_tokens[i]` tokens."""

    requests: list[Request] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # gave way while this plan was made

    def sampled(self) -> list[Request]:  # those whose last known token is computed, so that a next one can be drawn
        return [request for request, n in zip(self.requests, self.num_tokens)
                if request.num_computed_tokens + n == len(request.token_ids)]


@dataclass(kw_only=True)
class SchedulerStats:
    """What the scheduler has done since the start, in steps, requests and tokens."""

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0  # asked for, in the prompts of admitted requests
    prompt_hit_tokens: int = 0  # those of them that were shared instead of computed
    computed_tokens: int = 0  # every pass of a token through the model, recomputed ones again
    output_tokens: int = 0


class Scheduler:
    """Decides who runs, and keeps every request's block table.

    Args:
        allocator: the pool.
        max_num_seqs, max_num_batched_tokens: requests (seats) and tokens in one step at most.
        max_model_len: longest prompt plus output, in tokens.
        watermark: share of the pool, from 0 to 1, that admission leaves free, so that those who
            run can grow a while before anybody must give way.
        clock: tells the time, in seconds; a simulation brings its own.
    """

    def __init__(self, allocator: BlockAllocator, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
                 watermark: float = 0.01, clock: Callable[[], float] = time.monotonic) -> None:
        self.allocator = allocator
        self.max_num_seqs = require_int("max_num_seqs", max_num_seqs, 1)
        self.max_num_batched_tokens = require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.max_model_len = require_int("max_model_len", max_model_len, 2)
        self.watermark_blocks = int(require_number("watermark", watermark, 0.0, 1.0) * allocator.num_blocks)
        self.clock = clock
        self.running: list[Request] = []  # oldest first
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # next first; a dict, to abort in O(1)
        self.stats = SchedulerStats()

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue.

        Raises ValueError, and changes nothing, where it could never run: the prompt leaves no room in
        the model's context, or prompt and output do not fit the whole pool.
        """
        if request.num_prompt_tokens >= self.max_model_len:
            raise ValueError(f"the prompt has {request.num_prompt_tokens} tokens; with max_model_len="
                             f"{self.max_model_len} at most {self.max_model_len - 1} leave room for an output: shorten it")
        max_length = min(request.max_length, self.max_model_len)
        blocks = self._blocks_for(max_length - 1)  # the last token's K and V are never read
        if blocks > self.allocator.num_blocks:
            raise ValueError(f"the request can never fit: its {request.num_prompt_tokens} prompt tokens and up to "
                             f"{max_length - request.num_prompt_tokens} output tokens need {blocks} blocks of "
                             f"{self.allocator.block_size}, and the whole pool has {self.allocator.num_blocks}: "
                             "lower max_tokens, or raise num_blocks")
        request.max_length = max_length
        request.metrics.arrival_time = self.clock()
        self.waiting[request.request_id] = request

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Plans the next step: running requests first, then as many waiting ones as fit.

        The oldest running request always advances: alone it fits the pool (see `add`), and
        everybody else gives way to it.
        """
        step = Step()
        budget = self.max_num_batched_tokens
        block_size = self.allocator.block_size
        promised_blocks = 0  # that admitted prompts still have to take in later chunks
        for request in self.running:  # `_make_room` takes requests off its end meanwhile
            if budget == 0:
                break
            known, start = len(request.token_ids), request.num_computed_tokens
            num_tokens = known - start
            if num_tokens > budget:
                num_tokens = budget
            missing = -(-(start + num_tokens) // block_size) - len(request.block_table)
            if missing > 0:
                if not self._make_room(missing, request, step):
                    break
                request.block_table.extend(self.allocator.take() for _ in range(missing))
            if start + num_tokens < known:
                promised_blocks += self._blocks_for(known) - len(request.block_table)
            budget -= num_tokens
            step.requests.append(request)
            step.num_tokens.append(num_tokens)
        if not step.preempted:  # who gave way was promised the next free blocks
            self._admit(step, budget, promised_blocks)
        return step

    def _make_room(self, num_blocks: int, request: Request, step: Step) -> bool:
        """Preempts the youngest until `num_blocks` are available. False: `request` itself gave way."""
        while self.allocator.num_available < num_blocks:
            youngest = self.running.pop()
            self._preempt(youngest)
            step.preempted.append(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue, to recompute later (vLLM paper, section 4.5); full blocks stay findable."""
        self.allocator.give_back_all(request.block_table)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        request.metrics.preemptions += 1
        self.stats.num_preemptions += 1
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _admit(self, step: Step, budget: int, promised_blocks: int) -> None:
        """Seats waiting requests in order of arrival, until the first that does not fit."""
        allocator = self.allocator
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            request = next(iter(self.waiting.values()))
            known = len(request.token_ids)
            # The last token is computed even where it is cached: its logits are what we are here for.
            prefix = allocator.find_prefix(request.token_ids, known - 1)
            needed = self._blocks_for(known) - len(prefix)
            revived = sum(allocator.ref_count(block) == 0 for block in prefix)
            left = allocator.num_available - revived - promised_blocks - needed
            if left < self.watermark_blocks and self.running:  # alone, it fits (see `add`)
                break

            del self.waiting[request.request_id]
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            allocator.take_prefix(prefix)
            request.block_table.extend(prefix)
            request.num_computed_tokens = len(prefix) * allocator.block_size
            request.metrics.prefix_hit_tokens += request.num_computed_tokens
            if request.metrics.preemptions == 0:
                self.stats.prompt_tokens += request.num_prompt_tokens
                self.stats.prompt_hit_tokens += request.num_computed_tokens

            end = min(known, request.num_computed_tokens + budget)
            while len(request.block_table) * allocator.block_size < end:
                request.block_table.append(allocator.take())
            promised_blocks += self._blocks_for(known) - len(request.block_table)
            num_tokens = end - request.num_computed_tokens
            budget -= num_tokens
            step.requests.append(request)
            step.num_tokens.append(num_tokens)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.allocator.block_size)

    def update(self, step: Step, token_ids: Sequence[int], stopped: Container[str] = ()) -> None:
        """Records that a step's tokens were computed, and what was sampled.

        `token_ids` has one token for each of `step.sampled()`, in that order; `stopped` the ids of
        requests whose text reaches a stop string with it.
        """
        allocator, block_size = self.allocator, self.allocator.block_size
        next_token = iter(token_ids)
        finished = False
        for request, num_tokens in zip(step.requests, step.num_tokens):
            start = request.num_computed_tokens
            request.num_computed_tokens = end = start + num_tokens
            full_blocks, rest = divmod(end, block_size)
            for i in range(start // block_size, full_blocks):
                allocator.fill(request.block_table[i], block_size)
                self._publish(request, i)
            if rest:
                allocator.fill(request.block_table[full_blocks], rest)
            if end < len(request.token_ids):
                continue  # more of the prompt is to come
            token = next(next_token)
            request.token_ids.append(token)
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = self.clock()
            stop = token in request.stop_token_ids or request.request_id in stopped
            if stop or end + 1 == request.max_length:
                self._finish(request, "stop" if stop else "length")
                finished = True
        self.stats.num_steps += 1
        self.stats.computed_tokens += sum(step.num_tokens)
        self.stats.output_tokens += len(token_ids)
        if finished:
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]

    def _publish(self, request: Request, i: int) -> None:
        """Makes logical block `i` findable; where an equal block is there already, holds that one."""
        table, block_size = request.block_table, self.allocator.block_size
        tokens = request.token_ids[i * block_size : (i + 1) * block_size]
        table[i] = self.allocator.publish(table[i], table[i - 1] if i else None, tokens)

    def _finish(self, request: Request, reason: str) -> None:
        self.allocator.give_back_all(request.block_table)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.metrics.finished_time = self.clock()
        self.stats.num_finished += 1

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; its blocks go back."""
        if request.status is RequestStatus.WAITING:
            del self.waiting[request.request_id]
        elif request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            raise ValueError(f"request {request.request_id!r} has finished already")
        self._finish(request, "abort")

    def check_invariants(self) -> None:
        """Checks the pool against every block table, and each table against its request; O(pool)."""
        everyone = [*self.running, *self.waiting.values()]
        self.allocator.check_invariants([request.block_table for request in everyone])
        for request in everyone:
            if len(request.block_table) < self._blocks_for(request.num_computed_tokens):
                raise InvariantError(f"{request} has computed more tokens than its blocks hold")
            if request.block_table and request.status is not RequestStatus.RUNNING:
                raise InvariantError(f"{request} holds blocks, but does not run")
