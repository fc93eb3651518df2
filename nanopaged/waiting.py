"""Which request is next, and may it be admitted? The queue, and what policies judge by.

PagedAttention answers neither question. A request that is admitted too early makes others give way,
one that waits too long leaves memory idle; and every order lets some requests wait for others. So
both are functions that the user may choose, or write: `pressure/` has more of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

from nanopaged.request import Request, RequestStatus
from nanopaged.validation import require_number, shown

if TYPE_CHECKING:
    from nanopaged.scheduler import Scheduler


class TooManyWaiting(RuntimeError):
    """The queue is full: send the request again later, or elsewhere. Nothing was changed."""


OrderPolicy = Callable[[Request], float]  # lower is served first


def fcfs(request: Request) -> float:
    """First come, first served: all are equal, and ties go by arrival."""
    return 0


class PolicyError(RuntimeError):
    """A policy raised an exception, which is this one's cause. The request was not added, or the step not carried out.

    Nothing is lost, but while an admission policy goes on raising, no step is: abort what waits, or repair the policy.
    """


def place_in(order: OrderPolicy, request: Request) -> float:
    """A request's place. Raises PolicyError if the policy raises, TypeError or ValueError if it returns no number."""
    try:
        place = order(request)
    except Exception as error:
        raise PolicyError(f"the order policy raised {error!r}; it is called with a Request, whose fields are "
                          f"{', '.join(vars(request))}") from error
    # An int needs no check, and all the orders here return one.
    return place if type(place) is int else require_number("the place that `order` gives a request", place, -math.inf)


class AdmissionContext(NamedTuple):
    """What an admission policy may judge by, in blocks. The candidate is the first waiting request.

    A policy is called with one whenever others run; a request that is alone is always admitted. And it is
    called once when a request is added, about an empty pool (with chunk and prompt 0): a request refused
    here can never run.
    """

    pool: int  # blocks in the whole pool
    available: int  # free or cached, once the candidate holds what it can share
    committed: int  # what all running requests would hold at full length, shared blocks counted for each
    chunk: int  # what the candidate takes in this very step
    prompt: int  # what it takes until all its known tokens are computed
    full: int  # what it and all its continuations would hold at full length


AdmissionPolicy = Callable[[AdmissionContext], bool]


def admits(admission: AdmissionPolicy, context: AdmissionContext) -> bool:
    """The policy's answer. Raises PolicyError if it raises, TypeError if it returns no bool."""
    try:
        answer = admission(context)
    except Exception as error:
        raise PolicyError(f"the admission policy raised {error!r}; it is called with an AdmissionContext, whose fields "
                          f"are {', '.join(context._fields)}") from error
    if isinstance(answer, bool) or (getattr(answer, "dtype", None) == bool and answer.ndim == 0):  # numpy's too
        return bool(answer)
    raise TypeError(f"the admission policy must return True or False, got {shown(answer)}, for {context}")


def watermark(share: float) -> AdmissionPolicy:
    """Admits while the prompt fits and `share` of the pool stays free for running requests to grow into."""
    require_number("watermark", share, 0.0, 1.0)
    return lambda context: context.available - context.prompt >= int(share * context.pool)


def refuse_what_never_fits(request: Request, max_length: int, full_blocks: int, scheduler: Scheduler) -> None:
    """Raises ValueError if a request could not run in an idle engine: then waiting would not help.

    `max_length` tokens and `full_blocks` blocks are what it needs at full length.
    """
    prompt, pool, seats = request.num_prompt_tokens, scheduler.allocator.num_blocks, request.num_seats
    refuse_long_prompt(prompt, scheduler.max_model_len)
    if seats > scheduler.max_num_seqs:
        raise ValueError(f"n={seats} continuations need as many seats, max_num_seqs is {scheduler.max_num_seqs}")
    if full_blocks > pool:
        raise ValueError(f"the request can never fit: its {prompt} prompt tokens and up to {max_length - prompt} "
                         f"output tokens need {full_blocks} blocks of {scheduler.block_size}, and the whole pool has "
                         f"{pool}: lower max_tokens, or raise num_blocks")
    empty = AdmissionContext(pool=pool, available=pool, committed=0, chunk=0, prompt=0, full=full_blocks * seats)
    if not admits(scheduler.admission, empty):
        raise ValueError(f"the request can never fit: the admission policy refuses it even in an empty pool, {empty}")


def refuse_long_prompt(num_tokens: int, max_model_len: int, about: str = "") -> None:
    """Raises ValueError if a prompt of `num_tokens` tokens leaves no room for an output."""
    if num_tokens >= max_model_len:
        raise ValueError(f"the prompt has {about}{num_tokens} tokens; with max_model_len={max_model_len} at most "
                         f"{max_model_len - 1} leave room for an output")


class WaitingQueue:
    """Waiting requests in the order of their keys; O(log n) for each operation.

    A heap. A request that leaves from its middle stays in it until it comes to the top, or until such
    requests are more than half of it.
    """

    def __init__(self) -> None:
        self._heap: list[Request] = []
        self._waiting: set[Request] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:  # in order; sorts, so it is for looking at the queue
        return iter(sorted(self._waiting))

    def push(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._waiting.add(request)
        heappush(self._heap, request)

    def first(self) -> Request:
        while self._heap[0] not in self._waiting:
            heappop(self._heap)
        return self._heap[0]

    def leave(self, request: Request, status: RequestStatus) -> None:
        """Takes out the first request, which may come back, or any other, which may not.

        Raises ValueError for a request that is not in the queue.
        """
        if request not in self._waiting:
            raise ValueError(f"request {request.request_id!r} is not in the queue: it has finished, or is a follower "
                             "that has not started")
        request.status = status
        self._waiting.remove(request)
        if self._heap[0] is request:
            heappop(self._heap)
        if len(self._heap) > 2 * len(self._waiting) + 64:
            self._heap = sorted(self._waiting)  # a sorted list is a heap
