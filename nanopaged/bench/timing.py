"""How long does it take? Operations by the device's own time, on data that no cache holds; and an engine's steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from nanopaged import LLM
from nanopaged.step import Listener, Step

CACHE_BYTES = 256 * 2**20  # larger than any GPU's L2 cache: input sets of this size in all are read from memory


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def num_input_sets(num_bytes: int) -> int:
    """How many inputs of this size to use in turn, so that none is still in the cache when its turn comes again."""
    return max(2, -(-CACHE_BYTES // num_bytes))


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 9) -> float:
    """The median time of one call; the calls do the same on different data, one after the other.

    On a GPU they are recorded in one CUDA graph and timed by CUDA events: Python launches many kernels
    more slowly than they run, and an engine replays graphs too.
    """
    for call in calls[:2]:  # compiles, and wakes the device
        call()
    if device.type != "cuda":
        return statistics.median(_cpu_seconds(calls) for _ in range(min(repeats, 3))) / len(calls)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times) / len(calls)


def _cpu_seconds(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """The time in which a plain copy moves `num_bytes`: it reads half of them and writes the other half."""
    half = max(1, num_bytes // 2)
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(min(64, num_input_sets(num_bytes)))]
    return seconds([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs], device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy so large that only memory bandwidth matters."""
    num_bytes = 2**31 if device.type == "cuda" else 2**28
    return num_bytes / copy_seconds(num_bytes, device)


class StepSize(NamedTuple):
    """How much a step of the engine computed."""

    tokens: int
    logits_rows: int
    context: int  # tokens whose K and V each layer reads; a shared block counts for each of its holders
    scores: int = 0  # of requests with several rows: pairs of a row and a position that it sees, for each head


class _Sizes(Listener):
    def __init__(self) -> None:
        self.steps: list[StepSize] = []

    def stepped(self, step: Step) -> None:
        self.steps.append(StepSize(step.computed_tokens, len(step.sampled) + len(step.cut),
                                   sum(step.starts) + step.computed_tokens,
                                   sum(n * start + n * (n + 1) // 2 for start, n in zip(step.starts, step.num_tokens)
                                       if n > 1)))


def timed_steps(llm: LLM) -> Iterator[tuple[float, StepSize]]:
    """Runs all requests that were added; yields (seconds, size) after each step."""
    sizes = _Sizes()
    llm.scheduler.listeners.append(sizes)
    try:
        while llm.has_unfinished_requests():
            start = time.perf_counter()
            llm.step()  # ends with the tokens on the host, so it waits for the device
            elapsed = time.perf_counter() - start
            yield elapsed, sizes.steps.pop()
    finally:
        llm.scheduler.listeners.remove(sizes)
