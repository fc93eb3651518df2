"""What must hold of the kernels? What holds of attention, tile by tile; and that they, and not torch, have computed it.

Without a GPU they run in Triton's interpreter, which takes half a millisecond for an operation on a tile. So shapes are
tiny.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch

from nanopaged import attention_kernels
from nanopaged.attention_kernels import jit, tl
from nanopaged.lab.attention.cases import RANDOM, Case, describe, expect_attends, expect_tensor, make_case, shown
from nanopaged.lab.grading import begin, check, expect, note, tell
from nanopaged.lab.kernel.launches import Launch, Watched, expect_launched
from nanopaged.lab.kernel.speed import speeds
from nanopaged.paged_attention import Choice, choice_for, paged_attention_triton, write_kv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIM, BLOCK_SIZE, TILE = 16, 8, 16  # the smallest that the kernels take, and a tile of two blocks
WHOLE = choice_for("prompt", HEAD_DIM, 4)._replace(tile_kv=TILE)  # no context that is short is split
SPLIT = WHOLE._replace(smallest_part=TILE, programs=64)
UNWRITTEN = -1.0  # in every slot of a pool before a step


def expect_writes(slots: list[int], num_kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> None:
    """The pool is the middle of a larger one, so that a write outside of it shows."""
    begin(f"k_cache and v_cache: {(4, num_kv_heads, BLOCK_SIZE, HEAD_DIM)}, k and v: "
          f"{(len(slots), num_kv_heads, HEAD_DIM)} {str(dtype).removeprefix('torch.')}")
    tell(f"slots={slots}")
    pool = torch.full((8, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM), UNWRITTEN, dtype=dtype, device=DEVICE)
    tokens = torch.arange(1.0, len(slots) + 1, device=DEVICE)[:, None, None]
    wide = (tokens + 16 * torch.arange(2 * num_kv_heads, device=DEVICE)[:, None] + torch.zeros(HEAD_DIM, device=DEVICE))
    k, v = wide.to(dtype).split(num_kv_heads, dim=1)  # the rows of each lie between the other's
    wanted = pool.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[2 + slot // BLOCK_SIZE, 0, :, slot % BLOCK_SIZE] = k[token]
            wanted[2 + slot // BLOCK_SIZE, 1, :, slot % BLOCK_SIZE] = v[token]
    arguments = k, v, pool[2:6, 0], pool[2:6, 1], torch.tensor(slots, dtype=torch.int32, device=DEVICE)
    with Watched() as watched:
        write_kv_triton(*arguments)
    expect_launched(watched, *["write_kv_kernel"] * bool(slots))
    wrong = (pool != wanted).nonzero()
    if len(wrong):
        block, which, head, place, dim = wrong[0].tolist()
        where = (f"{'kv'[which]}_cache[{block - 2}, {head}, {place}, {dim}]" if 2 <= block < 6 else
                 f"memory {'before' if block < 2 else 'behind'} the pool")
        right, got = wanted[block, which, head, place, dim], pool[block, which, head, place, dim]
        expect(False, f"{where} should {'not be written' if right == UNWRITTEN else f'be {right:g}'}, and is {got:g}")


@check(1, "K and V of each token stand in its slot, and no other slot changes.")
def written() -> None:
    expect_writes([0], num_kv_heads=1)
    expect_writes([11], num_kv_heads=1)
    expect_writes([], num_kv_heads=1)
    for slots in permutations((9, 30, 2)):
        expect_writes(list(slots))


@check(1, "The number of heads need not be a power of two.")
def three_heads() -> None:
    expect_writes([31, 5], num_kv_heads=3)


@check(1, "A negative slot is nowhere.")
def negative_slots() -> None:
    expect_writes([-1], num_kv_heads=1)
    expect_writes([12, -1, 3, -1])


@check(1, "The kernel copies numbers of any dtype.")
def written_halves() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        expect_writes([17, 6], dtype=dtype)


def small_case(lengths: list[int], rows: list[int], name: str = "", prompts: bool = False, **options: Any) -> Case:
    case = make_case(lengths, rows, name, head_dim=HEAD_DIM, block_size=BLOCK_SIZE, device=DEVICE, **options)
    if prompts:
        case.batch.num_decodes = 0  # prompt_kernel takes requests with one row, too
    return case


def expect_attention(case: Case, choice: Choice, kernels: tuple[str, ...], *changes: str,
                     atol: float | None = None) -> None:
    watched = Watched()

    def attention(*arguments: Any) -> torch.Tensor:
        with watched:
            return paged_attention_triton(*arguments, choice=choice)

    expect_attends(attention, case, f"tiles of {choice.tile_kv} tokens", *changes, atol=atol)
    expect_launched(watched, *kernels)


def set_scores(case: Case, words: str, score: Callable[[int], float]) -> Case:
    """Lets each row of request 0 have the score score(p) at position p, which `words` say."""
    case.q.zero_()
    case.q[:, :, 0] = 1.0
    for position, slot in enumerate(case.slots(0)):
        case.k_cache[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE, 0] = score(position)
    case.scale, case.q_is, case.k_is = 1.0, "1 at dim 0, else 0", f"such that the score of position p is {words}"
    return case


def expect_prompt(case: Case, *changes: str, atol: float | None = None) -> None:
    expect_attention(case, WHOLE, ("prompt_kernel",), *changes, atol=atol)


@jit()
def part_kernel(q, k_cache, v_cache, table, mean, log_sum, k_stride, v_stride, begin, end, kv_head,
                BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """Sixteen rows attend to positions begin .. end - 1."""
    rows, dims = tl.arange(0, 16), tl.arange(0, HEAD_DIM)
    q_tile = tl.load(q + rows[:, None] * HEAD_DIM + dims[None, :])
    found, log_of_sum = attention_kernels._attend(q_tile, rows, begin, end, end, table, kv_head, k_cache, v_cache,
                                                  k_stride, v_stride, 1.0, False, BLOCK_SIZE, HEAD_DIM, 16, TILE, 1,
                                                  False)
    tl.store(mean + rows[:, None] * HEAD_DIM + dims[None, :], found)
    tl.store(log_sum + rows, log_of_sum)


@check(2, "A row's answer is the mean of V, weighted by softmax: within one tile, which may be wider than a block.")
def one_tile() -> None:
    for length in (1, 8, 15):
        expect_prompt(small_case([length], [1], prompts=True))
    expect_prompt(small_case([13], [1], prompts=True, values=RANDOM))


@check(2, "So it is over many tiles, whose blocks lie anywhere, for rows that see less and less.")
def many_tiles() -> None:
    for length, rows in ((17, 1), (37, 37)):
        expect_prompt(small_case([length], [rows], prompts=True))


@check(2, "If scores rise along a context, what was summed before is rescaled; if they fall, it is not.")
def moving_maxima() -> None:
    for length, words, score in ((17, "3 at position 16, else 0", lambda p: 3.0 * (p == 16)),
                                 (40, "p / 8", lambda p: p / 8), (40, "-p / 8", lambda p: -p / 8)):
        expect_prompt(set_scores(small_case([length], [1], prompts=True), words, score))


@check(2, "Very negative and very large scores give neither 0 nor NaN.")
def large_scores() -> None:
    for score in (-1000.0, 1000.0):
        expect_prompt(set_scores(small_case([20], [2], prompts=True), f"{score:.0f}", lambda p: score))


@check(2, "Each key-value head, shared by a group of query heads, is read at its own place.")
def heads() -> None:
    expect_prompt(small_case([20], [2], prompts=True, num_heads=2, num_kv_heads=2))
    expect_prompt(small_case([19, 21], [3, 2], prompts=True, num_heads=4, num_kv_heads=2, values=RANDOM, gap=True))


@check(2, "Half precision is summed in float32.")
def half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        expect_prompt(small_case([24], [2], prompts=True, values=RANDOM, dtype=dtype))


@check(2, "Over a part of a context, without a mask: the mean, and log2 of the sum of exponentials.")
def one_part() -> None:
    expect_prompt(small_case([1], [1], prompts=True))  # it raises if _attend is not written, and more clearly
    case = small_case([45], [16], num_kv_heads=2, num_heads=2, values=RANDOM, zero_is_free=True)
    q = case.q[:, 1].contiguous()
    for first, last in ((0, 9), (16, 45), (16, 17)):
        describe(case, f"_attend reads positions {first} to {last - 1} of key-value head 1, with scale_log2=1")
        mean, log_sum = torch.zeros(16, HEAD_DIM, device=DEVICE), torch.zeros(16, device=DEVICE)
        part_kernel[(1,)](q, case.k_cache, case.v_cache, case.batch.block_tables, mean, log_sum, case.k_cache.stride(0),
                          case.v_cache.stride(0), first, last, 1, BLOCK_SIZE, HEAD_DIM, TILE)
        case.scale = math.log(2.0)
        for row in (0, 15):
            expect_part(case, row, 1, 1, case.slots(0)[first:last], mean[row], log_sum[row], f"row {row}")


def expect_part(case: Case, row: int, head: int, kv_head: int, slots: list[int], mean: torch.Tensor,
                log_sum: torch.Tensor, which: str) -> None:
    wanted = case.answer(row, head, slots, kv_head)
    expect(torch.allclose(mean.double().cpu(), wanted, atol=1e-3), f"{which}: the mean should be {shown(wanted)}, and "
           f"is {shown(mean)}")
    k = case.k_cache[:, kv_head].flatten(0, 1)[slots].double().cpu()
    right = float((k @ case.q[row, head].double().cpu() * case.scale).logsumexp(0)) / math.log(2.0)
    expect(math.isclose(float(log_sum), right, abs_tol=1e-3), f"{which}: log2 of the sum of exponentials should be "
           f"{right:.4g}, and is {float(log_sum):.4g}")


def expect_decodes(case: Case, *changes: str, atol: float | None = None) -> None:
    expect_attention(case, WHOLE, ("decode_kernel",), *changes, atol=atol)


@check(3, "One row of each request attends to its whole context.")
def decodes() -> None:
    for lengths in ([1], [16], [21], [9, 24, 17]):
        expect_decodes(small_case(lengths, [1] * len(lengths)))
    expect_decodes(small_case([30, 13], [1, 1], values=RANDOM, gap=True))


@check(3, "The query heads that share a key-value head are rows of one tile.")
def grouped_decodes() -> None:
    for num_heads, num_kv_heads in ((2, 1), (6, 2)):
        expect_decodes(small_case([19], [1], num_heads=num_heads, num_kv_heads=num_kv_heads))
    expect_decodes(small_case([9, 4], [1, 1], num_heads=4, num_kv_heads=2, values=RANDOM))


@check(3, "A row that only fills up a batch, with a length of 0, becomes 0.")
def idle() -> None:
    expect_decodes(small_case([5, 0], [1, 1]))


@check(3, "Decodes and prompts share a batch.")
def mixed() -> None:
    expect_attention(small_case([20, 7, 18], [1, 1, 4], values=RANDOM), WHOLE, ("decode_kernel", "prompt_kernel"))


def run_split(case: Case, *changes: str) -> Launch:
    """decode_kernel's launch, of contexts in parts of 16 tokens. It does not matter if there is no merge_kernel yet."""
    describe(case, "contexts are split into parts of 16 tokens or more", *changes)
    watched = Watched()
    try:
        with watched:
            paged_attention_triton(case.q, case.k_cache, case.v_cache, case.batch, case.scale, choice=SPLIT)
    except NotImplementedError:
        if not watched.launches:
            raise
    launches = [launch for launch in watched.launches if launch.kernel == "decode_kernel"]
    expect(len(launches) == 1, f"decode_kernel should be launched once, and was {len(launches)} times")
    return launches[0]


def expect_parts(case: Case, *changes: str) -> None:
    launch = run_split(case, *changes)
    means, log_sums, num_parts = launch.arguments["out"], launch.arguments["log_sums"], launch.grid[2]
    for request, (row, _, length) in enumerate(case.requests()):
        size = max(1, -(-(-(-length // num_parts)) // TILE)) * TILE
        for part, first in enumerate(range(0, length, size)):
            for head in range(case.q.shape[1]):
                last = min(first + size, length)
                expect_part(case, row, head, case.head_of(head), case.slots(request)[first:last],
                            means[request, head, part], log_sums[request, head, part],
                            f"request {request}, head {head}, part {part}, positions {first} to {last - 1}")


@check(3, "Where a context is split, each program leaves the mean of its part, and log2 of its sum of exponentials.")
def split() -> None:
    expect_parts(small_case([17], [1]))
    expect_parts(small_case([3, 35], [1, 1], num_heads=2, num_kv_heads=1, values=RANDOM))


def expect_merged(case: Case, *changes: str, atol: float | None = None) -> None:
    expect_attention(case, SPLIT, ("decode_kernel", "merge_kernel"),
                     "contexts are split into parts of 16 tokens or more", *changes, atol=atol)


@check(4, "Parts count by their sums: one token more does not count as much as sixteen.")
def unequal_parts() -> None:
    expect_merged(small_case([32], [1]))
    expect_merged(small_case([17], [1]))


@check(4, "Neither very large nor very negative sums overflow, wherever the largest one stands.")
def large_sums() -> None:
    for words, score in (("-1000", lambda p: -1000.0), ("40 * p", lambda p: 40.0 * p),
                         ("-40 * p", lambda p: -40.0 * p)):
        expect_merged(set_scores(small_case([20], [1]), words, score), atol=1e-3)


@check(4, "Each request has its own number of parts; the others are not read.")
def unused_parts() -> None:
    expect_merged(small_case([34, 3], [1, 1]))
    expect_merged(small_case([9, 20], [1, 1], num_heads=2, num_kv_heads=1, values=RANDOM))


@check(4, "There may be more parts than fit into a tile.")
def many_parts() -> None:
    expect_merged(set_scores(small_case([270], [1]), "p / 8", lambda p: p / 8))


@check(4, "An empty context becomes 0.")
def no_part() -> None:
    expect_merged(small_case([20, 0], [1, 1]))


@check(4, "Where there is a GPU, the kernels' speed is printed beside the source's. It is no grade.", seconds=120.0)
def speed() -> None:
    expect_merged(small_case([17], [1]))
    if DEVICE == "cuda":
        try:
            note(speeds())
        except Exception as error:  # whatever it is, speed is no grade
            note(f"the speed could not be measured: {error!r}")


def expect_contained(length: int, rows: int, where: int, value: float, place: str = "V") -> None:
    case = small_case([length], [rows], prompts=True, values=RANDOM)
    wanted, slot = case.wanted(), case.slots(0)[where]
    (case.k_cache if place == "K" else case.v_cache)[slot // BLOCK_SIZE, 0, slot % BLOCK_SIZE, 1] = value
    describe(case, f"tiles of {TILE} tokens", f"but number 1 of {place} of position {where} is {value}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, in the interpreter
        got = paged_attention_triton(case.q, case.k_cache, case.v_cache, case.batch, case.scale, choice=WHOLE)
    expect_tensor(got, case)
    for row, numbers_of_row in enumerate(got[:, 0].cpu()):
        position = length - rows + row
        which = f"row {row} of q, position {position},"
        if position >= where:
            expect(not numbers_of_row[1].isfinite(), f"{which} sees that number, and its own should not be finite; it "
                   f"is {shown(numbers_of_row)}")
        else:
            right = torch.allclose(numbers_of_row.double(), wanted[row, 0], atol=1e-3)
            expect(right, f"{which} does not see that number, and should be {shown(wanted[row, 0])}; it is "
                   f"{shown(numbers_of_row)}")


@check(5, "A V that is not finite reaches only the rows that see it.")
def faults_of_v() -> None:
    for length, rows, where in ((2, 2, 1), (20, 4, 18), (36, 20, 20)):
        for value in (math.nan, math.inf):
            expect_contained(length, rows, where, value)


@check(5, "A K that is NaN reaches only the rows that see it.")
def faults_of_k() -> None:
    for length, rows, where in ((2, 2, 1), (20, 4, 18)):
        expect_contained(length, rows, where, math.nan, "K")
