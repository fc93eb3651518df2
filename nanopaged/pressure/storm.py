"""Is work thrown away as fast as it is done?

A request that gives way must be computed again, which takes room and time from others, which then
give way. The sign of such an eviction storm is *goodput*: the share of the computed tokens that were
computed for the first time. `StormWatch` keeps it over a window of steps, warns once for each storm,
and says which of the known causes fits the numbers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from operator import add, sub
from typing import NamedTuple

from nanopaged.outputs import RecentStats, goodput, recent_stats
from nanopaged.request import Request
from nanopaged.step import Step

logger = logging.getLogger(__name__)

WINDOW_STEPS = 64
STORM_GOODPUT = 0.8  # a storm begins below this, over a whole window
CALM_GOODPUT = 0.9  # and ends above this: one that wavers between the two is one storm


class StepFigures(NamedTuple):
    """What one step did. All figures add up, so that a window is a sum."""

    computed_tokens: int = 0
    recomputed_tokens: int = 0  # of these, tokens that the same request had in the pool, and lost
    preemptions: int = 0
    running: int = 0  # requests
    referenced_blocks: int = 0
    admitted_tokens: int = 0  # known tokens of the requests that were admitted
    hit_tokens: int = 0  # of these, tokens that were found in the pool

    @property
    def goodput(self) -> float:
        return goodput(self.computed_tokens, self.recomputed_tokens)


class StormWatch:
    """A sliding window over the steps of a scheduler with a pool of `num_blocks`; O(1) a step."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.steps: deque[StepFigures] = deque()
        self.window = StepFigures()  # the sum of `steps`
        self.before = StepFigures()  # the sum of everything that has left the window
        self.pressed: Sequence[Request] = ()  # the requests that ran, or gave way, when the pool was last full
        self.storming = False
        self.num_storms = 0

    def stepped(self, step: Step) -> None:
        if step.preempted:
            self.pressed = list(dict.fromkeys([*step.requests, *step.preempted]))
        self.record(StepFigures(
            step.computed_tokens, step.recomputed_tokens, len(step.preempted), len(step.requests),
            step.referenced_blocks, sum([admission.known_tokens for admission in step.admitted]),
            sum([admission.hit_tokens for admission in step.admitted])))

    def record(self, figures: StepFigures) -> None:
        """Adds a step; logs a warning if a storm begins with it."""
        self.steps.append(figures)
        oldest = self.steps.popleft() if len(self.steps) > WINDOW_STEPS else StepFigures()
        self.before = StepFigures(*map(add, self.before, oldest))
        self.window = window = StepFigures(*map(sub, map(add, self.window, figures), oldest))
        if self.storming:
            self.storming = window.goodput < CALM_GOODPUT
        elif len(self.steps) == WINDOW_STEPS and window.goodput < STORM_GOODPUT:
            self.storming = True
            self.num_storms += 1
            logger.warning(
                "eviction storm: over the last %d steps goodput is %.2f (%d of %d tokens were computed before), with "
                "%.2f preemptions a step and %.1f requests running in %d blocks. %s",
                WINDOW_STEPS, window.goodput, window.recomputed_tokens, window.computed_tokens,
                window.preemptions / WINDOW_STEPS, window.running / WINDOW_STEPS, self.num_blocks, self.cause())

    def cause(self) -> str:
        """The likeliest cause of a storm, with what to change; the first that fits the numbers."""
        pressed, num_blocks = self.pressed, self.num_blocks
        longest = max(pressed, key=lambda request: request.full_blocks, default=None)
        others = [request for request in pressed if 2 * request.full_blocks <= num_blocks]
        if longest is not None and 2 * longest.full_blocks > num_blocks and len(others) > 1:
            return (f"Likely cause: one very long request ({longest.group_id!r} holds up to {longest.full_blocks} of "
                    f"{num_blocks} blocks). Paging does not make it smaller: run it alone, or enlarge the pool")
        hit, hit_before = (f.hit_tokens / max(1, f.admitted_tokens) for f in (self.window, self.before))
        if hit_before > 0.3 and hit < hit_before / 2:
            return (f"Likely cause: sharing was lost (of admitted tokens {hit:.0%} were found in the pool, "
                    f"{hit_before:.0%} before). Cached prefixes are evicted before they are used again: enlarge the "
                    "pool, or send requests with a common prefix close together")
        needed = sum(request.full_blocks for request in pressed)
        full = needed / max(1, len(pressed))
        if num_blocks < 3 * full:
            return (f"Likely cause: the pool is too small for even the running set (a request at full length holds "
                    f"{full:.1f} of {num_blocks} blocks, so not even three fit). Enlarge the pool, or lower max_tokens")
        if needed > num_blocks:
            return (f"Likely cause: the watermark is too low (a request at full length holds {full:.1f} blocks, and "
                    f"those that ran together {needed} of {num_blocks}). Raise watermark (of admission='watermark'), "
                    "lower max_num_seqs, or set admission='reserve'")
        return (f"No known cause fits: the requests that ran when the pool was last full need {needed} of "
                f"{num_blocks} blocks at full length, so the pool and the watermark are large enough for them")

    def recent(self) -> RecentStats:
        window = self.window
        return recent_stats(len(self.steps), window.computed_tokens, window.recomputed_tokens, window.preemptions,
                            window.referenced_blocks, self.num_blocks)
