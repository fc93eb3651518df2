"""What is measured? A GPT-2 with random weights, and batches of any contents: these do not change the time."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from nanopaged.attention_arguments import RaggedBatch
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.validation import require_int


def random_gpt2(layers: int = 12, width: int = 768, seed: int = 0) -> GPT2:
    """Shaped like GPT-2 124M by default, with heads of 64; initialized as GPT-2 was (Radford et al., 2019)."""
    torch.manual_seed(require_int("seed", seed, 0, 2**63 - 1))
    model = GPT2(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return model


def uniform_batch(block_tables: torch.Tensor, queries: int, context: int) -> RaggedBatch:
    """Requests with `context` tokens each, of which a step computes the last `queries`; a row of tables for each."""
    count, device = len(block_tables), block_tables.device
    return SimpleNamespace(block_tables=block_tables,
                           query_start=torch.arange(count + 1, dtype=torch.int32, device=device) * queries,
                           seq_lens=torch.full((count,), context, dtype=torch.int32, device=device),
                           num_decodes=count if queries == 1 else 0, plan=None)
