"""What did servers do before paging, and what did it waste? First fit against a bitmap, and waste added up by hand."""

from __future__ import annotations

import random
from itertools import count

import pytest

from nanopaged.simulate.contiguous import RESERVATIONS, BuddyAllocator, ContiguousAllocator, ContiguousScheduler, MemoryUse
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.simulate.simulator import memory_refused


def test_first_fit_takes_the_leftmost_gap_that_has_room() -> None:
    allocator = ContiguousAllocator(100)
    starts = [allocator.take(n) for n in (10, 20, 30, 40)]
    assert starts == [0, 10, 30, 60] and allocator.take(1) is None
    allocator.give_back(0)
    allocator.give_back(30)
    assert allocator.take(15) == 30, "the gap of 10 at 0 is too short"
    assert allocator.take(10) == 0
    assert allocator.take(15) == 45 and allocator.num_free == 0


def test_gaps_that_meet_become_one_on_either_side_and_on_both() -> None:
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


def test_memory_can_be_free_and_yet_too_scattered_to_be_used() -> None:
    allocator = ContiguousAllocator(40)
    for _ in range(4):
        allocator.take(10)
    allocator.give_back(0)
    allocator.give_back(20)
    assert allocator.num_free == 20 and allocator.take(11) is None


def test_only_a_stretch_that_is_taken_can_be_given_back() -> None:
    allocator = ContiguousAllocator(40)
    start = allocator.take(10)
    with pytest.raises(ValueError, match="no stretch that is taken begins at slot 5"):
        allocator.give_back(5)
    allocator.give_back(start)
    with pytest.raises(ValueError, match="begins at slot 0"):
        allocator.give_back(start)
    with pytest.raises(ValueError, match="num_slots must be at least 1"):
        allocator.take(0)


def test_a_buddy_allocator_halves_what_is_too_long_and_joins_what_was_halved() -> None:
    allocator = BuddyAllocator(64 + 16)  # stretches of 64 and 16 to begin with
    assert allocator.longest == 64
    assert allocator.take(9) == 64, "9 slots round up to 16, and the shortest stretch with room is at the end"
    assert allocator.take(9) == 0 and allocator.num_free == 48
    assert allocator.take(17) == 32, "32 slots begin at a multiple of 32"
    assert allocator.take(32) is None and allocator.num_free == 16
    assert allocator.take(16) == 16 and allocator.take(1) is None
    allocator.give_back(32)
    allocator.give_back(16)
    assert allocator.take(64) is None, "the buddy of 16 is still taken"
    allocator.give_back(0)
    assert allocator.take(64) == 0
    with pytest.raises(ValueError, match="no stretch that is taken begins at slot 16"):
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
            start = allocator.take(wanted)
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
def test_it_agrees_with_a_bitmap_that_is_searched_slot_by_slot(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 80)
    allocator, taken = ContiguousAllocator(size), [False] * size
    stretches: dict[int, int] = {}
    for turn in range(300):
        where = f"seed {seed}, turn {turn}"
        if stretches and rng.random() < 0.5:
            start = rng.choice(list(stretches))
            length = stretches.pop(start)
            allocator.give_back(start)
            taken[start : start + length] = [False] * length
        else:
            length = rng.randint(1, max(1, size // 4))
            wanted = next((i for i in range(size - length + 1) if not any(taken[i : i + length])), None)
            assert allocator.take(length) == wanted, where
            if wanted is not None:
                stretches[wanted] = length
                taken[wanted : wanted + length] = [True] * length
        assert allocator.num_free == taken.count(False), where
        assert [i for start, length in allocator.gaps for i in range(start, start + length)] == [
            i for i in range(size) if not taken[i]], where
        assert all(a + n < b for (a, n), (b, _) in zip(allocator.gaps, allocator.gaps[1:])), f"two gaps touch: {where}"


@pytest.mark.parametrize("output, reserved", [(1, 1), (2, 2), (3, 4), (25, 32), (32, 32), (33, 64), (90, 100)])
def test_pow2_reserves_the_next_power_of_two_of_the_output(output: int, reserved: int) -> None:
    assert RESERVATIONS["pow2"](output, 100) == reserved, "25 becomes 32, the paper's example; never past the model"
    assert RESERVATIONS["max"](output, 100) == 100
    assert RESERVATIONS["oracle"](output, 100) == output


class Server:
    """A contiguous scheduler with its requests, stepped by hand."""

    def __init__(self, reservation: str, slots: int, seats: int = 8, budget: int = 100) -> None:
        self.scheduler = ContiguousScheduler(ContiguousAllocator(slots), RESERVATIONS[reservation], seats, budget,
                                             max_model_len=20, clock=lambda: 0.0)
        self.ids = count()

    def add(self, prompt: int, output: int) -> Request:
        request = Request(str(next(self.ids)), [1] * prompt, SamplingParams(max_tokens=output, ignore_eos=True))
        self.scheduler.add(request)
        return request

    def step(self) -> MemoryUse:
        """The memory during the step, as `simulate` looks at it."""
        step = self.scheduler.schedule()
        memory = self.scheduler.memory(sum(step.num_tokens), memory_refused(self.scheduler, step))
        self.scheduler.update(step, [0] * len(step.sampled()))
        return memory


def test_reserved_slots_are_those_of_tokens_still_to_be_generated() -> None:
    """Known in advance: 6 prompt and 5 output tokens, of which the last is never stored, are 10 slots of 50."""
    server = Server("oracle", 50)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)
    assert server.step() == MemoryUse(7, 3, 0, 0, 40)
    assert [server.step().reserved for _ in range(3)] == [2, 1, 0]
    assert not server.scheduler.has_unfinished() and server.scheduler.allocator.num_free == 50


def test_internal_waste_is_what_a_reservation_has_beyond_the_true_length() -> None:
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


def test_external_waste_is_free_memory_that_was_refused_to_the_head_of_the_queue() -> None:
    """Stretches of 10, 5 and 10 in 30 slots; when the first ends, its gap and the last one are too short for 12."""
    server = Server("oracle", 30)
    server.add(9, 2)
    server.add(2, 4)
    server.add(4, 7)
    assert server.step() == MemoryUse(tokens=15, reserved=10, internal=0, external=0, free=5)
    assert server.step() == MemoryUse(18, 7, 0, 0, 5)  # the first ends with it
    waiting = server.add(9, 4)
    assert server.step() == MemoryUse(tokens=10, reserved=5, internal=0, external=15, free=0)
    assert waiting.status is RequestStatus.WAITING
    server.step()  # the second ends with it, and the gaps at 0 and 10 meet
    assert server.step() == MemoryUse(tokens=8 + 9, reserved=2 + 3, internal=0, external=0, free=8)
    assert waiting.status is RequestStatus.RUNNING


def test_free_memory_is_not_waste_where_a_seat_is_what_is_missing() -> None:
    server = Server("oracle", 50, seats=1)
    server.add(6, 5)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)


def test_free_memory_is_not_waste_where_the_tokens_of_the_step_are_what_is_missing() -> None:
    server = Server("oracle", 50, budget=6)
    server.add(6, 5)
    server.add(6, 5)
    assert server.step() == MemoryUse(tokens=6, reserved=4, internal=0, external=0, free=40)


def test_first_come_is_first_served_even_where_a_later_request_would_fit() -> None:
    server = Server("oracle", 20)
    server.add(10, 6)
    long, short = server.add(8, 3), server.add(2, 2)
    for _ in range(3):
        server.step()
        assert long.status is RequestStatus.WAITING and short.status is RequestStatus.WAITING


def test_long_prompts_are_computed_in_chunks_within_the_budget() -> None:
    server = Server("oracle", 100, budget=4)
    first, second = server.add(6, 2), server.add(5, 2)
    computed = []
    while server.scheduler.has_unfinished():
        server.step()
        computed.append((first.num_computed_tokens, second.num_computed_tokens))
    assert computed == [(4, 0), (6, 2), (7, 5), (7, 6)]
    assert first.num_output_tokens == second.num_output_tokens == 2


def test_what_a_buddy_rounds_up_is_external_waste() -> None:
    clock_at_0 = lambda: 0.0  # noqa: E731
    scheduler = ContiguousScheduler(BuddyAllocator(32), RESERVATIONS["oracle"], 8, 64, 32, clock_at_0)
    for i in range(2):  # 10 prompt tokens, 8 output tokens of which 7 are stored: 17 slots, rounded up to 32
        scheduler.add(Request(str(i), [1] * 10, SamplingParams(max_tokens=8)))
    step = scheduler.schedule()
    assert [request.request_id for request in step.requests] == ["0"]
    assert scheduler.memory(10, refused=True) == MemoryUse(tokens=10, reserved=7, internal=0, external=15, free=0)


def test_what_could_never_fit_is_refused_when_it_is_added() -> None:
    with pytest.raises(ValueError, match="reserves 19 slots of 18"):
        Server("max", 18).add(1, 1)
    with pytest.raises(ValueError, match="21 tokens with max_model_len=20"):
        Server("oracle", 50).add(20, 1)
    Server("max", 19).add(1, 1)


@pytest.mark.parametrize("reservation", RESERVATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_every_slot_is_counted_once_whatever_happens(reservation: str, seed: int) -> None:
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
    while server.scheduler.has_unfinished():
        server.step()
    assert [r.num_output_tokens for r in requests] == [r.params.max_tokens for r in requests], f"seed {seed}"
    assert server.scheduler.memory(0, False) == MemoryUse(0, 0, 0, 0, 60)
    assert server.scheduler.allocator.gaps == [(0, 60)]
