"""What does a step cost on the host, with no model? Python's part, which a GPU would wait for.

A decode step of many requests, of short and of long contexts, with a model that returns at once. Each part is timed
inside the real engine:

    schedule   which requests run
    batch      the step as flat tensors
    update     what was computed is recorded
    text       bytes to text and stop strings, and what the engine keeps of each request
    outputs    what `LLM.step` returns

Shown is the median of the steps. Nothing should grow with the context: compare the two rows of each size. Python's
garbage collector is off meanwhile, since its time grows with all objects of the process.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import torch

from nanopaged import engine
from nanopaged.batch import Batch
from nanopaged.engine import LLM
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.sampling_params import SamplingParams
from nanopaged.step import Step
from nanopaged.validation import require_int

REQUESTS = (1, 64, 256)
CONTEXTS = (100, 900)  # tokens of the prompt
TOKEN = ord("x")  # of copycat's tokenizer, which each step draws for every request
PARTS = ("schedule", "batch", "update", "text", "outputs", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each size (default: %(default)s)")
    parser.add_argument("--requests", type=int, action="append", metavar="N",
                        help=f"in a step; may be repeated (default: {', '.join(map(str, REQUESTS))})")


def run(args: argparse.Namespace) -> dict[str, object]:
    steps = require_int("steps", args.steps, 1, 1000)
    sizes = [require_int("requests", size, 1, 4096) for size in args.requests or REQUESTS]
    rows, figures = [], []
    for size in sizes:
        for context in CONTEXTS:
            show_progress(f"{size} requests, {context} tokens each")
            costs = decode_costs(size, context, steps)
            figures.append({"requests": size, "context": context, "ms": costs})
            rows.append([size, context, *(costs[part] for part in PARTS)])
    show_progress("")
    print(table(["requests", "context", *(f"{part} ms" for part in PARTS)], rows))
    print("\n`step` is everything: the parts before it, and what lies between them. Lower is better.")
    return {"steps": figures}


def decode_costs(num_requests: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a decode step, the median of `steps`."""
    seconds: dict[str, list[float]] = defaultdict(list)
    llm = engine_without_model(num_requests, context + steps + 8)

    def timed(name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[name].append(time.perf_counter() - start)
            return result

        return call

    def logits_of(step: Step) -> torch.Tensor:
        timed("batch", Batch.from_step)(step, llm.config.block_size, llm.device)
        return torch.empty(0)

    llm.logits_of = logits_of
    llm.scheduler.schedule = timed("schedule", llm.scheduler.schedule)
    llm.scheduler.update = timed("update", llm.scheduler.update)
    llm._advance = timed("advance", llm._advance)
    with mock.patch.object(engine, "sample", lambda logits, requests: [TOKEN] * len(requests)):
        for i in range(num_requests):
            prompt = [i % 256, i // 256] + [TOKEN] * (context - 2)  # no two begin alike
            llm.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=steps + 4, ignore_eos=True))
        while llm.scheduler.waiting or any(request.num_output_tokens == 0 for request in llm.scheduler.running):
            llm.step()
        seconds.clear()
        gc.collect()
        gc.disable()
        try:
            for _ in range(steps):
                timed("step", llm.step)()
        finally:
            gc.enable()
    inside = zip(seconds["advance"], seconds["schedule"], seconds["batch"], seconds["update"])
    seconds["text"] = [advance - sum(parts) for advance, *parts in inside]
    seconds["outputs"] = [step - advance for step, advance in zip(seconds["step"], seconds["advance"])]
    return {part: 1e3 * statistics.median(seconds[part]) for part in PARTS}


def engine_without_model(num_requests: int, longest: int) -> LLM:
    """One with copycat's tokenizer, and a model so small that its weights do not matter."""
    config = GPT2Config(vocab_size=257, n_positions=longest, n_embd=16, n_layer=1, n_head=1, eos_token_id=256)
    return LLM(GPT2(config).eval(), device="cpu", max_num_seqs=num_requests, max_num_batched_tokens=8192,
               num_blocks=num_requests * (longest // 16 + 1) + 64, enable_prefix_caching=False)
