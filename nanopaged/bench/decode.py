"""How close is a whole decode step to its floor, and what do CUDA graphs gain?

Each step must read every weight once, and each request's K and V once: these bytes, divided by the
bandwidth of a large copy, are the floor. The times include all that a user waits for: scheduling, the
model, sampling and bookkeeping, from before the first step until after the last. GPT-2 124M with random
weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import asdict, dataclass

import torch

from nanopaged import LLM, SamplingParams
from nanopaged.bench.inputs import random_gpt2
from nanopaged.bench.timing import copy_bandwidth, device_name
from nanopaged.kv_cache import block_bytes
from nanopaged.attention_kernels import triton
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.validation import has_folder, require_int

NUM_STEPS = 16  # are timed together; the median of several such runs is shown


@dataclass(frozen=True)
class Timing:
    """Seconds for one step; `floor_s` is for the same bytes, `graphs_s` is None without CUDA graphs."""

    requests: int
    context: float  # tokens, the mean of all requests halfway through the timed steps
    eager_s: float
    graphs_s: float | None
    floor_s: float


def step_seconds(llm: LLM, num_requests: int, context: int, runs: int) -> tuple[float, float]:
    """(seconds, mean context) of one decode step, while `num_requests` decode with about `context` tokens each."""
    rng = random.Random(0)
    num_tokens = (runs + 1) * NUM_STEPS + 2
    for _ in range(num_requests):
        prompt = [rng.randrange(llm.model.config.vocab_size) for _ in range(context - num_tokens // 2)]
        llm.add_request(prompt, SamplingParams(max_tokens=num_tokens + num_requests, temperature=0.0, ignore_eos=True))
    while any(request.num_output_tokens == 0 for request in llm.scheduler.running) or llm.scheduler.waiting:
        llm.step()
    times = []
    for _ in range(runs + 1):  # the first also compiles, and records
        start = time.perf_counter()
        for _ in range(NUM_STEPS):
            llm.step()
        times.append((time.perf_counter() - start) / NUM_STEPS)
    running = list(llm.scheduler.running)
    halfway = statistics.mean(request.num_computed_tokens for request in running) - runs * NUM_STEPS / 2
    for request in running:
        llm.abort_request(request.group_id)
    return statistics.median(times[1:]), halfway


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, action="append", help="how many decode together; may be repeated "
                        "(default: 1, 8, 64 and 256; on a CPU 1 and 8)")
    parser.add_argument("--context", type=int, help="tokens of each request (default: 512; on a CPU 128)")
    parser.add_argument("--layers", type=int, default=12, help="the model's layers (default: %(default)s, GPT-2 124M)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default=None,
                        help="(default: float16; on a CPU float32)")


def run(args: argparse.Namespace) -> dict[str, object]:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    counts = args.requests or ([1, 8, 64, 256] if on_gpu else [1, 8])
    context = args.context or (512 if on_gpu else 128)
    for count in counts:
        require_int("--requests", count, 1, 4096)
    require_int("--context", context, 64, 512)
    require_int("--layers", args.layers, 1)
    model, bandwidth = random_gpt2(args.layers), copy_bandwidth(device)
    print(f"On {device_name(device)}; a large copy moves {bandwidth / 1e9:,.0f} GB/s, read and written.")
    if not on_gpu:
        print("There is no CUDA device: the torch path decodes, without CUDA graphs. The floor is meant for GPUs.")
    runs, times = 5 if on_gpu else 1, {}
    for eager in (False, True) if on_gpu and triton is not None and has_folder("fast") else (True,):
        blocks = max(counts) * (1024 // 16)
        llm = LLM(model, dtype=args.dtype or "auto", max_num_seqs=max(counts), num_blocks=blocks, enforce_eager=eager,
                  enable_prefix_caching=False)
        for count in counts:
            show_progress(f"{count} requests, {'eager' if eager else 'with graphs'}")
            times[eager, count] = step_seconds(llm, count, context, runs)
        weights = sum(p.numel() * p.element_size() for p in llm.model.parameters())
        weights -= llm.model.wpe.weight.numel() * llm.model.wpe.weight.element_size()  # of it a step reads a few rows
        token_bytes = block_bytes(llm.model.config, 1, llm.dtype)  # K and V in all layers
        del llm  # the next one's pool needs its memory
    show_progress("")
    timings = []
    for count in counts:
        (eager_s, mean_context), (graphs_s, _) = times[True, count], times.get((False, count), (None, None))
        floor_s = (weights + count * mean_context * token_bytes) / bandwidth
        timings.append(Timing(count, mean_context, eager_s, graphs_s, floor_s))
    print(table(
        ["requests", "context", "eager tokens/s", "graphs tokens/s", "floor tokens/s", "eager share", "graphs share"],
        [[t.requests, t.context, t.requests / t.eager_s, t.graphs_s and t.requests / t.graphs_s, t.requests / t.floor_s,
          f"{t.floor_s / t.eager_s:.0%}", t.graphs_s and f"{t.floor_s / t.graphs_s:.0%}"] for t in timings]))
    print(f"\nHigher is better. context: tokens, on average. The floor reads {weights / 1e6:,.0f} MB of weights, and"
          f"\n{token_bytes / 1e3:.1f} kB of KV for each token of context, at a large copy's bandwidth."
          "\nshare: of the floor's speed.")
    return {"device": device_name(device), "copy_bytes_per_s": bandwidth, "timings": [asdict(t) for t in timings]}
