"""How is a scheduler judged from outside? It is driven as an engine drives it, and everything is counted again.

A `Run` has a scheduler, its requests A, B, ..., and the contents that a model would have written into the pool's slots:
for each position all tokens up to there, since K and V depend on all of them. What it knows of the
scheduler it has from public names. After each event everything is counted again, and compared with a naive model
(`naive.py`). So each scenario also checks what no sentence of its own says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import groupby

from nanopaged.block_allocator import BlockAllocator
from nanopaged.lab.grading import begin, expect, expect_equal, story, tell
from nanopaged.lab.scheduler.naive import check_rows, check_shares, check_writes, count_again, shown
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Listener, Step
from nanopaged.waiting import AdmissionContext, AdmissionPolicy, OrderPolicy, fcfs

FROM_AND_TO = {"copy": ("pool", "pool"), "to_host": ("pool", "host"), "to_pool": ("host", "pool")}


def everybody(_: AdmissionContext) -> bool:
    """An admission policy: a request that finds room for this step is admitted, so requests give way soon."""
    return True


class Pool(BlockAllocator):
    """Notices a plan that goes on admitting, and does not end."""

    asked = 0  # in this step

    def find_prefix(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        self.asked += 1
        expect(self.asked < 200, "the plan of this step does not end: again and again a request is looked up that "
               "waits")
        return super().find_prefix(token_ids, max_tokens)


class Heard(Listener):
    """Notes what it is told, and finds everything counted right at that moment."""

    def __init__(self, run: Run) -> None:
        self.run, self.steps, self.ends = run, [], []

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def ended(self, request: Request) -> None:
        self.ends.append(request.request_id)
        is_running = request in self.run.scheduler.running
        if request.status is not RequestStatus.FINISHED or is_running:
            where = ", and which was still in running" if is_running else ""
            self.run.problems.append(f"a listener was told of the end of {request.request_id}, whose status was "
                                     f"{request.status.value}{where}")


class Run:
    def __init__(self, blocks: int, size: int = 2, seats: int = 8, budget: int = 16, about: str = "",
                 admission: AdmissionPolicy = everybody, order: OrderPolicy = fcfs, swap_blocks: int = 0,
                 caching: bool = True) -> None:
        begin(f"a pool of {blocks} blocks of {size} slots, {seats} seats, a budget of {budget} tokens{about}"
              + ("" if caching else ", no prefix caching"))
        self.blocks, self.size, self.seats, self.budget, self.order = blocks, size, seats, budget, order
        self.pool, self.time, self.caching = Pool(blocks, size, caching), 0.0, caching
        arguments = (self.pool, seats, budget, 1000, admission, order, None, lambda: self.time)
        if swap_blocks:
            swapping = import_module("nanopaged.pressure.swap_space")
            self.scheduler: Scheduler = swapping.SwappingScheduler(*arguments, swap_blocks=swap_blocks)
        else:
            self.scheduler = Scheduler(*arguments)
        self.members: list[Request] = []  # all that were added, in order
        self.prompts: dict[Request, list[int]] = {}
        self.answers: dict[Request, list[int]] = {}  # the tokens that a model would draw
        self.memory: dict[tuple[str, int, int], tuple[int, ...] | None] = {}  # by place, block and offset
        self.had: Counter[Request] = Counter()  # tokens that were in the pool for it, at most
        self.problems: list[str] = []
        self.heard = Heard(self)
        self.scheduler.listeners.append(self.heard)

    # What an engine does.

    def add(self, name: str, prompt: int | Sequence[int], max_tokens: int, n: int = 1, priority: float = 0) -> Request:
        """A prompt is given by its tokens, or by their number; then it has nothing in common with others."""
        tokens = [1000 * ord(name) + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        words = f"{prompt} tokens" if isinstance(prompt, int) else f"{tokens}"
        options = (f", n={n}" if n > 1 else "") + (f", priority={priority}" if priority else "")
        tell(f"add {name}: a prompt of {words}, max_tokens={max_tokens}{options}")
        members = [Request(name if n == 1 else f"{name}{i}", tokens, SamplingParams(n=n, max_tokens=max_tokens),
                           priority=priority, group_id=name) for i in range(n)]
        members[0].followers = members[1:]
        for i, member in enumerate(members):
            self.members.append(member)
            self.prompts[member] = tokens
            self.answers[member] = [100_000 * ord(name) + 1000 * i + j for j in range(max_tokens)]
        self.scheduler.add(members[0])
        return members[0]

    def step(self, stopped: Iterable[Request] = (), failed: Mapping[Request, str] | None = None) -> Step:
        """A whole step. Some requests may stop with the token that it gives them, or fail."""
        step = self.plan()
        self.carry_out(step, failed or {})
        self.record(step, stopped, failed or {})
        return step

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def finish(self, most: int = 120) -> None:
        """Steps until all requests have ended."""
        for _ in range(most):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        expect(not self.scheduler.has_unfinished(), f"after {most} more steps it has not ended: "
               f"{shown(self.scheduler.running)} run, and {shown(self.scheduler.waiting)} wait")
        expect(all(member.status is RequestStatus.FINISHED for member in self.members), "all requests should have "
               "finished, and the scheduler has nothing left to do, but not finished are "
               f"{shown(member for member in self.members if member.status is not RequestStatus.FINISHED)}")
        expect_equal("the number of blocks that can be handed out, when all have ended,", self.pool.num_available,
                     self.blocks)

    def plan(self) -> Step:
        scheduler, before = self.scheduler, [*self.scheduler.running]
        known = {request: len(request.token_ids) for request in self.members}
        times = {request: request.metrics.preemptions for request in self.scheduler.waiting}
        self.time, self.pool.asked = self.time + 1, 0
        tell(f"step {self.time:.0f}: schedule")
        step = scheduler.schedule()
        expect(isinstance(step, Step), f"schedule should return a Step, and returned {step!r}")
        expect(len(step.requests) == len(step.starts) == len(step.num_tokens),
               f"a step has {len(step.requests)} requests, {len(step.starts)} starts, {len(step.num_tokens)} "
               "num_tokens")
        told = ", ".join(f"{one.request_id}[{start}:{start + number}]" for one, start, number
                         in zip(step.requests, step.starts, step.num_tokens)) or "nothing"
        if step.admitted:
            told += f"; admitted: {shown(admission.request for admission in step.admitted)}"
        story[-1] += f" -> {told}" + (f"; gave way: {shown(step.preempted)}" if step.preempted else "")
        for request, number in known.items():
            expect_equal(f"the number of {request.request_id}'s tokens, which a plan does not change,",
                         len(request.token_ids), number)
        for request, number in times.items():
            expect(request.metrics.preemptions == number, f"{request.request_id} waited, was admitted, and gave way "
                   "in one step: it should not have been admitted")
        check_rows(self, step)
        check_shares(self, step, before)
        check_writes(self, step)
        count_again(self)
        return step

    def carry_out(self, step: Step, failed: Iterable[Request] = ()) -> None:
        """The moves, and the model: what failed writes garbage. Whatever is read must be right."""
        for kind, moves in groupby(self.scheduler.moves, key=lambda move: move.kind):
            source, target = FROM_AND_TO[kind]
            self.memory |= {(target, move.target, i): self.memory.get((source, move.source, i))
                            for move in [*moves] for i in range(self.size)}
        self.scheduler.moves.clear()
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            for p in range(start, start + num_tokens):
                self.memory[self.slot(request, p)] = None if request in failed else tuple(request.token_ids[: p + 1])
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            for p in range(start + num_tokens) if request not in failed else ():
                got, right = self.memory.get(self.slot(request, p)), tuple(request.token_ids[: p + 1])
                expect(got == right, f"{request.request_id} reads position {p} in block "
                       f"{request.block_table[p // self.size]}, slot {p % self.size}; there should be K and V of "
                       f"{list(right)}, and there is {'garbage' if got is None else list(got)}")

    def record(self, step: Step, stopped: Iterable[Request] = (), failed: Mapping[Request, str] | None = None) -> None:
        stopped, failed, before = [*stopped], dict(failed or {}), {one: len(one.token_ids) for one in self.members}
        drawn = {request: self.answers[request][request.num_output_tokens] for i, request in step.sampled
                 if step.requests[i] not in failed}
        ends = {one for one in drawn if one in stopped or len(one.token_ids) + 1 == one.max_length}
        ends |= {member for request in failed for member in (request, *request.followers)}
        tell(f"    update: tokens for {shown(drawn) or 'nobody'}" + (f"; {shown(stopped)} stops" if stopped else "")
             + (f"; {shown(failed)} failed" if failed else ""))
        rows, steps = [*zip(step.requests, step.starts, step.num_tokens)], len(self.heard.steps)
        again = {request: max(0, min(start + num_tokens, self.had[request]) - start)
                 for request, start, num_tokens in rows if request not in failed}
        counted = {request: request.metrics.recomputed_tokens for request in again}
        self.scheduler.update(step, drawn, stopped, failed)
        for request, number in before.items():
            expect_equal(f"the number of {request.request_id}'s tokens", len(request.token_ids),
                         number + (request in drawn))
        for request, start, num_tokens in rows:
            if request.status is RequestStatus.RUNNING:
                expect_equal(f"{request.request_id}'s num_computed_tokens", request.num_computed_tokens,
                             start + num_tokens)
                found = self.pool.find_prefix(request.token_ids, request.num_computed_tokens)
                full = request.block_table[: request.num_computed_tokens // self.size * self.caching].tolist()
                expect(found == full, f"{request.request_id} has {request.num_computed_tokens} computed tokens, so its "
                       f"full blocks, {full}, can be found; find_prefix finds {found}")
        for request, number in again.items():
            expect_equal(f"the tokens of this step that {request.request_id} computed again, which it had had before,",
                         request.metrics.recomputed_tokens - counted[request], number)
        expect_equal("step.recomputed_tokens", step.recomputed_tokens, sum(again.values()))
        for request in {*ends, *step.ended}:
            expect(request in step.ended, f"{request.request_id} ends with this step, and is not in step.ended")
            expect(request in ends, f"{request.request_id} should go on, and ended with {request.finish_reason!r}")
            reason = "error" if request not in drawn else "stop" if request in stopped else "length"
            expect_equal(f"{request.request_id}'s finish_reason", request.finish_reason, reason)
            expect_equal(f"{request.request_id}'s status", request.status, RequestStatus.FINISHED)
        held = {block for request in self.scheduler.running for block in request.block_table}
        expect_equal("step.referenced_blocks, the blocks that are held after it,", step.referenced_blocks, len(held))
        expect(len(self.heard.steps) == steps + 1, f"listeners should be told once of a step, and were told "
               f"{len(self.heard.steps) - steps} times")
        count_again(self)

    def fail(self, in_model: bool = False) -> None:
        """A step that is planned, and not recorded: it raised after its plan, or in the model, which left garbage."""
        step = self.plan()
        if in_model:
            self.carry_out(step, failed=step.requests)
        tell("    it raised in the model" if in_model else "    it raised before anything was computed")

    def abort(self, request: Request) -> None:
        tell(f"abort {request.request_id}")
        ended = {request, *request.followers}
        self.scheduler.abort(request)
        for member in ended:
            expect_equal(f"{member.request_id}'s finish_reason", member.finish_reason, "abort")
        count_again(self)

    def slot(self, request: Request, position: int) -> tuple[str, int, int]:
        return "pool", request.block_table[position // self.size], position % self.size
