"""How fast are a student's kernels, beside the source's? It is printed, and is no grade."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from unittest import mock

import torch

from nanopaged import attention_kernels, paged_attention
from nanopaged.lab.attention.cases import Case, make_case
from nanopaged.lab.isolation import CHECKOUT
from nanopaged.paged_attention import paged_attention_triton

KERNELS = ("prompt_kernel", "decode_kernel", "merge_kernel")


def speeds() -> str:
    """A line for each shape: the workspace's kernels, and the source's. It needs a GPU."""
    lines = []
    for words, lengths, rows in (("8 decodes of 1,024 tokens", [1024] * 8, [1] * 8),
                                 ("1 decode of 8,192 tokens", [8192], [1]),
                                 ("a prompt of 1,024 tokens", [1024], [1024])):
        case = make_case(lengths, rows, num_heads=12, num_kv_heads=12, head_dim=64, block_size=16,
                         dtype=torch.float16, device="cuda")
        yours, ours = _microseconds(case, attention_kernels), _microseconds(case, _source())
        lines.append(f"{words}: {yours:.0f} us; with the source's kernels: {ours:.0f} us")
    return "\n".join(lines)


def _source() -> ModuleType:
    """This checkout's kernels, beside the workspace's."""
    spec = importlib.util.spec_from_file_location("source_kernels", CHECKOUT / "nanopaged" / "attention_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _microseconds(case: Case, kernels: ModuleType) -> float:
    from triton.testing import do_bench

    arguments = case.q, case.k_cache, case.v_cache, case.batch, case.scale
    with mock.patch.multiple(paged_attention, **{name: getattr(kernels, name) for name in KERNELS}):
        return 1000.0 * do_bench(lambda: paged_attention_triton(*arguments), return_mode="median")
