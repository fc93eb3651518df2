"""The answer that every schedule must give: plain attention over the whole sequence, with no cache at all."""

from __future__ import annotations

import torch

from nanopaged import SamplingParams
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.request import Request
from nanopaged.sampling import sample

ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a logit, as a share of the largest
TINY = GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2)


def tiny_model(config: GPT2Config = TINY, seed: int = 0) -> GPT2:
    """Random weights, wide enough that the likeliest token is well ahead of the next."""
    torch.manual_seed(seed)
    model = GPT2(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model


def continue_densely(model: GPT2, prompt: list[int], params: SamplingParams,
                     max_model_len: int | None = None) -> list[int]:
    """The tokens that a request must get, whatever else runs: computed from the start for each one."""
    limit = min(len(prompt) + params.max_tokens, max_model_len or model.config.n_positions)
    request = Request("oracle", prompt, params, model.config.eos_token_id, params.seed or 0)
    while len(request.token_ids) < limit:
        logits = model.dense(torch.tensor(request.token_ids))[-1:]
        request.token_ids += sample(logits, [request])
        if request.token_ids[-1] in request.stop_token_ids:
            break
    return request.output_token_ids


def assert_dense_continuation(model: GPT2, prompt: list[int], params: SamplingParams, seed: int, output: list[int],
                              finished: bool, where: str) -> int:
    """The same in one pass: each token is what the dense model gives after the right ones before it.

    Returns how many tokens differ and were forgiven, because rounding explains them.
    """
    forgiven = 0
    if output:
        logits = model.dense(torch.tensor(prompt + output[:-1]))[len(prompt) - 1 :]
        draws = []
        for i in range(len(output)):
            draws.append(Request("oracle", prompt, params, model.config.eos_token_id, seed))
            draws[i].token_ids += output[:i]
        for i, (token, wanted) in enumerate(zip(output, sample(logits, draws))):
            if token != wanted:
                assert rounding_explains(logits[i], draws[i], token), f"{token}, not {wanted}, at {i}: {where}"
                forgiven += 1
    assert not set(output[:-1]) & set(params.stop_token_ids), f"went on past a stop token: {where}"
    if finished:
        limit = min(params.max_tokens, model.config.n_positions - len(prompt))
        assert len(output) == limit or output[-1] in params.stop_token_ids, f"ended early: {where}"
    return forgiven


def rounding_explains(logits: torch.Tensor, request: Request, token: int) -> bool:
    """Whether logits that differ by no more than rounding give `token`.

    Two schedules add up the same products in another order. That may change which of two tokens arrives
    first, or whether a token at the edge of a filter is kept: so the logits of `token`, of the one that is
    drawn instead, and of all that are likelier than either are moved up and down.
    """
    size = ROUNDING * float(logits.abs().max())
    (drawn,) = sample(logits[None], [request])
    ids = torch.arange(len(logits))
    for moved in (ids == token, ids == drawn, logits > logits[token], logits > logits[drawn]):
        for nudge in (size, -size):
            if sample((logits + nudge * moved)[None], [request]) == [token]:
                return True
    return False
