"""One step as flat tensors: a row for each token, and no padding between requests.

Three requests that compute 1, 3 and 2 tokens in a step, with blocks of 4 slots:

    request       A  B  B  B  C  C          query_start   [0, 1, 4, 6]
    position      9  0  1  2  4  5          seq_lens      [10, 3, 6]     computed, with this step
    slot         29 20 21 22  8  9          block_tables  [[0, 3, 7], [5, -, -], [6, 2, -]]

A token at position p of a request lives in slot `block_table[p // 4] * 4 + p % 4` of the pool. All of
it is one range of int32, cut into views, so that a step goes to a GPU in one copy.
"""

from __future__ import annotations

from array import array
from itertools import accumulate

import torch

from nanopaged.step import Step


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor's copy on `device`. The host does not wait: a GPU reads pinned memory while Python goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Batch:
    """What the model needs to know about a step. All tensors are int32, and views of `flat`.

    Attributes:
        token_ids, positions: (num_tokens,), positions in the requests' own sequences.
        slots: (num_tokens,), where each token's K and V are written.
        query_start: (num_requests + 1,), request i's rows are query_start[i], ..., query_start[i + 1] - 1.
        seq_lens: (num_requests,), tokens that its last row attends to.
        logits_rows: (num_sampled + num_cut,), the last row of each request: first those from which a token is sampled.
        block_tables: (num_requests, width), padded with 0, never read there.
        num_decodes: the first `num_decodes` requests have one row each.
        num_cut: the last `num_cut` of `logits_rows` give no token.
        plan: what an attention may compute from these once, for all layers; None until then.
    """

    def __init__(self, flat: torch.Tensor, num_tokens: int, num_requests: int, num_logits: int,
                 num_decodes: int, num_cut: int = 0) -> None:
        self.flat = flat
        self.num_decodes, self.num_cut = num_decodes, num_cut
        self.plan: object = None
        parts = [num_tokens, num_tokens, num_tokens, num_requests + 1, num_requests, num_logits]
        (self.token_ids, self.positions, self.slots, self.query_start, self.seq_lens, self.logits_rows,
         tables) = flat.split([*parts, len(flat) - sum(parts)])
        self.block_tables = tables.view(num_requests, -1)

    @classmethod
    def from_step(cls, step: Step, block_size: int, device: torch.device) -> Batch:
        rows = list(zip(step.requests, step.starts, step.num_tokens))
        decodes, chunks = rows[: step.num_decodes], rows[step.num_decodes :]
        token_ids = [request.token_ids[p] for request, p, _ in decodes]
        positions = step.starts[: step.num_decodes]
        slots = [request.block_table[p // block_size] * block_size + p % block_size for request, p, _ in decodes]
        for request, start, num_tokens in chunks:
            end, table = start + num_tokens, request.block_table
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
        query_start = list(accumulate(step.num_tokens, initial=0))
        seq_lens = [start + num_tokens for _, start, num_tokens in rows]
        logits_rows = [query_start[i + 1] - 1 for i, _ in step.sampled] + [query_start[i + 1] - 1 for i in step.cut]
        # Through an array, since torch.tensor takes three times as long to read a list.
        values = array("i", token_ids + positions + slots + query_start + seq_lens + logits_rows)
        padding = array("i", [0]) * max([len(request.block_table) for request in step.requests])
        for request in step.requests:
            values += request.block_table + padding[len(request.block_table) :]
        flat = upload(torch.frombuffer(values, dtype=torch.int32), device)
        return cls(flat, len(token_ids), len(step.requests), len(logits_rows), step.num_decodes, len(step.cut))
