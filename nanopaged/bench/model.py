"""A GPT-2 to measure with: weights that were never trained cost as much time as others."""

from __future__ import annotations

import torch

from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.validation import require_int


def random_gpt2(layers: int = 12, width: int = 768, seed: int = 0) -> GPT2:
    """GPT-2 124M's shapes, unless told otherwise, with heads of 64; starts as GPT-2 did (Radford et al., 2019)."""
    torch.manual_seed(require_int("seed", seed, 0, 2**63 - 1))
    model = GPT2(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return model
