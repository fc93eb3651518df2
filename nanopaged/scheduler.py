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
records what was computed. A plan that was not carried out (the model raised) leaves its admissions
and preemptions standing, and blocks taken early; the next `schedule` goes on from there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field

from nanopaged.admission import Policy, Situation, watermark
from nanopaged.block_allocator import BlockAllocator, InvariantError
from nanopaged.request import Request, RequestStatus
from nanopaged.stats import SchedulerStats
from nanopaged.storm import StepFigures, StormWatch
from nanopaged.swap_space import BlockMove, SwapSpace
from nanopaged.validation import require_int


class TooManyWaiting(RuntimeError):
    """The queue is full: send the request again later, or elsewhere. Nothing was changed."""


@dataclass
class Step:
    """One step's plan: `requests[i]` computes its next `num_tokens[i]` tokens."""

    requests: list[Request] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)  # gave way while this plan was made
    budget: int = 0  # tokens that nobody has taken yet
    admitted_tokens: int = 0  # known tokens of the requests that were admitted
    hit_tokens: int = 0  # of these, tokens that were found in the pool

    def sampled(self) -> list[Request]:
        """Those whose last known token is computed, each with the followers that start from it."""
        sampled = []
        for request, num_tokens in zip(self.requests, self.num_tokens):
            if request.num_computed_tokens + num_tokens == len(request.token_ids):
                sampled.append(request)
                sampled += request.followers
        return sampled


class Scheduler:
    """Decides who runs, and keeps every request's block table.

    Args:
        allocator: the pool.
        max_num_seqs, max_num_batched_tokens: requests (seats) and tokens in one step at most.
        max_model_len: longest prompt plus output, in tokens.
        admission: whom to let in, see `admission`.
        swap_blocks: blocks of CPU memory for preempted requests; 0: they are recomputed.
        max_waiting: requests in the queue, preempted ones too, past which none is added; None: any.
        clock: tells the time, in seconds; a simulation brings its own.
    """

    def __init__(self, allocator: BlockAllocator, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
                 admission: Policy = watermark(0.01), swap_blocks: int = 0, max_waiting: int | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.allocator = allocator
        self.block_size = allocator.block_size
        self.max_num_seqs = require_int("max_num_seqs", max_num_seqs, 1)
        self.max_num_batched_tokens = require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.max_model_len = require_int("max_model_len", max_model_len, 2)
        self.admission = admission
        self.max_waiting = max_waiting if max_waiting is None else require_int("max_waiting", max_waiting, 1)
        self.clock = clock
        self.running: list[Request] = []  # oldest first
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # next first; a dict, to abort in O(1)
        self.committed_seats = self.committed_blocks = 0  # of all who run, with their followers, at full length
        self.moves: list[BlockMove] = []  # to be carried out, in order, before the next step is computed
        self.swap = SwapSpace(require_int("swap_blocks", swap_blocks, 0), allocator, self.moves)
        self.stats = SchedulerStats()
        self.storm_watch = StormWatch()

    def add(self, request: Request) -> None:
        """Puts a request, with its followers, at the end of the queue.

        Raises ValueError where it could never run: no room in the model's context, or not in the whole
        pool. Raises TooManyWaiting where the queue is full. Nothing is changed then.
        """
        if self.queue_is_full():
            raise TooManyWaiting(f"{len(self.waiting)} requests wait already, max_waiting is {self.max_waiting}")
        if request.num_prompt_tokens >= self.max_model_len:
            raise ValueError(f"the prompt has {request.num_prompt_tokens} tokens; with max_model_len="
                             f"{self.max_model_len} at most {self.max_model_len - 1} leave room for an output")
        max_length = min(request.max_length, self.max_model_len)
        blocks = self._blocks_for(max_length - 1)  # the last token's K and V are never read
        pool, members = self.allocator.num_blocks, [request, *request.followers]
        if len(members) > self.max_num_seqs:
            raise ValueError(f"n={len(members)} continuations need as many seats, max_num_seqs is {self.max_num_seqs}")
        empty = Situation(pool=pool, available=pool, committed=0, chunk=0, prompt=0, full=blocks * len(members))
        if blocks <= pool and not self.admission(empty):
            raise ValueError(f"the request can never fit: the admission policy refuses it even in an empty pool, {empty}")
        if blocks > pool:
            raise ValueError(f"the request can never fit: its {request.num_prompt_tokens} prompt tokens and up to "
                             f"{max_length - request.num_prompt_tokens} output tokens need {blocks} blocks of "
                             f"{self.block_size}, and the whole pool has {pool}: lower max_tokens, or raise "
                             "num_blocks")
        now = self.clock()
        for member in members:
            member.max_length, member.full_blocks = max_length, blocks
            member.metrics.arrival_time = member.waiting_since = now
        self.waiting[request.request_id] = request

    def queue_is_full(self) -> bool:
        return self.max_waiting is not None and len(self.waiting) >= self.max_waiting

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Plans the next step: running requests first, then as many waiting ones as fit.

        The oldest running request always advances: alone it fits the pool (see `add`), and
        everybody else gives way to it.
        """
        step = Step(budget=self.max_num_batched_tokens)
        for request in self.running:  # `_give_way` takes requests off its end meanwhile
            if step.budget == 0 or not self._plan(request, step):
                break
        if not step.preempted:  # who gave way was promised the next free blocks
            self._admit(step)
        return step

    def _plan(self, request: Request, step: Step) -> bool:
        """Gives a request its tokens of this step, and the blocks to write them; False: it gave way itself."""
        start, table = request.num_computed_tokens, request.block_table
        num_tokens = len(request.token_ids) - start
        if num_tokens > step.budget:
            num_tokens = step.budget
        if start + num_tokens > len(table) * self.block_size or request.has_siblings:
            allocator = self.allocator
            missing = max(0, self._blocks_for(start + num_tokens) - len(table))  # a plan not carried out took some
            while allocator.num_available < missing + self._shares_tail(request):
                if not self._give_way(request, step):
                    return False
            if self._shares_tail(request):  # copy-on-write; asked again, since who gave way may have been the other
                tail = start // self.block_size
                self.moves.append(BlockMove("copy", table[tail], allocator.fork(table[tail])))
                table[tail] = self.moves[-1].target
            table.extend(allocator.take() for _ in range(missing))
            request.has_siblings = bool(request.followers)  # once it has written, its tail is its own
        step.budget -= num_tokens
        step.requests.append(request)
        step.num_tokens.append(num_tokens)
        return True

    def _shares_tail(self, request: Request) -> bool:
        """Whether the block that the request writes next is partly filled, and held by a sibling too."""
        tail, filled = divmod(request.num_computed_tokens, self.block_size)
        return request.has_siblings and filled > 0 and self.allocator.ref_count(request.block_table[tail]) > 1

    def _give_way(self, request: Request, step: Step) -> bool:
        """Preempts the youngest running request; False: that is `request` itself."""
        youngest = self.running.pop()
        self._preempt(youngest)
        step.preempted.append(youngest)
        return youngest is not request

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue (vLLM paper, section 4.5); full blocks stay findable for a while."""
        swapped = self.swap.swap_out(request)
        self._leave(request)
        request.most_computed_tokens = max(request.most_computed_tokens, request.num_computed_tokens)
        request.num_computed_tokens = 0
        request.status = RequestStatus.SWAPPED if swapped else RequestStatus.WAITING
        request.metrics.preemptions += 1
        self.stats.num_preemptions += 1
        request.waiting_since = self.clock()
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _leave(self, request: Request) -> None:
        self.allocator.give_back_all(request.block_table)
        self.committed_seats -= 1 + len(request.followers)
        self.committed_blocks -= request.full_blocks * (1 + len(request.followers))

    def _admit(self, step: Step) -> None:
        """Seats waiting requests in order of arrival, until the first that does not fit."""
        allocator = self.allocator
        while self.waiting and step.budget:
            request = next(iter(self.waiting.values()))
            known, members = len(request.token_ids), 1 + len(request.followers)
            if self.committed_seats + members > self.max_num_seqs:
                break
            # The last token is computed even where it is cached: its logits are what we are here for.
            prefix = allocator.find_prefix(request.token_ids, known - 1)
            end = min(known, self.swap.restorable_tokens(request, len(prefix)) + step.budget)
            situation = Situation(
                pool=allocator.num_blocks, committed=self.committed_blocks, full=request.full_blocks * members,
                available=allocator.num_available - sum(allocator.ref_count(block) == 0 for block in prefix),
                chunk=self._blocks_for(end) - len(prefix), prompt=self._blocks_for(known) - len(prefix))
            # Alone it fits (see `add`); with others it must also find room for what this step writes.
            if self.running and not (situation.available >= situation.chunk and self.admission(situation)):
                break

            del self.waiting[request.request_id]
            self.running.append(request)
            self.committed_seats += members
            self.committed_blocks += request.full_blocks * members
            request.status = RequestStatus.RUNNING
            request.metrics.waiting_s += self.clock() - request.waiting_since
            allocator.take_prefix(prefix)
            request.block_table.extend(prefix)
            hit = len(prefix) * self.block_size
            request.num_computed_tokens = self.swap.swap_in(request)
            for i in range(len(prefix), request.num_computed_tokens // self.block_size):
                self._publish(request, i)
            self.stats.swapped_in_tokens += request.num_computed_tokens - hit
            request.metrics.prefix_hit_tokens += hit
            step.hit_tokens += hit
            step.admitted_tokens += known
            if request.most_computed_tokens == 0:  # for the first time
                self.stats.prompt_tokens += request.num_prompt_tokens
                self.stats.prompt_hit_tokens += hit
            self._plan(request, step)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def update(self, step: Step, token_ids: Sequence[int], stopped: Container[str] = ()) -> None:
        """Records that a step's tokens were computed, and what was sampled.

        `token_ids` has one token for each of `step.sampled()`, in that order; `stopped` the ids of
        requests whose text reaches a stop string with it.
        """
        allocator, block_size, now = self.allocator, self.block_size, self.clock()
        next_token = iter(token_ids)
        recomputed, finished_before = 0, self.stats.num_finished
        started: dict[str, list[Request]] = {}  # followers, by the request that they follow
        for request, num_tokens in zip(step.requests, step.num_tokens):
            start = request.num_computed_tokens
            request.num_computed_tokens = end = start + num_tokens
            if start < request.most_computed_tokens:
                again = min(end, request.most_computed_tokens) - start
                request.metrics.recomputed_tokens += again
                recomputed += again
            tail, filled = divmod(end, block_size)
            if num_tokens > filled:  # it has reached the ends of blocks
                for i in range(start // block_size, tail):
                    allocator.fill(request.block_table[i], block_size)
                    self._publish(request, i)
            if filled:
                allocator.fill(request.block_table[tail], filled)
            if end == len(request.token_ids):
                token = next(next_token)
                if request.followers:
                    started[request.request_id] = self._start_followers(request, next_token, stopped, now)
                self._receive(request, token, stopped, now)
        if started or self.stats.num_finished > finished_before:
            self.running = [member for request in self.running
                            for member in (request, *started.get(request.request_id, ()))
                            if member.status is RequestStatus.RUNNING]
        self._count(step, len(token_ids), recomputed)

    def _start_followers(self, leader: Request, next_token: Iterator[int], stopped: Container[str],
                         now: float) -> list[Request]:
        """The prompt is computed: the others start from its blocks, each with a first token of its own."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            follower.status = RequestStatus.RUNNING
            follower.num_computed_tokens = leader.num_computed_tokens
            follower.metrics.waiting_s = leader.metrics.waiting_s
            follower.block_table = list(leader.block_table)
            for block in follower.block_table:
                self.allocator.share(block)
            self._receive(follower, next(next_token), stopped, now)
        return followers

    def _receive(self, request: Request, token: int, stopped: Container[str], now: float) -> None:
        request.receive(token, now)
        stop = token in request.stop_token_ids or request.request_id in stopped
        if stop or len(request.token_ids) == request.max_length:
            self._finish(request, "stop" if stop else "length")

    def _publish(self, request: Request, i: int) -> None:
        """Makes logical block `i` findable; where an equal block is there already, holds that one."""
        table, block_size = request.block_table, self.block_size
        tokens = request.token_ids[i * block_size : (i + 1) * block_size]
        table[i] = self.allocator.publish(table[i], table[i - 1] if i else None, tokens)

    def _count(self, step: Step, num_sampled: int, recomputed: int) -> None:
        stats, computed = self.stats, sum(step.num_tokens)
        stats.num_steps += 1
        stats.computed_tokens += computed
        stats.recomputed_tokens += recomputed
        stats.output_tokens += num_sampled
        allocator = self.allocator
        figures = StepFigures(computed, recomputed, len(step.preempted), len(step.requests),
                              allocator.num_blocks - allocator.num_available, step.admitted_tokens, step.hit_tokens)
        self.storm_watch.record(figures, [*step.requests, *step.preempted], allocator.num_blocks)
        stats.num_storms = self.storm_watch.num_storms

    def _finish(self, request: Request, reason: str) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        self.swap.drop(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.metrics.finished_time = self.clock()
        self.stats.num_finished += 1

    def abort(self, request: Request) -> None:
        """Ends a request that waits or runs, with the followers that have not started; the blocks go back."""
        if request.status is RequestStatus.FINISHED:
            raise ValueError(f"request {request.request_id!r} has finished already")
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            del self.waiting[request.request_id]
        self._finish(request, "abort")
        for follower in request.followers:
            self._finish(follower, "abort")
        request.followers = []

    def check_invariants(self) -> None:
        """Checks both pools against every block table, and each table against its request; O(pool)."""
        everyone = [*self.running, *self.waiting.values()]
        self.allocator.check_invariants([request.block_table for request in everyone])
        if self.swap.allocator is not None:
            self.swap.allocator.check_invariants([list(request.swapped_blocks.values()) for request in everyone])
        for name, got, wanted in (
            ("blocks", self.committed_blocks, sum(r.full_blocks * (1 + len(r.followers)) for r in self.running)),
            ("seats", self.committed_seats, sum(1 + len(r.followers) for r in self.running)),
        ):
            if got != wanted:
                raise InvariantError(f"{got} {name} are counted as committed, but {wanted} are")
        for request in everyone:
            if len(request.block_table) < self._blocks_for(request.num_computed_tokens):
                raise InvariantError(f"{request} has computed more tokens than its blocks hold")
            if request.block_table and request.status is not RequestStatus.RUNNING:
                raise InvariantError(f"{request} holds blocks, but does not run")
            if bool(request.swapped_blocks) != (request.status is RequestStatus.SWAPPED):
                raise InvariantError(f"{request} has {len(request.swapped_blocks)} blocks in the swap space")
