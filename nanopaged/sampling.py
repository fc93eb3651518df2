"""Which token comes next?

An exponential race draws it. Token j arrives after E_j / p_j, where E_j is exponentially distributed and
p_j is the token's probability; the first to arrive is token j with probability p_j. (The Gumbel-max trick,
Maddison et al., 2014, is the logarithm of this. 31 random bits are enough for probabilities down to 1e-9.)
E_j is a pure function of the request's seed, of how many tokens it has, and of j. So a token does not
depend on other requests, a step that is repeated after a fault draws the same one again, and logits that
another schedule has rounded differently change a token only where two arrive at practically the same time.

top_k and top_p keep the likeliest tokens. The race of the kept tokens is the same race without the
others, so nothing is sorted: if the winner is not kept, then neither is any token that is no likelier;
all these leave, and the next to arrive is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from nanopaged.batch import upload
from nanopaged.random_numbers import exponentials
from nanopaged.request import Request
from nanopaged.sampling_params import hashed

NOT_FINITE = -1  # stands for the token of a row whose logits are not finite
# Probabilities that are drawn from at once: few enough for a processor's cache, or enough to keep a GPU busy.
AT_ONCE = {"cpu": 2**19, "cuda": 2**24}
BYTES_AT_ONCE = 32  # for each of them, at most: 25 were measured on a CPU


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each row of `logits`, (num_rows, vocab_size) of any float dtype; NOT_FINITE if a row is not finite.

    Row i is sampled with the parameters and seed of `requests[i]`, which go to the device in one copy. The host
    waits for the device where it reads the ids back, and, if rows have filters, until each race has a winner.
    """
    logits, vocab_size = logits.contiguous(), logits.shape[1]  # a CPU's product may leave it column by column
    likeliest, token_ids = logits.max(dim=-1)  # (num_rows,)

    def filters(i: int) -> tuple[int, bool]:
        params = requests[i].params
        return params.top_k if 0 < params.top_k < vocab_size else vocab_size, params.top_p < 1

    rows = sorted((i for i, request in enumerate(requests) if request.params.temperature > 0), key=filters)
    if rows:
        params = [requests[i].params for i in rows]
        bits = [hashed(requests[i].seed, requests[i].num_output_tokens) for i in rows]
        values = upload(torch.tensor([
            rows, [p.temperature for p in params], [p.top_p if p.top_p < 1 else torch.inf for p in params],
            [(b & 0xFFFFFFFF) - 2**31 for b in bits], [(b >> 32) - 2**31 for b in bits],
        ], dtype=torch.float64), logits.device)  # (5, rows): a double holds every one of them exactly
        places = values[0].long()
        size, start = max(1, AT_ONCE[logits.device.type] // vocab_size), 0
        for (top_k, has_top_p), group in groupby(rows, key=filters):
            end = start + len(list(group))
            for chunk in (slice(i, min(i + size, end)) for i in range(start, end, size)):
                place, (temperature, top_p) = places[chunk], values[1:3, chunk]
                # Relative to the likeliest: a tiny temperature does not overflow. The clamps prevent 0 / 0 and denormal
                # numbers, which are slow; nothing below e**-80 is ever drawn.
                probs = logits.index_select(0, place).float().sub_(likeliest[place].float()[:, None])  # (rows, vocab)
                probs.div_(temperature.float().clamp(min=1e-6)[:, None]).clamp_(min=-80.0).exp_()
                speed = probs / exponentials(values[3:, chunk].int(), vocab_size)  # (rows, vocab)
                filtered = top_k < vocab_size or has_top_p
                drawn = _first_kept(speed, probs, top_k, top_p) if filtered else speed.argmax(dim=-1)
                token_ids.index_copy_(0, place, drawn)
            start = end
    return token_ids.masked_fill_(~likeliest.isfinite(), NOT_FINITE).tolist()


def sampling_bytes(num_rows: int, vocab_size: int, element_bytes: int, device_type: str) -> int:
    """Memory that `sample` needs for a moment, with its logits of `element_bytes` each."""
    at_once = min(num_rows, max(1, AT_ONCE[device_type] // vocab_size))
    return vocab_size * (num_rows * element_bytes + at_once * BYTES_AT_ONCE)


def _first_kept(speed: torch.Tensor, probs: torch.Tensor, top_k: int, top_p: torch.Tensor) -> torch.Tensor:
    """The first of the kept tokens, (rows,); speed and probs are (rows, vocab), top_p is (rows,). Overwrites speed.

    A token is kept if fewer than `top_k` tokens are likelier, and if these have less than `top_p` of the mass of
    the `top_k` likeliest ones. Of equally likely tokens the one with the lower id counts as likelier.
    """
    ids = torch.arange(probs.shape[1], device=probs.device)
    largest = probs
    if top_k < probs.shape[1]:  # not needed, but faster than taking out one winner after another
        largest = probs.topk(top_k, dim=-1, sorted=False).values  # (rows, top_k)
        speed.masked_fill_(probs < largest.amin(dim=-1, keepdim=True), 0.0)
    # Summed in double: on a GPU the order of a sum may vary, and its rounding must not move the edge.
    nucleus = top_p * largest.sum(dim=-1, dtype=torch.float64)  # (rows,)
    while True:
        winner = speed.argmax(dim=-1, keepdim=True)  # (rows, 1)
        prob = probs.gather(1, winner)
        likelier = (probs > prob) | ((probs == prob) & (ids < winner))  # (rows, vocab)
        before = (probs * likelier).sum(dim=-1, dtype=torch.float64)
        # Not "before < nucleus": in a row that is not finite nothing is less, and the loop must end.
        kept = (likelier.sum(dim=-1) < top_k) & ~(before >= nucleus)  # (rows,)
        if kept.all():
            return winner.squeeze(1)
        speed.masked_fill_(~(likelier | kept[:, None]), 0.0)
