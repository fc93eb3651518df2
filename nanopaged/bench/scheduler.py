"""Does the scheduler's cost for each token grow with the queue, with the pool, or with what is cached?

Three experiments; in each, one size grows by 100 times and all else stays equal. 64 requests run:

    waiting   requests in the queue; in every step the policy is asked about the first, and refuses it
    blocks    in the pool, with its free blocks in random order
    cached    prefixes in the pool; every new request begins with one of them, and evicts others

Timed are `schedule` and `update`, and `add` where requests come and go; there is no model. The sizes take
turns, round after round, so that noise does not fall on one of them alone, and the median of the rounds
is shown. Python's garbage collector is off meanwhile: its time grows with all objects of the process.
The slope is that of log cost over log size: at 0 the cost does not grow, at 1 it grows in proportion.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Iterator

from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.admission import reserve
from nanopaged.pressure.storm import StormWatch
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step
from nanopaged.validation import require_int
from nanopaged.waiting import watermark

RUNNING = 64
BLOCK_SIZE = 16
PROMPT, OUTPUT = 2 * BLOCK_SIZE, 192  # tokens of a request that runs in all timed steps: 14 blocks
SIZES = {"waiting": 100, "blocks": 1000, "cached": 100}  # the smallest; the largest is 100 times that
FACTORS = (1, 3, 10, 30, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="in each measurement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of block order and prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    require_int("rounds", args.rounds, 1)
    require_int("steps", args.steps, 1, OUTPUT - 8)
    experiments = {"waiting": behind_a_queue, "blocks": in_a_large_pool, "cached": among_cached_prefixes}
    rows, figures = [], {}
    for name, prepare in experiments.items():
        sizes = [SIZES[name] * factor for factor in FACTORS]
        costs: dict[int, list[float]] = {size: [] for size in sizes}
        for i in range(args.rounds):
            for size in sizes:
                show_progress(f"{name}: round {i + 1} of {args.rounds}, {size:,}")
                costs[size].append(seconds_per_token(*prepare(size, args.seed), args.steps))
        medians = [statistics.median(costs[size]) for size in sizes]
        figures[name] = {"sizes": sizes, "seconds_per_token": medians, "slope": slope(sizes, medians)}
        rows.append([f"{name}, {sizes[0]:,} to {sizes[-1]:,}", *(1e6 * cost for cost in medians),
                     f"{figures[name]['slope']:+.3f}"])
    show_progress("")
    print(f"Microseconds of scheduling for each token computed, {RUNNING} requests running; lower is better.\n")
    print(table(["what grows", *(f"x{factor}" for factor in FACTORS), "slope"], rows))
    print("\nslope: of log cost over log size. 0: the cost does not grow; 1: it grows in proportion.")
    return figures


def slope(sizes: list[int], costs: list[float]) -> float:
    """Of the straight line through (log size, log cost), by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def seconds_per_token(scheduler: Scheduler, arrivals: Iterator[Request], num_steps: int) -> float:
    """The mean over `num_steps` steps; for each request that has finished, another arrives."""
    gc.collect()
    gc.disable()
    try:
        computed, start = scheduler.stats.computed_tokens, time.perf_counter()
        for _ in range(num_steps):
            finished = scheduler.stats.num_finished
            step = scheduler.schedule()
            scheduler.update(step, tokens_for(step))
            for _ in range(scheduler.stats.num_finished - finished):
                scheduler.add(next(arrivals))
        return (time.perf_counter() - start) / (scheduler.stats.computed_tokens - computed)
    finally:
        gc.enable()


def tokens_for(step: Step) -> dict[Request, int]:
    """What a model would have answered."""
    return {request: 0 for _, request in step.sampled}


Prepared = tuple[Scheduler, Iterator[Request]]


def behind_a_queue(num_waiting: int, seed: int) -> Prepared:
    """All blocks are reserved for the running requests, so that none of the others is admitted."""
    full = -(-(PROMPT + OUTPUT - 1) // BLOCK_SIZE)
    scheduler = watched(Scheduler(BlockAllocator(RUNNING * full, BLOCK_SIZE), 2 * RUNNING, 4096, 4096, reserve))
    return with_running(scheduler, num_waiting), iter(())


def in_a_large_pool(num_blocks: int, seed: int) -> Prepared:
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
    blocks = [allocator.take() for _ in range(num_blocks)]
    random.Random(seed).shuffle(blocks)
    allocator.give_back_all(blocks)
    return with_running(watched(Scheduler(allocator, RUNNING, 4096, 4096)), 0), iter(())


def among_cached_prefixes(num_prefixes: int, seed: int) -> Prepared:
    """Prefixes of two blocks, and requests that share one, with up to 16 tokens of their own to compute."""
    allocator = BlockAllocator(2 * num_prefixes + 3 * RUNNING, BLOCK_SIZE)
    for i in range(num_prefixes):
        first, second = allocator.take(), allocator.take()
        for block in (first, second):
            allocator.fill(block, BLOCK_SIZE)
        allocator.publish(first, None, [i] * BLOCK_SIZE)
        allocator.publish(second, first, [i] * BLOCK_SIZE)
        allocator.give_back_all([first, second])
    scheduler, rng = watched(Scheduler(allocator, RUNNING, 4096, 4096, watermark(0.0))), random.Random(seed)
    requests = (make_request(f"sharing {i}", rng.randrange(num_prefixes), 1 + i % BLOCK_SIZE, BLOCK_SIZE)
                for i in range(1 << 60))
    for _ in range(RUNNING):
        scheduler.add(next(requests))
    return scheduler, requests


def watched(scheduler: Scheduler) -> Scheduler:
    """With the listener that an engine attaches."""
    scheduler.listeners.append(StormWatch(scheduler.allocator.num_blocks))
    return scheduler


def with_running(scheduler: Scheduler, num_waiting: int) -> Scheduler:
    """After the first step, which computes the prompts of the running requests."""
    for i in range(RUNNING + num_waiting):
        scheduler.add(make_request(str(i), i, 0, OUTPUT))
    step = scheduler.schedule()
    scheduler.update(step, tokens_for(step))
    return scheduler


def make_request(request_id: str, prefix: int, own_tokens: int, output_tokens: int) -> Request:
    prompt = [prefix] * PROMPT + [-1] * own_tokens
    return Request(request_id, prompt, SamplingParams(max_tokens=output_tokens, ignore_eos=True))
