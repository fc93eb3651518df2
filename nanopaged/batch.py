"""One step as flat tensors: a row for each token, and no padding between requests.

Three requests that compute 3, 1 and 2 tokens in a step, with blocks of 4 slots:

    request       A  A  A  B  C  C          query_start   [0, 3, 4, 6]
    position      0  1  2  9  4  5          seq_lens      [3, 10, 6]     computed, with this step
    slot         20 21 22 29  8  9          block_tables  [[5, -, -], [0, 3, 7], [6, 2, -]]

A token at position p of a request lives in slot `block_table[p // 4] * 4 + p % 4` of the pool. All of
it is one stretch of int32, cut into views, so that a step goes to a GPU in one copy.
"""

from __future__ import annotations

from array import array

import torch

from nanopaged.scheduler import Step


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor's copy on `device`, for which nobody waits: a GPU reads pinned memory while Python goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Batch:
    """What the model needs to know about a step. All tensors are int32, and views of `flat`.

    Attributes:
        token_ids, positions: (num_tokens,), positions in the requests' own sequences.
        slots: (num_tokens,), where each token's K and V are written.
        query_start: (num_requests + 1,), request i's rows are [i], ..., [i + 1] - 1.
        seq_lens: (num_requests,), tokens that its last row attends to.
        logits_rows: (num_sampled,), the rows from which a token is sampled.
        block_tables: (num_requests, width), padded with 0, never read there.
        max_query_len: most rows of one request; it chooses the attention kernel.
    """

    def __init__(self, flat: torch.Tensor, num_tokens: int, num_requests: int, num_sampled: int,
                 max_query_len: int) -> None:
        self.flat = flat
        self.sizes = (num_tokens, num_requests, num_sampled, max_query_len)
        self.max_query_len = max_query_len
        parts = [num_tokens, num_tokens, num_tokens, num_requests + 1, num_requests, num_sampled]
        (self.token_ids, self.positions, self.slots, self.query_start, self.seq_lens, self.logits_rows,
         tables) = flat.split([*parts, len(flat) - sum(parts)])
        self.block_tables = tables.view(num_requests, -1)

    @classmethod
    def from_step(cls, step: Step, block_size: int, device: torch.device, num_requests: int | None = None,
                  table_width: int | None = None) -> Batch:
        """Lays a step's requests out in the step's order.

        A CUDA graph's batch has a fixed size: with `num_requests` the last request is repeated up to that
        number, which writes the same K and V to the same slots again, and `table_width` is the width of
        the block tables. None: as many, and as wide, as the step needs.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start, seq_lens, logits_rows = [0], [], []
        missing = 0 if num_requests is None else num_requests - len(step.requests)
        requests = step.requests + step.requests[-1:] * missing
        for request, num_tokens in zip(requests, step.num_tokens + step.num_tokens[-1:] * missing):
            start = request.num_computed_tokens
            end = start + num_tokens
            table = request.block_table
            if num_tokens == 1:  # as nearly always: without lists of one
                token_ids.append(request.token_ids[start])
                positions.append(start)
                slots.append(table[start // block_size] * block_size + start % block_size)
            else:
                token_ids += request.token_ids[start:end]
                positions += range(start, end)
                slots += [table[p // block_size] * block_size + p % block_size for p in range(start, end)]
            query_start.append(len(token_ids))
            seq_lens.append(end)
            if end == len(request.token_ids):  # one draw for it, and one for each follower that starts from it
                logits_rows += [len(token_ids) - 1] * (1 + len(request.followers))
        width = table_width or max(len(request.block_table) for request in step.requests)
        # Through an array, since torch.tensor takes three times as long to read a list.
        values = array("i", token_ids + positions + slots + query_start + seq_lens + logits_rows)
        padding = array("i", [0]) * width
        for request in requests:
            values.extend(request.block_table)
            values.extend(padding[len(request.block_table) :])
        batch = cls(torch.frombuffer(values, dtype=torch.int32), len(token_ids), len(requests), len(logits_rows),
                    max(step.num_tokens))
        return batch.to(device)

    def to(self, device: torch.device) -> Batch:
        return Batch(upload(self.flat, device), *self.sizes)

    def refill(self, batch: Batch) -> None:
        """Takes over another batch's values, of the same sizes and on the CPU, in the memory that it has."""
        self.flat.copy_(batch.flat.pin_memory() if self.flat.is_cuda else batch.flat, non_blocking=True)
