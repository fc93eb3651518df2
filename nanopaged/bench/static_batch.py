"""The baseline: how are batches served without paging?

Requests are gathered into a batch, each padded on the left to the longest prompt, each with a contiguous
cache for the longest prompt and the longest output. The batch runs until its longest request has ended;
requests that have ended earlier are computed all the same. The layers are those of the given model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from nanopaged.gpt2 import GPT2


def static_cache_tokens(prompts: Sequence[list[int]], output_lens: Sequence[int]) -> int:
    """Tokens of KV that the batch's cache has room for; the last token's K and V are never read."""
    return len(prompts) * (max(map(len, prompts)) + max(output_lens) - 1)


def static_cache(model: GPT2, prompts: Sequence[list[int]], output_lens: Sequence[int]) -> torch.Tensor:
    """The batch's cache, its memory touched: (n_layer, 2, B, num_kv_heads, longest, head_dim)."""
    config, longest = model.config, static_cache_tokens(prompts, output_lens) // len(prompts)
    return torch.zeros(config.n_layer, 2, len(prompts), config.num_kv_heads, longest, config.head_dim,
                       device=model.wte.weight.device, dtype=model.wte.weight.dtype)


@torch.inference_mode()
def generate_static(model: GPT2, prompts: Sequence[list[int]], output_lens: Sequence[int], cache: torch.Tensor,
                    prefill_rows: int, after_step: Callable[[int], None] = lambda num_tokens: None) -> list[list[int]]:
    """Continues one batch of B prompts greedily.

    Args:
        output_lens: tokens to generate for each prompt.
        cache: of `static_cache`; written in place.
        prefill_rows: tokens, with padding, of the prompts that are computed together (whole prompts, at
            least one), so that the baseline's intermediate results are no larger than those of a paged step.
        after_step: called with the number of output tokens, of all requests, that are done.

    Returns the output tokens of each.
    """
    device, batch, width = cache.device, len(prompts), max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)  # (B,)
    token_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, width)

    def forward(rows: slice, token_ids: torch.Tensor, start: int) -> torch.Tensor:
        """The most likely token after columns start, ..., start + T - 1 of some rows: (b, T) -> (b,)."""
        num_rows, num_columns = token_ids.shape
        end = start + num_columns
        columns = torch.arange(end, device=device)
        seen = columns >= padding[rows, None, None, None]  # (b, 1, 1, end)
        if num_columns > 1:
            seen = (seen & (columns <= columns[start:, None])) | (columns == columns[start:, None])  # (b, 1, T, end)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (heads.unflatten(0, (num_rows, -1)).transpose(1, 2) for heads in (q, k, v))
            k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v  # (b, heads, T, head_dim)
            y = F.scaled_dot_product_attention(q, k_cache[:, :, :end], v_cache[:, :, :end], seen, enable_gqa=True)
            return y.transpose(1, 2).flatten(0, 1)  # (b * T, n_head, head_dim)

        positions = (columns[start:] - padding[rows, None]).clamp(min=0)  # (b, T)
        x = (model.wte(token_ids) + model.wpe(positions)).flatten(0, 1)  # (b * T, n_embd)
        for block, (k_cache, v_cache) in zip(model.h, cache[:, :, rows]):  # `attend` sees this layer's cache
            x = block(x, attend)
        last = x.unflatten(0, (num_rows, -1))[:, -1]  # (b, n_embd)
        return model.head(model.ln_f(last)).argmax(dim=-1)

    at_once = max(1, prefill_rows // width)
    groups = [slice(i, min(i + at_once, batch)) for i in range(0, batch, at_once)]
    newest = torch.cat([forward(rows, token_ids[rows], 0) for rows in groups])  # (B,)
    outputs = [newest]
    while len(outputs) < max(output_lens):
        after_step(sum(min(len(outputs), length) for length in output_lens))
        newest = forward(slice(0, batch), newest[:, None], width + len(outputs) - 1)
        outputs.append(newest)
    return [tokens[:length] for tokens, length in zip(torch.stack(outputs, dim=1).tolist(), output_lens)]
