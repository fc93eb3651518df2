"""What does a grader of attention compare with? Contexts that are scattered over a pool, and the answer in float64.

The simplest case counts: K is 0, so that all positions weigh the same, and V of position p is p. Then each row's answer
is the mean of the positions that it sees, and a wrong one says which it saw. Every slot outside the contexts is NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from nanopaged.lab.grading import begin, expect, numbers, tell

COUNTING, RANDOM = "counting", "random"
OTHER_HEAD = 1000.0  # between V of two key-value heads, where it counts
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of an answer's size, or of 1


@dataclass
class Case:
    q: torch.Tensor  # (num_tokens, num_heads, head_dim)
    k_cache: torch.Tensor  # (num_blocks, num_kv_heads, block_size, head_dim)
    v_cache: torch.Tensor
    batch: SimpleNamespace  # a RaggedBatch
    scale: float
    tables: list[list[int]]
    values: str
    head_of: Callable[[int], int]  # a query head's key-value head
    q_is: str = "0"  # in words, where V counts
    k_is: str = "0"

    def requests(self) -> list[tuple[int, int, int]]:
        """Of each: its first row, the number of its rows, the length of its context."""
        starts, lengths = self.batch.query_start.tolist(), self.batch.seq_lens.tolist()
        return [(first, last - first, length) for first, last, length in zip(starts, starts[1:], lengths)]

    def slots(self, request: int) -> list[int]:
        """Of its positions, in order."""
        block_size, length = self.k_cache.shape[2], int(self.batch.seq_lens[request])
        return [self.tables[request][p // block_size] * block_size + p % block_size for p in range(length)]

    def answer(self, row: int, head: int, slots: list[int], kv_head: int, scale: float | None = None) -> torch.Tensor:
        """(head_dim,) float64: of one row and head, if it sees these slots of this key-value head."""
        k, v = (cache[:, kv_head].flatten(0, 1)[slots].double().cpu() for cache in (self.k_cache, self.v_cache))
        weights = (k @ self.q[row, head].double().cpu() * (self.scale if scale is None else scale)).softmax(0)
        return weights @ v

    def wanted(self) -> torch.Tensor:
        """(num_tokens, num_heads, head_dim) float64."""
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        for request, (first, n, length) in enumerate(self.requests()):
            slots = self.slots(request)
            for r in range(n if length else 0):
                for head in range(self.q.shape[1]):
                    out[first + r, head] = self.answer(first + r, head, slots[: length - n + r + 1], self.head_of(head))
        return out


def make_case(lengths: list[int], rows: list[int], name: str = "", *, values: str = COUNTING, num_heads: int = 1,
              num_kv_heads: int = 1, head_dim: int = 4, block_size: int = 4, dtype: torch.dtype = torch.float32,
              past: int | None = None, gap: bool = False, zero_is_free: bool = False, device: str = "cpu") -> Case:
    """A batch whose request i has `rows[i]` rows, the last of `lengths[i]` tokens, in blocks in any order.

    `past` fills the tables after the last block; by default, an unused block does. With `gap`, a block's K does not lie
    beside the next block's, as in a pool where K and V of a block are neighbours. With `zero_is_free`, no request
    has block 0.
    """
    rng = numbers(f"{name} {lengths} {rows}")
    needed = [-(-length // block_size) for length in lengths]
    num_blocks = sum(needed) + 2
    order = [0] * zero_is_free + _scattered(range(zero_is_free, num_blocks), rng)
    tables = [[order.pop() for _ in range(count)] for count in needed]
    pool = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), torch.nan)
    for length, table in zip(lengths, tables):
        for p in range(length):
            pool[table[p // block_size], :, :, p % block_size] = _kv(values, p, num_kv_heads, head_dim, rng)
    k_cache, v_cache = pool.to(device, dtype).unbind(1)
    if not gap:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    width = max(needed) + 1
    padded = [table + [order[0] if past is None else past] * (width - len(table)) for table in tables]
    shape = (sum(rows), num_heads, head_dim)
    q = torch.zeros(shape) if values == COUNTING else _normal(shape, rng)
    batch = SimpleNamespace(
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        query_start=torch.tensor([sum(rows[:i]) for i in range(len(rows) + 1)], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        num_decodes=next((i for i, n in enumerate(rows) if n != 1), len(rows)), plan=None)
    return Case(q.to(device, dtype), k_cache, v_cache, batch, head_dim**-0.5, tables, values,
                lambda head: head // (num_heads // num_kv_heads))


def _scattered(blocks: range, rng: random.Random) -> list[int]:
    """These blocks. Tables are taken from the end, and in none a block is followed by the pool's next one."""
    while True:
        order = rng.sample(blocks, len(blocks))
        if all(later + 1 != earlier for earlier, later in zip(order, order[1:])):
            return order


def _kv(values: str, position: int, num_kv_heads: int, head_dim: int, rng: random.Random) -> torch.Tensor:
    """(2, num_kv_heads, head_dim)."""
    if values == RANDOM:
        return _normal((2, num_kv_heads, head_dim), rng)
    kv = torch.zeros(2, num_kv_heads, head_dim)
    kv[1] = position + OTHER_HEAD * torch.arange(num_kv_heads)[:, None]
    return kv


def _normal(shape: tuple[int, ...], rng: random.Random) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))


def describe(case: Case, *changes: str) -> None:
    """A scenario begins: this case."""
    batch = case.batch
    begin(f"k_cache and v_cache: (num_blocks, num_kv_heads, block_size, head_dim) = {tuple(case.k_cache.shape)}")
    tables = str(batch.block_tables.tolist())
    tell(f"block_tables={tables if len(tables) < 80 else f'{tables[:70]}...'}, seq_lens={batch.seq_lens.tolist()}")
    tell(f"query_start={batch.query_start.tolist()}, num_decodes={batch.num_decodes}, q: {tuple(case.q.shape)} "
         f"{str(case.q.dtype).removeprefix('torch.')}, scale={case.scale:g}")
    tell(f"q is {case.q_is}, K is {case.k_is}, and V of position p is p"
         + (f" + {OTHER_HEAD:.0f} * its head" if case.k_cache.shape[1] > 1 else "")
         if case.values == COUNTING else "q, K and V are random numbers")
    tell("every slot outside the contexts is NaN")
    for change in changes:
        tell(change)


def expect_attends(attention: Callable[..., torch.Tensor], case: Case, *changes: str,
                   atol: float | None = None) -> None:
    """Fails if the answer is not the naive one. `changes` say what was done to the case since it was made."""
    describe(case, *changes)
    wanted = case.wanted()
    before = [tensor.clone() for tensor in _inputs(case)]
    out = attention(case.q, case.k_cache, case.v_cache, case.batch, case.scale)
    expect_tensor(out, case)
    for name, old, tensor in zip(("q", "k_cache", "v_cache", "block_tables", "query_start", "seq_lens"), before,
                                 _inputs(case)):
        expect(_same(old, tensor), f"attention reads its arguments, and does not change them; but {name} has changed")
    got = out.double().cpu()
    limit = TOLERANCE[case.q.dtype] if atol is None else atol
    wrong = ~((got - wanted).abs() <= limit * wanted.abs().clamp(min=1.0))  # NaN is wrong too
    if wrong.any():
        row, head, _ = wrong.nonzero()[0].tolist()
        expect(False, _complaint(case, row, head, got[row, head], wanted[row, head]))


def expect_tensor(out: object, case: Case) -> None:
    expect(isinstance(out, torch.Tensor), f"attention should return a tensor, and returned {type(out).__name__}")
    expect(out.shape == case.q.shape and out.dtype == case.q.dtype,
           f"the result should have q's shape and dtype, {tuple(case.q.shape)} {case.q.dtype}, and has "
           f"{tuple(out.shape)} {out.dtype}")
    expect(out.is_contiguous(), f"the result should be contiguous, and its strides are {out.stride()}")


def _inputs(case: Case) -> list[torch.Tensor]:
    batch = case.batch
    return [case.q, case.k_cache, case.v_cache, batch.block_tables, batch.query_start, batch.seq_lens]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _complaint(case: Case, row: int, head: int, got: torch.Tensor, wanted: torch.Tensor) -> str:
    request = next(i for i, (first, n, _) in enumerate(case.requests()) if first <= row < first + n)
    first, n, length = case.requests()[request]
    which = f"row {row} of q, head {head}" if case.q.shape[1] > 1 else f"row {row} of q"
    if not length:
        return f"{which} belongs to request {request}, which has no token: it should be 0, and is {shown(got)}"
    position = length - n + row - first
    return (f"{which} is position {position} of request {request}, and sees its positions 0 to {position}. It should "
            f"be {shown(wanted)}, and is {shown(got)}.{_guess(case, row, head, request, got)}")


def _guess(case: Case, row: int, head: int, request: int, got: torch.Tensor) -> str:
    """What gives the answer that was given, if that is one of the usual mistakes."""
    if got.isnan().any():
        return (" NaN comes from a slot that no context has, from a softmax over no position at all, or from an "
                "overflow.")
    (first, n, length), slots = case.requests()[request], case.slots(request)
    seen, right = slots[: length - n + row - first + 1], case.head_of(head)
    guesses = [("of a mask that counts from the start of the context", slots[: row - first + 1], right, case.scale),
               ("of a row that sees one position too many", slots[: len(seen) + 1], right, case.scale),
               ("without a mask: the row also sees all that comes after it", slots, right, case.scale),
               ("of a row that sees one position too few", seen[:-1], right, case.scale),
               ("of the first position alone", slots[:1], right, case.scale),
               ("of scores that are not multiplied by scale", seen, right, 1.0),
               ("of the scale 1 / sqrt(head_dim), whatever scale says", seen, right, len(got) ** -0.5)]
    guesses += [(f"of key-value head {other}, not {right}", seen, other, case.scale)
                for other in range(case.k_cache.shape[1])]
    wanted = case.answer(row, head, seen, right)
    for words, visible, kv_head, scale in guesses:
        answer = case.answer(row, head, visible, kv_head, scale) if visible else wanted
        if _near(answer, got) and not _near(answer, wanted):
            return f" That is the answer {words}."
    return ""


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def shown(values: torch.Tensor) -> str:
    """One row's numbers."""
    text = ", ".join(f"{value:.4g}" for value in values[:4].tolist())
    return f"[{text}{', ...' if len(values) > 4 else ''}]"
