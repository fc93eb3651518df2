"""What comes back? The answers of the public interface (the names are vLLM's), and the engine's figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopaged.models.tokenizer import TextStream
    from nanopaged.request import Request
    from nanopaged.step import Step


@dataclass
class RequestMetrics:
    """What happened to one request. Times are in seconds; points in time, on the scheduler's clock."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    waiting_s: float = 0.0  # in the queue, at first and after each preemption
    preemptions: int = 0
    recomputed_tokens: int = 0  # computed again, because they were lost in a preemption
    prefix_hit_tokens: int = 0  # found in the pool instead of computed
    output_tokens: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_between_tokens_s(self) -> float | None:
        """The mean, of at least two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.output_tokens - 1)


class RequestOutput:
    """A request, as far as it had come when this was made.

    Every step makes one for each request, and most are never looked at. So it notes only what will change; the rest is
    built when it is read. Tokens are cut out of the request's own, to which more are only appended.
    """

    def __init__(self, request_id: str, group: dict[Request, TextStream]) -> None:
        """From a request's continuations, in order, each with its text."""
        self.request_id = request_id
        self._group = group
        self._then = [(len(member.token_ids), member.finish_reason, member.error, member.metrics.__dict__.copy())
                      for member in group]

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        first = next(iter(self._group))
        return first.token_ids[: first.num_prompt_tokens]

    @cached_property
    def outputs(self) -> list[CompletionOutput]:
        return [CompletionOutput(index, member, self._group, *then)
                for index, (member, then) in enumerate(zip(self._group, self._then))]

    @property
    def finished(self) -> bool:
        return all([finish_reason is not None for _, finish_reason, _, _ in self._then])

    @property
    def metrics(self) -> RequestMetrics:
        return self.outputs[0].metrics  # the first continuation also computed the prompt

    def __repr__(self) -> str:
        return (f"RequestOutput(request_id={self.request_id!r}, prompt_token_ids={self.prompt_token_ids}, "
                f"outputs={self.outputs}, finished={self.finished})")


class CompletionOutput:
    """A continuation of the prompt, one of n, when it had `num_known` tokens, those of the prompt included."""

    def __init__(self, index: int, member: Request, group: dict[Request, TextStream], num_known: int,
                 finish_reason: str | None, error: str | None, metrics: dict[str, Any]) -> None:
        self.index = index
        self.finish_reason = finish_reason  # "stop", "length", "abort", "error"; None while it runs
        self.error = error  # what went wrong, if it ended with "error"
        self.metrics = RequestMetrics(**metrics)
        self._member, self._group, self._num_known = member, group, num_known

    @cached_property
    def token_ids(self) -> list[int]:
        return self._member.token_ids[self._member.num_prompt_tokens : self._num_known]

    @cached_property
    def text(self) -> str:
        streamed = self._group[self._member]
        stream = streamed.caught_up([token for token in self.token_ids if token not in self._member.stop_token_ids])
        if stream.num_tokens > streamed.num_tokens:
            self._group[self._member] = stream  # so that reading after each step decodes each token once
        return stream.shown(self.finish_reason is not None)

    def __repr__(self) -> str:
        return (f"CompletionOutput(index={self.index}, text={self.text!r}, token_ids={self.token_ids}, "
                f"finish_reason={self.finish_reason!r}, metrics={self.metrics}, error={self.error!r})")


@dataclass(kw_only=True)
class AllocatorStats:
    """The pool at one moment. A slot is the room for one token's K and V."""

    num_blocks: int
    referenced_blocks: int
    cached_blocks: int
    free_blocks: int
    shared_blocks: int  # with a reference count above 1
    reserved_slots: int  # in referenced blocks, each counted once however many requests share it
    filled_slots: int  # those of them that hold a computed token; the rest is internal fragmentation
    prefix_hit_tokens: int  # since the start: tokens found in the pool instead of computed
    evicted_blocks: int  # since the start: cached blocks that were reused for other tokens


@dataclass(kw_only=True)
class SchedulerStats:
    """What the scheduler has done since the start, in steps, requests and tokens; a listener of the scheduler."""

    num_steps: int = 0
    num_finished: int = 0  # continuations
    num_preemptions: int = 0
    prompt_tokens: int = 0  # in the prompts of admitted requests
    prompt_hit_tokens: int = 0  # those of them that were shared instead of computed
    computed_tokens: int = 0  # every pass of a token through the model, recomputed ones again
    recomputed_tokens: int = 0
    swapped_in_tokens: int = 0  # restored from the swap space instead of recomputed
    output_tokens: int = 0
    referenced_block_steps: int = 0  # referenced blocks, added up over the steps

    def stepped(self, step: Step) -> None:
        self.num_steps += 1
        self.num_preemptions += len(step.preempted)
        self.computed_tokens += step.computed_tokens
        self.recomputed_tokens += step.recomputed_tokens
        self.output_tokens += len(step.sampled)
        self.referenced_block_steps += step.referenced_blocks
        for admission in step.admitted:
            self.swapped_in_tokens += admission.restored_tokens
            if admission.is_first:
                self.prompt_tokens += admission.request.num_prompt_tokens
                self.prompt_hit_tokens += admission.hit_tokens

    def ended(self, request: Request) -> None:
        self.num_finished += 1

    def average(self, num_blocks: int) -> RecentStats:
        """Over all steps, in a pool of `num_blocks`."""
        return recent_stats(self.num_steps, self.computed_tokens, self.recomputed_tokens, self.num_preemptions,
                            self.referenced_block_steps, num_blocks)


def goodput(computed_tokens: int, recomputed_tokens: int) -> float:
    """Share of the computed tokens that were computed for the first time; 1 if none was computed."""
    return 1.0 - recomputed_tokens / computed_tokens if computed_tokens else 1.0


@dataclass(kw_only=True)
class RecentStats:
    """Averages over recent steps; over all steps if there is no storm watch."""

    goodput: float
    preemptions_per_step: float
    pool_occupancy: float  # share of the pool that was referenced


def recent_stats(steps: int, computed: int, recomputed: int, preemptions: int, block_steps: int,
                 num_blocks: int) -> RecentStats:
    """From sums over `steps` steps, of tokens, preemptions and referenced blocks."""
    steps = max(1, steps)
    return RecentStats(goodput=goodput(computed, recomputed), preemptions_per_step=preemptions / steps,
                       pool_occupancy=block_steps / steps / num_blocks)


@dataclass(kw_only=True)
class EngineStats(AllocatorStats, SchedulerStats, RecentStats):
    """The pool's and the scheduler's figures, and how many requests there are."""

    num_waiting: int
    num_running: int
    num_storms: int
    swap_blocks: int
    swap_blocks_used: int
