"""What did servers do before paging, and what did it waste?

They gave each request one contiguous stretch of KV memory, taken when it was admitted and kept until it
ended, so they had to know, or to guess, how long it would become. This is the baseline of the vLLM
paper (Kwon et al., SOSP 2023, section 3.1, Figures 2 and 3), with its three kinds of waste:

    │ A A A A A A ~ ~ ~ ~ x x x x x x │ B B B ~ ~ │ . . . │ C C C C C ~ x x │ . . . . │
      tokens      reserved  internal                external                  external

    reserved   slots of tokens that the request will still generate
    internal   slots that it will never use: the reservation is longer than the request becomes
    external   gaps, too short for the request that waits

Apart from its memory a server here obeys the same rules as `Scheduler`: continuous batching, first come
first served, the same seats and token budget, prompts in chunks. Who holds a reservation never gives way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanopaged.request import Request, RequestStatus
from nanopaged.scheduler import Step
from nanopaged.stats import SchedulerStats
from nanopaged.validation import require_int


class ContiguousAllocator:
    """Cuts stretches out of `num_slots` slots: first fit, and gaps that meet become one.

    First fit looks from the left at every gap, of which there is at most one more than there are stretches.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = require_int("num_slots", num_slots, 1)
        self.longest = num_slots  # stretch that an empty memory has room for
        self.gaps: list[tuple[int, int]] = [(0, num_slots)]  # (start, length), by start; no two touch
        self._lengths: dict[int, int] = {}  # of the stretches that are taken, by start

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self.gaps)

    def take(self, num_slots: int) -> int | None:
        """The start of a stretch of that length, from the first gap that has room; None: none has."""
        require_int("num_slots", num_slots, 1)
        for i, (start, length) in enumerate(self.gaps):
            if length >= num_slots:
                rest = (start + num_slots, length - num_slots)
                self.gaps[i : i + 1] = [rest] if rest[1] else []
                self._lengths[start] = num_slots
                return start
        return None

    def give_back(self, start: int) -> None:
        """Makes the stretch that begins at `start` a gap again. Raises ValueError where none does."""
        if start not in self._lengths:
            raise ValueError(f"no stretch that is taken begins at slot {start}")
        end = start + self._lengths.pop(start)
        i = bisect_left(self.gaps, (start, 0))
        first, last = i, i  # the gaps that it swallows
        if i and sum(self.gaps[i - 1]) == start:
            first, start = i - 1, self.gaps[i - 1][0]
        if i < len(self.gaps) and self.gaps[i][0] == end:
            last, end = i + 1, sum(self.gaps[i])
        self.gaps[first:last] = [(start, end - start)]


class BuddyAllocator:
    """Cuts stretches out of `num_slots` slots, each a power of two long, by halving longer ones (Knuth, 1968, 2.5).

    A stretch and its buddy, the other half of what was cut, become one again when both are free. So
    free memory scatters little, but what is rounded up is lost too: the paper assumes this allocator for
    Orca (section 6.1), and counts both as external.
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
        self._orders: dict[int, int] = {}  # of the stretches that are taken, by start

    @property
    def num_free(self) -> int:
        return sum(len(starts) << order for order, starts in enumerate(self._free))

    def take(self, num_slots: int) -> int | None:
        """The start of a stretch of at least that length, the shortest and leftmost there is; None: there is none."""
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
        """Frees the stretch that begins at `start`. Raises ValueError where none does."""
        if start not in self._orders:
            raise ValueError(f"no stretch that is taken begins at slot {start}")
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
    """The slots of the whole KV memory at one moment, by what they hold; they add up to all of it."""

    tokens: float  # K and V of computed tokens
    reserved: float
    internal: float
    external: float
    free: float


class ContiguousScheduler:
    """Serves requests whose KV lies in one stretch each; has the methods of `Scheduler` that a simulation uses.

    Args:
        allocator: the memory.
        reservation: how many output tokens to reserve for; the prompt's length is known.
        max_num_seqs, max_num_batched_tokens, max_model_len, clock: as in `Scheduler`.
    """

    def __init__(self, allocator: ContiguousAllocator | BuddyAllocator, reservation: Reservation, max_num_seqs: int,
                 max_num_batched_tokens: int, max_model_len: int, clock: Callable[[], float]) -> None:
        self.allocator, self.reservation, self.clock = allocator, reservation, clock
        self.longest = allocator.longest
        self.max_num_seqs = require_int("max_num_seqs", max_num_seqs, 1)
        self.max_num_batched_tokens = require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.max_model_len = require_int("max_model_len", max_model_len, 2)
        self.running: list[Request] = []  # oldest first
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.stats = SchedulerStats()
        self._stretches: dict[str, int] = {}  # where a running request's begins
        self._tokens = self._needed = self._held = 0  # slots: filled; at full length; reserved

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue. Raises ValueError where it could never run."""
        reserved = self.slots_for(request)
        if reserved > self.longest or request.max_length > self.max_model_len:
            raise ValueError(f"the request can never fit: it reserves {reserved} slots of {self.longest}, "
                             f"and has {request.max_length} tokens with max_model_len={self.max_model_len}")
        self.waiting[request.request_id] = request
        request.metrics.arrival_time = request.waiting_since = self.clock()

    def slots_for(self, request: Request) -> int:
        """The length of its stretch, which can be `longest` at most."""
        output = self.reservation(request.params.max_tokens, self.max_model_len - request.num_prompt_tokens)
        return request.num_prompt_tokens + output - 1  # the last token's K and V are never read

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Plans the next step: running requests first, then those at the head of the queue that find a stretch."""
        step = Step(budget=self.max_num_batched_tokens)
        for request in self.running:
            self._plan(request, step)
        while self.waiting and step.budget and len(self.running) < self.max_num_seqs:
            request = next(iter(self.waiting.values()))
            reserved = self.slots_for(request)
            start = self.allocator.take(reserved)
            if start is None:
                break
            del self.waiting[request.request_id]
            self._stretches[request.request_id] = start
            self._held += reserved
            self._needed += request.max_length - 1
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            self._plan(request, step)
        return step

    def _plan(self, request: Request, step: Step) -> None:
        num_tokens = min(len(request.token_ids) - request.num_computed_tokens, step.budget)
        if num_tokens:
            step.budget -= num_tokens
            step.requests.append(request)
            step.num_tokens.append(num_tokens)

    def update(self, step: Step, token_ids: Sequence[int]) -> None:
        """Records that a step's tokens were computed; `token_ids` has one for each of `step.sampled()`."""
        now, finished_before = self.clock(), self.stats.num_finished
        sampled = step.sampled()
        for request, num_tokens in zip(step.requests, step.num_tokens):
            request.num_computed_tokens += num_tokens
        for request, token in zip(sampled, token_ids):
            request.receive(token, now)
            if len(request.token_ids) == request.max_length:
                self._finish(request, now)
        if self.stats.num_finished > finished_before:
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        computed = sum(step.num_tokens)
        self._tokens += computed
        self.stats.num_steps += 1
        self.stats.computed_tokens += computed
        self.stats.output_tokens += len(token_ids)

    def _finish(self, request: Request, now: float) -> None:
        self.allocator.give_back(self._stretches.pop(request.request_id))
        self._tokens -= request.num_computed_tokens
        self._held -= self.slots_for(request)
        self._needed -= request.max_length - 1
        request.status = RequestStatus.FINISHED
        request.finish_reason = "length"
        request.metrics.finished_time = now
        self.stats.num_finished += 1

    def memory(self, writing: int, refused: bool) -> MemoryUse:
        """What the slots hold during a step; O(1).

        `writing`: tokens that the step computes. `refused`: whether a request waits for a stretch, and finds none.
        """
        gaps, tokens = self.allocator.num_slots - self._held, self._tokens + writing
        return MemoryUse(tokens, self._needed - tokens, self._held - self._needed,
                         gaps if refused else 0, 0 if refused else gaps)
