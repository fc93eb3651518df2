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
    WAITING = "waiting"  # a preempted request waits again
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class RequestMetrics:
    """What happened to one request. Times are in seconds, on the scheduler's clock."""

    arrival_time: float = 0.0
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0
    prefix_hit_tokens: int = 0  # found in the pool instead of computed


class Request:
    """One prompt on its way to becoming a continuation.

    `request_id` is unique in its scheduler, `eos_token_id` is the model's end of text, if it has one.
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
        self.text = ""  # of the output, up to the last whole character
        self.pending = b""  # the beginning of the next character
        self.block_table: list[int] = []  # logical block i is physical block block_table[i]
        self.num_computed_tokens = 0  # tokens whose K and V are in the pool
        self.status = RequestStatus.WAITING
        self.finish_reason: str | None = None
        self.metrics = RequestMetrics()

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def __repr__(self) -> str:
        return (f"Request({self.request_id!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
                f"output={self.num_output_tokens}, computed={self.num_computed_tokens}, blocks={self.block_table})")
