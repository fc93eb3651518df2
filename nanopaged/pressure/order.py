"""Which waiting request is served first? Every order but the first lets some requests starve.

    "fcfs"       in order of arrival. Nobody starves: a request waits for those before it, and no others.
    "priority"   the lowest `priority` first, as in vLLM; ties by arrival. A steady stream of urgent requests
                 starves all others.
    "shortest"   the smallest `max_tokens` first, which lowers the mean waiting time (shortest job first). A
                 steady stream of short requests starves the long ones.

Another is a function of a request that returns a number: `LLM(order=my_order)`. It is called once, when the
request is added. The number decides which request is admitted next, and which gives way when the pool is
full: the last of the running ones. A waiting request never preempts a running one, so an urgent request
waits until there is room.
"""

from __future__ import annotations

from nanopaged.request import Request
from nanopaged.waiting import OrderPolicy, fcfs


def priority(request: Request) -> float:
    return request.priority


def shortest(request: Request) -> float:
    return request.params.max_tokens


def by_name(name: str) -> OrderPolicy:
    """The order that is called "fcfs", "priority" or "shortest"."""
    return {"fcfs": fcfs, "priority": priority, "shortest": shortest}[name]
