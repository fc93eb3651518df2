"""What does one step of the engine cost? Fits the constants of `simulator.StepCost` to real steps.

A step reads all weights once (a fixed cost), computes each of its tokens, and reads the K and V of
each request's context. Random prompts of many lengths run through the engine, alone and in batches;
each step's seconds are one equation in these three unknowns, solved by least squares of the relative
error, so that short steps weigh as much as long ones. Every step is timed in several rounds, and its
fastest time counts: what else the machine does can only add. Random weights cost what trained ones do.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from nanopaged import LLM, SamplingParams
from nanopaged.batch import Batch
from nanopaged.bench.model import random_gpt2
from nanopaged.report import show_progress, table
from nanopaged.sampling import sample
from nanopaged.validation import require_int

BATCH_SIZES = (1, 4, 16)
OUTPUT_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of a GPT-2 of width 768 (default: %(default)s, 124M)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing all steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    require_int("rounds", args.rounds, 1)
    llm = LLM(random_gpt2(args.layers, seed=args.seed), device=args.device, num_blocks=1024, enable_prefix_caching=False)
    timed_steps(llm, random.Random(args.seed), 1)  # warms up
    rounds = []
    for i in range(args.rounds):
        rng, steps = random.Random(args.seed), []  # the same prompts again, so the same steps
        for batch_size in BATCH_SIZES:
            show_progress(f"round {i + 1} of {args.rounds}: batches of {batch_size} requests")
            steps += timed_steps(llm, rng, batch_size)
        rounds.append(steps)
    equations = torch.tensor(rounds, dtype=torch.float64).amin(0)  # (steps, 4): 1, tokens, KV tokens read, seconds
    relative = equations / equations[:, 3:]
    constants = torch.linalg.lstsq(relative[:, :3], relative[:, 3:]).solution[:, 0]
    errors = (relative[:, :3] @ constants - 1).abs().tolist()
    fixed_s, per_token_s, per_kv_token_s = constants.tolist()
    figures = {"fixed_s": fixed_s, "per_token_s": per_token_s, "per_kv_token_s": per_kv_token_s,
               "steps": len(steps), "median_relative_error": statistics.median(errors), "device": str(llm.device),
               "threads": torch.get_num_threads()}
    show_progress("")
    print(f"The cost of a step on {llm.device} ({torch.get_num_threads()} threads), fitted to {len(steps)} steps; "
          f"half of them are predicted within {statistics.median(errors):.0%}.\n")
    print(table(["cost", "microseconds"], [["fixed, each step", fixed_s * 1e6],
                                           ["each token computed", per_token_s * 1e6],
                                           ["each token of context read", per_kv_token_s * 1e6]]))
    if min(constants) < 0:
        print("\nA cost below zero cannot be: the machine was too busy to be measured. Try again when it is quiet.")
    return figures


def timed_steps(llm: LLM, rng: random.Random, batch_size: int) -> list[tuple[float, int, int, float]]:
    """(1, tokens computed, tokens of context read, seconds) of each step that `batch_size` random requests take."""
    vocabulary, longest = llm.config.vocab_size, llm.config.n_positions - OUTPUT_TOKENS
    for _ in range(batch_size):
        prompt = [rng.randrange(vocabulary) for _ in range(round(longest ** rng.uniform(0.3, 1.0)))]
        llm.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True))
    steps = []
    while llm.scheduler.has_unfinished():
        start = time.perf_counter()
        step = llm.scheduler.schedule()
        batch = Batch.from_step(step, llm.block_size, llm.device)
        token_ids = sample(llm.model(batch, llm.kv_cache.blocks, llm.attention), step.sampled())  # waits for the device
        context = sum(request.num_computed_tokens + n for request, n in zip(step.requests, step.num_tokens))
        llm.scheduler.update(step, token_ids)
        steps.append((1.0, sum(step.num_tokens), context, time.perf_counter() - start))
    return steps
