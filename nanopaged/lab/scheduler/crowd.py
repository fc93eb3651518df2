"""What happens when anything may happen? Random requests, in a pool that is too small for them."""

from __future__ import annotations

from random import Random

from nanopaged.lab.grading import numbers
from nanopaged.lab.scheduler.outside import Run
from nanopaged.request import Request, RequestStatus
from nanopaged.waiting import OrderPolicy, fcfs, watermark


def by_priority(request: Request) -> float:
    return request.priority


def crowds(name: str, number: int = 12, *, blocks: tuple[int, int] = (4, 10), budget: tuple[int, int] = (1, 8),
           failing: bool = False, aborting: bool = False, swapping: bool = False) -> None:
    """Several crowds, from small to large. Each must come to its end, and everything must hold at any time."""
    random = numbers(name)
    for size in range(number):
        crowd(random, 2 + size // 3, blocks, budget, failing, aborting, swapping)


def crowd(random: Random, number: int, blocks: tuple[int, int], budget: tuple[int, int], failing: bool, aborting: bool,
          swapping: bool) -> None:
    order: OrderPolicy = random.choice([fcfs, by_priority])
    admission = {"admission": watermark(0.2)} if random.random() < 0.3 else {}
    run = Run(random.randint(*blocks), random.choice([1, 2, 2, 3]), random.randint(2, 4), random.randint(*budget),
              ", served by priority" if order is by_priority else "", order=order,
              swap_blocks=random.randint(1, 6) if swapping else 0, caching=random.random() < 0.75, **admission)
    slots, common = run.blocks * run.size, [random.randint(1, 9) for _ in range(40)]
    coming = [chr(ord("A") + i) for i in range(number)]
    for _ in range(400):
        if coming and (random.random() < 0.5 or not run.scheduler.has_unfinished()):
            length = random.randint(1, max(1, min(9, slots - 4)))
            prompt = common[: random.randint(0, length)]
            prompt += [random.randint(10, 99) for _ in range(length - len(prompt))]
            run.add(coming.pop(0), prompt, random.randint(1, min(7, slots + 1 - length)), random.choice([1, 1, 1, 2]),
                    random.choice([0, 0, 1, -1]))
        elif not run.scheduler.has_unfinished():
            break
        elif failing and random.random() < 0.2:
            run.fail(in_model=random.random() < 0.5)
        elif aborting and random.random() < 0.15:
            alive = [one for one in run.members if one.status is not RequestStatus.FINISHED
                     and not any(one in other.followers for other in run.members)]
            run.abort(random.choice(alive))
        else:
            spoilt = random.choice(run.scheduler.running) if failing and run.scheduler.running else None
            step = run.plan()
            failed = {spoilt: "not finite"} if spoilt in step.requests and random.random() < 0.1 else {}
            run.carry_out(step, failed)
            stopped = [one for i, one in step.sampled if step.requests[i] not in failed and random.random() < 0.05]
            run.record(step, stopped, failed)
    run.finish()
