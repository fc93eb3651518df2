"""What makes GPT-2 faster on a CPU, without `gpt2` knowing of it?

`use_cpu_kernels` swaps modules of a finished model for others that compute the same: products of few rows
as W x^T, padded to a number of rows that the library likes, and GELU by a sigmoid. `keep_freed_memory`
spares a step the page faults of its intermediate results.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanopaged.gpt2 import GPT2, MLP

FEW_ROWS = 256  # where x W^T and W x^T are about equally fast


def use_cpu_kernels(model: GPT2) -> None:
    """Swaps the modules of a model on the CPU, in place; parameters and their names stay."""
    for block in model.h:
        block.attn.c_attn = CpuLinear(block.attn.c_attn, contiguous=True)  # heads are cut out of its rows
        block.attn.c_proj = CpuLinear(block.attn.c_proj)
        block.mlp = CpuMLP(block.mlp)
    model.head = partial(project, weight=model.wte.weight)


class CpuLinear(nn.Module):
    """Takes over the parameters of a Linear; (T, in_features) -> (T, out_features)."""

    def __init__(self, linear: nn.Linear, contiguous: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.contiguous = linear.weight, linear.bias, contiguous

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = project(x, self.weight, self.bias)
        return product.contiguous() if self.contiguous else product


class CpuMLP(nn.Module):
    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.c_fc, self.c_proj = CpuLinear(mlp.c_fc), CpuLinear(mlp.c_proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = pad_rows(x)  # once for both products
        return self.c_proj(gelu(self.c_fc(padded)))[: len(x)]  # (T, n_embd)


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b: (T, n_in), (n_out, n_in), (n_out,) -> (T, n_out), which is a transposed view for few rows.

    Two cores compute W x^T in two thirds of the time of x W^T for the 8 to 64 rows of a decode step, if
    these are a multiple of 8.
    """
    rows = len(x)
    if rows > FEW_ROWS or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    x = pad_rows(x)
    if len(x) <= 8:
        x = x.contiguous()  # of so few columns x^T, each should be contiguous
    product = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())  # (n_out, T or more)
    return product.t()[:rows]


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """(T, n) -> as many rows as W x^T is fast for: for 31 it takes nearly twice as long as for 32."""
    rows = len(x)
    if x.device.type != "cpu" or not 5 < rows <= FEW_ROWS or rows % 8 == 0:  # of 5 or fewer, 8 would take longer
        return x
    return F.pad(x, (0, 0, 0, -rows % 8))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), GELU's approximation; any shape.

    As x sigmoid(2 u), which is the same, it takes half the time of torch's own in float32.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    scale = 2 * math.sqrt(2 / math.pi)
    twice_u = torch.addcmul(x.new_tensor(scale), x, x, value=scale * 0.044715).mul_(x)
    return twice_u.sigmoid_().mul_(x)


def keep_freed_memory() -> None:
    """Makes the C library keep what a step on a CPU frees, for the next layer, and not return it to the system.

    Memory that comes back from the system is handed out page by page, at up to a tenth of a step's time.
    glibc keeps twice the size of the largest block that it has seen freed, 32 MiB at most (mallopt(3),
    M_MMAP_THRESHOLD): so one is allocated and freed here. Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
