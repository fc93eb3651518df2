"""What should the pool hold? A scheduler whose steps are carried out in a dict, and compared with what requests know.

A slot holds the tokens up to its own: K and V of a token depend on these, and on nothing else. So a copy that is
missing, or comes from the wrong block, or is overwritten, is seen by the next request that reads it.
"""

from __future__ import annotations

from nanopaged.block_allocator import BlockAllocator
from nanopaged.lab.grading import Failed, Told, begin, expect, tell
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step

STEPS = 80  # more mean that it does not end


class Run:
    """The scheduler, the pool, and what lies in it. Whatever fits is admitted."""

    def __init__(self, num_blocks: int = 20, block_size: int = 4, budget: int = 64, caching: bool = True) -> None:
        begin(f"{num_blocks} blocks of {block_size} tokens, a budget of {budget}")
        self.size = block_size
        self.pool = BlockAllocator(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.pool, 8, budget, 64, admission=lambda its: its.available >= its.chunk)
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, place in it) -> tokens up to this one
        self.members: list[Request] = []

    def add(self, prompt_tokens: int, n: int, max_tokens: int, name: str = "r") -> list[Request]:
        """A request with n continuations, which are named r.0, r.1, ..."""
        tell(f"request {name}: a prompt of {prompt_tokens} tokens, n={n}, max_tokens={max_tokens}")
        prompt = [ord(name[0]) + i for i in range(prompt_tokens)]
        params = SamplingParams(n=n, max_tokens=max_tokens)
        members = [Request(f"{name}.{i}", prompt, params, group_id=name) for i in range(n)]
        members[0].followers = members[1:]
        self.scheduler.add(members[0])
        self.members += members
        return members

    def plan(self) -> Step:
        step = self.scheduler.schedule()
        rows = [f"{request.request_id} computes {n} from position {start}"
                for request, start, n in zip(step.requests, step.starts, step.num_tokens)]
        tell(f"a step: {'; '.join(rows) or 'nothing runs'}")
        if self.scheduler.moves:
            moves = [f"{kind} {source} -> {target}" for kind, source, target in self.scheduler.moves]
            tell(f"   moves: {', '.join(moves)}")
        self._tell_tables()
        self._expect_counts()
        return step

    def carry_out(self) -> None:
        """Makes the planned copies, in the dict."""
        before = dict(self.contents)
        for kind, source, target in self.scheduler.moves:
            expect(kind == "copy", f"a move should be a \"copy\", and is {kind!r}")
            for place in range(self.size):
                self.contents[target, place] = before.get((source, place), ())
        self.scheduler.moves.clear()

    def record(self, step: Step) -> None:
        """Writes the step's tokens, lets each request read all of its own, and gives each a token of its own."""
        for request, start, n in zip(step.requests, step.starts, step.num_tokens):
            for p in range(start, start + n):
                block = request.block_table[p // self.size]
                others = [other.request_id for other in self.scheduler.running
                          if other is not request and block in other.block_table]
                expect(not others, f"{request.request_id} writes into block {block} while {' and '.join(others)} "
                       f"{'hold' if others[1:] else 'holds'} it too")
                self.contents[block, p % self.size] = tuple(request.token_ids[: p + 1])
        for request, start, n in zip(step.requests, step.starts, step.num_tokens):
            for p in range(start + n):
                self._expect_readable(request, p)
        drawn = {member: 100 * (1 + self.members.index(member)) + len(member.token_ids) for _, member in step.sampled}
        self.scheduler.update(step, drawn)
        for member, token in drawn.items():
            expect(member.token_ids[-1] == token, f"{member.request_id} should have got the token {token}")
        self._expect_counts()

    def step(self) -> Step:
        step = self.plan()
        self.carry_out()
        self.record(step)
        return step

    def finish(self) -> None:
        """Steps until all have ended; then no block may be held."""
        for _ in range(STEPS):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        else:
            raise Failed(f"after {STEPS} steps the requests should have ended, and still run: {self.scheduler.running}")
        for member in self.members:
            expect(member.status is RequestStatus.FINISHED, f"{member.request_id} should have finished, and is "
                   f"{member.status.value}")
        held = self.pool.num_blocks - self.pool.num_available
        expect(held == 0, f"no block should be held at the end, and {held} are")

    def abort(self, member: Request) -> None:
        tell(f"{member.request_id} is aborted")
        self.scheduler.abort(member)
        self._expect_counts()

    def _tell_tables(self) -> None:
        if tables := [f"{r.request_id} {[*r.block_table]}" for r in self.scheduler.running]:
            tell(f"   block tables: {', '.join(tables)}")

    def _expect_readable(self, request: Request, p: int) -> None:
        block = request.block_table[p // self.size]
        found, expected = self.contents.get((block, p % self.size), ()), tuple(request.token_ids[: p + 1])
        expect(found == expected, f"{request.request_id} reads position {p} from block {block}: there should be K and "
               f"V of token {expected[-1]} after {[*expected[:-1]]}, and there is "
               + (f"that of token {found[-1]} after {[*found[:-1]]}" if found else "nothing"))

    def _expect_counts(self) -> None:
        """Each block has as many holders as there are tables that name it."""
        tables = [[*request.block_table] for request in self.scheduler.running]
        for block in range(self.pool.num_blocks):
            named = sum(block in table for table in tables)
            counted = self.pool.ref_count(block)
            expect(counted == named, f"block {block} is in {named} block tables, so it should have as many holders, "
                   f"and it counts {counted}")


def started(prompt: int, n: int, max_tokens: int = 6, **options: int) -> tuple[Run, list[Request]]:
    """A run in which the prompt has just been computed."""
    run = Run(**options)
    members = run.add(prompt, n, max_tokens)
    for _ in range(20):
        if members[0].num_computed_tokens == prompt:
            break
        run.step()
    return run, members


def expect_copies(run: Run, members: list[Request], shared: int, prompt: int) -> None:
    """All but one of the members have their own copy of the tail, and the copies are planned."""
    tails = [member.block_table[prompt // run.size] for member in members]
    planned = [(move.kind, move.source, move.target) for move in run.scheduler.moves]
    expect(len({*tails}) == len(tails), f"each of {len(tails)} writers should have a tail of its own: they are {tails}")
    expect(shared in tails, f"the last writer should keep block {shared}, and the tails are {tails}")
    expected = sorted(("copy", shared, tail) for tail in tails if tail != shared)
    expect(sorted(planned) == expected, f"{len(tails)} writers need {len(expected)} copies, {expected}, and planned "
           f"are {sorted(planned)}")


def pool(num_blocks: int, size: int = 4) -> BlockAllocator:
    begin(f"pool = BlockAllocator(num_blocks={num_blocks}, block_size={size})")
    return Told("pool", BlockAllocator(num_blocks, size))


def held_block(blocks: BlockAllocator, filled: int, holders: int) -> int:
    block = blocks.take()
    blocks.fill(block, filled)
    for _ in range(holders - 1):
        blocks.share(block)
    return block
