"""What is GPT-2, over a ragged batch?

OpenAI's architecture (Radford et al., 2019): learned positions, LayerNorm before each sublayer
(pre-norm), GELU by its tanh approximation, and the token embedding used again as the output head.
Parameters have the checkpoint's names (`wte`, `h.0.attn.c_attn`, ...).

The model is written twice. `dense` is GPT-2 with no cache at all: everything else must agree with it.
`forward` is the same function of a ragged batch; only its attention reads from a paged KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanopaged.batch import Batch
from nanopaged.torch_attention import AttentionBackend
from nanopaged.validation import require_int, require_number


@dataclass(frozen=True)
class GPT2Config:
    """The model's shape; fields and defaults are those of the checkpoint's config.json, but for `n_kv_head`:
    K and V heads, for experiments with grouped-query attention; None is `n_head`, as in GPT-2.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None  # ends a generation; None: nothing does

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "n_inner"):
            if name not in ("n_kv_head", "n_inner") or getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
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


FEW_ROWS = 256  # where the two orders of a product on a CPU, below, are about equally fast


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: (T, n_in), (n_out, n_in), (n_out,) -> (T, n_out), which is a transposed view for few rows on a CPU.

    Two cores get W x^T done in two thirds of the time of x W^T for the 8 to 64 rows of a decode step, if
    these are a multiple of 8.
    """
    rows = len(x)
    if rows > FEW_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    x = pad_rows(x)
    if len(x) <= 8:
        x = x.contiguous()  # of so few columns x^T, each should be one stretch of memory
    product = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())  # (n_out, T or more)
    return product.t()[:rows]


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """(T, n) -> as many rows as W x^T is fast for on a CPU: for 31 it takes nearly twice as long as for 32."""
    rows = len(x)
    if x.device.type != "cpu" or not 5 < rows <= FEW_ROWS or rows % 8 == 0:  # of 5 or fewer, 8 would take longer
        return x
    return F.pad(x, (0, 0, 0, -rows % 8))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), GELU's approximation; any shape.

    As x sigmoid(2 u), which is the same, it takes half the time of torch's own on a CPU.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    scale = 2 * math.sqrt(2 / math.pi)
    twice_u = torch.addcmul(x.new_tensor(scale), x, x, value=scale * 0.044715).mul_(x)
    return twice_u.sigmoid_().mul_(x)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(x, self.weight, self.bias)  # (T, out_features)


class Attention(nn.Module):  # the projections around attention; attention itself is the caller's
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.head_counts = (config.n_head, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.c_attn = Linear(config.n_embd, sum(self.head_counts) * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, n_embd) -> q (T, n_head, head_dim), k and v (T, num_kv_heads, head_dim)."""
        heads = self.c_attn(x).contiguous()  # (T, (n_head + 2 * num_kv_heads) * head_dim)
        heads = heads.unflatten(1, (-1, self.head_dim))  # (T, n_head + 2 * num_kv_heads, head_dim)
        return heads.split(self.head_counts, dim=1)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, n_inner)
        self.c_proj = Linear(n_inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = pad_rows(x)  # once for both products
        return self.c_proj(gelu(self.c_fc(padded)))[: len(x)]  # (T, n_embd)


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)


class GPT2(nn.Module):
    """A GPT-2 with random weights; `checkpoint.load_model` fills it with trained ones."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @torch.inference_mode()
    def dense(self, token_ids: torch.Tensor) -> torch.Tensor:
        """One whole sequence, no cache: (T,) int64 -> logits (T, vocab_size)."""
        positions = torch.arange(len(token_ids), device=token_ids.device)
        x = self.wte(token_ids) + self.wpe(positions)  # (T, n_embd)
        for block in self.h:
            q, k, v = (heads.transpose(0, 1) for heads in block.attn.qkv(block.ln_1(x)))  # (heads, T, head_dim)
            y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
            x = x + block.attn.c_proj(y.transpose(0, 1).flatten(1))  # (T, n_embd)
            x = x + block.mlp(block.ln_2(x))
        return project(self.ln_f(x), self.wte.weight)

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: torch.Tensor, attention: AttentionBackend) -> torch.Tensor:
        """One step of many requests.

        Args:
            batch: the step's tokens, T rows.
            kv_cache: (n_layer, 2, num_blocks, num_kv_heads, block_size, head_dim); written in place.
            attention: the operations to use, of `paged_attention`.

        Returns logits (num_sampled, vocab_size), for the rows `batch.logits_rows` alone: the head is
        the largest matrix of a small GPT-2, and most rows of a prompt need no next token.
        """
        scale = self.config.head_dim**-0.5
        x = self.wte(batch.token_ids) + self.wpe(batch.positions)  # (T, n_embd)
        for block, (k_cache, v_cache) in zip(self.h, kv_cache):
            q, k, v = block.attn.qkv(block.ln_1(x))  # (T, heads, head_dim)
            attention.write_kv(k, v, k_cache, v_cache, batch.slots)
            y = attention.paged_attention(q, k_cache, v_cache, batch.block_tables, batch.query_start, batch.seq_lens,
                                          batch.max_query_len, scale)  # (T, n_head, head_dim)
            x = x + block.attn.c_proj(y.flatten(1))  # (T, n_embd)
            x = x + block.mlp(block.ln_2(x))
        return project(self.ln_f(x.index_select(0, batch.logits_rows)), self.wte.weight)
