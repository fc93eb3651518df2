"""A step as flat tensors: each token in its row and slot, each request's rows and blocks where attention looks."""

from __future__ import annotations

import random

import pytest
import torch

from nanopaged.batch import Batch, upload
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.step import Step

CPU = torch.device("cpu")


def request(token_ids: list[int], block_table: list[int], followers: int = 0) -> Request:
    made = Request("any", token_ids, SamplingParams())
    made.block_table.extend(block_table)
    made.followers = [Request(f"follower {i}", token_ids, SamplingParams()) for i in range(followers)]
    return made


def step_of(*parts: tuple[Request, int, int]) -> Step:
    """From (request, position of its first token in the step, number of tokens)."""
    requests, starts, num_tokens = map(list, zip(*parts))
    step = Step(0, requests, starts, num_tokens)
    step.arrange()
    return step


def batch_of(*parts: tuple[Request, int, int], block_size: int = 4) -> Batch:
    return Batch.from_step(step_of(*parts), block_size, CPU)


def test_three_requests_lie_as_the_docstring_shows() -> None:
    a, b, c = request([*range(60, 70)], [0, 3, 7]), request([*range(70, 73)], [5]), request([*range(80, 87)], [6, 2])
    batch = batch_of((b, 0, 3), (a, 9, 1), (c, 4, 2))  # the decoding request moves to the front
    assert batch.token_ids.tolist() == [69, 70, 71, 72, 84, 85]
    assert batch.positions.tolist() == [9, 0, 1, 2, 4, 5]
    assert batch.slots.tolist() == [29, 20, 21, 22, 8, 9]
    assert batch.query_start.tolist() == [0, 1, 4, 6]
    assert batch.seq_lens.tolist() == [10, 3, 6]
    assert batch.block_tables.tolist() == [[0, 3, 7], [5, 0, 0], [6, 2, 0]]
    assert batch.logits_rows.tolist() == [0, 3, 5], "C has a token that is not computed yet, so its row comes last"
    assert batch.num_decodes == 1
    assert batch.plan is None


@pytest.mark.parametrize("num_tokens, num_decodes", [
    ([1, 1, 1], 3), ([1, 2, 1], 2), ([2, 3, 4], 0), ([4], 0), ([1], 1),
], ids=str)
def test_the_first_requests_have_one_row_each_and_are_counted(num_tokens: list[int], num_decodes: int) -> None:
    batch = batch_of(*[(request([0] * n, [i]), 0, n) for i, n in enumerate(num_tokens)])
    assert batch.num_decodes == num_decodes
    rows = batch.query_start.diff().tolist()
    assert rows[:num_decodes] == [1] * num_decodes and sorted(rows) == sorted(num_tokens)


def test_one_row_gives_a_token_to_its_request_and_to_each_follower() -> None:
    alone, leader, cut_off = request([1], [0]), request([2, 3], [1], followers=2), request([4, 5, 6], [2], followers=3)
    batch = batch_of((alone, 0, 1), (leader, 0, 2), (cut_off, 0, 2))
    assert batch.logits_rows.tolist() == [0, 2, 2, 2, 4]


def test_a_step_in_which_no_prompt_ends_has_the_logits_of_its_last_row_alone() -> None:
    batch = batch_of((request([1, 2, 3], [0]), 0, 2))
    assert batch.logits_rows.tolist() == [1]
    assert batch.block_tables.tolist() == [[0]]


def test_blocks_that_are_held_for_later_steps_stand_in_the_table() -> None:
    batch = batch_of((request([1], [4, 9, 2]), 0, 1), (request([1, 2], [3]), 0, 2))
    assert batch.block_tables.tolist() == [[4, 9, 2], [3, 0, 0]]
    assert batch.seq_lens.tolist() == [1, 2]


def test_all_tensors_are_views_of_one_flat_int32_tensor_in_which_nothing_else_lies() -> None:
    batch = batch_of((request([1, 2, 3], [0]), 0, 3), (request([4] * 9, [3, 1, 2]), 8, 1))
    names = ("token_ids", "positions", "slots", "query_start", "seq_lens", "logits_rows", "block_tables")
    elements: list[int] = []
    for tensor in (getattr(batch, name) for name in names):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        first = (tensor.data_ptr() - batch.flat.data_ptr()) // 4
        elements += range(first, first + tensor.numel())
    assert elements == list(range(len(batch.flat)))
    batch.flat.fill_(7)
    assert all((getattr(batch, name) == 7).all() for name in names)


def test_the_flat_tensor_and_the_sizes_are_enough_to_make_the_batch_again() -> None:
    batch = batch_of((request([1, 2, 3], [0]), 0, 3), (request([4] * 9, [3, 1, 2], followers=1), 8, 1))
    again = Batch(batch.flat.clone(), len(batch.token_ids), len(batch.seq_lens), len(batch.logits_rows),
                  batch.num_decodes)
    assert again.num_decodes == batch.num_decodes == 1 and again.num_cut == batch.num_cut == 0
    for name in ("token_ids", "positions", "slots", "query_start", "seq_lens", "logits_rows", "block_tables"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name


def test_laying_out_a_step_changes_nothing_in_its_requests() -> None:
    made = request([1, 2, 3], [5, 6])
    step = step_of((made, 1, 2))
    before = vars(made) | {"token_ids": made.token_ids[:], "block_table": made.block_table[:]}
    assert Batch.from_step(step, 2, CPU).slots.tolist() == [11, 12]
    assert vars(made) == before


@pytest.mark.parametrize("seed", range(10))
def test_random_steps_agree_with_a_lookup_token_by_token(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 8, 16])
    parts = []
    for _ in range(rng.randint(1, 9)):
        length = rng.randint(1, 40)
        end = rng.choice([length, rng.randint(1, length)])
        start = rng.choice([end - 1, rng.randrange(end)])
        table = rng.sample(range(1000), -(-length // block_size) + rng.randint(0, 2))
        token_ids = [rng.randrange(50257) for _ in range(length)]
        parts.append((request(token_ids, table, followers=rng.choice([0, 0, 2])), start, end - start))
    step = step_of(*parts)
    batch = Batch.from_step(step, block_size, CPU)
    rows, drawn, cut = [], [], []
    for i, (r, start, n) in enumerate(zip(step.requests, step.starts, step.num_tokens)):
        assert batch.query_start[i] == len(rows), f"seed {seed}, request {i}"
        rows += [(r.token_ids[p], p, r.block_table[p // block_size] * block_size + p % block_size)
                 for p in range(start, start + n)]
        assert batch.seq_lens[i] == start + n, f"seed {seed}, request {i}"
        table = r.block_table.tolist()
        assert batch.block_tables[i, : len(table)].tolist() == table, f"seed {seed}, request {i}"
        assert not batch.block_tables[i, len(r.block_table) :].any(), f"seed {seed}, request {i}"
        if start + n == len(r.token_ids):
            drawn += [len(rows) - 1] * (1 + len(r.followers))
        else:
            cut.append(len(rows) - 1)
    assert batch.query_start[-1] == len(rows), f"seed {seed}"
    assert list(zip(batch.token_ids.tolist(), batch.positions.tolist(), batch.slots.tolist())) == rows, f"seed {seed}"
    assert batch.logits_rows.tolist() == drawn + cut, f"seed {seed}"
    assert batch.block_tables.shape[1] == max(len(r.block_table) for r in step.requests), f"seed {seed}"


@pytest.mark.gpu
def test_a_batch_on_a_gpu_is_the_same_and_the_host_does_not_wait() -> None:
    parts = [(request([1, 2, 3], [0]), 0, 3), (request([4] * 9, [3, 1, 2]), 8, 1)]
    torch.cuda.set_sync_debug_mode("error")  # a synchronisation raises
    try:
        batch = Batch.from_step(step_of(*parts), 4, torch.device("cuda"))
        values = upload(torch.arange(5), torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.flat.cpu(), batch_of(*parts).flat)
    assert values.tolist() == [0, 1, 2, 3, 4]
