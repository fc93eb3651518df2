"""One step as flat tensors: a row for each token, and no padding between requests.

Three requests that compute 3, 1 and 2 tokens in a step, with blocks of 4 slots:

    request       A  A  A  B  C  C          query_start   [0, 3, 4, 6]
    position      0  1  2  9  4  5          seq_lens      [3, 10, 6]     computed, with this step
    slot         20 21 22 29  8  9          block_tables  [[5, -, -], [0, 3, 7], [6, 2, -]]

A token at position p of a request lives in slot `block_table[p // 4] * 4 + p % 4` of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopaged.scheduler import Step


@dataclass
class Batch:
    """What the model needs to know about a step. All tensors are on the model's device."""

    token_ids: torch.Tensor  # (num_tokens,) int64
    positions: torch.Tensor  # (num_tokens,) int64, places in the requests' own sequences
    slots: torch.Tensor  # (num_tokens,) int64, where each token's K and V are written
    query_start: torch.Tensor  # (num_requests + 1,) int32, request i's rows are [i], ..., [i + 1] - 1
    seq_lens: torch.Tensor  # (num_requests,) int32, tokens that its last row attends to
    block_tables: torch.Tensor  # (num_requests, longest table) int32, padded with 0, never read there
    max_query_len: int  # most rows of one request; a kernel's grid is sized by it
    logits_rows: torch.Tensor  # (num_sampled,) int64, the rows from which a token is sampled

    @classmethod
    def from_step(cls, step: Step, block_size: int, device: torch.device) -> Batch:
        """Lays a step's requests out in the step's order."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start, seq_lens, logits_rows = [0], [], []
        for request, num_tokens in zip(step.requests, step.num_tokens):
            start = request.num_computed_tokens
            end = start + num_tokens
            table = request.block_table
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
            slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
            query_start.append(len(token_ids))
            seq_lens.append(end)
            if end == len(request.token_ids):  # one draw for it, and one for each follower that starts from it
                logits_rows += [len(token_ids) - 1] * (1 + len(request.followers))
        longest = max(len(request.block_table) for request in step.requests)
        block_tables = [request.block_table + [0] * (longest - len(request.block_table)) for request in step.requests]

        def tensor(values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(tensor(token_ids), tensor(positions), tensor(slots), tensor(query_start, torch.int32),
                   tensor(seq_lens, torch.int32), tensor(block_tables, torch.int32), max(step.num_tokens),
                   tensor(logits_rows))
