"""What is GPT-2: once plainly, and once over a ragged batch with a paged cache?

OpenAI's architecture (Radford et al., 2019): learned positions, LayerNorm before each sublayer
(pre-norm), GELU by its tanh approximation, and the token embedding used again as the output head.
Parameters have the checkpoint's names (`wte`, `h.0.attn.c_attn`, ...).

`dense` is GPT-2 with no cache at all: everything else must agree with it. `forward` is the same
function of a ragged batch. They differ in attention alone, so this is a function that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanopaged.attention_arguments import AttentionBackend
from nanopaged.batch import Batch
from nanopaged.validation import require_int, require_number

# q (T, n_head, head_dim), k and v (T, num_kv_heads, head_dim) -> (T, n_head, head_dim)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GPT2Config:
    """The model's shape; fields and defaults are those of the checkpoint's config.json, except `n_kv_head`."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None  # for grouped-query attention; None: n_head, as in GPT-2
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None  # ends a generation; None: nothing does

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            may_be_none = name in ("n_kv_head", "n_inner")
            if name == "vocab_size" or name.startswith("n_") and not (may_be_none and value is None):
                require_int(name, value, 1)
        require_number("layer_norm_epsilon", self.layer_norm_epsilon, 0.0)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head must divide n_embd, got n_head={self.n_head}, n_embd={self.n_embd}")
        if self.n_head % self.num_kv_heads:
            raise ValueError(f"n_kv_head must divide n_head, got n_kv_head={self.n_kv_head}, n_head={self.n_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def num_kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.head_counts = (config.n_head, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.c_attn = nn.Linear(config.n_embd, sum(self.head_counts) * config.head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        heads = self.c_attn(x).unflatten(1, (-1, self.head_dim))  # (T, n_head + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split(self.head_counts, dim=1)
        return self.c_proj(attend(q, k, v).flatten(1))  # (T, n_embd)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (T, n_embd)


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), attend)  # (T, n_embd)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """A GPT-2 with random weights; `checkpoint.load_model` fills it with trained ones."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits: (T, n_embd) -> (T, vocab_size)."""
        return F.linear(x, self.wte.weight)

    @torch.inference_mode()
    def dense(self, token_ids: torch.Tensor) -> torch.Tensor:
        """One whole sequence, no cache: (T,) int64 -> logits (T, vocab_size)."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))  # (1, heads, T, head_dim)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return y[0].transpose(0, 1)  # (T, n_head, head_dim)

        x = self.wte(token_ids) + self.wpe(torch.arange(len(token_ids), device=token_ids.device))  # (T, n_embd)
        for block in self.h:
            x = block(x, attend)
        return self.head(self.ln_f(x))

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """One step of many requests, T rows -> logits of the rows `batch.logits_rows`, (num_logits, vocab_size).

        Writes to kv_cache, (n_layer, 2, num_blocks, num_kv_heads, block_size, head_dim). If any row of a request is
        not finite, its logits are NaN: then neither its token nor what it wrote is of use to anyone.
        """

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attention.write_kv(k, v, k_cache, v_cache, batch.slots)
            return attention.paged_attention(q, k_cache, v_cache, batch, self.config.head_dim**-0.5)

        x = self.wte(batch.token_ids) + self.wpe(batch.positions)  # (T, n_embd)
        for block, (k_cache, v_cache) in zip(self.h, kv_cache):  # `attend` sees this layer's cache
            x = block(x, attend)
        last = x.index_select(0, batch.logits_rows)  # (num_logits, n_embd): the head is the largest matrix
        if batch.num_cut or batch.num_decodes < len(batch.seq_lens):  # else every row shows in its own logits
            faults = F.pad((~x.isfinite().all(dim=1)).cumsum(0), (1, 0))  # (T + 1,) in all rows before this one
            ends = torch.searchsorted(batch.query_start, batch.logits_rows, right=True)  # (num_logits,)
            spoiled = faults[batch.query_start[ends]] > faults[batch.query_start[ends - 1]]
            last[len(last) - batch.num_cut :] = 0.0  # what these rows predict may overflow: nobody asked for it
            last = last.masked_fill(spoiled[:, None], torch.nan)
        return self.head(self.ln_f(last))
