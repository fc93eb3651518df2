"""Which requests run this step, and which must wait or give way?

Continuous batching (Orca: Yu et al., OSDI 2022): the batch is rebuilt for every step, so a
request joins when there is room and leaves when it is done. There is no prefill phase and no
decode phase. A step has a budget of tokens; each request computes as many of its known tokens as
the budget allows, so a long prompt is cut into chunks and computed while others decode beside it
(Sarathi-Serve: Agrawal et al., OSDI 2024).

    running   [A, B, C, D]      in the order of their keys; A is served first
                        ↑└──── the last: the first to give way when the pool is full
    waiting   [E, F, ...]       in the order of their keys; E is admitted first, and never preempts

`schedule` plans a step and takes the blocks that it writes, the engine runs the model, `update`
records what was computed. If a plan is not carried out (the model raised), its admissions and
preemptions stand, and its blocks stay taken; the next `schedule` goes on from there.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Container, Mapping
from itertools import count
from types import MappingProxyType

from nanopaged.block_allocator import BlockAllocator, blocks_for
from nanopaged.invariants import check_scheduler
from nanopaged.outputs import SchedulerStats
from nanopaged.request import Request, RequestStatus
from nanopaged.step import Admission, BlockMove, Listeners, Step
from nanopaged.validation import require_int
from nanopaged.waiting import (AdmissionContext, AdmissionPolicy, OrderPolicy, TooManyWaiting, WaitingQueue, admits,
                               fcfs, place_in, refuse_what_never_fits, watermark)


class Scheduler:
    """Decides which requests run, and keeps the block table of each.

    Args:
        allocator: the pool.
        max_num_seqs, max_num_batched_tokens: requests (seats) and tokens in one step at most.
        max_model_len, max_waiting: see `config.EngineConfig`; preempted requests wait too.
        admission, order: functions, see `waiting`; `order` is called once for a request, when it is added.
        clock: returns the time in seconds; a simulation brings its own.
    """

    def __init__(self, allocator: BlockAllocator, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int,
                 admission: AdmissionPolicy = watermark(0.01), order: OrderPolicy = fcfs,
                 max_waiting: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.allocator, self.block_size = allocator, allocator.block_size
        self.max_num_seqs = require_int("max_num_seqs", max_num_seqs, 1)
        self.max_num_batched_tokens = require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.max_model_len = require_int("max_model_len", max_model_len, 2)
        self.admission, self.order, self.clock = admission, order, clock
        self.max_waiting = max_waiting if max_waiting is None else require_int("max_waiting", max_waiting, 1)
        self.running: list[Request] = []  # sorted by key
        self.waiting = WaitingQueue()
        self.committed_seats = self.committed_blocks = 0  # of running requests and their followers, at full length
        self.moves: list[BlockMove] = []  # planned, and not carried out yet; a step keeps its own
        self.stats = SchedulerStats()
        self.listeners = Listeners([self.stats])
        self._arrivals = count()
        self._unrecorded: Step | None = None  # the last plan, until it is recorded

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it could never run, TooManyWaiting if the queue is full."""
        if self.queue_is_full():
            raise TooManyWaiting(f"{len(self.waiting)} requests wait already, max_waiting is {self.max_waiting}")
        max_length = min(request.max_length, self.max_model_len)
        full_blocks = blocks_for(max_length - 1, self.block_size)  # the last token's K and V are never read
        refuse_what_never_fits(request, max_length, full_blocks, self)
        place, arrival, now = place_in(self.order, request), next(self._arrivals), self.clock()
        for i, member in enumerate([request, *request.followers]):
            member.key = (place, arrival, i)
            member.max_length, member.full_blocks = max_length, full_blocks
            member.metrics.arrival_time = member.waiting_since = now
        self.waiting.push(request)
        self.listeners.tell("added", request)

    def queue_is_full(self) -> bool:
        return self.max_waiting is not None and len(self.waiting) >= self.max_waiting

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Plans the next step: running requests first, then as many waiting ones as fit.

        The first running request always advances: alone it fits the pool (`refuse_what_never_fits`), and
        all others give way to it.
        """
        step, unrecorded = Step(self.max_num_batched_tokens), self._unrecorded
        if unrecorded is not None:  # it was not carried out, but these have happened
            step.moves, step.admitted, step.preempted = unrecorded.moves, unrecorded.admitted, unrecorded.preempted
        self._unrecorded, num_preempted = step, len(step.preempted)
        for request in self.running:  # `_make_room` takes requests off its end meanwhile
            if step.budget == 0 or not self._plan(request, step):
                break
        if len(step.preempted) == num_preempted:  # else the next free blocks are for those that gave way
            self._admit(step)
        step.arrange()
        return step

    def _plan(self, request: Request, step: Step) -> bool:
        """Gives a request its tokens of this step, and the blocks to write them; False: it gave way itself."""
        start = request.num_computed_tokens
        num_tokens = len(request.token_ids) - start
        if num_tokens > step.budget:
            num_tokens = step.budget
        if start + num_tokens > len(request.block_table) * self.block_size or request.may_share_tail:
            if not self._make_room(request, start + num_tokens, step):
                return False
        step.budget -= num_tokens
        step.requests.append(request)
        step.starts.append(start)
        step.num_tokens.append(num_tokens)
        return True

    def _make_room(self, request: Request, end: int, step: Step) -> bool:
        """Makes a table writable up to position `end`; the last running requests give way. False: this one did too."""
        allocator, table = self.allocator, request.block_table
        missing = max(0, blocks_for(end, self.block_size) - len(table))  # some are there, if an earlier step failed
        while allocator.num_available < missing + self._shares_tail(request):
            self._preempt(last := self.running.pop(), step)
            if last is request:
                return False
        if self._shares_tail(request):  # asked again: the other holder may have given way
            self._copy_tail(request)
        request.may_share_tail = False
        table.extend([allocator.take() for _ in range(missing)])
        return True

    def _copy_tail(self, request: Request) -> None:
        """Copy-on-write (vLLM paper, section 4.4): the block that is written next becomes the request's own."""
        table, tail = request.block_table, request.num_computed_tokens // self.block_size
        copy = self.allocator.fork(table[tail])
        self._move("copy", table[tail], copy)
        table[tail] = copy

    def _move(self, kind: str, source: int, target: int) -> None:
        self.moves.append(BlockMove(kind, source, target))
        self._unrecorded.moves.append(self.moves[-1])

    def _shares_tail(self, request: Request) -> bool:
        """Whether the block that the request writes next is partly filled, and held by others too."""
        tail, filled = divmod(request.num_computed_tokens, self.block_size)
        return request.may_share_tail and filled > 0 and self.allocator.ref_count(request.block_table[tail]) > 1

    def _preempt(self, request: Request, step: Step) -> None:
        """Takes a request's blocks (vLLM paper, section 4.5). Full ones stay findable until they are reused."""
        self._leave(request)
        request.most_computed_tokens = max(request.most_computed_tokens, request.num_computed_tokens)
        request.num_computed_tokens = 0
        request.metrics.preemptions += 1
        request.waiting_since = self.clock()
        self.waiting.push(request)
        step.preempted.append(request)

    def _admit(self, step: Step) -> None:
        """Seats waiting requests in the order of their keys, until the first that does not fit.

            token_ids   │ hit: found in │ restored by │ chunk: computed │ computed in │
                        │ the pool      │ a subclass  │ in this step    │ later steps │
                        0                                                         known
        """
        while self.waiting and step.budget:
            request = self.waiting.first()
            known = len(request.token_ids)
            if self.committed_seats + request.num_seats > self.max_num_seqs:
                break
            # The last token is computed even if it is cached: the next one is drawn from its logits.
            prefix = self.allocator.find_prefix(request.token_ids, known - 1)
            if self.running and not self._fits(request, prefix, step.budget):  # alone it fits: `refuse_what_never_fits`
                break
            self._seat(request, prefix)
            hit = len(prefix) * self.block_size
            restored = request.num_computed_tokens - hit
            step.admitted.append(Admission(request, known, hit, restored, request.metrics.preemptions == 0))
            self._plan(request, step)

    def _fits(self, request: Request, prefix: list[int], budget: int) -> bool:
        """Whether the first waiting request finds room for what this step writes, and the policy agrees."""
        allocator, known, hit = self.allocator, len(request.token_ids), len(prefix) * self.block_size
        end = min(known, hit + self._restorable_tokens(request, hit) + budget)
        context = AdmissionContext(
            pool=allocator.num_blocks, committed=self.committed_blocks, full=request.full_blocks * request.num_seats,
            available=allocator.num_available - sum([allocator.ref_count(block) == 0 for block in prefix]),
            chunk=blocks_for(end, self.block_size) - len(prefix),
            prompt=blocks_for(known, self.block_size) - len(prefix))
        return context.available >= context.chunk and admits(self.admission, context)

    def _restorable_tokens(self, request: Request, hit: int) -> int:
        """Tokens that a subclass has kept outside the pool, from position `hit` on."""
        return 0

    def _seat(self, request: Request, prefix: list[int]) -> None:
        """Lets a request run, with the blocks of its prefix; a subclass restores here what it has kept."""
        self.waiting.leave(request, RequestStatus.RUNNING)
        insort(self.running, request)
        self.committed_seats += request.num_seats
        self.committed_blocks += request.full_blocks * request.num_seats
        self.allocator.take_prefix(prefix)
        request.block_table.extend(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size
        request.metrics.prefix_hit_tokens += request.num_computed_tokens
        request.metrics.waiting_s += self.clock() - request.waiting_since

    def _leave(self, request: Request) -> None:
        self.allocator.give_back_all(request.block_table)
        self.committed_seats -= request.num_seats
        self.committed_blocks -= request.full_blocks * request.num_seats

    def update(self, step: Step, token_ids: Mapping[Request, int], stopped: Container[Request] = (),
               failed: Mapping[Request, str] = MappingProxyType({})) -> None:
        """Records a computed step, with a token for each request in `step.sampled`; those in `stopped` end with it.

        `failed` has requests of the step that could not be computed, and why. They end, with the followers that have
        not started, and nobody finds what they wrote.
        """
        allocator, block_size = self.allocator, self.block_size
        if failed:
            step.sampled = [(i, request) for i, request in step.sampled if step.requests[i] not in failed]
            step.leaders = [leader for leader in step.leaders if leader not in failed]
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            if request in failed:
                continue
            request.num_computed_tokens = end = start + num_tokens
            if start < request.most_computed_tokens:
                again = min(end, request.most_computed_tokens) - start
                request.metrics.recomputed_tokens += again
                step.recomputed_tokens += again
            tail, filled = divmod(end, block_size)
            if num_tokens > filled:  # its tokens do not all lie in the last block: those before it are full
                for i in range(start // block_size, tail):
                    allocator.fill(request.block_table[i], block_size)
                    self._publish(request, i)
            if filled:
                allocator.fill(request.block_table[tail], filled)
        for leader in step.leaders:
            self._start_followers(leader)
        now = self.clock()
        for _, request in step.sampled:
            request.receive(token_ids[request], now)
            if request in stopped or len(request.token_ids) == request.max_length:
                self._finish(request, "stop" if request in stopped else "length")
                step.ended.append(request)
        for request, reason in failed.items():
            for member in (request, *request.followers):
                member.error = reason
                self._finish(member, "error")
                step.ended.append(member)
        if step.ended:
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        step.referenced_blocks = allocator.num_blocks - allocator.num_available
        self._unrecorded = None
        self.listeners.tell_step(step)

    def _publish(self, request: Request, i: int) -> None:
        """Makes logical block `i` findable; if an equal block is there already, the request holds that one."""
        table, block_size = request.block_table, self.block_size
        tokens = request.token_ids[i * block_size : (i + 1) * block_size]
        table[i] = self.allocator.publish(table[i], table[i - 1] if i else None, tokens)

    def _start_followers(self, leader: Request) -> None:
        """The prompt is computed: its other continuations share all its blocks, the partly filled last one too."""
        followers, leader.followers = leader.followers, []
        leader.may_share_tail = True
        for follower in followers:
            follower.status, follower.may_share_tail = RequestStatus.RUNNING, True
            follower.num_computed_tokens = leader.num_computed_tokens
            follower.metrics.waiting_s = leader.metrics.waiting_s
            follower.block_table = leader.block_table[:]
            for block in follower.block_table:
                self.allocator.share(block)
            insort(self.running, follower)

    def _finish(self, request: Request, reason: str) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.metrics.finished_time = self.clock()

    def abort(self, request: Request) -> None:
        """Ends a waiting or running request, with the followers that have not started; its blocks go back."""
        if request.status is RequestStatus.RUNNING:
            del self.running[bisect_left(self.running, request)]
        else:
            self.waiting.leave(request, RequestStatus.FINISHED)
        members = [request, *request.followers]
        for member in members:
            self._finish(member, "abort")
        self.listeners.tell("ended", *members)

    def check_invariants(self) -> None:  # O(pool), for tests and for debugging
        check_scheduler(self)
