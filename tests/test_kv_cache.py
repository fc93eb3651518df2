"""The pool's memory: as many blocks as fit, and whole blocks that move in the order in which they were planned."""

from __future__ import annotations

import os

import pytest
import torch

from nanopaged import kv_cache
from nanopaged.config import EngineConfig
from nanopaged.gpt2 import GPT2Config
from nanopaged.kv_cache import KVCache, block_bytes, blocks_that_fit, free_bytes
from nanopaged.step import BlockMove
from tests.oracle import TINY
from tests.test_config import needs_pressure

CPU = torch.device("cpu")
BLOCK = block_bytes(TINY, 8, torch.float32)


def cache_with_contents() -> KVCache:
    """Six blocks of random numbers in the pool, four blocks of -1 in CPU memory."""
    cache = KVCache(TINY, 8, 6, 4, CPU, torch.float32)
    cache.blocks.copy_(torch.rand(cache.blocks.shape))
    cache.host_blocks.fill_(-1)
    return cache


def assert_pool_holds(cache: KVCache, before: torch.Tensor, sources: list[int]) -> None:
    """Whether block i holds what was in block sources[i] before, in all layers."""
    for block, source in enumerate(sources):
        now = cache.blocks[:, :, block]
        held = [i for i in range(before.shape[2]) if torch.equal(now, before[:, :, i])]
        assert held == [source], f"block {block} must hold what was in block {source}, and holds what was in {held}"


def test_all_layers_of_a_block_come_back_as_they_went_and_nothing_else_changes() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    moves = [BlockMove("to_host", 4, 2), BlockMove("to_host", 1, 0)]
    cache.carry_out(moves)
    assert moves == []
    assert torch.equal(cache.host_blocks[[2, 0]], before[:, :, [4, 1]].permute(2, 0, 1, 3, 4, 5))
    assert (cache.host_blocks[[1, 3]] == -1).all() and torch.equal(cache.blocks, before)
    cache.blocks[:, :, [1, 4]] = 0
    cache.carry_out([BlockMove("to_pool", 2, 1), BlockMove("to_pool", 0, 5), BlockMove("copy", 3, 4)])
    assert_pool_holds(cache, before, [0, 4, 2, 3, 3, 1])


def test_moves_are_made_in_their_order() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    # Block 0 goes to the host, takes a copy of 1, is copied on to 2 by way of the host, and comes back itself as 1.
    cache.carry_out([BlockMove("to_host", 0, 0), BlockMove("copy", 1, 0), BlockMove("to_host", 0, 1),
                     BlockMove("to_pool", 1, 2), BlockMove("to_pool", 0, 1), BlockMove("copy", 2, 3)])
    assert_pool_holds(cache, before, [1, 0, 1, 1, 4, 5])


def test_copies_that_follow_each_other_read_all_sources_before_they_write() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    cache.carry_out([BlockMove("copy", 0, 1), BlockMove("copy", 1, 2), BlockMove("copy", 2, 0)])
    assert_pool_holds(cache, before, [2, 0, 1, 3, 4, 5])


def test_the_last_of_two_copies_to_one_block_counts() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    cache.carry_out([BlockMove("copy", 0, 5), BlockMove("copy", 1, 4), BlockMove("copy", 2, 5)])
    assert_pool_holds(cache, before, [0, 1, 2, 3, 1, 2])


def test_moves_that_fail_are_made_the_next_time_and_those_before_them_are_not_repeated() -> None:
    cache = cache_with_contents()
    before, host_blocks = cache.blocks.clone(), cache.host_blocks
    moves = [BlockMove("copy", 0, 5), BlockMove("to_host", 1, 3), BlockMove("to_pool", 3, 2)]
    cache.host_blocks = host_blocks[:0]
    with pytest.raises(IndexError):
        cache.carry_out(moves)
    assert moves == [BlockMove("to_host", 1, 3), BlockMove("to_pool", 3, 2)]
    cache.host_blocks = host_blocks
    cache.carry_out(moves)
    assert moves == []
    assert_pool_holds(cache, before, [0, 1, 1, 3, 4, 0])


def test_a_step_without_moves_changes_nothing() -> None:
    cache = cache_with_contents()
    before = cache.blocks.clone()
    cache.carry_out([])
    assert torch.equal(cache.blocks, before)


@pytest.mark.parametrize("n_kv_head", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_block_holds_k_and_v_of_its_tokens_in_all_layers(n_kv_head: int | None, dtype: torch.dtype) -> None:
    config = GPT2Config(vocab_size=9, n_embd=48, n_layer=3, n_head=6, n_kv_head=n_kv_head)
    cache = KVCache(config, 16, 5, 2, CPU, dtype)
    assert cache.blocks.shape == (3, 2, 5, n_kv_head or 6, 16, 8)  # n_layer, K and V, num_blocks, and one block
    assert cache.host_blocks.shape == (2, 3, 2, n_kv_head or 6, 16, 8)
    assert cache.blocks.dtype == cache.host_blocks.dtype == dtype
    assert cache.blocks.nbytes == 5 * block_bytes(config, 16, dtype)
    assert cache.host_blocks.nbytes == 2 * block_bytes(config, 16, dtype)


def sized(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int = 0, **options: object) -> int:
    """Blocks for the tiny model with `free` bytes of memory."""
    monkeypatch.setattr(kv_cache, "free_bytes", lambda *_: free)
    config = EngineConfig(**{"block_size": 8, "max_model_len": 96, "max_num_batched_tokens": 512} | options)
    return blocks_that_fit(TINY, config, CPU, torch.float32, reserved)


@pytest.mark.parametrize("free, reserved, num_blocks", [
    (10 * BLOCK, 0, 10), (10 * BLOCK + 1, 0, 10), (10 * BLOCK - 1, 0, 9), (BLOCK, 0, 1),
    (10 * BLOCK, 1, 9), (10 * BLOCK, 9 * BLOCK, 1),
])
def test_the_pool_has_as_many_blocks_as_fit_beside_what_is_reserved(
    free: int, reserved: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sized(monkeypatch, free, reserved) == num_blocks


@pytest.mark.parametrize("options, num_blocks", [
    ({"max_num_seqs": 3}, 3 * 12), ({"max_num_seqs": 3, "max_model_len": 89}, 3 * 12),
    ({"max_num_seqs": 3, "max_model_len": 88}, 3 * 11), ({"max_num_seqs": 1, "block_size": 64}, 2),
], ids=str)
def test_the_pool_is_no_larger_than_all_seats_can_use(
    options: dict[str, object], num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sized(monkeypatch, 2**40, **options) == num_blocks


@pytest.mark.parametrize("free, reserved", [(BLOCK - 1, 0), (0, 0), (-(2**30), 0), (10 * BLOCK, 10 * BLOCK)])
def test_no_room_for_a_single_block_says_what_to_change(
    free: int, reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "cpu has no memory left for a single block.*raise gpu_memory_utilization, or set num_blocks"
    with pytest.raises(ValueError, match=words):
        sized(monkeypatch, free, reserved)


@pytest.mark.parametrize("options, num_blocks, host_blocks", [
    ({}, 10, 0), ({"num_blocks": 7}, 7, 0), ({"swap_blocks": 3}, 10, 0),
    pytest.param({"preemption": "swap", "swap_blocks": 3}, 10, 3, marks=needs_pressure),
], ids=str)
def test_a_config_gives_the_cache_its_blocks(
    options: dict[str, object], num_blocks: int, host_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "free_bytes", lambda *_: 12 * BLOCK)
    config = EngineConfig(block_size=8, max_model_len=96, max_num_batched_tokens=512, **options)
    cache = KVCache.of(TINY, config, CPU, torch.float32, 2 * BLOCK)
    assert cache.num_blocks == cache.blocks.shape[2] == num_blocks and len(cache.host_blocks) == host_blocks


def test_the_pool_may_take_a_quarter_of_the_used_share_of_free_cpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert free_bytes(CPU, 0.5) == 1000 * 4096 // 8


def test_a_system_that_does_not_tell_its_free_memory_gives_the_pool_1_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError, ValueError, OSError):
        def sysconf(name: str) -> int:
            raise error(name)

        monkeypatch.setattr(os, "sysconf", sysconf)
        assert free_bytes(CPU, 0.5) == 2**30


def test_what_torch_keeps_of_tensors_that_are_gone_counts_as_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free, kept = 3 * 2**30, [4 * 2**30]  # of 10 GiB

    def memory(device: torch.device) -> tuple[int, int]:
        return free - sum(kept) + 4 * 2**30, 10 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    assert free_bytes(torch.device("cuda"), 0.75) == int(7 * 2**30 - 2.5 * 2**30)


@pytest.mark.parametrize("num_blocks, host_blocks, lower", [(2**27, 0, "num_blocks"), (4, 2**27, "swap_blocks")])
def test_a_cache_for_which_there_is_no_memory_says_what_to_lower(num_blocks: int, host_blocks: int, lower: str) -> None:
    large = GPT2Config(n_embd=1600, n_layer=48, n_head=25)  # 2**27 of its blocks are 300 TiB
    with pytest.raises(ValueError, match=f"no memory for a KV cache of 134217728 blocks, .* MiB on cpu: lower {lower}"):
        KVCache(large, 8, num_blocks, host_blocks, CPU, torch.float32)


@pytest.mark.parametrize("device, host_blocks, pinned", [
    ("cuda", 4, True), ("cuda", 1, True), ("cuda", 0, False), ("cpu", 4, False),
])
def test_blocks_in_cpu_memory_are_pinned_beside_a_gpu_if_there_are_any(
    device: str, host_blocks: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pin_memory: bool) -> torch.Tensor:
        made.append((device.type, pin_memory))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)  # there may be no GPU
    KVCache(TINY, 8, 6, host_blocks, torch.device(device), torch.float32)
    assert made == [(device, False), ("cpu", pinned)]


@pytest.mark.parametrize("num_blocks, host_blocks, name", [(2**28 + 1, 0, "num_blocks"), (4, 2**28 + 1, "swap_blocks")])
def test_slots_fit_an_int32(num_blocks: int, host_blocks: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be from 0 to 268435456, got 268435457"):
        KVCache(TINY, 8, num_blocks, host_blocks, CPU, torch.float32)


@pytest.mark.gpu
def test_the_pool_on_a_gpu_leaves_room_for_the_share_of_others() -> None:
    device = torch.device("cuda")
    free, total = torch.cuda.mem_get_info(device)
    half, most = (free_bytes(device, share) for share in (0.5, 0.9))
    assert half < most <= free
    assert abs((most - half) - 0.4 * total) < 2**28  # other programs may take or free some meanwhile


@pytest.mark.gpu
def test_blocks_in_cpu_memory_are_pinned_beside_a_gpu_and_come_back_as_they_went() -> None:
    cache = KVCache(TINY, 8, 6, 4, torch.device("cuda"), torch.float16)
    assert cache.host_blocks.is_pinned()
    cache.blocks.copy_(torch.rand(cache.blocks.shape))
    before = cache.blocks.clone()
    cache.carry_out([BlockMove("to_host", 4, 2), BlockMove("copy", 0, 4), BlockMove("to_pool", 2, 5)])
    assert_pool_holds(cache, before, [0, 1, 2, 3, 0, 4])
