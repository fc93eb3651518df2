"""What is one step, and who is told of it? The layout of a step, and what its listeners see."""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import asdict, dataclass

import pytest
from tests.crowds import by_arrival, random_request, record, request_with, take_step, whatever_fits
from tests.oracle import tiny_model
from tests.recount import assert_consistent, assert_writes_are_exclusive
from tests.test_engine import random_params, random_prompts, tiny_llm

from nanopaged import LLM, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.outputs import EngineStats
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.request import Request, RequestStatus
from nanopaged.scheduler import Scheduler
from nanopaged.step import Listener, Step
from nanopaged.waiting import AdmissionContext, PolicyError

MODEL = tiny_model()


def step_of(*rows: tuple[int, int, int], followers: int = 0) -> Step:
    """A plan for requests with so many known tokens, each from this start and of this many tokens."""
    requests = [request_with(i, [7] * known, n=1 + followers) for i, (known, _, _) in enumerate(rows)]
    return Step(64, requests, [start for _, start, _ in rows], [num_tokens for _, _, num_tokens in rows])


@pytest.mark.parametrize("seed", range(5))
def test_requests_with_one_token_come_first_and_both_kinds_keep_their_order(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        rows = [(99, rng.randrange(50), rng.choice([1, 1, 2, 30])) for _ in range(rng.randint(0, 6))]
        step = step_of(*rows)
        before = list(zip(step.requests, step.starts, step.num_tokens))
        step.arrange()
        assert step.num_decodes == sum(num_tokens == 1 for _, _, num_tokens in rows), f"seed {seed}"
        after = list(zip(step.requests, step.starts, step.num_tokens, strict=True))
        assert after == [row for row in before if row[2] == 1] + [row for row in before if row[2] > 1], f"seed {seed}"
        assert step.computed_tokens == sum(num_tokens for _, _, num_tokens in rows), f"seed {seed}"


def test_a_token_is_drawn_for_each_request_whose_last_known_token_is_computed() -> None:
    step = step_of((10, 0, 10), (10, 0, 9), (10, 9, 1), (10, 3, 1), (10, 4, 6))
    first, _, third, _, fifth = step.requests
    step.arrange()
    assert step.num_tokens == [1, 1, 10, 9, 6]
    assert step.sampled == [(0, third), (2, first), (4, fifth)]


def test_a_token_is_drawn_for_each_follower_from_the_row_of_its_leader() -> None:
    step = step_of((4, 0, 4), (4, 3, 1), (4, 0, 3), followers=2)
    long, short, partial = step.requests
    step.arrange()
    assert step.sampled == [(0, short), *((0, follower) for follower in short.followers),
                            (1, long), *((1, follower) for follower in long.followers)]
    assert len(step.sampled) == 6 and len(partial.followers) == 2


def test_a_step_starts_where_the_requests_are_and_keeps_its_starts_when_they_go_on() -> None:
    scheduler, rng = Scheduler(BlockAllocator(20, 4), 4, 6, 64, order=by_arrival), random.Random(0)
    requests = [request_with(i, [i] * 9, 3) for i in range(2)]
    for request in requests:
        scheduler.add(request)
    steps = [take_step(scheduler, rng) for _ in range(4)]
    assert [list(zip(step.requests, step.starts, step.num_tokens)) for step in steps] == [
        [(requests[0], 0, 6)], [(requests[0], 6, 3), (requests[1], 0, 3)],
        [(requests[0], 9, 1), (requests[1], 3, 5)], [(requests[0], 10, 1), (requests[1], 8, 1)]]
    assert [step.num_decodes for step in steps] == [0, 0, 1, 2]
    assert steps[-1].ended == [requests[0]]


class Journal(Listener):
    """Notes each event, and checks that the state is consistent whenever it is told one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.events: list[tuple[str, Request | Step]] = []
        scheduler.listeners.append(self)

    def added(self, request: Request) -> None:
        assert request in list(self.scheduler.waiting)
        self.note("added", request)

    def stepped(self, step: Step) -> None:
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            assert request in step.ended or request.num_computed_tokens == start + num_tokens
        for _, request in step.sampled:
            assert request.num_output_tokens > 0 and request.metrics.last_token_time is not None
        assert step.referenced_blocks == self.scheduler.allocator.stats().referenced_blocks
        self.note("stepped", step)

    def ended(self, request: Request) -> None:
        assert request.status is RequestStatus.FINISHED and request.finish_reason and not request.block_table
        assert request not in self.scheduler.running and request not in list(self.scheduler.waiting)
        self.note("ended", request)

    def note(self, event: str, subject: Request | Step) -> None:
        self.scheduler.check_invariants()
        assert_consistent(self.scheduler)
        self.events.append((event, subject))

    def news(self) -> list[tuple[str, Request | Step]]:
        """The events since the last call."""
        assert self in self.scheduler.listeners, "an assertion in this listener failed: see the log"
        events, self.events = self.events, []
        return events


class RandomRun:
    """A scheduler under pressure; some plans are not carried out, some requests are aborted or stop early."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        arguments = (BlockAllocator(rng.choice([12, 16]), 4, rng.random() < 0.7), rng.choice([6, 12]),
                     rng.choice([5, 12, 200]), 64, whatever_fits, lambda request: rng.randrange(3))
        self.scheduler = SwappingScheduler(*arguments, swap_blocks=8) if seed % 2 else Scheduler(*arguments)
        self.leaders = [random_request(rng, i) for i in range(20)]
        self.members = [member for leader in self.leaders for member in (leader, *leader.followers)]
        self.to_come = self.leaders[:]
        self.abandoned = 0

    def goes_on(self) -> bool:
        return bool(self.to_come) or self.scheduler.has_unfinished()

    def action(self) -> tuple[str, Request | Step]:
        """Adds or aborts a request, or takes a step; what it was, and of what."""
        rng, scheduler = self.rng, self.scheduler
        if self.to_come and (rng.random() < 0.4 or not scheduler.has_unfinished()):
            scheduler.add(self.to_come[-1])
            return "add", self.to_come.pop()
        if self.to_come and rng.random() < 0.05:
            victim = rng.choice([*scheduler.running, *scheduler.waiting])
            scheduler.abort(victim)
            return "abort", victim
        while rng.random() < 0.2:
            scheduler.schedule()
            self.abandoned += 1
        step = scheduler.schedule()
        assert_writes_are_exclusive(scheduler, step)
        record(scheduler, step, rng, stop_chance=0.05)
        return "step", step


@pytest.mark.parametrize("seed", range(20))
def test_each_event_is_told_once_in_order_and_when_the_state_is_consistent(seed: int) -> None:
    run = RandomRun(seed)
    journal = Journal(run.scheduler)
    ended: Counter[Request] = Counter()
    while run.goes_on():
        waiting_followers = {leader: list(leader.followers) for leader in run.leaders}
        what, subject = run.action()
        news = journal.news()
        if what == "add":
            assert news == [("added", subject)], f"seed {seed}"
        elif what == "abort":
            members = [subject, *waiting_followers.get(subject, [])]
            assert news == [("ended", member) for member in members], f"seed {seed}"
        else:
            finished = [request for _, request in subject.sampled if request.finish_reason]
            assert news == [("stepped", subject), *(("ended", request) for request in finished)], f"seed {seed}"
            assert subject.ended == finished, f"seed {seed}"
        ended.update(request for event, request in news if event == "ended")
    assert ended == Counter(run.members), f"seed {seed}: each continuation ends once"
    assert run.abandoned and run.scheduler.stats.num_preemptions, f"seed {seed}"


def test_a_refused_request_is_told_to_no_listener() -> None:
    scheduler = Scheduler(BlockAllocator(4, 4), 4, 64, 64, max_waiting=1)
    journal = Journal(scheduler)
    with pytest.raises(ValueError, match="can never fit"):
        scheduler.add(request_with(0, [1] * 40))
    scheduler.add(request_with(1, [1]))
    with pytest.raises(RuntimeError, match="max_waiting is 1"):
        scheduler.add(request_with(2, [1]))
    assert [(event, request.request_id) for event, request in journal.news()] == [("added", "1.0")]


def test_a_plan_that_was_not_carried_out_has_its_admissions_and_preemptions_in_the_next_step() -> None:
    scheduler, rng = Scheduler(BlockAllocator(4, 4, False), 4, 64, 64, whatever_fits, by_arrival), random.Random(0)
    first, second = request_with(0, [1] * 7, 8), request_with(1, [2] * 7, 8)
    for request in (first, second):
        scheduler.add(request)
    plans = [scheduler.schedule() for _ in range(3)]
    for plan in plans:
        assert [(a.request, a.known_tokens, a.hit_tokens, a.is_first) for a in plan.admitted] == [
            (first, 7, 0, True), (second, 7, 0, True)]
    record(scheduler, plans[-1], rng)
    assert scheduler.stats.prompt_tokens == 14
    step = take_step(scheduler, rng)
    assert step.admitted == step.preempted == []
    plans = [scheduler.schedule() for _ in range(3)]
    assert [plan.preempted for plan in plans] == [[second]] * 3, "the ninth token of the first needs a block"
    assert scheduler.stats.num_preemptions == 0, "nothing was recorded"
    record(scheduler, plans[-1], rng)
    assert scheduler.stats.num_preemptions == 1
    step = take_step(scheduler, rng)
    assert step.preempted == [] and scheduler.stats.num_preemptions == 1


def test_moves_that_were_made_before_the_model_raised_are_in_the_step_that_is_recorded() -> None:
    scheduler, rng = Scheduler(BlockAllocator(8, 4), 4, 64, 64, whatever_fits), random.Random(0)
    scheduler.add(request_with(0, [1] * 6, 8, n=3))
    take_step(scheduler, rng)
    copies = list(scheduler.schedule().moves)
    assert [move.kind for move in copies] == ["copy", "copy"]
    scheduler.moves.clear()  # made; and now the model raises
    again = scheduler.schedule()
    assert (again.moves, scheduler.moves) == (copies, [])
    record(scheduler, again, rng)
    assert take_step(scheduler, rng).moves == []


def test_a_policy_that_raises_loses_no_admission_and_no_move() -> None:
    asked: list[AdmissionContext] = []

    def raises_at_the_third(context: AdmissionContext) -> bool:
        asked.append(context)
        if context.committed and len(asked) == 6:  # 4 requests were added; the first is admitted without a question
            raise ZeroDivisionError
        return True

    scheduler, rng = Scheduler(BlockAllocator(40, 4), 8, 64, 64, raises_at_the_third, by_arrival), random.Random(0)
    for number in range(4):
        scheduler.add(request_with(number, [number] * 6, 8, n=2 if number == 0 else 1))
    with pytest.raises(PolicyError, match=r"admission policy raised ZeroDivisionError\(\).*fields are pool, available"):
        scheduler.schedule()
    assert len(scheduler.running) == 2
    take_step(scheduler, rng)
    assert scheduler.stats.prompt_tokens == 4 * 6
    asked.clear()
    copies = scheduler.schedule().moves
    assert [move.kind for move in copies] == ["copy"]


class Recount(Listener):
    """Counts what SchedulerStats counts, from the requests and the pool where they show it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.counts: Counter[str] = Counter()
        self.furthest: Counter[Request] = Counter()  # tokens that a request has had in the pool
        self.admissions: Counter[Request] = Counter()
        scheduler.listeners.append(self)

    def stepped(self, step: Step) -> None:
        counts, furthest = self.counts, self.furthest
        for request, known_tokens, hit_tokens, restored_tokens, is_first in step.admitted:
            furthest[request] = max(furthest[request], hit_tokens + restored_tokens)
            is_leader = request.request_id.endswith(".0")
            assert is_first == (is_leader and self.admissions[request] == 0), request
            self.admissions[request] += 1
            counts["swapped_in_tokens"] += restored_tokens
            counts["hit_tokens"] += hit_tokens
            if is_first:
                assert known_tokens == request.num_prompt_tokens
                counts["prompt_tokens"] += known_tokens
                counts["prompt_hit_tokens"] += hit_tokens
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            counts["computed_tokens"] += num_tokens
            counts["recomputed_tokens"] += max(0, min(start + num_tokens, furthest[request]) - start)
            furthest[request] = max(furthest[request], start + num_tokens)
        for request in self.scheduler.running:  # followers too, which have started in this step
            furthest[request] = max(furthest[request], request.num_computed_tokens)
        counts["num_steps"] += 1
        counts["referenced_block_steps"] += self.scheduler.allocator.stats().referenced_blocks

    def ended(self, request: Request) -> None:
        self.counts["num_finished"] += 1
        self.counts["output_tokens"] += request.num_output_tokens
        self.counts["num_preemptions"] += request.metrics.preemptions


@pytest.mark.parametrize("seed", range(20))
def test_the_statistics_are_what_a_listener_counts_in_random_runs(seed: int) -> None:
    run = RandomRun(seed)
    scheduler = run.scheduler
    recount = Recount(scheduler)
    while run.goes_on():
        run.action()
    assert recount in scheduler.listeners, "an assertion in this listener failed: see the log"
    counts = recount.counts
    assert counts.pop("hit_tokens", 0) == scheduler.allocator.stats().prefix_hit_tokens == sum(
        member.metrics.prefix_hit_tokens for member in run.members), f"seed {seed}"
    assert asdict(scheduler.stats) == counts, f"seed {seed}"
    assert counts["num_preemptions"] > 0 and counts["num_finished"] == len(run.members), f"seed {seed}"
    assert (counts["swapped_in_tokens"] > 0) == (seed % 2 == 1), f"seed {seed}"
    for member in run.members:
        expected = member.metrics.preemptions + member.request_id.endswith(".0")
        assert recount.admissions[member] == expected or member.finish_reason == "abort", f"seed {seed}: {member}"


def test_the_moves_of_a_step_stay_in_it_after_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm(MODEL, num_blocks=9, preemption="swap", admission=whatever_fits)
    carry_out, made, kept = llm.kv_cache.carry_out, [], []
    monkeypatch.setattr(llm.kv_cache, "carry_out", lambda moves: (made.append(moves[:]), carry_out(moves)))

    class Mover(Listener):
        def stepped(self, step: Step) -> None:
            assert llm.scheduler.moves == []
            kept.append(step.moves)

    llm.scheduler.listeners.append(Mover())
    llm.generate([[i] * 12 for i in range(4)], SamplingParams(n=2, max_tokens=20))
    assert kept == made
    assert {move.kind for moves in kept for move in moves} == {"copy", "to_host", "to_pool"}


class Noisy(Listener):
    """Counts the events that it is told, and raises on one kind."""

    def __init__(self, raises_on: str = "") -> None:
        self.raises_on = raises_on
        self.told: Counter[str] = Counter()

    def added(self, request: Request) -> None:
        self.hear("added")

    def stepped(self, step: Step) -> None:
        self.hear("stepped")

    def ended(self, request: Request) -> None:
        self.hear("ended")

    def hear(self, event: str) -> None:
        self.told[event] += 1
        if event == self.raises_on:
            raise ZeroDivisionError(f"on {event}")


def run_with(*listeners: Listener) -> tuple[list[list[int]], EngineStats, LLM]:
    """Random requests under pressure; their tokens, and the engine's figures."""
    rng = random.Random(1)
    llm = tiny_llm(MODEL, num_blocks=10, admission=whatever_fits)
    llm.scheduler.listeners.extend(listeners)
    prompts = random_prompts(rng, 6)
    outputs = llm.generate(prompts, [random_params(rng) for _ in prompts])
    return [output.outputs[0].token_ids for output in outputs], llm.stats(), llm


@pytest.mark.parametrize("event", ["added", "stepped", "ended"])
def test_a_listener_that_raises_is_detached_and_logged_and_nothing_else_changes(
        event: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens, stats, _ = run_with()
    before, broken, after = Noisy(), Noisy(event), Noisy()
    with caplog.at_level(logging.ERROR):
        tokens_beside, stats_beside, llm = run_with(before, broken, after)
    assert tokens_beside == tokens and stats_beside == stats
    assert broken not in llm.scheduler.listeners and broken.told[event] == 1
    assert before in llm.scheduler.listeners and after in llm.scheduler.listeners
    assert before.told == after.told == {"added": 6, "stepped": stats.num_steps, "ended": 6}
    (record,) = [record for record in caplog.records if record.name == "nanopaged.step"]
    assert record.levelno == logging.ERROR and record.exc_info[0] is ZeroDivisionError
    assert "a listener raised" in record.getMessage() and "Noisy" in record.getMessage()


def test_of_two_equal_listeners_the_one_that_raises_is_detached() -> None:
    @dataclass
    class Equal(Listener):
        calls: int = 0

        def added(self, request: Request) -> None:
            if self is second:
                raise ZeroDivisionError

    first, second = Equal(), Equal()
    scheduler = Scheduler(BlockAllocator(4, 4), 4, 64, 64)
    scheduler.listeners.extend([first, second])
    scheduler.add(request_with(0, [1]))
    left = {id(listener) for listener in scheduler.listeners}
    assert id(first) in left and id(second) not in left
