"""What should a copied block hold? Caches full of different numbers, and engines with NaN in their pools."""

from __future__ import annotations

from itertools import product

import torch

from nanopaged.engine import LLM
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.kv_cache import KVCache
from nanopaged.lab.grading import begin, expect, tell
from nanopaged.step import BlockMove


def cache_of(num_blocks: int = 6, host_blocks: int = 2) -> tuple[KVCache, torch.Tensor]:
    """Three layers, blocks of 2 slots; every number in them is another. And a copy of it."""
    begin(f"a cache of {num_blocks} blocks, and {host_blocks} in CPU memory")
    shape = GPT2Config(vocab_size=5, n_embd=8, n_layer=3, n_head=2)
    cache = KVCache(shape, 2, num_blocks, host_blocks, torch.device("cpu"), torch.float32)
    cache.blocks.copy_(torch.arange(cache.blocks.numel()).view(cache.blocks.shape))
    cache.host_blocks.fill_(-1.0)
    return cache, cache.blocks.clone()


def moves_of(*moves: tuple[str, int, int]) -> list[BlockMove]:
    for kind, source, target in moves:
        tell(f"planned: {kind}, from block {source} to block {target}")
    return [BlockMove(*move) for move in moves]


def expect_pool(cache: KVCache, before: torch.Tensor, sources: list[int]) -> None:
    """Block i holds what was in block sources[i] before."""
    for block, source in enumerate(sources):
        for layer, part in product(range(before.shape[0]), range(2)):
            got = cache.blocks[layer, part, block]
            expect(torch.equal(got, before[layer, part, source]), f"layer {layer}, {'KV'[part]}: block {block} should "
                   f"hold what was in block {source}, and holds {_held(got, before[layer, part])}")


def _held(got: torch.Tensor, blocks: torch.Tensor) -> str:
    equal = [str(i) for i, block in enumerate(blocks) if torch.equal(block, got)]
    return f"what was in block {equal[0]}" if equal else "something else"


def engine(num_blocks: int = 16) -> LLM:
    """Random weights, and a pool that is NaN wherever nothing was written."""
    torch.manual_seed(1)
    model = GPT2(GPT2Config(vocab_size=29, n_positions=48, n_embd=16, n_layer=2, n_head=2))
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.4)
    llm = LLM(model.eval(), device="cpu", block_size=8, max_num_batched_tokens=8, num_blocks=num_blocks)
    llm.kv_cache.blocks.fill_(torch.nan)
    return llm
