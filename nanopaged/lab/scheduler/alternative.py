"""Another right scheduler: it shares the budget out first, makes room afterwards, and keeps its rows in a dict.

What is open is done otherwise than in the source: rows stand in another order, blocks are taken one by one, and a step
is recorded in passes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MappingProxyType

from nanopaged import scheduler
from nanopaged.request import Request, RequestStatus
from nanopaged.step import Admission, Step
from nanopaged.waiting import AdmissionContext, admits

REPLACES = "scheduler"
__all__ = ["Scheduler"]


class Scheduler(scheduler.Scheduler):
    def schedule(self) -> Step:
        step = Step(self.max_num_batched_tokens)
        if self._unrecorded:
            for name in ("moves", "admitted", "preempted"):
                setattr(step, name, [*getattr(self._unrecorded, name)])
        self._unrecorded, gave_way = step, len(step.preempted)
        rows: dict[Request, range] = {}
        for request in tuple(self.running):
            if request.status is RequestStatus.RUNNING:
                self._give(request, step, rows)
        while len(step.preempted) == gave_way and self._seat_first(step, rows):
            pass
        for request, positions in reversed(rows.items()):
            step.requests.append(request)
            step.starts.append(positions.start)
            step.num_tokens.append(len(positions))
        step.arrange()
        return step

    def _give(self, request: Request, step: Step, rows: dict[Request, range]) -> None:
        """Positions of a request, as far as the budget and the pool allow."""
        start = request.num_computed_tokens
        positions = range(start, min(len(request.token_ids), start + step.budget))
        if positions and self._make_room(request, positions.stop, step):
            rows[request] = positions
            step.budget -= len(positions)

    def _make_room(self, request: Request, end: int, step: Step) -> bool:
        table, allocator = request.block_table, self.allocator
        while len(table) * self.block_size < end or self._shares_tail(request):
            if not allocator.num_available:
                last = self.running[-1]
                self.running.remove(last)
                self._preempt(last, step)
                if last is request:
                    return False
            elif self._shares_tail(request):
                self._copy_tail(request)
            else:
                table.append(allocator.take())
        request.may_share_tail = False
        return True

    def _preempt(self, request: Request, step: Step) -> None:
        step.preempted.append(request)
        if request.num_computed_tokens > request.most_computed_tokens:
            request.most_computed_tokens = request.num_computed_tokens
        self._leave(request)
        request.num_computed_tokens, request.waiting_since = 0, self.clock()
        request.metrics.preemptions += 1
        self.waiting.push(request)

    def _seat_first(self, step: Step, rows: dict[Request, range]) -> bool:
        """Admits the first waiting request. False: there is none, or it must wait."""
        if not step.budget or not self.waiting:
            return False
        request = self.waiting.first()
        prefix = self.allocator.find_prefix(request.token_ids, len(request.token_ids) - 1)
        seats_are_free = self.max_num_seqs - self.committed_seats >= request.num_seats
        if not seats_are_free or len(self.running) > 0 and not self._fits(request, prefix, step.budget):
            return False
        self._seat(request, prefix)
        hit = len(prefix) * self.block_size
        step.admitted.append(Admission(request, len(request.token_ids), hit, request.num_computed_tokens - hit,
                                       is_first=not request.metrics.preemptions))
        self._give(request, step, rows)
        return True

    def _fits(self, request: Request, prefix: list[int], budget: int) -> bool:
        pool, size, known = self.allocator, self.block_size, len(request.token_ids)
        computed = len(prefix) * size + self._restorable_tokens(request, len(prefix) * size)
        room = pool.num_available - len(pool.cached_blocks().intersection(prefix))
        chunk = (min(known, computed + budget) - 1) // size + 1 - len(prefix)
        if chunk > room:
            return False
        return admits(self.admission, AdmissionContext(
            pool.num_blocks, room, self.committed_blocks, chunk, (known - 1) // size + 1 - len(prefix),
            request.num_seats * request.full_blocks))

    def update(self, step: Step, token_ids: Mapping[Request, int], stopped: Container[Request] = (),
               failed: Mapping[Request, str] = MappingProxyType({})) -> None:
        rows = {request: (start, start + number) for request, start, number
                in zip(step.requests, step.starts, step.num_tokens) if request not in failed}
        step.sampled = [(i, request) for i, request in step.sampled if step.requests[i] in rows]
        step.leaders = [leader for leader in step.leaders if leader in rows]
        for request, (start, end) in rows.items():
            again = max(0, min(end, request.most_computed_tokens) - start)
            request.metrics.recomputed_tokens += again
            step.recomputed_tokens += again
        for request, (start, end) in rows.items():
            self._record(request, start, end)
        for leader in step.leaders:
            self._start_followers(leader)
        now = self.clock()
        for _, request in step.sampled:
            request.receive(token_ids[request], now)
        for _, request in step.sampled:
            if request in stopped:
                self._end(request, "stop", step)
            elif len(request.token_ids) >= request.max_length:
                self._end(request, "length", step)
        for request, reason in failed.items():
            for member in [request, *request.followers]:
                member.error = reason
                self._end(member, "error", step)
        step.referenced_blocks = self.allocator.stats().referenced_blocks
        self._unrecorded = None
        self.listeners.tell_step(step)

    def _record(self, request: Request, start: int, end: int) -> None:
        request.num_computed_tokens = end
        position = start
        while position < end:  # block by block
            block = position // self.block_size
            position = min(end, (block + 1) * self.block_size)
            self.allocator.fill(request.block_table[block], position - block * self.block_size)
            if position % self.block_size == 0:
                self._publish(request, block)

    def _end(self, request: Request, reason: str, step: Step) -> None:
        if request in self.running:
            self.running.remove(request)
        self._finish(request, reason)
        step.ended.append(request)

    def _finish(self, request: Request, reason: str) -> None:
        held = request.status is RequestStatus.RUNNING
        request.metrics.finished_time = self.clock()
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        if held:
            self._leave(request)

    def abort(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.leave(request, RequestStatus.FINISHED)
        ended = [request, *request.followers]
        for member in ended:
            self._finish(member, "abort")
        self.listeners.tell("ended", *ended)
