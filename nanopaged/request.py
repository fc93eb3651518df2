"""What is one request, and what state is it in?

    token_ids    │ prompt ................................ │ output ......... │
    computed     │ KV is in the pool ........................... │ not yet ... │
                 0                                               ^            ^
                                             num_computed_tokens ┘            └ len(token_ids)

Each step computes some of the tokens that are known but not computed. Right after a prompt arrives
these are many (prefill); later it is the newest one (decode).
"""

from __future__ import annotations

from array import array
from enum import Enum

from nanopaged.outputs import RequestMetrics
from nanopaged.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"  # also after a preemption
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One continuation of a prompt: the prompt, and what was generated so far.

    `request_id` is unique in its scheduler, `eos_token_id` is the model's end of text, if it has one.
    Of the n continuations of one prompt (parallel sampling) the first computes the prompt; the others
    are its `followers` until then, and start from its blocks, each with a first token of its own.
    """

    def __init__(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams,
                 eos_token_id: int | None = None, seed: int = 0, priority: float = 0, group_id: str = "") -> None:
        if not prompt_token_ids:
            raise ValueError("the prompt is empty: give at least one token to continue from")
        # What the user asked for. It does not change.
        self.request_id = request_id
        self.group_id = group_id or request_id  # the user's request, the same for all n continuations
        self.params = params
        self.seed, self.priority = seed, priority
        self.num_prompt_tokens = len(prompt_token_ids)
        self.stop_token_ids = set(params.stop_token_ids)
        if eos_token_id is not None and not params.ignore_eos:
            self.stop_token_ids.add(eos_token_id)

        # How far it has come.
        self.token_ids = list(prompt_token_ids)  # prompt and output
        self.finish_reason: str | None = None
        self.error: str | None = None  # why it could not go on
        self.metrics = RequestMetrics()

        # The scheduler's: its place among the others.
        self.status = RequestStatus.WAITING
        self.key: tuple[float, ...] = ()  # lower is served first
        self.waiting_since = 0.0
        self.followers: list[Request] = []  # that have not started
        self.max_length = self.num_prompt_tokens + params.max_tokens  # the scheduler may lower it
        self.full_blocks = 0  # blocks in its table at full length

        # The scheduler's: its KV.
        self.block_table = array("i")  # logical block i is physical block block_table[i]; int32, as a batch copies it
        self.num_computed_tokens = 0  # tokens whose K and V are in the pool
        self.most_computed_tokens = 0  # before any preemption
        self.may_share_tail = False  # whether the partly filled last block may have other holders

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_seats(self) -> int:  # in the batch, its followers' included
        return 1 + len(self.followers)

    def receive(self, token_id: int, now: float) -> None:
        """Appends a token that was sampled at `now`."""
        self.token_ids.append(token_id)
        metrics = self.metrics
        metrics.last_token_time = now
        metrics.output_tokens += 1
        if metrics.first_token_time is None:
            metrics.first_token_time = now

    def __lt__(self, other: Request) -> bool:
        return self.key < other.key

    def __repr__(self) -> str:
        return (f"Request({self.request_id!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
                f"output={self.num_output_tokens}, computed={self.num_computed_tokens}, blocks={[*self.block_table]})")
