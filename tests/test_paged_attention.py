"""The kernels against the torch reference, which `test_torch_attention` tests, and against contiguous attention.

Without a GPU the kernels run in Triton's interpreter, so shapes are tiny.
"""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nanopaged import paged_attention
from nanopaged.attention_arguments import AttentionBackend
from nanopaged.batch import Batch
from nanopaged.paged_attention import (
    BLOCK_SIZES,
    CHOICES,
    HEAD_DIMS,
    SMALLEST_PART,
    TRITON,
    Choice,
    choice_for,
    paged_attention_triton,
    prompt_tile,
    parts_of_contexts,
    write_kv_triton,
)
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.step import Step
from nanopaged.torch_attention import TORCH, paged_attention_torch
from tests.test_gpt2 import TINY, random_model
from tests.test_torch_attention import (
    DEVICE,
    RAGGED,
    TOLERANCE,
    Case,
    assert_attends,
    assert_writes_its_slots_alone,
    contiguous_attention,
    make_case,
    strided_case,
)

pytest.importorskip("triton", reason="there is no Triton on this system")
pytestmark = pytest.mark.gpu_too  # there the kernels are compiled


SMALL_PARTS = Choice(tile_kv=16, num_stages=3, num_warps=4, smallest_part=16)


def assert_kernels_attend(case: Case, wanted: torch.Tensor | None = None, choice: Choice | None = None) -> None:
    """Compares with contiguous attention, unless another answer is given."""
    assert_attends(partial(paged_attention_triton, choice=choice), case,
                   contiguous_attention(case) if wanted is None else wanted)


@pytest.mark.parametrize("lengths, query_lens", RAGGED)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernels_equal_the_reference_on_ragged_batches(
    lengths: list[int], query_lens: list[int], dtype: torch.dtype
) -> None:
    case = make_case(lengths, query_lens, dtype=dtype)
    assert_kernels_attend(case, paged_attention_torch(*case.arguments()))


@pytest.mark.parametrize("num_heads, num_kv_heads", [(2, 2), (2, 1), (4, 1), (6, 2), (12, 1), (12, 12)])
@pytest.mark.parametrize("query_lens", [[3, 1], [1, 1]], ids=["prompt", "decode"])
def test_the_kernels_share_key_heads_among_query_heads(
    num_heads: int, num_kv_heads: int, query_lens: list[int]
) -> None:
    assert_kernels_attend(make_case([19, 10], query_lens, num_heads, num_kv_heads))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("query_lens", [[2, 1], [1, 1]], ids=["prompt", "decode"])
def test_the_kernels_take_every_head_size(head_dim: int, query_lens: list[int]) -> None:
    assert_kernels_attend(make_case([21, 70], query_lens, 1, 1, head_dim=head_dim))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_kernels_take_every_block_size(block_size: int) -> None:
    assert_kernels_attend(make_case([block_size + 1, 3], [1, 3], 1, 1, block_size=block_size))


class Launches:
    """Records how many programs each kernel is launched with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grids: dict[str, tuple[int, ...]] = {}
        for name in ("prompt_kernel", "decode_kernel", "merge_kernel"):
            monkeypatch.setattr(paged_attention, name, self._recording(name, getattr(paged_attention, name)))

    def _recording(self, name: str, kernel: object) -> object:
        class Recording:
            def __getitem__(_, grid: tuple[int, ...]) -> object:
                self.grids[name] = grid
                return kernel[grid]

        return Recording()


@pytest.mark.parametrize("query_lens, kernels", [
    ([1, 1], ["decode_kernel"]), ([1, 2], ["decode_kernel", "prompt_kernel"]), ([2, 1], ["prompt_kernel"]),
    ([1, 0], ["decode_kernel", "prompt_kernel"])], ids=str)
def test_requests_that_stand_first_with_one_row_are_decodes_and_the_others_prompts(
    query_lens: list[int], kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    assert_kernels_attend(make_case([9, 4], query_lens))
    assert list(launches.grids) == kernels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_decode_beside_a_prompt_is_what_it_is_without_it_and_so_is_the_prompt(
    dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "parts_of_contexts", lambda *numbers: parts)
    case = make_case([40, 9, 33, 20], [1, 1, 17, 3], 4, 2, dtype=dtype)
    together = paged_attention_triton(*case.arguments(), SMALL_PARTS)

    def alone(requests: slice, rows: slice, num_decodes: int) -> torch.Tensor:
        batch = SimpleNamespace(block_tables=case.batch.block_tables[requests], seq_lens=case.batch.seq_lens[requests],
                                query_start=case.batch.query_start[requests.start:requests.stop + 1] - rows.start,
                                num_decodes=num_decodes, plan=None)
        return paged_attention_triton(case.q[rows], case.k_cache, case.v_cache, batch, case.scale, SMALL_PARTS)

    assert torch.equal(together[:2], alone(slice(0, 2), slice(0, 2), 2))
    assert torch.equal(together[2:], alone(slice(2, 4), slice(2, 22), 0))


@pytest.mark.parametrize("attention", [TORCH, TRITON], ids=["torch", "triton"])
def test_a_mixed_step_of_a_model_gives_the_logits_of_its_decodes_and_its_prompt_in_steps_of_their_own(
    attention: AttentionBackend
) -> None:
    model = random_model(replace(TINY, n_kv_head=2), seed=0).to(DEVICE)
    rng, blocks = random.Random(0), random.Random(1).sample(range(12), 12)
    requests = []
    for length in (21, 9, 30):
        requests.append(Request("any", [rng.randrange(TINY.vocab_size) for _ in range(length)], SamplingParams()))
        requests[-1].block_table = array("i", [blocks.pop() for _ in range(-(-length // 8))])

    def step(cache: torch.Tensor, which: slice, starts: list[int], ends: list[int]) -> torch.Tensor:
        """The logits of all its rows."""
        step = Step(0, requests[which], starts, [end - start for start, end in zip(starts, ends)])
        step.arrange()
        batch = Batch.from_step(step, 8, DEVICE)
        batch.logits_rows, batch.num_cut = torch.arange(len(batch.token_ids), device=DEVICE), 0
        return model(batch, cache, attention)

    mixed = torch.full((TINY.n_layer, 2, 12, 2, 8, 16), torch.nan, device=DEVICE)
    step(mixed, slice(0, 3), [0, 0, 0], [20, 8, 12])  # two prompts but for their last token, and a part of one
    apart = mixed.clone()
    got = step(mixed, slice(0, 3), [20, 8, 12], [21, 9, 27])  # two decodes, and a chunk from the middle
    wanted = [step(apart, slice(2, 3), [12], [27]), step(apart, slice(0, 2), [20, 8], [21, 9])]
    torch.testing.assert_close(got, torch.cat(wanted[::-1]), atol=3e-5, rtol=0)
    torch.testing.assert_close(mixed, apart, atol=3e-5, rtol=0, equal_nan=True)


def test_the_split_of_a_short_context_does_not_depend_on_how_long_its_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph all tables have room for the longest request."""
    monkeypatch.setattr(paged_attention, "num_multiprocessors", lambda device: 2)
    case = make_case([100, 40], [1, 1], 2, 2)
    narrow = paged_attention_triton(*case.arguments(), SMALL_PARTS)
    case.batch.block_tables = torch.nn.functional.pad(case.batch.block_tables, (0, 60))
    assert torch.equal(narrow, paged_attention_triton(*case.arguments(), SMALL_PARTS))


@pytest.mark.parametrize("parts", [1, 4])
def test_an_empty_context_gives_zeros_and_no_other_request_notices(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "parts_of_contexts", lambda *numbers: parts)
    for query_lens in ([1, 1, 1], [1, 1, 3]):
        case = make_case([9, 300, 20], query_lens)
        case.batch.seq_lens[0] = 0
        out = paged_attention_triton(*case.arguments())
        assert not out[0].any()
        torch.testing.assert_close(out, paged_attention_torch(*case.arguments()), rtol=0, atol=1e-5)


# In the interpreter each takes five seconds, so one stands for all there.
@pytest.mark.parametrize("num_requests", [257, *(pytest.param(n, marks=pytest.mark.gpu) for n in (255, 256))])
def test_a_batch_of_about_256_requests_is_decoded(num_requests: int) -> None:
    lengths = [1 + i % 3 for i in range(num_requests)]
    assert_kernels_attend(make_case(lengths, [1] * num_requests, 1, 1))


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_a_context_of_whole_blocks_and_one_token_is_read_to_its_end(num_blocks: int, query_len: int) -> None:
    assert_kernels_attend(make_case([8 * num_blocks + 1, 8 * num_blocks], [query_len, query_len]))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_table_that_ends_with_its_context_is_not_read_past_its_end(width: int) -> None:
    """As where max_model_len is no multiple of the block size."""
    case = make_case([8 * width - 3], [1], 1, 1)
    case.batch.block_tables = case.batch.block_tables[:, :width].clone()
    assert_kernels_attend(case)


SPLIT_EDGES = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100]  # of blocks of 8 tokens, and of splits of 16


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(2, 1, 32), (4, 1, 64), (12, 1, 128), (2, 2, 256)])
def test_a_decode_split_over_programs_equals_the_reference(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "num_multiprocessors", lambda device: 1000)
    launches = Launches(monkeypatch)
    for lengths in (SPLIT_EDGES, [3, 290]):
        case = make_case(lengths, [1] * len(lengths), num_heads, num_kv_heads, head_dim, dtype=dtype)
        assert_kernels_attend(case, paged_attention_torch(*case.arguments()), SMALL_PARTS)
        assert launches.grids["decode_kernel"][2] == -(-case.batch.block_tables.shape[1] * 8 // 16)
    assert launches.grids["merge_kernel"] == (2, num_heads)


@pytest.mark.parametrize(
    "length", [SMALLEST_PART - 1, SMALLEST_PART, SMALLEST_PART + 1, 2 * SMALLEST_PART + 1])
def test_one_request_is_split_at_the_smallest_part_that_pays(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch)
    monkeypatch.setattr(paged_attention, "num_multiprocessors", lambda device: 132)
    case = make_case([length], [1], 1, 1)
    case.batch.block_tables = case.batch.block_tables[:, :-1]  # no wider than the context needs
    assert_kernels_attend(case)
    parts = -(-case.batch.block_tables.shape[1] * 8 // SMALLEST_PART)
    assert launches.grids["decode_kernel"] == (1, 1, parts)
    assert ("merge_kernel" in launches.grids) == (parts > 1)


def test_the_table_has_a_choice_that_launches_for_every_kernel_head_size_and_dtype() -> None:
    assert CHOICES.keys() == {(kernel, size) for kernel in ("decode", "prompt") for size in (2, 4)}
    for (kernel, size), row in CHOICES.items():
        assert [choice_for(kernel, head_dim, size)[:3] for head_dim in HEAD_DIMS] == row
        for head_dim, choice in zip(HEAD_DIMS, row, strict=True):
            tile_kv, num_stages, num_warps = choice
            assert tile_kv in (16, 32, 64, 128) and SMALLEST_PART % tile_kv == 0, "parts begin with a tile"
            assert num_warps in (1, 2, 4, 8) and num_stages >= 1


def test_amd_has_three_stages_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    there = choice_for("decode", 64, 2)
    monkeypatch.setattr(paged_attention, "ON_AMD", True)
    assert choice_for("decode", 64, 2) == there._replace(num_stages=3) and there.num_stages == 5
    assert choice_for("prompt", 64, 2).num_stages == 2


@pytest.mark.parametrize("choice", [Choice(16, 3, 4, 16, 8), Choice(128, 2, 8, 64, 1)])
@pytest.mark.parametrize("query_lens", [[1, 1], [3, 1]], ids=["decode", "prompt"])
def test_any_choice_computes_the_same(choice: Choice, query_lens: list[int]) -> None:
    assert_kernels_attend(make_case([70, 19], query_lens), choice=choice)


def test_few_contexts_are_split_to_fill_the_multiprocessors_and_many_are_not() -> None:
    def parts(requests: int, longest: int) -> int:
        return parts_of_contexts(requests * 12, longest, num_programs=4 * 132)

    assert parts(1, 1024) == 8  # 96 programs: as many as the smallest part allows
    for requests in (1, 2, 5, 8, 20):
        assert 0.9 * 4 * 132 <= parts(requests, 32768) * requests * 12 <= 1.4 * 4 * 132  # 4 programs for each, or so
    assert parts(256, 1024) == parts(44, 32768) == 1  # 44 * 12 = 4 * 132: there are enough programs
    assert parts(256, 10) == parts(1, 100) == 1


def test_an_idle_request_among_decodes_shifts_no_other() -> None:
    assert_kernels_attend(make_case([9, 4, 12], [1, 0, 1]))


@pytest.mark.parametrize("seed", range(8))
def test_every_tile_finds_its_request_in_random_ragged_batches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "prompt_tile", lambda group, element_bytes: (16, 16 // group))  # many tiles
    rng = torch.Generator().manual_seed(seed)
    query_lens = torch.randint(0, 40, (7,), generator=rng).tolist()
    lengths = [n + extra for n, extra in zip(query_lens, torch.randint(1, 9, (7,), generator=rng).tolist())]
    print(f"seed {seed}: lengths {lengths}, query_lens {query_lens}")
    assert_kernels_attend(make_case(lengths, query_lens, 4, 2, seed=seed))


def test_a_prompt_longer_than_a_tile_is_causal_in_every_row() -> None:
    rows, tile_q = prompt_tile(1, 4)
    assert tile_q < 70, f"the prompt must need several tiles, a tile has {rows} rows"
    assert_kernels_attend(make_case([75], [70], 1, 1))


def test_rows_of_a_strided_projection_are_read_where_they_lie() -> None:
    assert_kernels_attend(strided_case())


FAR_BLOCK = """
from types import SimpleNamespace
import torch
from nanopaged.paged_attention import paged_attention_triton, write_kv_triton
from nanopaged.torch_attention import paged_attention_torch
# A pool of 2**31 + 2**27 elements: memory that is never touched is not there, and two blocks are touched.
far = 2**31 // (2 * 8 * 16) + 1000
pool = torch.empty(far + 2**19, 2, 8, 16, dtype=torch.float16, device="{device}")
rng = torch.Generator().manual_seed(0)
k, v = (torch.randn(1, 2, 16, generator=rng).half().to(pool.device) for _ in range(2))
def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=pool.device)
pool[far] = 0
write_kv_triton(k, v, pool, pool, ints(far * 8 + 3))
assert torch.equal(pool[far, :, 3], v[0]), f"the token's slot holds {{pool[far, :, 3]}}"
assert pool[far].count_nonzero() == 32, f"its block holds {{pool[far].count_nonzero()}} values of 32"
pool[0] = 0
for num_rows in (1, 2):
    q = torch.randn(num_rows, 2, 16, generator=rng).half().to(pool.device)
    batch = SimpleNamespace(block_tables=ints(0, far)[None], query_start=ints(0, num_rows), seq_lens=ints(12),
                            num_decodes=int(num_rows == 1), plan=None)
    inputs = (q, pool, pool, batch, 0.25)
    torch.testing.assert_close(paged_attention_triton(*inputs), paged_attention_torch(*inputs), rtol=0, atol=2e-3)
print("reached")
"""


def test_elements_past_2_to_the_31_are_reached() -> None:
    # In a process of its own: a place cut to 32 bits is negative, and reading there ends the process.
    run = subprocess.run([sys.executable, "-c", FAR_BLOCK.format(device=DEVICE.type)], capture_output=True, text=True)
    if "not enough memory" in run.stderr or "out of memory" in run.stderr:
        pytest.skip("no 4.3 GB of address space")
    assert run.stdout == "reached\n", f"exit status {run.returncode}: {run.stderr}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_token_is_written_to_its_slot_and_no_other_slot_changes(dtype: torch.dtype) -> None:
    assert_writes_its_slots_alone(write_kv_triton, dtype)


def test_a_step_may_have_no_token_to_write_or_to_attend_from() -> None:
    cache, empty = torch.zeros(1, 1, 8, 16, device=DEVICE), torch.zeros(0, 1, 16, device=DEVICE)
    write_kv_triton(empty, empty, cache, cache, torch.zeros(0, dtype=torch.int32, device=DEVICE))
    assert not cache.any()
    assert paged_attention_triton(*make_case([9], [0]).arguments()).shape == (0, 2, 16)


def test_tensors_on_a_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "INTERPRETED", False)
    case = make_case([9], [1], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="run on CUDA, and these tensors are on cpu: use attention='torch'"):
        paged_attention_triton(*case.arguments())


def test_the_kernels_refuse_sizes_that_they_were_not_written_for() -> None:
    for sizes in ({"head_dim": 24}, {"block_size": 12}):
        case = make_case([9], [1], **sizes)
        paged_attention_torch(*case.arguments())
        got = f"{sizes.get('block_size', 8)} and {sizes.get('head_dim', 16)}"
        with pytest.raises(ValueError, match=f"block_size of .* and a head_dim of .* got {got}: use attention='torch'"):
            paged_attention_triton(*case.arguments())
