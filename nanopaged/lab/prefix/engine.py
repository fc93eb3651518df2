"""How can one see what a request reads? With an engine without a model, whose K and V say what they were computed for.

A slot of the pool holds the tokens up to its own, as the real K and V depend on them. So a request reads right if each
slot that its table leads to holds exactly the beginning of its own text. The next token is a known function of what was
read.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanopaged.block_allocator import BlockAllocator
from nanopaged.lab.grading import Failed, begin, expect, expect_equal, tell
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step

STEPS = 300  # more mean that a run does not end


def next_token(tokens: Sequence[int], alphabet: int) -> int:
    return (3 * sum(tokens) + len(tokens)) % alphabet


class Engine:
    def __init__(self, num_blocks: int, block_size: int = 2, budget: int = 64, seats: int = 8, alphabet: int = 5,
                 caching: bool = True) -> None:
        begin(f"a pool of {num_blocks} blocks with {block_size} slots; at most {budget} tokens a step")
        self.pool = BlockAllocator(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.pool, seats, budget, 1000)
        self.block_size, self.alphabet = block_size, alphabet
        self.slots: list[list[tuple[int, ...] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.steps = 0
        self.hits: dict[str, int] = {}  # tokens that were found, at a request's first admission
        self.computed: dict[str, int] = {}

    def add(self, name: str, prompt: Sequence[int], max_tokens: int = 1) -> Request:
        tell(f"request {name} arrives, with prompt {[*prompt]} and max_tokens={max_tokens}")
        request = Request(name, [*prompt], SamplingParams(max_tokens=max_tokens))
        self.scheduler.add(request)
        self.computed[name] = 0
        return request

    def step(self) -> Step:
        self.steps += 1
        step = self.scheduler.schedule()
        for admission in step.admitted:
            self.hits.setdefault(admission.request.request_id, admission.hit_tokens)
        for move in step.moves:
            self.slots[move.target] = self.slots[move.source][:]
        rows = [*zip(step.requests, step.starts, step.num_tokens)]
        for request, start, num_tokens in rows:
            self._compute(request, start, num_tokens)
        expect(rows, "a step should compute something, and it computes nothing")
        for request, start, num_tokens in rows:
            self._read(request, start + num_tokens)
        drawn = {request: next_token(request.token_ids, self.alphabet) for _, request in step.sampled}
        self.scheduler.update(step, drawn)
        for request, _, _ in rows:
            if request.finish_reason is None:
                tell(f"   after it, {request.request_id}'s table is {request.block_table.tolist()}")
        return step

    def _compute(self, request: Request, start: int, num_tokens: int) -> None:
        name, table = request.request_id, request.block_table.tolist()
        tell(f"step {self.steps}: {name} computes {num_tokens} tokens from position {start}, with table {table}")
        expect(num_tokens > 0, f"{name} computes no token, so there are no logits to draw its next token from")
        self.computed[name] += num_tokens
        for position in range(start, start + num_tokens):
            block, slot = self._place(request, position)
            self.slots[block][slot] = tuple(request.token_ids[: position + 1])

    def _read(self, request: Request, end: int) -> None:
        for position in range(end):
            block, slot = self._place(request, position)
            expected = tuple(request.token_ids[: position + 1])
            got = self.slots[block][slot]
            expect(got == expected, f"{request.request_id} reads K and V of position {position} from block {block}, "
                   f"slot {slot}: they should be computed for {expected}, and are for {got}")

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        logical, slot = divmod(position, self.block_size)
        expect(logical < len(request.block_table), f"{request.request_id} has no block for position {position}")
        return request.block_table[logical], slot

    def run(self, until: Request | None = None) -> None:
        """Until all have ended, or one has."""
        while self.scheduler.has_unfinished() and (until is None or until.finish_reason is None):
            if self.steps >= STEPS:
                raise Failed(f"the requests have not ended after {STEPS} steps")
            self.step()
        if until is None:
            expect_equal("the number of blocks that are held after all requests have ended",
                         self.pool.num_blocks - self.pool.num_available, 0)


def output_of(prompt: Sequence[int], max_tokens: int, alphabet: int = 5) -> list[int]:
    """What a request must return, whatever happens around it."""
    tokens = [*prompt]
    for _ in range(max_tokens):
        tokens.append(next_token(tokens, alphabet))
    return tokens[len(prompt):]
