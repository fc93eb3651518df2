"""What comes back? The answers of the public interface; the names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from nanopaged.block_allocator import AllocatorStats
from nanopaged.request import RequestMetrics
from nanopaged.scheduler import SchedulerStats


@dataclass
class CompletionOutput:
    """A continuation, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length" or "abort"; None while it runs


@dataclass
class RequestOutput:
    """A request, as far as it has come."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


@dataclass(kw_only=True)
class EngineStats(AllocatorStats, SchedulerStats):
    """The pool's and the scheduler's figures, and how many requests there are."""

    num_waiting: int
    num_running: int
