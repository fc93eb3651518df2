"""Arguments that do not fit each other are named, whichever attention they are given to.

Both backends ask before anything else, so neither Triton nor a GPU is needed here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nanopaged.attention_arguments import AttentionBackend
from nanopaged.paged_attention import TRITON
from nanopaged.torch_attention import TORCH
from tests.test_torch_attention import DEVICE, make_case

pytestmark = pytest.mark.gpu_too
backends = pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["torch", "triton"])
Change = Callable[[object], object]

BAD: list[tuple[str, Change, type, str]] = [  # (argument, what becomes of it, error, words)
    ("q", lambda t: t.double(), TypeError, "q must be float32, float16 or bfloat16"),
    ("q", lambda t: t.half(), TypeError, "k_cache must be torch.float16, got torch.float32"),
    ("q", lambda t: t[:, :, :8], ValueError, "q must have shape"),
    ("q", lambda t: t[:, :, ::2], ValueError, "q must have shape"),
    ("q", lambda t: t[0], ValueError, "q must have 3 dimensions"),
    ("q", lambda t: t.tolist(), TypeError, "q must be a tensor"),
    ("q", lambda t: t[:, :1], ValueError, "num_kv_heads must divide num_heads"),
    ("q", lambda t: t[:, :0], ValueError, "there must be a head and a block at least"),
    ("k_cache", lambda t: t[0], ValueError, "k_cache must have 4 dimensions"),
    ("k_cache", lambda t: t[:, :0], ValueError, "num_blocks, num_kv_heads, block_size, head_dim.* is empty"),
    ("k_cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "blocks must each be contiguous"),
    ("v_cache", lambda t: t[:2], ValueError, "v_cache must have shape"),
    ("v_cache", lambda t: t.half(), TypeError, "v_cache must be torch.float32"),
    ("block_tables", lambda t: t.long(), TypeError, "block_tables must be torch.int32, got torch.int64"),
    ("block_tables", lambda t: t[0], ValueError, "block_tables must have 2 dimensions"),
    ("block_tables", lambda t: t[:1], ValueError, r"block_tables must have shape \(2,"),
    ("block_tables", lambda t: t.repeat(1, 2)[:, ::2], ValueError, "block_tables .* contiguous last dimension"),
    ("block_tables", lambda t: t[:, :0], ValueError, "there must be a head and a block at least"),
    ("query_start", lambda t: t[:-1], ValueError, r"query_start must have shape \(3,\)"),
    ("seq_lens", lambda t: t.float(), TypeError, "seq_lens must be torch.int32"),
    ("seq_lens", lambda t: t.to("meta"), ValueError, "seq_lens must be on the cache's device"),
    ("num_decodes", lambda n: 3, ValueError, "num_decodes must be from 0 to 2, got 3"),
    ("num_decodes", lambda n: -1, ValueError, "num_decodes must be from 0 to 2, got -1"),
    ("num_decodes", lambda n: 2, ValueError, r"num_decodes says that 2 requests have one row each, got q \(3, 2, 16\)"),
    ("num_decodes", float, TypeError, "num_decodes must be an int, got 1.0"),
]


@backends
@pytest.mark.parametrize("name, change, error, words", BAD, ids=[f"{name}: {words}" for name, _, _, words in BAD])
def test_an_argument_of_attention_that_does_not_fit_is_named(
    backend: AttentionBackend, name: str, change: Change, error: type, words: str
) -> None:
    case = make_case([9, 3], [1, 2])
    holder = case if hasattr(case, name) else case.batch
    setattr(holder, name, change(getattr(holder, name)))
    with pytest.raises(error, match=words):
        backend.paged_attention(*case.arguments())


@backends
def test_an_argument_of_writing_that_does_not_fit_is_named(backend: AttentionBackend) -> None:
    cache = torch.zeros(2, 2, 8, 16, device=DEVICE)
    rows, slots = torch.zeros(3, 2, 16, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for k, v, v_cache, where, error, words in (
        (rows[:, :1], rows, cache, slots, ValueError, r"k must have shape \(3, 2, 16\)"),
        (rows, rows[:2], cache, slots, ValueError, r"v must have shape \(3, 2, 16\)"),
        (rows, rows.half(), cache, slots, TypeError, "v must be torch.float32, got torch.float16"),
        (rows, rows, cache[:1], slots, ValueError, r"v_cache must have shape \(2, 2, 8, 16\)"),
        (rows, rows, cache, slots[:2], ValueError, r"slots must have shape \(3,\)"),
        (rows, rows, cache, slots.long(), TypeError, "slots must be torch.int32, got torch.int64"),
    ):
        with pytest.raises(error, match=words):
            backend.write_kv(k, v, cache, v_cache, where)
    assert not cache.any()
