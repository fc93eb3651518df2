"""The kernels against the torch reference, and the reference against contiguous attention.

Without a GPU the kernels run in Triton's interpreter, so shapes are tiny.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from nanopaged import paged_attention
from nanopaged.paged_attention import (
    BLOCK_SIZES,
    HEAD_DIMS,
    MIN_SPLIT_TOKENS,
    paged_attention_triton,
    prompt_tile,
    split_tokens,
    write_kv_triton,
)
from nanopaged.torch_attention import paged_attention_torch, write_kv_torch

pytest.importorskip("triton", reason="there is no Triton on this system")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu_too  # there the kernels are compiled
# Rounding of the output's own dtype, and, for half precision, of the softmax before it meets V.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A ragged batch over a scattered pool, and the contiguous contexts that the pool holds."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    scale: float
    contexts: list[tuple[torch.Tensor, torch.Tensor]]  # each request's K and V, (length, num_kv_heads, head_dim)

    def arguments(self) -> tuple:
        return (self.q, self.k_cache, self.v_cache, self.block_tables, self.query_start, self.seq_lens,
                self.max_query_len, self.scale)


def make_case(lengths: list[int], query_lens: list[int], num_heads: int = 2, num_kv_heads: int = 2, head_dim: int = 16,
              block_size: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Random contexts, scattered over a pool in which everything else is NaN: a read of it shows."""
    rng = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    order = torch.randperm(num_blocks, generator=rng).tolist()
    k_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    tables, contexts = [], []
    for length in lengths:
        table = [order.pop() for _ in range(-(-length // block_size))]
        k, v = (torch.randn(length, num_kv_heads, head_dim, generator=rng).to(dtype) for _ in range(2))
        for position in range(length):
            block, offset = table[position // block_size], position % block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = k[position], v[position]
        tables.append(table)
        contexts.append((k, v))
    width = max(map(len, tables)) + 1
    padded = torch.tensor([table + [num_blocks - 1] * (width - len(table)) for table in tables], dtype=torch.int32)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(query_lens), num_heads, head_dim, generator=rng).to(dtype)
    return Case(q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE), padded.to(DEVICE), starts.to(DEVICE),
                torch.tensor(lengths, dtype=torch.int32, device=DEVICE), max(query_lens), head_dim**-0.5, contexts)


def contiguous_attention(case: Case) -> torch.Tensor:
    """torch's own attention in float32, request by request, over contexts that were never cut up."""
    outputs = []
    for i, (k, v) in enumerate(case.contexts):
        q = case.q[case.query_start[i] : case.query_start[i + 1]].float().cpu()  # (n, num_heads, head_dim)
        n, length, group = len(q), len(k), q.shape[1] // k.shape[1]
        allowed = torch.arange(length) <= torch.arange(length - n, length)[:, None]  # (n, length)
        k, v = (t.float().repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))  # (num_heads, length, head_dim)
        out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=allowed, scale=case.scale)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert not got.isnan().any(), "a slot outside the context was read"
    torch.testing.assert_close(got.float().cpu(), wanted.float().cpu(), rtol=0, atol=TOLERANCE[dtype])


RAGGED = [  # (lengths, query_lens): decodes, chunks, whole prompts, an idle request; around block boundaries
    ([1], [1]),
    ([8, 9, 16, 17], [1, 1, 1, 1]),
    ([5, 23], [5, 23]),
    ([30, 1, 12, 9], [7, 1, 0, 1]),
    ([40, 33], [1, 20]),
]


@pytest.mark.parametrize("lengths, query_lens", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_reference_equals_contiguous_attention(
    lengths: list[int], query_lens: list[int], dtype: torch.dtype
) -> None:
    for num_heads, num_kv_heads in ((2, 2), (4, 2), (12, 1)):
        case = make_case(lengths, query_lens, num_heads, num_kv_heads, dtype=dtype)
        assert_close(paged_attention_torch(*case.arguments()), contiguous_attention(case), dtype)


@pytest.mark.parametrize("lengths, query_lens", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_equals_the_reference_on_ragged_batches(
    lengths: list[int], query_lens: list[int], dtype: torch.dtype
) -> None:
    case = make_case(lengths, query_lens, dtype=dtype)
    assert_close(paged_attention_triton(*case.arguments()), paged_attention_torch(*case.arguments()), dtype)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (2, 1), (4, 1), (6, 2), (12, 1), (12, 12)])
@pytest.mark.parametrize("query_lens", [[3, 1], [1, 1]], ids=["prompt", "decode"])
def test_the_kernels_share_key_heads_among_query_heads(num_heads: int, num_kv_heads: int, query_lens: list[int]) -> None:
    case = make_case([19, 10], query_lens, num_heads, num_kv_heads)
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("query_lens", [[2, 1], [1, 1]], ids=["prompt", "decode"])
def test_the_kernels_take_every_head_size(head_dim: int, query_lens: list[int]) -> None:
    case = make_case([21, 70], query_lens, 1, 1, head_dim=head_dim)
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


class Launches:
    """Counts the programs that each kernel is launched with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grids: dict[str, tuple[int, ...]] = {}
        for name in ("_prompt_kernel", "_decode_kernel", "_merge_kernel"):
            monkeypatch.setattr(paged_attention, name, self._recording(name, getattr(paged_attention, name)))

    def _recording(self, name: str, kernel):
        class Recording:
            def __getitem__(_, grid: tuple[int, ...]):
                self.grids[name] = grid
                return kernel[grid]

        return Recording()


SPLIT_EDGES = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100]  # of blocks of 8 tokens, and of splits of 16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(2, 1, 32), (4, 1, 64), (12, 1, 128), (2, 2, 256)])
def test_a_decode_split_over_programs_equals_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "MIN_SPLIT_TOKENS", 16)
    monkeypatch.setattr(paged_attention, "_multiprocessors", lambda device: 1000)
    launches = Launches(monkeypatch)
    for lengths in (SPLIT_EDGES, [3, 290]):
        case = make_case(lengths, [1] * len(lengths), num_heads, num_kv_heads, head_dim, dtype=dtype)
        assert_close(paged_attention_triton(*case.arguments()), paged_attention_torch(*case.arguments()), dtype)
        assert launches.grids["_decode_kernel"][2] == -(-case.block_tables.shape[1] * 8 // 16), "the context was not split"
    assert launches.grids["_merge_kernel"] == (2, num_heads)


@pytest.mark.parametrize("length", [MIN_SPLIT_TOKENS - 1, MIN_SPLIT_TOKENS, MIN_SPLIT_TOKENS + 1, 2 * MIN_SPLIT_TOKENS + 1])
def test_one_request_is_split_at_the_smallest_part_that_pays(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    monkeypatch.setattr(paged_attention, "_multiprocessors", lambda device: 132)
    case = make_case([length], [1], 1, 1)
    case.block_tables = case.block_tables[:, :-1]  # no wider than the context needs
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)
    parts = -(-case.block_tables.shape[1] * 8 // MIN_SPLIT_TOKENS)
    assert launches.grids["_decode_kernel"] == (1, 1, parts)
    assert ("_merge_kernel" in launches.grids) == (parts > 1)


def test_few_contexts_are_split_to_fill_the_multiprocessors_and_many_are_not() -> None:
    def parts(requests: int, longest: int) -> int:
        return -(-longest // split_tokens(requests * 12, longest, num_multiprocessors=132))

    assert parts(1, 1024) == 8  # 96 programs: as many as the smallest part allows
    for requests in (1, 2, 5, 8, 20):
        assert 0.9 * 4 * 132 <= parts(requests, 32768) * requests * 12 <= 1.4 * 4 * 132  # 4 programs for each, or so
    assert parts(256, 1024) == parts(44, 32768) == 1  # 44 * 12 = 4 * 132: there are programs enough
    assert parts(256, 10) == parts(1, 100) == 1


def test_an_idle_request_among_decodes_shifts_nobody() -> None:
    case = make_case([9, 4, 12], [1, 0, 1])
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


@pytest.mark.parametrize("seed", range(8))
def test_every_tile_finds_its_request_in_random_ragged_batches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "prompt_tile", lambda group, element_bytes: (16, 16 // group))  # many tiles
    rng = torch.Generator().manual_seed(seed)
    query_lens = torch.randint(0, 40, (7,), generator=rng).tolist()
    lengths = [n + extra for n, extra in zip(query_lens, torch.randint(1, 9, (7,), generator=rng).tolist())]
    case = make_case(lengths, query_lens, 4, 2, seed=seed)
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


FAR_BLOCK = """
import torch
from nanopaged.paged_attention import paged_attention_triton, write_kv_triton
from nanopaged.torch_attention import paged_attention_torch
# A pool of 2**31 + 2**27 elements: memory that nobody touches is not there, and two blocks are touched.
far = 2**31 // (2 * 8 * 16) + 1000
pool = torch.empty(far + 2**19, 2, 8, 16, dtype=torch.float16, device="{device}")
rng = torch.Generator().manual_seed(0)
k, v, q = (torch.randn(1, 2, 16, generator=rng).half().to(pool.device) for _ in range(3))
slots = torch.tensor([far * 8 + 3], dtype=torch.int32, device=pool.device)
pool[far] = 0
write_kv_triton(k, v, pool, pool, slots)
assert torch.equal(pool[far, :, 3], v[0]) and pool[far].count_nonzero() == 32, "written elsewhere"
table = torch.tensor([[0, far]], dtype=torch.int32, device=pool.device)
pool[0] = 0
for query_start in ([0, 1], [0, 2]):
    q = torch.randn(query_start[1], 2, 16, generator=rng).half().to(pool.device)
    inputs = (q, pool, pool, table, torch.tensor(query_start, dtype=torch.int32, device=pool.device),
              torch.tensor([12], dtype=torch.int32, device=pool.device), query_start[1], 0.25)
    torch.testing.assert_close(paged_attention_triton(*inputs), paged_attention_torch(*inputs), rtol=0, atol=2e-3)
print("reached")
"""


def test_elements_past_2_to_the_31_are_reached() -> None:
    # In a process of its own: a place cut to 32 bits is negative, and reading there ends the process.
    run = subprocess.run([sys.executable, "-c", FAR_BLOCK.format(device=DEVICE.type)], capture_output=True, text=True)
    if "not enough memory" in run.stderr or "out of memory" in run.stderr:
        pytest.skip("no 4.3 GB of address space")
    assert run.stdout == "reached\n", f"exit status {run.returncode}: {run.stderr}"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_kernel_takes_every_block_size(block_size: int) -> None:
    case = make_case([block_size + 1, 3], [1, 3], 1, 1, block_size=block_size)
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = make_case([20, 20], [20, 1])
    case.q *= 1000.0  # scores in the thousands: exp() of one is infinite, exp() of its negative zero
    got = paged_attention_triton(*case.arguments()).cpu()
    torch.testing.assert_close(got, contiguous_attention(case), rtol=0, atol=1e-4)


def test_a_prompt_longer_than_a_tile_is_causal_in_every_row() -> None:
    rows, tile_q = prompt_tile(1, 4)
    assert tile_q < 70, f"the prompt must need several tiles, a tile has {rows} rows"
    case = make_case([75], [70], 1, 1)
    assert_close(paged_attention_triton(*case.arguments()), contiguous_attention(case), torch.float32)


def test_rows_of_a_strided_projection_are_read_where_they_lie() -> None:
    case = make_case([9, 12], [2, 12])
    wide = torch.full((len(case.q), 6, 16), torch.nan, device=DEVICE)
    wide[:, 2:4] = case.q  # as q lies beside k and v in the output of c_attn
    case.q = wide[:, 2:4]
    for attention in (paged_attention_torch, paged_attention_triton):
        assert_close(attention(*case.arguments()), contiguous_attention(case), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("write_kv", [write_kv_torch, write_kv_triton])
def test_writing_puts_each_token_into_its_slot_and_touches_nothing_else(write_kv, dtype: torch.dtype) -> None:
    k_cache, v_cache = torch.zeros(2, 4, 3, 8, 16, dtype=dtype, device=DEVICE)  # (num_blocks, heads, block_size, head_dim)
    qkv = torch.randn(5, 9, 16).to(DEVICE, dtype)
    k, v = qkv[:, 3:6], qkv[:, 6:9]  # views, as the model hands them over
    slots = torch.tensor([31, 0, 9, 8, 30], dtype=torch.int32, device=DEVICE)
    write_kv(k, v, k_cache, v_cache, slots)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        by_slot = cache.transpose(1, 2).flatten(0, 1)  # (slots, heads, head_dim)
        assert torch.equal(by_slot[slots], rows)
        by_slot[slots] = 0
        assert not by_slot.any(), "another slot was written"


def test_writing_no_token_is_no_error() -> None:
    cache = torch.zeros(1, 1, 8, 16, device=DEVICE)
    empty = torch.zeros(0, 1, 16, device=DEVICE)
    for write_kv in (write_kv_torch, write_kv_triton):
        write_kv(empty, empty, cache, cache, torch.zeros(0, dtype=torch.int32, device=DEVICE))


BAD = [  # (argument, what becomes of it, error, words)
    ("q", lambda t: t.double(), TypeError, "q must be float32, float16 or bfloat16"),
    ("q", lambda t: t.half(), TypeError, "k_cache must be torch.float16, got torch.float32"),
    ("q", lambda t: t[:, :, :8], ValueError, "q must have shape"),
    ("q", lambda t: t[:, :, ::2], ValueError, "q must have shape"),
    ("q", lambda t: t[0], ValueError, "q must have 3 dimensions"),
    ("q", lambda t: t.tolist(), TypeError, "q must be a tensor"),
    ("q", lambda t: t[:, :1], ValueError, "num_kv_heads must divide num_heads"),
    ("k_cache", lambda t: t[0], ValueError, "k_cache must have 4 dimensions"),
    ("k_cache", lambda t: t[:, :0], ValueError, "num_blocks, num_kv_heads, block_size, head_dim.* is empty"),
    ("k_cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "blocks must each be contiguous"),
    ("v_cache", lambda t: t[:2], ValueError, "v_cache must have shape"),
    ("v_cache", lambda t: t.half(), TypeError, "v_cache must be torch.float32"),
    ("block_tables", lambda t: t.long(), TypeError, "block_tables must be torch.int32, got torch.int64"),
    ("block_tables", lambda t: t[0], ValueError, "block_tables must have 2 dimensions"),
    ("block_tables", lambda t: t[:1], ValueError, r"block_tables must have shape \(2,"),
    ("block_tables", lambda t: t.repeat(1, 2)[:, ::2], ValueError, "block_tables .* contiguous last dimension"),
    ("query_start", lambda t: t[:-1], ValueError, r"query_start must have shape \(3,\)"),
    ("seq_lens", lambda t: t.float(), TypeError, "seq_lens must be torch.int32"),
    ("block_tables", lambda t: t[:, :0], ValueError, "there must be a head and a block at least"),
    ("q", lambda t: t[:, :0], ValueError, "there must be a head and a block at least"),
    ("max_query_len", lambda n: n + 2, ValueError, "max_query_len must be from 1 to 3"),
    ("max_query_len", lambda n: 0, ValueError, "max_query_len must be from 1 to 3"),
    ("max_query_len", lambda n: float(n), TypeError, "max_query_len must be an int"),
    ("seq_lens", lambda t: t.to("meta"), ValueError, "seq_lens must be on the cache's device"),
]


@pytest.mark.parametrize("attention", [paged_attention_torch, paged_attention_triton])
@pytest.mark.parametrize("name, change, error, words", BAD)
def test_arguments_that_do_not_fit_are_named(attention, name: str, change, error: type, words: str) -> None:
    case = make_case([9, 3], [1, 2])
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(error, match=words):
        attention(*case.arguments())


@pytest.mark.parametrize("write_kv", [write_kv_torch, write_kv_triton])
def test_rows_and_slots_that_do_not_fit_are_named(write_kv) -> None:
    cache = torch.zeros(2, 2, 8, 16, device=DEVICE)
    rows, slots = torch.zeros(3, 2, 16, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for k, v, where, error, words in (
        (rows[:, :1], rows, slots, ValueError, "k must have shape"),
        (rows, rows[:2], slots, ValueError, "v must have shape"),
        (rows, rows.half(), slots, TypeError, "v must be torch.float32"),
        (rows, rows, slots[:2], ValueError, "slots must have shape"),
        (rows, rows, slots.long(), TypeError, "slots must be torch.int32"),
    ):
        with pytest.raises(error, match=words):
            write_kv(k, v, cache, cache, where)


def test_tensors_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "INTERPRETED", False)
    case = make_case([9], [1])
    for name in ("q", "k_cache", "v_cache", "block_tables", "query_start", "seq_lens"):
        setattr(case, name, getattr(case, name).cpu())
    with pytest.raises(ValueError, match="run on CUDA, and these tensors are on cpu: use attention='torch'"):
        paged_attention_triton(*case.arguments())


def test_the_kernels_refuse_sizes_that_they_were_not_written_for() -> None:
    case = make_case([9], [1], head_dim=24)
    paged_attention_torch(*case.arguments())
    with pytest.raises(ValueError, match="head_dim of .* got 8 and 24: use attention='torch'"):
        paged_attention_triton(*case.arguments())
