"""What must hold of attention over a pool of blocks? The answer of a naive one, row by row, over the same positions."""

from __future__ import annotations

import math
from itertools import permutations

import torch

from nanopaged.lab.attention.cases import (RANDOM, TOLERANCE, Case, describe, expect_attends, expect_tensor, make_case,
                                           shown)
from nanopaged.lab.grading import begin, check, expect, numbers, raising, tell
from nanopaged.torch_attention import paged_attention_torch, write_kv_torch

UNWRITTEN = -1.0  # in every slot of a pool before a step


def expect_writes(slots: list[int], num_blocks: int = 3, num_kv_heads: int = 2, block_size: int = 4, head_dim: int = 2,
                  gap: bool = False, strided: bool = False) -> None:
    """Token t has the K 100 * t + 10 * head + dim, and a V that is 1000 more."""
    begin(f"k_cache and v_cache: {(num_blocks, num_kv_heads, block_size, head_dim)}, k and v: "
          f"{(len(slots), num_kv_heads, head_dim)}")
    tell(f"slots={slots}")
    tell("K of token t, counted from 0, is 100 * t + 10 * head + dim, and its V is 1000 more")
    tell(f"before, each number of the pool is {UNWRITTEN:g}")
    if gap:
        tell("K and V of a block are neighbours in memory: block b is pool[b, 0] and pool[b, 1]")
    if strided:
        tell("k and v are slices of one wider tensor, as in GPT-2")
    pool = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), UNWRITTEN)
    k_cache, v_cache = pool.unbind(1) if gap else (pool[:, 0].clone(), pool[:, 1].clone())
    rows = (100.0 * torch.arange(len(slots))[:, None, None] + 10.0 * torch.arange(num_kv_heads)[:, None]
            + torch.arange(head_dim))  # (num_tokens, num_kv_heads, head_dim)
    wide = torch.cat([rows, rows + 1000.0], dim=1)
    k, v = wide.split(num_kv_heads, dim=1) if strided else (rows, rows + 1000.0)
    wanted = [(cache, written, block, head, place) for cache, written in ((k_cache, k.clone()), (v_cache, v.clone()))
              for block in range(num_blocks) for head in range(num_kv_heads) for place in range(block_size)]
    result = write_kv_torch(k, v, k_cache, v_cache, torch.tensor(slots, dtype=torch.int32))
    what = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else f"{result!r:.60}"
    expect(result is None, f"what write_kv_torch returns should be None, and is {what}: it writes in place")
    for cache, written, block, head, place in wanted:
        slot, got, name = block * block_size + place, cache[block, head, place], "k" if cache is k_cache else "v"
        right, why = torch.full((head_dim,), UNWRITTEN), "which is no token's, should still"
        if slot in slots:
            right, why = written[slots.index(slot), head], f"which is token {slots.index(slot)}'s, should"
        expect(torch.equal(got, right), f"{name}_cache[{block}, {head}, {place}], in slot {slot}, {why} be "
               f"{shown(right)}, and is {shown(got)}")


@check(1, "K and V of a token stand in its slot: block slot // block_size, place slot % block_size.")
def one_token() -> None:
    for slot in range(6):
        expect_writes([slot], num_blocks=3, block_size=2, num_kv_heads=1)
    expect_writes([7])


@check(1, "Tokens may go to any slots, in any order, and no other slot changes.")
def many_tokens() -> None:
    for slots in permutations((1, 2, 5)):
        expect_writes(list(slots), block_size=2)
    expect_writes(numbers("slots").sample(range(20), 9), num_blocks=5)
    expect_writes([])


@check(1, "Neither the pool nor the new rows need to be contiguous.")
def strided() -> None:
    expect_writes([5, 2, 11], gap=True)
    expect_writes([5, 2, 11], strided=True)


@check(1, "Arguments that do not fit each other raise TypeError or ValueError, and nothing is written.")
def write_refuses() -> None:
    cache, rows = torch.zeros(2, 1, 4, 2), torch.ones(1, 1, 2)
    slots = torch.tensor([1], dtype=torch.int32)
    for k, taken, kind, what in ((rows.half(), slots, TypeError, "k in float16, and a cache in float32,"),
                                 (rows, slots.long(), TypeError, "slots in int64"),
                                 (torch.ones(1, 2, 2), slots, ValueError, "k with two heads, and a cache with one,")):
        begin(f"{what} in write_kv_torch")
        k_cache = cache.clone()
        with raising(kind, what):
            write_kv_torch(k, rows, k_cache, cache.clone(), taken)
        expect(not k_cache.any(), "something was written before the arguments were checked")


def expect_attention(case: Case, *changes: str, atol: float | None = None) -> None:
    expect_attends(paged_attention_torch, case, *changes, atol=atol)


@check(2, "One row attends to its whole context: all the slots of its blocks up to its length, and no other slot.")
def one_decode() -> None:
    for length in (1, 3, 4, 2):
        expect_attention(make_case([length], [1]))


@check(2, "Scores are multiplied by `scale`, whatever it is, and softmax weighs them.")
def scaled() -> None:
    for scale in (0.5, 0.25, 1.0):
        case = make_case([2], [1])
        case.scale, case.q_is, case.k_is = scale, "1", "ln(3) / 2 = 0.5493 at position 1, else 0"
        case.q.fill_(1.0)
        case.k_cache[case.tables[0][0], 0, 1] = math.log(3.0) / 2
        expect_attention(case, f"so position 1 weighs {3 ** (2 * scale):.4g} times as much as position 0")
    case = make_case([3], [1], values=RANDOM)
    for case.scale in (0.1, 2.0):
        expect_attention(case)


@check(2, "Positions follow the order of the block table, wherever the blocks lie.")
def scattered() -> None:
    for length in (5, 7, 8, 12, 21):
        expect_attention(make_case([length], [1]))
        expect_attention(make_case([length], [1], values=RANDOM))
    expect_attention(make_case([11], [1], gap=True), "K and V of a block are neighbours in memory")


@check(2, "A short request beside a long one attends to its own tokens alone, even where both are padded.")
def not_padded() -> None:
    for lengths in ([2, 1], [1, 3], [4, 1]):
        expect_attention(make_case(lengths, [1, 1]))


@check(2, "Entries of the table after the last block are not read.")
def past_the_table() -> None:
    for length in (1, 4, 5, 8):
        expect_attention(make_case([length, 1], [1, 1], past=10**6), "no block has the id 1000000")


@check(2, "Each request has its row, its table and its length, and each head its own K and V.")
def many_decodes() -> None:
    expect_attention(make_case([5, 2], [1, 1]))
    expect_attention(make_case([6], [1], num_heads=2, num_kv_heads=2))
    expect_attention(make_case([9, 1, 4], [1, 1, 1], num_heads=3, num_kv_heads=3, values=RANDOM))


@check(2, "Large scores give no infinity, and very negative ones no division by zero.")
def large_scores() -> None:
    for sign, words in ((1, "200 + p"), (-1, "-200 - p")):
        case = make_case([6], [1])
        for place, slot in enumerate(case.slots(0)):
            case.k_cache[slot // 4, 0, slot % 4] = sign * (200.0 + place)
        case.q.fill_(1.0)
        case.q_is, case.k_is = "1", f"{words} at position p"
        expect_attention(case, atol=1e-3)


@check(2, "Half precision is computed in float32, and returned as it came.")
def half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        expect_attention(make_case([7, 3], [1, 1], values=RANDOM, dtype=dtype))
    case = make_case([2], [1], dtype=torch.float16)
    for slot in case.slots(0):
        case.k_cache[slot // 4, 0, slot % 4] = 300.0
    case.q.fill_(300.0)
    case.q_is = case.k_is = "300"
    expect_attention(case, "the scores pass float16's largest number, 65504", atol=TOLERANCE[torch.float16])


@check(2, "Arguments that do not fit each other raise TypeError or ValueError.")
def attention_refuses() -> None:
    for name, dtype, kind in (("seq_lens", torch.int64, TypeError), ("block_tables", torch.int64, TypeError)):
        case = make_case([3], [1])
        setattr(case.batch, name, getattr(case.batch, name).to(dtype))
        describe(case, f"{name} in int64")
        with raising(kind, f"{name} in int64"):
            paged_attention_torch(case.q, case.k_cache, case.v_cache, case.batch, case.scale)
    case = make_case([3], [1], num_heads=3)
    describe(case, "three heads of q, and two of the cache")
    with raising(ValueError, "three heads of q over two key-value heads"):
        paged_attention_torch(case.q, case.k_cache.repeat(1, 2, 1, 1), case.v_cache.repeat(1, 2, 1, 1), case.batch,
                              case.scale)


@check(3, "In a prompt, each row sees itself and what comes before it.")
def whole_prompt() -> None:
    for length in (1, 3, 5):
        expect_attention(make_case([length], [length]))
    expect_attention(make_case([9], [9], values=RANDOM, num_heads=2, num_kv_heads=2))


@check(3, "The rows of a chunk are the last of its context: the mask counts from the end.")
def chunk() -> None:
    for length, rows in ((4, 3), (5, 2), (6, 5), (9, 3)):
        expect_attention(make_case([length], [rows]))
        expect_attention(make_case([length], [rows], values=RANDOM))


@check(3, "Requests with one row and with many share a batch.")
def ragged() -> None:
    expect_attention(make_case([3, 5], [1, 2]))
    expect_attention(make_case([7, 5, 4], [3, 1, 4]))
    rng = numbers("ragged")
    for _ in range(6):
        lengths = [rng.randint(1, 14) for _ in range(rng.randint(2, 4))]
        expect_attention(make_case(lengths, [rng.randint(1, length) for length in lengths], values=RANDOM,
                                   num_heads=2, num_kv_heads=2, block_size=rng.choice((1, 3, 8))))


@check(3, "A request without rows takes none, and rows of a request without tokens become 0.")
def idle() -> None:
    torch.set_deterministic_debug_mode("warn")  # with it, torch.empty gives NaN
    expect_attention(make_case([3, 6, 2], [1, 0, 2]))
    expect_attention(make_case([3, 0], [1, 1]))
    expect_attention(make_case([0, 3], [2, 2]))
    expect_attention(make_case([0, 2], [0, 0]))


@check(3, "q may be a slice of a wider tensor, and the result is contiguous.")
def strided_q() -> None:
    case = make_case([6, 3], [2, 3], values=RANDOM, num_heads=2, num_kv_heads=2)
    wide = torch.full((len(case.q), 6, 4), torch.nan)
    wide[:, 2:4] = case.q
    case.q = wide[:, 2:4]
    expect_attention(case, "q lies between other numbers in memory")


@check(4, "Query head h reads key-value head h // group: neighbours share one.")
def grouped() -> None:
    for num_heads, num_kv_heads in ((2, 1), (4, 2), (6, 2)):
        expect_attention(make_case([3], [1], num_heads=num_heads, num_kv_heads=num_kv_heads))
    expect_attention(make_case([3], [2], num_heads=4, num_kv_heads=2))


@check(4, "So it is in ragged batches, too.")
def grouped_and_ragged() -> None:
    for num_heads, num_kv_heads in ((3, 1), (4, 2), (6, 3)):
        expect_attention(make_case([5, 9, 6], [1, 4, 6], num_heads=num_heads, num_kv_heads=num_kv_heads, values=RANDOM))


def expect_contained(length: int, rows: int, where: int, place: str, value: float, num_kv_heads: int = 1) -> None:
    """K or V of one position's first key-value head is not a number; who sees it?"""
    case = make_case([length], [rows], values=RANDOM, num_heads=2, num_kv_heads=num_kv_heads)
    wanted = case.wanted()
    slot = case.slots(0)[where]
    (case.k_cache if place == "K" else case.v_cache)[slot // 4, 0, slot % 4, 1] = value
    describe(case, f"but number 1 of {place} of position {where}, key-value head 0, is {value}")
    got = paged_attention_torch(case.q, case.k_cache, case.v_cache, case.batch, case.scale)
    expect_tensor(got, case)
    for row in range(rows):
        position = length - rows + row
        for head in range(2):
            which = f"row {row} of q, position {position}, head {head}"
            if position >= where and case.head_of(head) == 0:
                expect(not got[row, head, 1].isfinite(), f"{which} sees that number, and its own should not be finite; "
                       f"it is {shown(got[row, head])}")
            else:
                right = torch.allclose(got[row, head].double(), wanted[row, head], atol=1e-4)
                expect(right, f"{which} does not see that number, and should be {shown(wanted[row, head])}; it is "
                       f"{shown(got[row, head])}")


@check(5, "A V that is not finite reaches only the rows that see it.")
def faults_of_v() -> None:
    for value in (float("nan"), float("inf")):
        for length, rows, where in ((2, 2, 1), (5, 3, 3), (5, 3, 2), (4, 4, 0), (6, 2, 5)):
            expect_contained(length, rows, where, "V", value)


@check(5, "A K that is NaN reaches only the rows that see it.")
def faults_of_k() -> None:
    for length, rows, where in ((2, 2, 1), (5, 3, 3), (4, 4, 0)):
        expect_contained(length, rows, where, "K", float("nan"))


@check(5, "It reaches no other key-value head, and no other request.")
def faults_of_others() -> None:
    expect_contained(5, 3, 3, "V", float("nan"), num_kv_heads=2)
    case = make_case([4, 5], [1, 2], values=RANDOM)
    wanted = case.wanted()
    slot = case.slots(0)[1]
    case.v_cache[slot // 4, 0, slot % 4] = torch.nan
    describe(case, "but V of position 1 of request 0 is NaN")
    got = paged_attention_torch(case.q, case.k_cache, case.v_cache, case.batch, case.scale)
    expect_tensor(got, case)
    expect(torch.allclose(got[1:].double(), wanted[1:], atol=1e-4), "request 1 does not see it, and its first row "
           f"should be {shown(wanted[1, 0])}; it is {shown(got[1, 0])}")
