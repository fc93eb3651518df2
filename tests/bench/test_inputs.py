"""The model and the batches that are measured."""

from __future__ import annotations

import torch

from nanopaged.bench.inputs import random_gpt2, uniform_batch
from nanopaged.gpt2 import GPT2Config


def test_a_random_model_has_the_given_shape_and_the_weights_of_its_seed() -> None:
    model = random_gpt2(layers=1, width=128, seed=3)
    assert model.config == GPT2Config(n_layer=1, n_embd=128, n_head=2)
    assert torch.equal(model.wte.weight, random_gpt2(1, 128, 3).wte.weight)
    assert not torch.equal(model.wte.weight, random_gpt2(1, 128, 4).wte.weight)
    assert 0.019 < model.wte.weight.std() < 0.021 and not model.wte.weight.requires_grad


def test_a_uniform_batch_has_the_same_rows_and_context_for_each_request() -> None:
    tables = torch.tensor([[3, 1], [0, 2], [5, 4]], dtype=torch.int32)
    decodes, prompts = uniform_batch(tables, 1, 20), uniform_batch(tables, 7, 20)
    assert decodes.query_start.tolist() == [0, 1, 2, 3] and prompts.query_start.tolist() == [0, 7, 14, 21]
    assert (decodes.num_decodes, prompts.num_decodes) == (3, 0)
    for batch in (decodes, prompts):
        assert batch.block_tables is tables and batch.seq_lens.tolist() == [20, 20, 20]
