"""What does one step of the engine cost? Fits the constants of `simulator.StepCost` to real steps.

A step reads all weights once (a fixed cost), computes each of its tokens, and reads the K and V of
each request's context. Random prompts of many lengths run through the engine, alone and in batches;
each step's seconds are one equation in these three unknowns, solved by least squares of the relative
error, so that short steps weigh as much as long ones. Every step is timed in several rounds, and its
shortest time is used: noise can only add to it. Random weights cost as much as trained ones.
"""

from __future__ import annotations

import argparse
import random
import statistics

import torch

from nanopaged import LLM, SamplingParams
from nanopaged.bench.inputs import random_gpt2
from nanopaged.bench.timing import timed_steps
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.validation import require_int

BATCH_SIZES = (1, 4, 16)
OUTPUT_TOKENS = 8

Equation = tuple[float, float, float, float]  # of a step: 1, tokens computed, tokens of context read, seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of a GPT-2 of width 768 (default: %(default)s, 124M)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing all steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    require_int("rounds", args.rounds, 1)
    model = random_gpt2(args.layers, seed=args.seed)
    llm = LLM(model, device=args.device, num_blocks=1024, enable_prefix_caching=False)
    equations_of(llm, random.Random(args.seed), 1)  # warms up
    rounds = []
    for i in range(args.rounds):
        rng, steps = random.Random(args.seed), []  # the same prompts again, so the same steps
        for batch_size in BATCH_SIZES:
            show_progress(f"round {i + 1} of {args.rounds}: batches of {batch_size} requests")
            steps += equations_of(llm, rng, batch_size)
        rounds.append(steps)
    equations = torch.tensor(rounds, dtype=torch.float64).amin(0)  # (steps, 4)
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
        print("\nA cost cannot be negative: there was too much noise. Try again when the machine is idle.")
    return figures


def equations_of(llm: LLM, rng: random.Random, batch_size: int) -> list[Equation]:
    """One for each step that `batch_size` random requests take."""
    shape = llm.model.config
    longest = shape.n_positions - OUTPUT_TOKENS
    for _ in range(batch_size):
        prompt = [rng.randrange(shape.vocab_size) for _ in range(round(longest ** rng.uniform(0.3, 1.0)))]
        llm.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True))
    return [(1.0, size.tokens, size.context, seconds) for seconds, size in timed_steps(llm)]
