"""Which request to admit, and when? Two policies beside the watermark of `waiting`: the most careful, and the least.

Every other policy lies between these two. One of your own is a function of an `AdmissionContext`:
`LLM(admission=my_policy)`.
"""

from __future__ import annotations

from nanopaged.waiting import AdmissionContext, AdmissionPolicy, watermark


def reserve(context: AdmissionContext) -> bool:
    """Admits only what fits at full length, with all running requests at full length: none ever gives way."""
    return context.committed + context.full <= context.pool


def greedy(context: AdmissionContext) -> bool:
    """Admits whatever fits this instant, at the expense of running requests: storms on purpose."""
    return context.available >= context.chunk


def by_name(name: str, watermark_share: float) -> AdmissionPolicy:
    """The policy that is called "watermark", "reserve" or "greedy"."""
    return {"watermark": watermark(watermark_share), "reserve": reserve, "greedy": greedy}[name]
