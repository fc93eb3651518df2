"""Which token comes next?

Each row of a batch is drawn with one uniform number, by inverting its cumulative distribution. The
number is a pure function of the request's seed and of how many tokens it has: so the token does not
depend on other requests, and a step that is repeated after a fault draws the same one again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanopaged.batch import upload
from nanopaged.request import Request
from nanopaged.sampling_params import hashed


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the `index`-th token of a request; the same on every machine."""
    return (hashed(seed, index) >> 11) * 2.0**-53  # 53 bits: a double's precision, below 1


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    """One token for each row of `logits`, (num_rows, vocab_size) of any float dtype.

    Row i is sampled with the parameters and seed of `requests[i]`. The host waits for the device only where it reads
    the num_rows ids back: what a draw needs goes up in one copy, and a fault in the logits is reported as the id -1.
    """
    likeliest, token_ids = logits.max(dim=-1)  # (num_rows,)
    rows = [i for i, request in enumerate(requests) if request.params.temperature > 0]
    if rows:
        params = [requests[i].params for i in rows]
        draws = [uniform(requests[i].seed, requests[i].num_output_tokens) for i in rows]
        vocab_size = logits.shape[1]
        values = upload(torch.tensor([
            rows,
            [p.temperature for p in params],
            [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params],
            [p.top_p if p.top_p < 1 else torch.inf for p in params],
            draws,
        ], dtype=torch.float64), logits.device)  # (5, rows): a double holds every one of them exactly
        chosen = values[0].long()
        token_ids = token_ids.index_copy(0, chosen, _draw(logits.index_select(0, chosen), *values[1:]))
    token_ids = token_ids.masked_fill(~likeliest.isfinite(), -1).tolist()
    if -1 in token_ids:
        raise FloatingPointError("the model's logits are not finite: a weight is not, the dtype overflows, or "
                                 "attention has read slots that were never written; compare with GPT2.dense")
    return token_ids


def _draw(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
          draws: torch.Tensor) -> torch.Tensor:
    """Draws from each row's filtered distribution; the other arguments are float64, (rows,)."""
    # Every row is sorted, whether or not it is filtered: the order in which the probabilities are
    # added up decides which token a draw lands on, and must not depend on the row's neighbours.
    scores, ids = logits.float().sort(dim=-1, descending=True, stable=True)  # (rows, vocab)
    # Subtracting the maximum first keeps a tiny temperature from overflowing; the clamp, from 0 / 0.
    scores = (scores - scores[:, :1]) / temperature.float().clamp(min=1e-6)[:, None]
    rank = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill(rank >= top_k[:, None], -torch.inf)
    # Summed in double: on a GPU the order of a sum may vary, and its rounding must not move a draw.
    probs = scores.softmax(dim=-1).double()  # (rows, vocab), largest first
    before = probs.cumsum(dim=-1) - probs  # the mass of all likelier tokens
    kept = (before < top_p[:, None]) & (probs > 0)
    kept[:, 0] = True  # however small top_p is
    cumulative = (probs * kept).cumsum(dim=-1)
    target = draws[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)  # (rows, 1)
    # A draw just below 1 may round up to the total: then the last kept token is meant.
    place = place.clamp(max=kept.sum(dim=-1, keepdim=True) - 1)
    return ids.gather(1, place).squeeze(1)
