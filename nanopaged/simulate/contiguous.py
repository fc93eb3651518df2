"""What did servers do before paging, and what did it waste?

They gave each request one contiguous range of KV memory, taken when it was admitted and kept until it
ended, so they had to know, or to guess, how long it would become. This is the baseline of the vLLM
paper (Kwon et al., SOSP 2023, section 3.1, Figures 2 and 3), with its three kinds of waste:

    │ A A A A A A ~ ~ ~ ~ x x x x x x │ B B B ~ ~ │ . . . │ C C C C C ~ x x │ . . . . │
      tokens      reserved  internal                external                  external

    reserved   slots of tokens that the request will still generate
    internal   slots that it will never use: the reservation is longer than the request becomes
    external   gaps, too short for the request that waits

Everything but the memory is the engine's own `Scheduler`: continuous batching, the order of the queue,
seats and token budget, prompts in chunks. A request that holds a range is never preempted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from nanopaged.block_allocator import BlockAllocator
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler
from nanopaged.validation import require_int
from nanopaged.waiting import OrderPolicy, fcfs


class ContiguousAllocator:
    """Cuts ranges out of `num_slots` slots: first fit, and neighbouring gaps are merged.

    First fit searches the gaps from the left. There is at most one gap more than there are ranges.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = require_int("num_slots", num_slots, 1)
        self.longest = num_slots  # range that an empty memory has room for
        self.gaps: list[tuple[int, int]] = [(0, num_slots)]  # (start, length), by start; no two touch
        self._lengths: dict[int, int] = {}  # of the ranges in use, by start

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self.gaps)

    def has_room(self, num_slots: int) -> bool:
        return any(length >= num_slots for _, length in self.gaps)

    def take(self, num_slots: int) -> int | None:
        """The start of a range of that length, in the first gap that is long enough; None if there is no such gap."""
        require_int("num_slots", num_slots, 1)
        for i, (start, length) in enumerate(self.gaps):
            if length >= num_slots:
                rest = (start + num_slots, length - num_slots)
                self.gaps[i : i + 1] = [rest] if rest[1] else []
                self._lengths[start] = num_slots
                return start
        return None

    def give_back(self, start: int) -> None:
        """Frees the range that starts at `start`. Raises ValueError if there is none."""
        if start not in self._lengths:
            raise ValueError(f"no range in use starts at slot {start}")
        end = start + self._lengths.pop(start)
        i = bisect_left(self.gaps, (start, 0))
        first, last = i, i  # the gaps to merge with
        if i and sum(self.gaps[i - 1]) == start:
            first, start = i - 1, self.gaps[i - 1][0]
        if i < len(self.gaps) and self.gaps[i][0] == end:
            last, end = i + 1, sum(self.gaps[i])
        self.gaps[first:last] = [(start, end - start)]


class BuddyAllocator:
    """Cuts ranges out of `num_slots` slots, each a power of two long, by halving longer ones (Knuth, 1968, 2.5).

    A range and its buddy, the other half of what was cut, are merged when both are free. So free memory
    is scattered less, but what is rounded up is wasted too: the paper assumes this allocator for Orca
    (section 6.1), and counts both as external.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = require_int("num_slots", num_slots, 1)
        self.longest = 1 << (num_slots.bit_length() - 1)
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]  # starts, by log2 of the length
        start = 0
        for order in reversed(range(num_slots.bit_length())):  # a memory of any size is a few powers of two
            if num_slots >> order & 1:
                self._free[order].add(start)
                start += 1 << order
        self._orders: dict[int, int] = {}  # of the ranges in use, by start

    @property
    def num_free(self) -> int:
        return sum(len(starts) << order for order, starts in enumerate(self._free))

    def has_room(self, num_slots: int) -> bool:
        return any(self._free[(num_slots - 1).bit_length() :])

    def take(self, num_slots: int) -> int | None:
        """The start of a range of at least that length, the shortest and leftmost there is; None if there is none."""
        wanted = (require_int("num_slots", num_slots, 1) - 1).bit_length()
        order = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if order is None:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        for half in reversed(range(wanted, order)):  # the right halves stay free
            self._free[half].add(start + (1 << half))
        self._orders[start] = wanted
        return start

    def give_back(self, start: int) -> None:
        """Frees the range that starts at `start`. Raises ValueError if there is none."""
        if start not in self._orders:
            raise ValueError(f"no range in use starts at slot {start}")
        order = self._orders.pop(start)
        while (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start, order = min(start, buddy), order + 1
        self._free[order].add(start)


ALLOCATORS = {"first-fit": ContiguousAllocator, "buddy": BuddyAllocator}

Reservation = Callable[[int, int], int]  # (true output length, longest output that the model allows) -> output tokens

RESERVATIONS: dict[str, Reservation] = {
    "max": lambda output, longest: longest,  # nothing is known: the paper's Orca (Max)
    "pow2": lambda output, longest: min(longest, 1 << (output - 1).bit_length()),  # Orca (Pow2)
    "oracle": lambda output, longest: output,  # Orca (Oracle): no real server knows
}


class MemoryUse(NamedTuple):
    """The slots of the whole KV memory at one moment, by what they hold; the sum is the whole memory."""

    tokens: float  # K and V of computed tokens
    reserved: float
    internal: float
    external: float
    free: float


class ContiguousScheduler(Scheduler):
    """The engine's scheduler, serving requests whose KV is one range of memory each.

    Its pool has one block for each seat, as long as the longest request. So each running request holds
    exactly one block, and there is always a free one; what limits admission is `memory_ranges`.

    Args:
        memory_ranges: allocates the KV memory.
        reservation: for how many output tokens to reserve slots; the prompt's length is known.
        max_num_seqs, max_num_batched_tokens, max_model_len, clock, order: as in `Scheduler`.
    """

    def __init__(self, memory_ranges: ContiguousAllocator | BuddyAllocator, reservation: Reservation,
                 max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, clock: Callable[[], float],
                 order: OrderPolicy = fcfs) -> None:
        num_seats = min(require_int("max_num_seqs", max_num_seqs, 1), memory_ranges.num_slots)  # a slot each, at least
        seats = BlockAllocator(num_seats, require_int("max_model_len", max_model_len, 2), enable_prefix_caching=False)
        super().__init__(seats, max_num_seqs, max_num_batched_tokens, max_model_len, order=order, clock=clock)
        self.memory_ranges, self.reservation = memory_ranges, reservation
        self.longest = memory_ranges.longest
        self.starts: dict[Request, int] = {}  # first slots of the running requests' ranges
        self._needed = self._held = 0  # slots of the running requests: at full length; reserved

    def slots_for(self, request: Request) -> int:
        """The length of its range, which can be `longest` at most."""
        output = self.reservation(request.params.max_tokens, self.max_model_len - request.num_prompt_tokens)
        return request.num_prompt_tokens + output - 1  # the last token's K and V are never read

    def add(self, request: Request) -> None:
        """Puts a request into the queue. Raises ValueError if it could never run."""
        reserved = self.slots_for(request)
        if reserved > self.longest or request.max_length > self.max_model_len:
            raise ValueError(f"the request can never fit: it reserves {reserved} slots of {self.longest}, "
                             f"and has {request.max_length} tokens with max_model_len={self.max_model_len}")
        super().add(request)

    def _fits(self, request: Request, prefix: list[int], budget: int) -> bool:
        return self.memory_ranges.has_room(self.slots_for(request))

    def _seat(self, request: Request, prefix: list[int]) -> None:
        super()._seat(request, prefix)
        reserved = self.slots_for(request)
        self.starts[request] = self.memory_ranges.take(reserved)
        self._held += reserved
        self._needed += request.max_length - 1

    def _leave(self, request: Request) -> None:
        super()._leave(request)
        self.memory_ranges.give_back(self.starts.pop(request))
        self._held -= self.slots_for(request)
        self._needed -= request.max_length - 1

    def memory(self, writing: int, refused: bool) -> MemoryUse:
        """What the slots hold during a step; O(1).

        `writing`: tokens that the step computes. `refused`: whether the first waiting request finds no range.
        """
        gaps, tokens = self.memory_ranges.num_slots - self._held, self.allocator.stats().filled_slots + writing
        return MemoryUse(tokens, self._needed - tokens, self._held - self._needed,
                         gaps if refused else 0, 0 if refused else gaps)
