"""What is one request, and what state is it in?

    token_ids    │ prompt ................................ │ output ......... │
    computed     │ KV is in the pool ........................... │ not yet ... │
                 0                                               ^            ^
                                             num_computed_tokens ┘            └ len(token_ids)

Each step computes some of the tokens that are known but not computed. Right after a prompt arrives
these are many (prefill); later it is the newest one (decode).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nanopaged.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"  # also after a preemption, to be recomputed
    SWAPPED = "swapped"  # waits too, with KV in CPU memory
    RUNNING = "running"
    FINISHED = "finished"


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


class Request:
    """One continuation on its way: a prompt, and what was generated so far.

    `request_id` is unique in its scheduler, `eos_token_id` is the model's end of text, if it has one.
    Of the n continuations of one prompt (parallel sampling) the first computes the prompt, and has the
    others as `followers` until they start, with their first token, from its blocks.
    """

    def __init__(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams,
                 eos_token_id: int | None = None, seed: int = 0) -> None:
        if not prompt_token_ids:
            raise ValueError("the prompt is empty: give at least one token to continue from")
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)  # prompt and output
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.seed = seed
        self.stop_token_ids = set(params.stop_token_ids)
        if eos_token_id is not None and not params.ignore_eos:
            self.stop_token_ids.add(eos_token_id)
        self.max_length = self.num_prompt_tokens + params.max_tokens  # the scheduler may lower it
        self.group_id = request_id  # the user's request, of which this may be one of several continuations
        self.followers: list[Request] = []
        self.has_siblings = False  # may share a partly filled block with them
        self.text = ""  # of the output, up to the last whole character
        self.pending = b""  # the beginning of the next character
        self.block_table: list[int] = []  # logical block i is physical block block_table[i]
        self.full_blocks = 0  # in the table at full length
        self.num_computed_tokens = 0  # tokens whose K and V are in the pool
        self.most_computed_tokens = 0  # at any time before a preemption
        self.swapped_blocks: dict[int, int] = {}  # logical block i is block swapped_blocks[i] of the swap space
        self.num_swapped_tokens = 0  # tokens that were computed when it was swapped out
        self.status = RequestStatus.WAITING
        self.waiting_since = 0.0
        self.finish_reason: str | None = None
        self.metrics = RequestMetrics()

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def receive(self, token_id: int, now: float) -> None:
        """Appends a token that was sampled at `now`."""
        self.token_ids.append(token_id)
        metrics = self.metrics
        metrics.last_token_time = now
        metrics.output_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now

    def __repr__(self) -> str:
        return (f"Request({self.request_id!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
                f"output={self.num_output_tokens}, computed={self.num_computed_tokens}, blocks={self.block_table})")
