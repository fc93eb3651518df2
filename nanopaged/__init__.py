"""nanopaged: PagedAttention, small enough to read in an evening.

The public names are loaded when they are first used, so that the scheduler and the allocator can be
imported, tested and simulated where torch is not even installed.
"""

from __future__ import annotations

import importlib

_PUBLIC = {"LLM": "engine", "SamplingParams": "sampling_params", "RequestOutput": "outputs",
           "CompletionOutput": "outputs", "TooManyWaiting": "waiting", "PolicyError": "waiting"}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanopaged' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanopaged.{_PUBLIC[name]}"), name)
