"""The answer that every schedule must give: plain attention over the whole sequence, with no cache at all."""

from __future__ import annotations

import torch

from nanopaged import SamplingParams
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.request import Request
from nanopaged.sampling import sample

TINY = GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2)


def tiny_model(config: GPT2Config = TINY, seed: int = 0) -> GPT2:
    """Random weights, wide enough that the likeliest token is well ahead of the next."""
    torch.manual_seed(seed)
    model = GPT2(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model


def continue_densely(model: GPT2, prompt: list[int], params: SamplingParams, max_model_len: int | None = None) -> list[int]:
    """The tokens that a request must get, whatever else runs: computed from the start for each one."""
    limit = min(len(prompt) + params.max_tokens, max_model_len or model.config.n_positions)
    request = Request("oracle", prompt, params, model.config.eos_token_id, params.seed or 0)
    while len(request.token_ids) < limit:
        logits = model.dense(torch.tensor(request.token_ids))[-1:]
        request.token_ids += sample(logits, [request])
        if request.token_ids[-1] in request.stop_token_ids:
            break
    return request.output_token_ids
