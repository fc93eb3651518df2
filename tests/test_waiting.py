"""Which request is next? The queue of waiting requests, and the refusal of those that could never run."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nanopaged.block_allocator import BlockAllocator
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.waiting import AdmissionContext, PolicyError, TooManyWaiting, WaitingQueue, admits, place_in


class CountedKey(float):
    """A place in the order that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: float) -> bool:
        CountedKey.compared += 1
        return float(self) < float(other)

    def __eq__(self, other: object) -> bool:
        CountedKey.compared += 1
        return float(self) == other

    __hash__ = float.__hash__


def request_at(place: float, arrival: int) -> Request:
    request = Request(str(arrival), [1], SamplingParams())
    request.key = (place, arrival, 0)
    return request


@pytest.mark.parametrize("seed", range(10))
def test_requests_leave_in_the_order_of_their_keys_whatever_comes_between(seed: int) -> None:
    rng, queue = random.Random(seed), WaitingQueue()
    inside: list[Request] = []
    for arrival in range(600):
        match rng.choice(["push"] * 4 + ["admit", "abort", "preempt"]):
            case "push":
                inside.append(request_at(rng.randrange(5), arrival))
                queue.push(inside[-1])
            case "admit" if inside:
                request = queue.first()
                assert request is min(inside, key=lambda r: r.key), f"seed {seed}"
                queue.leave(request, RequestStatus.RUNNING)
                inside.remove(request)
            case "abort" if inside:
                request = inside.pop(rng.randrange(len(inside)))
                queue.leave(request, RequestStatus.FINISHED)
            case "preempt" if inside:  # it comes back at once, to the same place
                request = queue.first()
                queue.leave(request, RequestStatus.RUNNING)
                queue.push(request)
        assert list(queue) == sorted(inside, key=lambda r: r.key), f"seed {seed}"
        assert len(queue) == len(inside) and bool(queue) == bool(inside), f"seed {seed}"


def test_each_operation_compares_a_logarithm_of_the_queue() -> None:
    queue, rng = WaitingQueue(), random.Random(0)
    requests = [request_at(CountedKey(rng.random()), i) for i in range(16_384)]  # 2 ** 14
    for request in requests:
        queue.push(request)
    for act in (lambda: queue.push(request_at(CountedKey(0.0), -1)), lambda: queue.first(),
                lambda: queue.leave(queue.first(), RequestStatus.RUNNING),
                lambda: queue.leave(requests[5000], RequestStatus.FINISHED)):
        CountedKey.compared = 0
        act()
        assert CountedKey.compared <= 4 * 15, f"{CountedKey.compared} comparisons"


def test_aborted_requests_do_not_pile_up_behind_a_head_that_never_leaves() -> None:
    queue = WaitingQueue()
    queue.push(request_at(0, 0))
    for arrival in range(1, 5000):
        request = request_at(1, arrival)
        queue.push(request)
        queue.leave(request, RequestStatus.FINISHED)
    assert len(queue) == 1 and len(queue._heap) < 200


@pytest.mark.parametrize("place, error", [(None, TypeError), ("1", TypeError), (float("nan"), ValueError),
                                          (float("inf"), ValueError), (True, TypeError)])
def test_an_order_that_returns_no_number_is_named(place: object, error: type[Exception]) -> None:
    def my_order(request: Request) -> object:
        return place

    with pytest.raises(error, match="the place that `order` gives a request"):
        place_in(my_order, request_at(0, 0))


def test_a_follower_that_has_not_started_cannot_be_aborted_alone() -> None:
    scheduler = Scheduler(BlockAllocator(8, 4), 8, 64, 64)
    leader, follower, other = (Request(name, [1], SamplingParams(n=2)) for name in ("0.0", "0.1", "1.0"))
    leader.followers = [follower]
    scheduler.add(leader)
    scheduler.add(other)
    with pytest.raises(ValueError, match="'0.1' is not in the queue"):
        scheduler.abort(follower)
    scheduler.check_invariants()
    assert list(scheduler.waiting) == [leader, other] and follower.status is RequestStatus.WAITING


def test_a_full_queue_refuses_a_request_with_both_numbers() -> None:
    scheduler = Scheduler(BlockAllocator(8, 4), 8, 64, 64, max_waiting=1)
    scheduler.add(Request("0", [1], SamplingParams()))
    with pytest.raises(TooManyWaiting, match="1 requests wait already, max_waiting is 1"):
        scheduler.add(Request("1", [1], SamplingParams()))
    assert [request.request_id for request in scheduler.waiting] == ["0"]


CONTEXT = AdmissionContext(pool=9, available=5, committed=4, chunk=1, prompt=2, full=3)


@pytest.mark.parametrize("answer", [True, False, np.True_, np.False_], ids=str)
def test_an_admission_policy_answers_with_a_bool(answer: object) -> None:
    assert admits(lambda context: answer, CONTEXT) is bool(answer)


@pytest.mark.parametrize("answer", [None, 1, 0, "yes", [True], np.int64(1), np.array([True])], ids=repr)
def test_an_admission_policy_that_returns_no_bool_is_told_what_it_returned_and_for_what(answer: object) -> None:
    with pytest.raises(TypeError, match="must return True or False, got .*, for AdmissionContext.pool=9, available=5,"):
        admits(lambda context: answer, CONTEXT)


@pytest.mark.parametrize("policy", [
    lambda context: context.free > 3, lambda context: 1 // (context.pool - 9), lambda context, more: True,
], ids=["a field that does not exist", "a division by zero", "another signature"])
def test_an_admission_policy_that_raises_is_named_with_the_fields_that_it_may_read(policy: object) -> None:
    with pytest.raises(PolicyError, match="admission policy raised .*fields are pool, available, .*, full") as caught:
        admits(policy, CONTEXT)
    assert isinstance(caught.value.__cause__, (AttributeError, ZeroDivisionError, TypeError))


def test_an_order_policy_that_raises_is_named_with_the_fields_that_it_may_read() -> None:
    with pytest.raises(PolicyError, match="order policy raised AttributeError.*fields are request_id, ") as got:
        place_in(lambda request: request.urgency, Request("any", [1], SamplingParams()))
    assert isinstance(got.value.__cause__, AttributeError)
