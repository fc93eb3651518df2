"""What did servers do before paging, and what did it waste? First fit and a bitmap agree; waste is computed by hand."""

from __future__ import annotations

import random
from itertools import count

import pytest

from nanopaged.pressure.order import shortest
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.simulate.contiguous import (RESERVATIONS, BuddyAllocator, ContiguousAllocator, ContiguousScheduler,
                                           MemoryUse)
from nanopaged.simulate.simulator import memory_refused
from nanopaged.waiting import OrderPolicy, fcfs
from tests.recount import assert_consistent, assert_nothing_is_held


def test_first_fit_takes_the_leftmost_gap_that_has_room() -> None:
    allocator = ContiguousAllocator(100)
    starts = [allocator.take(n) for n in (10, 20, 30, 40)]
    assert starts == [0, 10, 30, 60] and allocator.take(1) is None
    allocator.give_back(0)
    allocator.give_back(30)
    assert allocator.take(15) == 30, "the gap of 10 at 0 is too short"
    assert allocator.take(10) == 0
    assert allocator.take(15) == 45 and allocator.num_free == 0


def test_a_freed_range_is_merged_with_the_gaps_on_either_side_and_on_both() -> None:
    allocator = ContiguousAllocator(40)
    for _ in range(4):
        allocator.take(10)
    allocator.give_back(10)
    allocator.give_back(20)  # a gap to its left
    assert allocator.gaps == [(10, 20)]
    allocator.give_back(0)  # a gap to its right
    assert allocator.gaps == [(0, 30)]
    assert allocator.take(10) == 0
    allocator.give_back(30)
    assert allocator.gaps == [(10, 30)]
    assert allocator.take(10) == 10
    allocator.give_back(0)
    allocator.give_back(10)  # gaps on both sides
    assert allocator.gaps == [(0, 40)] and allocator.take(40) == 0


def test_free_memory_can_be_too_scattered_to_be_used() -> None:
    allocator = ContiguousAllocator(40)
    for _ in range(4):
        allocator.take(10)
    allocator.give_back(0)
    allocator.give_back(20)
    assert allocator.num_free == 20 and allocator.take(11) is None


def test_only_a_range_in_use_can_be_given_back() -> None:
    allocator = ContiguousAllocator(40)
    start = allocator.take(10)
    with pytest.raises(ValueError, match="no range in use starts at slot 5"):
        allocator.give_back(5)
    allocator.give_back(start)
    with pytest.raises(ValueError, match="starts at slot 0"):
        allocator.give_back(start)
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        allocator.take(0)


def test_a_buddy_allocator_halves_ranges_that_are_too_long_and_merges_the_halves_again() -> None:
    allocator = BuddyAllocator(64 + 16)  # at first, ranges of 64 and 16
    assert allocator.longest == 64
    assert allocator.take(9) == 64, "9 slots are rounded up to 16, and the shortest range with room is at the end"
    assert allocator.take(9) == 0 and allocator.num_free == 48
    assert allocator.take(17) == 32, "32 slots start at a multiple of 32"
    assert allocator.take(32) is None and allocator.num_free == 16
    assert allocator.take(16) == 16 and allocator.take(1) is None
    allocator.give_back(32)
    allocator.give_back(16)
    assert allocator.take(64) is None, "the buddy of 16 is still taken"
    allocator.give_back(0)
    assert allocator.take(64) == 0
    with pytest.raises(ValueError, match="no range in use starts at slot 16"):
        allocator.give_back(16)


@pytest.mark.parametrize("seed", range(4))
def test_buddies_never_overlap_and_all_memory_comes_back(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 300)
    allocator, owner, taken = BuddyAllocator(size), [None] * size, {}
    for i in range(500):
        if taken and rng.random() < 0.5:
            start = rng.choice(sorted(taken))
            length = taken.pop(start)
            owner[start : start + length] = [None] * length
            allocator.give_back(start)
        else:
            wanted = rng.randint(1, 40)
            had_room = allocator.has_room(wanted)
            start = allocator.take(wanted)
            assert had_room == (start is not None), f"seed {seed}, step {i}"
            rounded = 1 << (wanted - 1).bit_length()
            aligned = range(0, size - rounded + 1, rounded)
            if start is None:
                assert not any(owner[a : a + rounded] == [None] * rounded for a in aligned), f"seed {seed}, step {i}"
            else:
                assert start in aligned and owner[start : start + rounded] == [None] * rounded, f"seed {seed}, step {i}"
                owner[start : start + rounded], taken[start] = [i] * rounded, rounded
        assert allocator.num_free == owner.count(None), f"seed {seed}, step {i}"
    for start in list(taken):
        allocator.give_back(start)
    assert allocator.num_free == size and allocator.take(allocator.longest) == 0, f"seed {seed}"


@pytest.mark.parametrize("seed", range(10))
def test_first_fit_agrees_with_a_bitmap_that_is_searched_slot_by_slot(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 80)
    allocator, taken = ContiguousAllocator(size), [False] * size
    ranges: dict[int, int] = {}
    for turn in range(300):
        where = f"seed {seed}, turn {turn}"
        if ranges and rng.random() < 0.5:
            start = rng.choice(list(ranges))
            length = ranges.pop(start)
            allocator.give_back(start)
            taken[start : start + length] = [False] * length
        else:
            length = rng.randint(1, max(1, size // 4))
            wanted = next((i for i in range(size - length + 1) if not any(taken[i : i + length])), None)
            assert allocator.has_room(length) == (wanted is not None), where
            assert allocator.take(length) == wanted, where
            if wanted is not None:
                ranges[wanted] = length
                taken[wanted : wanted + length] = [True] * length
        assert allocator.num_free == taken.count(False), where
        assert [i for start, length in allocator.gaps for i in range(start, start + length)] == [
            i for i in range(size) if not taken[i]], where
        assert all(a + n < b for (a, n), (b, _) in zip(allocator.gaps, allocator.gaps[1:])), f"two gaps touch: {where}"


@pytest.mark.parametrize("output, reserved", [(1, 1), (2, 2), (3, 4), (25, 32), (32, 32), (33, 64), (90, 100)])
def test_pow2_reserves_the_next_power_of_two_of_the_output(output: int, reserved: int) -> None:
    assert RESERVATIONS["pow2"](output, 100) == reserved, "25 becomes 32, the paper's example"
    assert RESERVATIONS["max"](output, 100) == 100
    assert RESERVATIONS["oracle"](output, 100) == output


class Server:
    """A contiguous scheduler with its requests, stepped by hand."""

    def __init__(self, reservation: str, slots: int, seats: int = 8, budget: int = 100,
                 order: OrderPolicy = fcfs) -> None:
        self.ranges = ContiguousAllocator(slots)
        self.scheduler = ContiguousScheduler(self.ranges, RESERVATIONS[reservation], seats, budget, max_model_len=20,
                                             clock=lambda: 0.0, order=order)
        self.ids = count()

    def add(self, prompt: int, output: int) -> Request:
        request = Request(str(next(self.ids)), [1] * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        self.scheduler.add(request)
        return request

    def step(self) -> MemoryUse:
        """The memory during the step, as `simulate` counts it."""
        step = self.scheduler.schedule()
        memory = self.scheduler.memory(sum(step.num_tokens), memory_refused(self.scheduler, step))
        self.scheduler.update(step, {request: 0 for _, request in step.sampled})
        return memory


def test_reserved_slots_are_for_tokens_that_will_still_be_generated() -> None:
    """Known in advance: 6 prompt and 5 output tokens, of which the last is never stored, are 10 slots of 50."""
    server = Server("oracle", 50)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)
    assert server.step() == MemoryUse(7, 3, 0, 0, 40)
    assert [server.step().reserved for _ in range(3)] == [2, 1, 0]
    assert not server.scheduler.has_unfinished() and server.ranges.num_free == 50


def test_internal_waste_is_the_part_of_a_reservation_beyond_the_true_length() -> None:
    """The longest context is 20: 19 slots are reserved, 10 will be used."""
    server = Server("max", 50)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=9, external=0, free=31)
    assert server.step() == MemoryUse(7, 3, 9, 0, 31)


def test_internal_waste_of_a_power_of_two() -> None:
    """An output of 5 is reserved as 8: 13 slots, of which 10 will be used."""
    server = Server("pow2", 50)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=3, external=0, free=37)


def test_external_waste_is_free_memory_that_is_refused_to_the_first_waiting_request() -> None:
    """Ranges of 10, 5 and 10 in 30 slots; when the first ends, its gap and the last one are too short for 12."""
    server = Server("oracle", 30)
    server.add(9, 2)
    server.add(2, 4)
    server.add(4, 7)
    assert server.step() == MemoryUse(tokens=15, reserved=10, internal=0, external=0, free=5)
    assert server.step() == MemoryUse(18, 7, 0, 0, 5)  # the first ends with it
    waiting = server.add(9, 4)
    assert server.step() == MemoryUse(tokens=10, reserved=5, internal=0, external=15, free=0)
    assert waiting.status is RequestStatus.WAITING
    server.step()  # the second ends with it, and the gaps at 0 and 10 are merged
    assert server.step() == MemoryUse(tokens=8 + 9, reserved=2 + 3, internal=0, external=0, free=8)
    assert waiting.status is RequestStatus.RUNNING


def test_free_memory_is_not_waste_if_a_seat_is_missing() -> None:
    server = Server("oracle", 50, seats=1)
    server.add(6, 5)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)


def test_free_memory_is_not_waste_if_the_step_has_no_tokens_left() -> None:
    server = Server("oracle", 50, budget=6)
    server.add(6, 5)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)


@pytest.mark.policy
def test_under_fcfs_a_request_that_does_not_fit_is_not_overtaken_by_a_later_one_that_would() -> None:
    server = Server("oracle", 20)
    server.add(10, 6)
    long, short = server.add(8, 3), server.add(2, 2)
    for _ in range(3):
        server.step()
        assert long.status is RequestStatus.WAITING and short.status is RequestStatus.WAITING


def test_an_order_policy_decides_which_request_gets_a_range_first() -> None:
    server = Server("oracle", 20, order=shortest)
    first = server.add(10, 6)
    server.step()
    long, short = server.add(8, 3), server.add(2, 2)
    server.step()
    assert [first.status, long.status] == [RequestStatus.RUNNING, RequestStatus.WAITING]
    assert server.scheduler.running == [short, first]


@pytest.mark.parametrize("seed", range(3))
def test_a_request_that_holds_a_range_never_gives_way(seed: int) -> None:
    """Also if many more wait than there is memory for, in an order that prefers those that arrive later."""
    rng, requests = random.Random(seed), []
    server = Server("oracle", 40, order=lambda request: -float(request.request_id))
    for turn in range(100):
        requests.append(server.add(rng.randint(1, 10), rng.randint(1, 10)))
        server.step()
        assert_consistent(server.scheduler, f"seed {seed}, turn {turn}")
        assert all(len(request.block_table) == 1 for request in server.scheduler.running), f"seed {seed}, turn {turn}"
    assert len(server.scheduler.waiting) > 20 and server.scheduler.stats.num_preemptions == 0, f"seed {seed}"
    assert sum(request.metrics.preemptions for request in requests) == 0, f"seed {seed}"


def test_an_aborted_request_gives_its_range_back() -> None:
    server = Server("oracle", 20)
    running, waiting = server.add(6, 5), server.add(9, 4)
    server.step()
    server.scheduler.abort(waiting)
    server.scheduler.abort(running)
    assert server.ranges.gaps == [(0, 20)]
    assert server.scheduler.memory(0, False) == MemoryUse(0, 0, 0, 0, 20)
    assert_nothing_is_held(server.scheduler)


def test_more_seats_than_slots_cost_no_memory() -> None:
    server = Server("oracle", 20, seats=10**12)
    server.add(6, 5)
    server.step()
    assert server.scheduler.allocator.num_blocks == 20


def test_long_prompts_are_computed_in_chunks_within_the_budget() -> None:
    server = Server("oracle", 100, budget=4)
    first, second = server.add(6, 2), server.add(5, 2)
    computed = []
    while server.scheduler.has_unfinished():
        server.step()
        computed.append((first.num_computed_tokens, second.num_computed_tokens))
    assert computed == [(4, 0), (6, 2), (7, 5), (7, 6)]
    assert first.num_output_tokens == second.num_output_tokens == 2


def test_the_slots_that_a_buddy_allocator_rounds_up_are_external_waste() -> None:
    scheduler = ContiguousScheduler(BuddyAllocator(32), RESERVATIONS["oracle"], 8, 64, 32, clock=lambda: 0.0)
    for i in range(2):  # 10 prompt tokens, 8 output tokens of which 7 are stored: 17 slots, rounded up to 32
        scheduler.add(Request(str(i), [1] * 10, SamplingParams(max_tokens=8)))
    step = scheduler.schedule()
    assert [request.request_id for request in step.requests] == ["0"]
    assert scheduler.memory(10, refused=True) == MemoryUse(tokens=10, reserved=7, internal=0, external=15, free=0)


def test_a_request_that_could_never_fit_is_refused_when_it_is_added() -> None:
    with pytest.raises(ValueError, match="reserves 19 slots of 18"):
        Server("max", 18).add(1, 1)
    with pytest.raises(ValueError, match="21 tokens with max_model_len=20"):
        Server("oracle", 50).add(20, 1)
    Server("max", 19).add(1, 1)


@pytest.mark.parametrize("reservation", RESERVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_slot_is_counted_once_in_every_step(reservation: str, seed: int) -> None:
    rng = random.Random(seed)
    server = Server(reservation, 60, seats=rng.randint(1, 9), budget=rng.randint(1, 30))
    requests = []
    for turn in range(200):
        if turn < 150 and rng.random() < 0.3:
            prompt = rng.randint(1, 12)
            requests.append(server.add(prompt, rng.randint(1, 20 - prompt)))
        memory = server.step()
        running = server.scheduler.running
        assert sum(memory) == 60 and min(memory) >= 0, f"seed {seed}, turn {turn}: {memory}"
        assert len(running) <= server.scheduler.max_num_seqs, f"seed {seed}, turn {turn}"
        server.scheduler.check_invariants()
    while server.scheduler.has_unfinished():
        server.step()
    assert [r.num_output_tokens for r in requests] == [r.params.max_tokens for r in requests], f"seed {seed}"
    assert server.scheduler.memory(0, False) == MemoryUse(0, 0, 0, 0, 60)
    assert server.ranges.gaps == [(0, 60)]
    assert_nothing_is_held(server.scheduler, f"seed {seed}")
