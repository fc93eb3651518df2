"""Every order of events, not some: a model checker over the real scheduler and allocator.

    python tests/model_check.py            the scopes that the tests run: 23, with 8,000 states
    python tests/model_check.py --large    many more, one line for each: 925, with 600,000 states

A scope is two or three requests, with common prefixes and without, n up to 2; a pool of 4 blocks of 2 slots; a
budget of 1 to 3 tokens a step; an order; and swapping or not. In a scope every order of these events is tried:

    add          of each request
    step         carried out and recorded; a request may stop with it, or fail since its logits are not finite, and
                 the admission policy may refuse everybody
    fail_after   a step that raises after its plan, between its moves, or in the model
    abort        of each request, with all its continuations

The search is breadth first over states, so it finds a shortest way to a violation. A state is everything that
decides the future (see `World.key`). Each is visited once, and every event is tried in it. After each event

 - the scheduler's own invariants hold, and so does a recount from outside (`recount`);
 - each request is in exactly one place, with the known answer's tokens;
 - blocks hold what they should: a `World` keeps the contents of the pool and of the swap space as a model would
   write them, and a slot that counts as computed, or can be found, has its token after its whole prefix;
 - a step serves the first running request, and from every state, steps alone lead to the end.

Why are small scopes enough? Most faults show in some small case, if all small cases are tried: the small scope
hypothesis (Jackson, Software Abstractions, 2006). Two requests are enough to share a block, to evict one and to
give way, and a third comes between them; two slots are enough for a block to be partly filled; and no decision of
the scheduler depends on a larger number. (How long a queue grows before its heap is built again does.)

A violation is printed as Python that repeats it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copyreg
import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations_with_replacement, count, groupby, product, takewhile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tests/model_check.py`

from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure import order
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import BlockMove, Step
from nanopaged.waiting import AdmissionContext
from tests.recount import assert_consistent, assert_nothing_is_held, assert_writes_are_exclusive

BLOCKS, SIZE = 4, 2  # of the pool, and of a block, in slots
MOST_PENDING = 10  # moves, and preemptions, that are not recorded: a step that fails again and again adds no more
PLACES = {"copy": ("pool", "pool"), "to_host": ("pool", "host"), "to_pool": ("host", "pool")}  # from, to

Slot = tuple[str, int, int]  # "pool" or "host", block, offset
Prefix = tuple[int, ...]  # a token with all before it, since its K and V depend on them

# States are kept as pickles, which is much faster than `deepcopy`. A `count` shows its number only in its repr.
copyreg.pickle(count, lambda numbers: (count, (int(repr(numbers)[6:-1]),)))


class Ask(NamedTuple):
    """What a user asks for. The token at position p of continuation i is (p + i) % 2, whatever the prompt is."""

    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    priority: int = 0


class Scope(NamedTuple):
    asks: tuple[Ask, ...]
    budget: int  # max_num_batched_tokens
    order: str = "fcfs"
    swap_blocks: int = 0  # 0: preempted requests recompute
    seats: int = 4  # max_num_seqs
    caching: bool = True


class Event(NamedTuple):
    """A method of `World`, with its argument if it has one."""

    method: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.method}({self.argument!r})" if self.argument else f"{self.method}()"


STEP = Event("step")


def slots(place: str, blocks: Sequence[int] | Mapping[int, int], tokens: Sequence[int], start: int,
          end: int) -> Iterator[tuple[Slot, Prefix]]:
    """Where logical blocks keep the positions from `start` to `end`, and what should be there."""
    for p in range(start, end):
        yield (place, blocks[p // SIZE], p % SIZE), tuple(tokens[: p + 1])


def carried_out(moves: Iterable[BlockMove], memory: Mapping[Slot, Prefix | None]) -> dict[Slot, Prefix | None]:
    """What slots hold after moves, made as `KVCache.carry_out` makes them."""
    memory = dict(memory)
    for kind, run in groupby(moves, key=lambda move: move.kind):
        source, target = PLACES[kind]
        copies = ({(target, move.target, i): memory.get((source, move.source, i)) for i in range(SIZE)} for move in run)
        for copy in list(copies) if kind == "copy" else copies:  # copies in the pool read everything, then write
            memory |= copy
    return memory


class World:
    """A scheduler, its requests A, B, ... with the continuations A0, A1, ..., and what all blocks hold.

    The methods up to `finish` are events. Each leaves a world in which everything holds, or raises.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        arguments = (BlockAllocator(BLOCKS, SIZE, scope.caching), scope.seats, scope.budget, 1000, self.admits,
                     order.by_name(scope.order), None, float)  # the clock stands at float(), 0.0
        self.scheduler = (SwappingScheduler(*arguments, swap_blocks=scope.swap_blocks) if scope.swap_blocks
                          else Scheduler(*arguments))
        self.door_is_open, self.num_asked = True, 0
        self.groups: dict[str, list[Request]] = {}  # all requests, also those that are not added yet
        self.answers: dict[str, list[int]] = {}  # all tokens that a continuation can ever have
        for name, (prompt, max_tokens, n, priority) in zip("ABC", scope.asks):
            params, end = SamplingParams(n=n, max_tokens=max_tokens), len(prompt) + max_tokens
            self.groups[name] = group = [Request(f"{name}{i}", list(prompt), params, priority=priority, group_id=name)
                                         for i in range(n)]
            group[0].followers = group[1:]
            for i, member in enumerate(group):
                self.answers[member.request_id] = [*prompt, *((p + i) % 2 for p in range(len(prompt), end))]
        self.to_add = list(self.groups)
        self.memory: dict[Slot, Prefix | None] = {}  # garbage where there is none

    def admits(self, _: AdmissionContext) -> bool:
        """The admission policy: accepts everybody, so that requests give way, or nobody."""
        self.num_asked += 1
        assert self.num_asked <= len(self.answers), "the scheduler admits requests without end"
        return self.door_is_open

    def add(self, name: str) -> None:
        self.to_add.remove(name)
        self.num_asked = 0
        self.scheduler.add(self.groups[name][0])
        self.check()

    def abort(self, name: str) -> None:
        """As `LLM.abort_request` does it."""
        for member in self.groups[name]:
            if member.status is not RequestStatus.FINISHED:
                self.scheduler.abort(member)
        self.check()

    def step(self, stops: str = "", fails: str = "") -> Step:
        """A step that is carried out; one continuation may stop with the token that it gets, or not be finite."""
        scheduler, step = self.scheduler, self.planned()
        self.memory = carried_out(scheduler.moves, self.memory)
        scheduler.moves.clear()
        failed = {request: "not finite" for request in step.requests if request.request_id == fails}
        self.write(step, failed)
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            for slot, prefix in slots("pool", request.block_table, request.token_ids, 0, start + num_tokens):
                assert request in failed or self.memory.get(slot) == prefix, \
                    f"{request} reads {self.memory.get(slot)} in {slot}, not {prefix}"
        token_ids = {request: self.answers[request.request_id][len(request.token_ids)]
                     for i, request in step.sampled if step.requests[i] not in failed}
        stopped = [request for request in token_ids if request.request_id == stops]
        scheduler.update(step, token_ids, stopped, failed)
        for request in (*stopped, *failed):
            assert request.finish_reason == ("error" if request in failed else "stop"), f"{request} goes on"
        self.check()
        return step

    def step_not_finite(self, name: str) -> None:
        self.step(fails=name)

    def step_without_admission(self) -> None:
        """A step for which the admission policy refuses everybody; a request that is alone is admitted anyway."""
        self.door_is_open = False
        self.step()
        self.door_is_open = True

    def fail_after(self, part: str) -> None:
        """A step that raises after its "plan", after those first "moves" that are of one kind, or in the "model".

        A model that raises may have written all its slots, or some, or only K: garbage is the worst it can leave.
        """
        step, moves = self.planned(), self.scheduler.moves
        if part != "plan":
            made = list(takewhile(lambda move: part == "model" or move.kind == moves[0].kind, moves))
            self.memory = carried_out(made, self.memory)
            del moves[: len(made)]
        if part == "model":
            self.write(step, failed=step.requests)
        self.check()

    def finish(self) -> None:
        """Steps until all requests have ended; raises if a state comes back."""
        seen: set[bytes] = set()
        while self.scheduler.has_unfinished():
            assert self.key() not in seen, "steps alone do not lead to the end: a state comes back"
            seen.add(self.key())
            self.step()

    def events(self) -> Iterator[Event]:
        """All that can happen, but for the variants of a step."""
        for i, name in enumerate(self.to_add):
            # Equal requests differ in their names alone, so all orders of adding them are one.
            if self.ask(name) not in map(self.ask, self.to_add[:i]):
                yield Event("add", name)
        if self.scheduler.has_unfinished():
            yield from (STEP, Event("fail_after", "plan"), Event("fail_after", "model"))
        for name, group in self.groups.items():
            if name not in self.to_add and any(member.status is not RequestStatus.FINISHED for member in group):
                yield Event("abort", name)

    def variants(self, step: Step) -> Iterator[Event]:
        """What else could have happened, once a step was carried out."""
        if len({move.kind for move in step.moves}) > 1:
            yield Event("fail_after", "moves")
        if step.admitted:
            yield Event("step_without_admission")
        for _, request in step.sampled:
            if request.finish_reason is None:
                yield Event("step", request.request_id)
        for request in step.requests:
            yield Event("step_not_finite", request.request_id)

    def planned(self) -> Step:
        self.num_asked, first = 0, self.scheduler.running[:1]
        step = self.scheduler.schedule()
        assert_writes_are_exclusive(self.scheduler, step)
        assert all(request in step.requests for request in first), f"the first running request is not served: {first}"
        assert step.requests, "requests wait, and nobody is served"
        assert min(step.num_tokens) > 0 and sum(step.num_tokens) <= self.scope.budget, f"{step.num_tokens} are planned"
        for pending in (self.scheduler.moves, step.preempted):
            assert len(pending) <= MOST_PENDING, f"with each step that fails there are more of {pending}"
        return step

    def write(self, step: Step, failed: Iterable[Request]) -> None:
        for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
            for slot, prefix in slots("pool", request.block_table, request.token_ids, start, start + num_tokens):
                self.memory[slot] = None if request in failed else prefix

    def check(self) -> None:
        """Raises unless everything holds."""
        scheduler = self.scheduler
        scheduler.check_invariants()
        assert_consistent(scheduler)
        assert scheduler.committed_seats <= self.scope.seats, f"{scheduler.committed_seats} seats are taken"
        present = [*scheduler.running, *scheduler.waiting]
        places = Counter(member for request in present for member in (request, *request.followers))
        members = [member for group in self.groups.values() for member in group]
        for request in members:
            ended = request.status is RequestStatus.FINISHED
            expected = 0 if ended or request.group_id in self.to_add else 1
            assert places[request] == expected, f"{request} is in {places[request]} places, not in {expected}"
            tokens, answer = request.token_ids, self.answers[request.request_id]
            assert tokens == answer[: len(tokens)], f"{request} has the tokens {tokens}, not {answer}"
            assert ended == (request.finish_reason is not None), f"{request} ends with {request.finish_reason}"
            assert request.finish_reason != "length" or tokens == answer, f"{request} ends early, with {tokens}"
        stats, plan = scheduler.stats, scheduler._unrecorded  # listeners are told of an unrecorded plan later
        told = stats.num_finished, stats.num_preemptions + (len(plan.preempted) if plan else 0)
        happened = (sum(request.status is RequestStatus.FINISHED for request in members),
                    sum(request.metrics.preemptions for request in members))
        assert told == happened, f"listeners are told of {told} ends and preemptions, {happened} happened"
        self.check_contents()
        if not present:
            assert_nothing_is_held(scheduler)

    def check_contents(self) -> None:
        """Compares all slots that count, as planned moves will leave them; and clears the others.

        A slot that does not count may hold anything. To read it before it is written again is a violation,
        whatever it holds; so garbage stands for all contents, which keeps the number of states small.
        """
        scheduler, counted = self.scheduler, set()
        settled = carried_out(scheduler.moves, self.memory)
        users = [(request, slots("pool", request.block_table, request.token_ids, 0, request.num_computed_tokens))
                 for request in scheduler.running]
        users += [(request, slots("host", blocks, request.token_ids, min(blocks) * SIZE, num_tokens))
                  for request, (blocks, num_tokens) in getattr(scheduler, "swapped", {}).items()]
        users += [(f"whoever finds block {block}", slots("pool", {len(prefix) // SIZE - 1: block}, prefix,
                                                         len(prefix) - SIZE, len(prefix)))
                  for block, prefix in self.prefixes().items()]
        for user, uses in users:
            for slot, prefix in uses:
                assert settled.get(slot) == prefix, f"{slot} holds {settled.get(slot)}, for {user} it must be {prefix}"
                counted.add(slot)
        # A planned move reads its source, even if that block was given back since, and overwrites its target.
        read = {(PLACES[kind][0], source) for kind, source, _ in scheduler.moves}
        written = {(PLACES[kind][1], target) for kind, _, target in scheduler.moves}
        self.memory = {slot: prefix for slot, prefix in self.memory.items()
                       if slot[:2] in read or slot in counted and slot[:2] not in written}

    def prefixes(self) -> dict[int, Prefix]:
        """Of each published block all tokens up to its end, from its key and its parents' keys."""
        allocator = self.scheduler.allocator
        by_identity = {allocator._identities[block]: block for block in allocator._index.values()}

        def prefix(block: int) -> Prefix:
            parent, tokens = allocator._keys[block]
            return (prefix(by_identity[parent]) if parent else ()) + tokens

        return {block: prefix(block) for block in by_identity.values()}

    def ask(self, name: str) -> int:
        """The number of what a request asks for; equal ones have the same."""
        return self.scope.asks.index(self.scope.asks["ABC".index(name)])

    def key(self) -> bytes:
        """What decides the future, and nothing else: two worlds with the same key have the same futures.

        Blocks are named in the order in which they are met. Free blocks have no names, since one is as good as
        another, except for those that a planned move reads or writes. Of the requests' keys only their order
        counts; of equal requests, how many are still to be added; of requests that have ended, whether they are
        still in the queue's heap. Tokens follow from their number, and what slots hold, where it counts, from the
        tokens. Counters that nothing but reports read are left out.
        """
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        present = [*scheduler.running, *scheduler.waiting]
        swapped, plan = getattr(scheduler, "swapped", {}), scheduler._unrecorded
        groups = {name: i for i, name in enumerate(dict.fromkeys(request.group_id for request in sorted(present)))}
        names: dict[str, dict[int, int]] = {"pool": {}, "host": {}}

        def named(place: str, blocks: Iterable[int]) -> list[int]:
            return [names[place].setdefault(block, len(names[place])) for block in blocks]

        requests = [
            (groups[request.group_id], self.ask(request.group_id), request.request_id[1:], request.status.value,
             len(request.token_ids), request.num_computed_tokens, request.most_computed_tokens,
             request.may_share_tail, len(request.followers), named("pool", request.block_table))
            for request in present]
        kept = [(num_tokens, list(blocks), named("host", blocks.values()))
                for _, (blocks, num_tokens) in sorted(swapped.items())]
        cached = named("pool", allocator._cached)  # least recently used first
        moves = [(kind, named(PLACES[kind][0], [source]), named(PLACES[kind][1], [target]),
                  [self.memory.get((PLACES[kind][0], source, i)) for i in range(SIZE)])
                 for kind, source, target in scheduler.moves]
        prefixes = self.prefixes()
        published = [(prefixes.get(block), allocator._filled[block]) for block in names["pool"]]
        free = [names["pool"].get(block) for block in allocator._free]
        free += [names["host"].get(block) for block in scheduler.swap_space._free] if self.scope.swap_blocks else []
        heap = [request.status.value for request in sorted(scheduler.waiting._heap)]
        return repr((requests, kept, cached, moves, published, free, heap, len(plan.preempted) if plan else 0,
                     sorted(map(self.ask, self.to_add)))).encode()


class Found(NamedTuple):
    """What a search has found: no violation, or a shortest series of events that leads to one."""

    states: int
    transitions: int
    longest: int = 0  # steps, from any state to the end
    error: str = ""
    events: tuple[Event, ...] = ()


def search(scope: Scope) -> Found:
    """Visits every state of a scope, and tries every event in it."""
    world = World(scope)
    numbers = {world.key(): 0}
    came: list[tuple[int, Event]] = [(0, STEP)]  # to each state but the first: from which one, and by which event
    snapshots = deque([(list(world.events()), pickle.dumps(world, -1))])
    after_step: dict[int, int] = {}
    transitions = 0

    def violation(error: str, state: int, last: Event) -> Found:
        events = [last]
        while state:
            state, event = came[state]
            events.append(event)
        return Found(len(came), transitions, error=error, events=tuple(events[::-1]))

    for state in count():
        if not snapshots:
            break
        events, snapshot = snapshots.popleft()
        for event in events:  # a step adds its variants
            world = pickle.loads(snapshot)
            transitions += 1
            try:
                step = getattr(world, event.method)(*filter(None, [event.argument]))
            except Exception as error:  # nothing that the scheduler raises is expected here
                return violation(f"{type(error).__name__}: {error}", state, event)
            key = world.key()
            if key not in numbers:
                numbers[key] = len(came)
                came.append((state, event))
                snapshots.append((list(world.events()), pickle.dumps(world, -1)))
            if event == STEP:
                after_step[state] = numbers[key]
                events += world.variants(step)

    steps: dict[int, int] = {}  # from a state to the end
    for state in range(len(came)):
        way, last = {state: None}, state  # in order
        while last in after_step and last not in steps:
            last = after_step[last]
            if last in way:
                return violation("AssertionError: steps alone do not lead to the end: a state comes back", state,
                                 Event("finish"))
            way[last] = None
        for back, before in enumerate(reversed(way)):
            steps[before] = steps.get(last, 0) + back
    return Found(len(came), transitions, max(steps.values()))


def few_scopes() -> Iterator[Scope]:
    """All orders, budgets and ways to give way for one pair; the rest once."""
    pair = Ask((0, 1, 0), 3, n=2, priority=1), Ask((0, 1, 1), 4)  # "priority" prefers the last, "shortest" the first
    for policy, swap_blocks, budget in product(("fcfs", "priority", "shortest"), (0, 2), (1, 2, 3)):
        yield Scope(pair, budget, policy, swap_blocks)
    yield Scope(pair, 3, swap_blocks=2, seats=2)
    yield Scope(pair, 3, swap_blocks=2, caching=False)
    yield Scope((Ask((0, 1, 0), 3, n=2), Ask((0, 1, 0), 3, n=2)), 3, swap_blocks=2)
    yield Scope((Ask((0, 1, 0), 3, n=2), Ask((1,), 8)), 3, swap_blocks=2)  # one that evicts all of the other
    yield Scope((Ask((0, 1, 0), 3), Ask((0, 1, 1), 3), Ask((1, 0), 3)), 3)


def many_scopes() -> Iterator[Scope]:
    """Pairs and triples of a menu. An order is a number for each request, so "shortest" would repeat "priority"."""
    menu = (Ask((0, 1, 0), 4), Ask((0, 1, 0), 3, n=2), Ask((0, 1, 1), 5))
    more = (Ask((1, 0, 0), 4, n=2), Ask((0,), 4, n=2), Ask((0, 1), 7), Ask((0, 1, 0, 1, 0), 3, n=2))

    def urgent(asks: Sequence[Ask], step: int) -> tuple[Ask, ...]:
        return tuple(ask._replace(priority=step * i) for i, ask in enumerate(asks))

    for pair in combinations_with_replacement(menu + more, 2):
        for swap_blocks, budget in product((0, 1, 3), (1, 2, 3)):
            yield Scope(pair, budget, "fcfs", swap_blocks)
            yield Scope(urgent(pair, -1), budget, "priority", swap_blocks)
            if pair[0] != pair[1]:
                yield Scope(urgent(pair, 1), budget, "priority", swap_blocks)
        for swap_blocks in (0, 2):
            yield Scope(pair, 3, swap_blocks=swap_blocks, seats=2)
            yield Scope(pair, 3, swap_blocks=swap_blocks, caching=False)
    for triple in combinations_with_replacement(menu, 3):
        for swap_blocks, budget in product((0, 2), (1, 2, 3)):
            yield Scope(triple, budget, "fcfs", swap_blocks)
            yield Scope(urgent(triple, -1), budget, "priority", swap_blocks)


def report(scopes: Iterable[Scope], one_line_each: bool = False) -> int:
    """Searches scopes, and prints what it finds. Returns the exit status: 1 after a violation, which ends it."""
    states = transitions = longest = number = 0
    for number, scope in enumerate(scopes, 1):
        start, found = time.process_time(), search(scope)
        states, transitions = states + found.states, transitions + found.transitions
        longest = max(longest, found.longest)
        if found.error:
            lines = ["from tests.model_check import Ask, Scope, World", f"world = World({scope})",
                     *(f"world.{event}" for event in found.events)]
            print(f"A violation after {len(found.events)} events:\n", *lines, "", found.error, sep="\n")
            return 1
        if one_line_each:
            print(f"{found.states:7} states {found.transitions:8} transitions {time.process_time() - start:6.1f} s  "
                  f"{scope}", flush=True)
    print(f"no violation in {number} scopes: {states} states, {transitions} transitions, at most {longest} steps to "
          "the end")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tries every order of events in small scopes of the scheduler.")
    parser.add_argument("--large", action="store_true", help="many more scopes, one line for each")
    large = parser.parse_args().large
    sys.exit(report(many_scopes() if large else few_scopes(), large))
