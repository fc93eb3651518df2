"""Requests for a scheduler without a model, whose tokens are random; and steps that are checked."""

from __future__ import annotations

import random

from nanopaged import LLM
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step
from nanopaged.waiting import AdmissionContext
from tests.recount import assert_consistent, assert_writes_are_exclusive

VOCABULARY = 3  # so small that requests often have a common prefix


def whatever_fits(context: AdmissionContext) -> bool:
    """An admission for tests in which requests give way, whatever the default is."""
    return True


def by_arrival(request: Request) -> float:
    """An order for tests that rely on one, whatever the default is."""
    return 0


def members_of(llm: LLM, request_id: str) -> list[Request]:
    """The unfinished continuations of a request, in order."""
    present = [*llm.scheduler.running, *llm.scheduler.waiting]
    present += [follower for request in present for follower in request.followers]
    return sorted((request for request in present if request.group_id == request_id), key=lambda r: r.key[-1])


def request_with(number: int, prompt: list[int], max_tokens: int = 4, n: int = 1, priority: float = 0) -> Request:
    """A request, as the leader of its n continuations."""
    params = SamplingParams(n=n, max_tokens=max_tokens)
    members = [Request(f"{number}.{i}", prompt, params, priority=priority) for i in range(n)]
    members[0].followers = members[1:]
    return members[0]


def random_request(rng: random.Random, number: int) -> Request:
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
    return request_with(number, prompt, rng.randint(1, 20), rng.choice([1, 1, 2, 3]), rng.choice([-2.5, 0, 0, 1, 7]))


def record(scheduler: Scheduler, step: Step, rng: random.Random, stop_chance: float = 0.0) -> None:
    """Records a planned step; each token ends its request with this chance."""
    scheduler.moves.clear()  # as if they had been made
    requests = [request for _, request in step.sampled]
    stopped = {request for request in requests if rng.random() < stop_chance}
    scheduler.update(step, {request: rng.randrange(VOCABULARY) for request in requests}, stopped)


def take_step(scheduler: Scheduler, rng: random.Random, where: str = "") -> Step:
    """Plans a step and records it, and checks what must always hold."""
    step = scheduler.schedule()
    assert_writes_are_exclusive(scheduler, step, where)
    scheduler.check_invariants()
    record(scheduler, step, rng)
    scheduler.check_invariants()
    assert_consistent(scheduler, where)
    return step


def check_every_plan(scheduler: Scheduler, where: str = "") -> None:
    """From here on no step may write a block that others hold; for an engine, which plans its steps itself."""
    schedule = scheduler.schedule

    def checked() -> Step:
        step = schedule()
        assert_writes_are_exclusive(scheduler, step, where)
        return step

    scheduler.schedule = checked
