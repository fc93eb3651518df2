"""nanopaged: PagedAttention, small enough to read in an evening.

The public names are loaded when they are first used, so that the scheduler and the allocator can be
imported, tested and simulated where torch is not even installed.
"""

from __future__ import annotations

import importlib
import os

# torch's threads spin while they wait for each other. With another program on a core, they spin most of the time that
# it leaves: a step takes three times as long. After 1,000 turns they sleep, which costs little where nobody else works
# (docs/benchmarks.md). It is read when torch is first imported, and what the user has set stays.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"

_PUBLIC = {"LLM": "engine", "SamplingParams": "sampling_params", "RequestOutput": "outputs",
           "CompletionOutput": "outputs", "TooManyWaiting": "waiting", "PolicyError": "waiting"}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanopaged' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nanopaged.{_PUBLIC[name]}"), name)
