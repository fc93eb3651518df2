"""What has happened so far, in plain numbers?"""

from __future__ import annotations

from dataclasses import dataclass

from nanopaged.block_allocator import AllocatorStats


@dataclass(kw_only=True)
class SchedulerStats:
    """What the scheduler has done since the start, in steps, requests and tokens."""

    num_steps: int = 0
    num_finished: int = 0  # continuations
    num_preemptions: int = 0
    prompt_tokens: int = 0  # asked for, in the prompts of admitted requests
    prompt_hit_tokens: int = 0  # those of them that were shared instead of computed
    computed_tokens: int = 0  # every pass of a token through the model, recomputed ones again
    recomputed_tokens: int = 0
    swapped_in_tokens: int = 0  # brought back instead of recomputed
    output_tokens: int = 0
    num_storms: int = 0


@dataclass(kw_only=True)
class EngineStats(AllocatorStats, SchedulerStats):
    """The pool's and the scheduler's figures, and how many requests there are."""

    num_waiting: int
    num_running: int
    swap_blocks: int
    swap_blocks_used: int
    # Over the last `storm.WINDOW_STEPS` steps:
    goodput: float  # share of the computed tokens that were computed for the first time
    preemptions_per_step: float
    pool_occupancy: float  # share of the pool that was referenced, on average
