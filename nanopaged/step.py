"""What is one step, and who is notified of it?

The scheduler plans a step, the batch lays it out, the engine computes it, the scheduler records it;
then listeners (counters, a storm watch, a recorder) are told.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from nanopaged.request import Request

logger = logging.getLogger(__name__)


class BlockMove(NamedTuple):
    """A copy of one whole block, K and V of all layers, that must be made before the step is computed."""

    kind: str  # "copy" within the pool, "to_host" from the pool into CPU memory, or "to_pool" back
    source: int
    target: int


class Admission(NamedTuple):
    """A request that was admitted, and how many of its known tokens need not be computed."""

    request: Request
    known_tokens: int
    hit_tokens: int  # found in the pool
    restored_tokens: int  # kept outside the pool, and brought back
    is_first: bool  # no preemption came before


@dataclass
class Step:
    """One step's plan: `requests[i]` computes `num_tokens[i]` tokens, from position `starts[i]` on."""

    budget: int  # tokens that no request has taken yet
    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0  # the first `num_decodes` requests compute one token each, the others more
    # (i, request): a token for `request` is drawn from the logits of requests[i]'s last row. It is that
    # request, or one of its followers, whose first token it is.
    sampled: list[tuple[int, Request]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)  # requests, by number, that the budget lets compute only a part
    leaders: list[Request] = field(default_factory=list)  # their followers start with this step
    computed_tokens: int = 0
    # What has happened since the last step that was recorded, by the plans of steps that failed too.
    moves: list[BlockMove] = field(default_factory=list)  # made before the step is computed
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    # Known once the step is recorded.
    ended: list[Request] = field(default_factory=list)
    recomputed_tokens: int = 0  # tokens that the same request had in the pool, and lost
    referenced_blocks: int = 0

    def arrange(self) -> None:
        """Moves decoding requests to the front, where attention finds them, and decides which requests are sampled."""
        self.computed_tokens, self.num_decodes = sum(self.num_tokens), self.num_tokens.count(1)
        if self.num_tokens[: self.num_decodes].count(1) < self.num_decodes:  # else they stand there already
            rows = sorted(zip(self.requests, self.starts, self.num_tokens), key=lambda row: row[2] > 1)  # stable
            self.requests, self.starts, self.num_tokens = map(list, zip(*rows))
        planned = zip(count(), self.requests, self.starts, self.num_tokens)
        self.sampled = [(i, request) for i, request, start, num_tokens in planned
                        if start + num_tokens == len(request.token_ids)]
        if len(self.sampled) < len(self.requests):
            self.cut = sorted(set(range(len(self.requests))) - {i for i, _ in self.sampled})
        self.leaders = [request for _, request in self.sampled if request.followers]
        if self.leaders:
            self.sampled = [(i, member) for i, request in self.sampled for member in (request, *request.followers)]


class Listener:
    """Is told what happened, once the state is consistent. It may read everything, and call nothing that changes it.

    A base for listeners; any object that has one of these methods is one. `llm.scheduler.listeners.append(listener)`
    attaches it. A request's `group_id` is the id that `LLM.add_request` returned.
    """

    def added(self, request: Request) -> None:
        """A request was queued; of n continuations, which `stepped` and `ended` tell one by one, the first."""

    def stepped(self, step: Step) -> None:
        """A step was recorded."""

    def ended(self, request: Request) -> None:
        """A request has finished, or was aborted."""


class Listeners(list[Listener]):
    def tell_step(self, step: Step) -> None:
        self.tell("stepped", step)
        self.tell("ended", *step.ended)

    def tell(self, event: str, *subjects: Request | Step) -> None:
        """Calls `event` of each. One that raises is detached, and logged, and nothing else changes."""
        for listener in self[:]:
            try:
                if method := getattr(listener, event, None):
                    for subject in subjects:
                        method(subject)
            except Exception:
                logger.exception("a listener raised, and is told nothing from here on: %r", listener)
                self[:] = [other for other in self if other is not listener]  # `remove` would ask for equality
