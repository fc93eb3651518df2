"""Whom to let in, and when?

PagedAttention does not answer this. A request that is admitted too early makes others give way; one
that waits too long leaves memory idle. A policy is a function of a `Situation`; the three here mark
out the ground, and a reader can pass another: `LLM(admission=my_policy)`.

It is asked about the head of the queue whenever others run; a request that is alone is always let in.
And it is asked once when a request is added, about an empty pool (with chunk and prompt 0): what it
refuses there is refused for good, since it would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanopaged.validation import require_choice, require_number


@dataclass(frozen=True)
class Situation:
    """What a policy may judge by, in blocks. The candidate is the request at the head of the queue."""

    pool: int  # blocks in the whole pool
    available: int  # free or cached, once the candidate holds what it can share
    committed: int  # what everyone who runs would hold at full length, shared blocks counted for each
    chunk: int  # what the candidate takes in this very step
    prompt: int  # what it takes until all its known tokens are computed
    full: int  # what it and all its continuations would hold at full length


Policy = Callable[[Situation], bool]


def watermark(share: float) -> Policy:
    """Admits while the prompt fits and `share` of the pool stays free for those who run to grow into."""
    require_number("watermark", share, 0.0, 1.0)
    return lambda now: now.available - now.prompt >= int(share * now.pool)


def reserve(now: Situation) -> bool:
    """Admits only what fits at full length, with everyone else at full length: nobody ever gives way."""
    return now.committed + now.full <= now.pool


def greedy(now: Situation) -> bool:
    """Admits whatever fits this instant, and lets others pay for it: storms on purpose."""
    return now.available >= now.chunk


def policy(admission: str | Policy, watermark_share: float) -> Policy:
    """The policy of this name; a function is taken as it is."""
    policies = {"watermark": watermark(watermark_share), "reserve": reserve, "greedy": greedy}
    return admission if callable(admission) else policies[require_choice("admission", admission, tuple(policies))]
