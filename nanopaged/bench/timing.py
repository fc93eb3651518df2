"""How long does it take? The device's own time, without Python's, and with data that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 256 * 2**20  # more than any GPU's L2 cache: inputs in turn, as many as this, come from memory


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def num_input_sets(num_bytes: int) -> int:
    """How many inputs of this size to take in turn, so that each has left the cache when it comes again."""
    return max(2, -(-CACHE_BYTES // num_bytes))


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 9) -> float:
    """The median time of one call; the calls do the same on different data, and follow each other.

    On a GPU they are recorded in one CUDA graph and timed by CUDA events: Python launches slower than
    many of them run, and an engine replays graphs too.
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
    """Bytes per second, read and written, of a copy so large that nothing but memory counts."""
    num_bytes = 2**31 if device.type == "cuda" else 2**28
    return num_bytes / copy_seconds(num_bytes, device)
