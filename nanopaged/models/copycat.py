"""Can a GPT-2 be useful with no training at all?

Copycat's weights are written by hand. It continues a text by copying what followed the same last 16
bytes earlier in its context: an induction circuit (Olsson et al., 2022), done on purpose. Its right
answer is known, so a KV cache that mixes up a single block shows in the text.

**Codes.** A token is nine signs: the eight bits of its byte as +1 and -1, and a ninth that only
the end of text has. A position is PAIRS angles, each growing with the position at a frequency of
its own. Moving k positions back turns angle f by k * f: a rotation, which the query's weights can
do. The frequencies are irregular (f * f * sqrt(2), modulo one), since evenly spaced ones come round
together: the product of two positions' codes is 112 for equal ones, below 37 for all others. Every
number stands beside its negative: the mean of a row is zero and its length is known, so LayerNorm
only divides by a constant, which the weights undo.

**The row.** 1,024 numbers, cut into fields:

    ├ byte 0 ┼ byte 1 ┼ ... ┼ byte 15 ┼ previous window ...... ┼ position ┤
      the token itself, 1 to 15 back,   the 16 that end one      4 * 112
      18 numbers each                   position back, 16 * 18

**The layers.** Head by head, each is "look k back, and bring these fields here":

    layer 1   looks 1, 2, 3 back,  brings byte 0        to bytes 1, 2, 3: now there are windows of 4
    layer 2   looks 4, 8, 12 back, brings bytes 0..3    to bytes 4..7, 8..11, 12..15: a window of 16
    layer 3   looks 1 back,        brings bytes 0..15   to the previous window
    layer 4   looks where the previous window equals its own window: there the same 16 bytes have
              come to an end one position earlier. Brings byte 0 from there onto its own byte 0,
              louder than what was there: the head then reads the copied byte.

A look is a softmax that is sharp enough to pick one position: the query is multiplied by a gain.
The MLPs have nothing to do; they are one unit wide, and zero.
"""

from __future__ import annotations

import math

import torch

from nanopaged.gpt2 import GPT2, GPT2Config

WINDOW = 16  # tokens that must match
SIGNS = 9  # a token's code
FIELD = 2 * SIGNS  # the code, each sign beside its negative
PAIRS = 112  # frequencies of a position's code
POSITION = 2 * WINDOW * FIELD  # where the position's code begins in a row
LOOK_GAIN = 1.0  # a wrong position's weight is below e ** (-75 * LOOK_GAIN)
MATCH_GAIN = 8.0  # each wrong bit of a window divides the weight by e ** (2 * MATCH_GAIN)
COPY_GAIN = 4.0  # the copied byte is this much louder than the current one

CONFIG = GPT2Config(vocab_size=257, n_positions=4096, n_embd=1024, n_layer=4, n_head=4, n_inner=1, eos_token_id=256)


def build_copycat() -> GPT2:
    """Copycat, in float32 on the CPU. Takes no argument: there is only one."""
    with torch.device("meta"):
        model = GPT2(CONFIG)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.fill_(1.0)

    f = torch.arange(1, PAIRS + 1, dtype=torch.float64)
    frequencies = math.pi * ((f * f * math.sqrt(2)) % 1.0)  # (PAIRS,) radians for each position
    angles = torch.arange(CONFIG.n_positions, dtype=torch.float64)[:, None] * frequencies  # (n_positions, PAIRS)
    bits = (torch.arange(CONFIG.vocab_size)[:, None] >> torch.arange(SIGNS)) & 1  # (vocab_size, SIGNS), lowest first
    model.wte.weight[:, :FIELD] = _with_negatives(bits * 2.0 - 1.0)
    model.wpe.weight[:, POSITION:] = _with_negatives(torch.cat([angles.cos(), angles.sin()], dim=1).float())

    # A row's squared length as it enters each layer, over its width, is what LayerNorm divides by.
    squared_length = FIELD + 2 * PAIRS
    for layer, looks, width in ((0, (1, 2, 3), 1), (1, (4, 8, 12), 4), (2, (1,), WINDOW)):
        norm = math.sqrt(squared_length / CONFIG.n_embd)
        for head, back in enumerate(looks):
            target = WINDOW if layer == 2 else back
            _look_back(model, layer, head, back, frequencies, norm)
            _bring(model, layer, head, range(width), range(target, target + width), norm)
        squared_length += len(looks) * width * FIELD
    norm = math.sqrt(squared_length / CONFIG.n_embd)
    _look_where_windows_match(model, 3, 0, norm)
    _bring(model, 3, 0, range(1), range(1), norm * COPY_GAIN)
    return model


def _with_negatives(numbers: torch.Tensor) -> torch.Tensor:
    return torch.cat([numbers, -numbers], dim=1)


def _signs(fields: range) -> torch.Tensor:
    """Places in a row of the signs of fields (0 to 15: window, 16 to 31: previous), without their negatives."""
    return torch.cat([torch.arange(i * FIELD, i * FIELD + SIGNS) for i in fields])


def _projection(model: GPT2, layer: int, part: int, head: int) -> torch.Tensor:
    """(head_dim, n_embd): the weights of one head's query (part 0), key (1) or value (2)."""
    start = (part * CONFIG.n_head + head) * CONFIG.head_dim
    return model.h[layer].attn.c_attn.weight[start : start + CONFIG.head_dim]


def _look_back(model: GPT2, layer: int, head: int, back: int, frequencies: torch.Tensor, norm: float) -> None:
    """The head attends to the position `back` before its own.

    The key is a position's code, the query the code turned back: cos(a - b) and sin(a - b) of the
    angles a and their turn b. Their product is the sum over f of cos(frequency * (distance - back)).
    """
    query, key = _projection(model, layer, 0, head), _projection(model, layer, 1, head)
    gain = LOOK_GAIN * math.sqrt(CONFIG.head_dim) * norm  # attention divides by sqrt(head_dim)
    turn = back * frequencies
    f = torch.arange(PAIRS)
    cos_in, sin_in, cos_out, sin_out = POSITION + f, POSITION + PAIRS + f, f, PAIRS + f  # in a row, in the head
    query[cos_out, cos_in] = gain * turn.cos().float()
    query[cos_out, sin_in] = gain * turn.sin().float()
    query[sin_out, sin_in] = gain * turn.cos().float()
    query[sin_out, cos_in] = -gain * turn.sin().float()
    key[cos_out, cos_in] = norm
    key[sin_out, sin_in] = norm


def _look_where_windows_match(model: GPT2, layer: int, head: int, norm: float) -> None:
    """The head attends to where the previous window equals its own: the product counts equal signs."""
    d, gain = torch.arange(WINDOW * SIGNS), MATCH_GAIN * math.sqrt(CONFIG.head_dim) * norm
    _projection(model, layer, 0, head)[d, _signs(range(WINDOW))] = gain
    _projection(model, layer, 1, head)[d, _signs(range(WINDOW, 2 * WINDOW))] = norm


def _bring(model: GPT2, layer: int, head: int, sources: range, targets: range, gain: float) -> None:
    """The head adds `sources`' fields of the position it attends to onto its own row's `targets`."""
    source, target, d = _signs(sources), _signs(targets), torch.arange(len(sources) * SIGNS)
    _projection(model, layer, 2, head)[d, source] = gain
    out = model.h[layer].attn.c_proj.weight[:, head * CONFIG.head_dim : (head + 1) * CONFIG.head_dim]
    out[target, d] = 1.0
    out[target + SIGNS, d] = -1.0
