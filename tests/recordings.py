"""Random runs that are recorded: one that fails leaves its recording beside the report."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, repeat
from pathlib import Path
from typing import NamedTuple

from nanopaged import LLM
from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.storm import StormWatch
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.scheduler import Scheduler
from nanopaged.validation import has_folder
from nanopaged.waiting import AdmissionContext, PolicyError
from tests.crowds import VOCABULARY, random_request, record, request_with, whatever_fits


@contextmanager
def recorded(engine: LLM | Scheduler, folder: Path, text: bool = True) -> Iterator[None]:
    """Records what happens inside, in this folder; prints where, if that fails. Without show/ it does nothing."""
    if not has_folder("show"):
        yield
        return
    from nanopaged.show.recording import record as recording_of

    path = folder / "run.jsonl"
    try:
        with recording_of(engine, str(path), text):
            yield
    except BaseException:
        print(f"what happened is recorded in {path}")
        raise


class Moment(NamedTuple):
    """The scheduler after a step, as it says itself."""

    figures: dict[str, int]
    running: dict[str, tuple[list[int], int, int]]  # of each: its table, its computed and its known tokens
    waiting: set[str]

    @classmethod
    def of(cls, scheduler: Scheduler) -> Moment:
        swap_space = getattr(scheduler, "swap_space", None)
        used = swap_space.stats().referenced_blocks if swap_space else 0
        return cls(
            {**vars(scheduler.allocator.stats()), **vars(scheduler.stats), "num_waiting": len(scheduler.waiting),
             "num_running": len(scheduler.running), "swap_blocks_used": used},
            {request.request_id: (request.block_table.tolist(), request.num_computed_tokens, len(request.token_ids))
             for request in scheduler.running},
            {request.request_id for request in scheduler.waiting})


def clock(rng: random.Random) -> Callable[[], float]:
    """Between any two looks at it 10 microseconds pass, or more."""
    times = accumulate((rng.uniform(1e-5, 0.01) for _ in repeat(None)), initial=rng.uniform(0, 1e5))
    return lambda: next(times)


class RandomRun:
    """A scheduler with random requests, aborts, failed requests and steps, policies that raise, often a swap space."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        block_size = rng.choice([1, 2, 4, 8])
        longest = -(-40 // block_size)
        pool = BlockAllocator(rng.randint(longest, 3 * longest), block_size, rng.random() < 0.8)
        options = {"admission": self.admission, "clock": clock(random.Random(seed))}
        arguments = (pool, rng.randint(3, 8), rng.randint(4, 40), 64)
        if rng.random() < 0.5:
            self.scheduler = SwappingScheduler(*arguments, swap_blocks=rng.randint(1, 20), **options)
        else:
            self.scheduler = Scheduler(*arguments, **options)
        self.scheduler.listeners.append(StormWatch(pool.num_blocks))
        self.num_added = 0
        self.moments: dict[int, Moment] = {}  # after each step that was recorded, by the number of such steps

    def admission(self, context: AdmissionContext) -> bool:
        if self.rng.random() < 0.02:
            raise RuntimeError("injected")
        return whatever_fits(context)

    def go_on(self, times: int) -> None:
        for _ in range(times):
            before = self.scheduler.stats.num_steps
            try:
                self.act()
            except PolicyError:
                pass
            if self.scheduler.stats.num_steps > before:
                self.moments[before + 1] = Moment.of(self.scheduler)

    def act(self) -> None:
        scheduler, rng, chance = self.scheduler, self.rng, self.rng.random()
        present = [*scheduler.running, *scheduler.waiting]
        if chance < 0.3:
            request = random_request(rng, self.num_added)
            try:
                scheduler.add(request)
            except ValueError:  # with its continuations it can never fit
                return
            self.num_added += 1
        elif chance < 0.35 and present:
            scheduler.abort(rng.choice(present))
        elif scheduler.has_unfinished():
            step = scheduler.schedule()
            scheduler.moves.clear()
            if rng.random() < 0.9:  # else it is not carried out
                sampled = [request for _, request in step.sampled]
                scheduler.update(step, {request: rng.randrange(VOCABULARY) for request in sampled},
                                 {request for request in sampled if rng.random() < 0.1},
                                 {request: "injected" for request in step.requests if rng.random() < 0.02})


def storm(scheduler: Scheduler, rng: random.Random) -> None:
    """More requests than fit: of `tight_scheduler`, a storm."""
    for number in range(40):
        scheduler.add(request_with(number, [1] * rng.randint(8, 16), rng.randint(12, 20)))
    while scheduler.has_unfinished():
        record(scheduler, scheduler.schedule(), rng)


def tight_scheduler(seed: int) -> Scheduler:
    scheduler = Scheduler(BlockAllocator(32, 4, False), 16, 64, 64, whatever_fits, clock=clock(random.Random(seed)))
    scheduler.listeners.append(StormWatch(32))
    return scheduler
