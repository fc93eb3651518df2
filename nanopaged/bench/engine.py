"""How fast is the whole engine on a CPU, and how far from what its matrix products alone would take?

The shapes of GPT-2 124M with random weights in float32, requests of mixed lengths, greedy. The paged
engine is compared with three others on the same model: the floor (the matrix products of the same steps,
those of prompts' attention among them, and their KV bytes read once at the speed of a large read, nothing
else; timed in turn with the engine's steps); static batches, padded to the longest, as large as the KV
memory of the paged run allows; and one request at a time.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import torch

from nanopaged import LLM, SamplingParams
from nanopaged.bench.inputs import random_gpt2
from nanopaged.bench.static_batch import generate_static, static_cache, static_cache_tokens
from nanopaged.bench.timing import StepSize, timed_steps
from nanopaged.config import prepare_model
from nanopaged.fast.cpu import pad_rows, project
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.kv_cache import block_bytes
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.validation import require_int

BLOCK_SIZE = 16
STEP_TOKENS = 512  # rows of a step at most, for the paged engine (its default on a CPU) and for static prefill
ALONE = 2  # requests that are run one at a time: enough for a rate; all of them would take two minutes more


@dataclass
class Workload:
    prompts: list[list[int]]
    output_lens: list[int]

    @classmethod
    def mixed(cls, num_requests: int, max_prompt: int, max_output: int, seed: int, prefix_len: int = 0) -> Workload:
        """Lengths drawn uniformly: of prompts from a sixteenth of the longest on, of outputs from an eighth."""
        rng = random.Random(seed)
        prefix = rng.choices(range(GPT2Config.vocab_size), k=prefix_len)
        prompts = [prefix + rng.choices(range(GPT2Config.vocab_size), k=rng.randint(-(-max_prompt // 16), max_prompt))
                   for _ in range(num_requests)]
        return cls(prompts, [rng.randint(-(-max_output // 8), max_output) for _ in range(num_requests)])

    def sample(self, count: int) -> Workload:
        """A few requests that represent all: evenly spaced in the order of their lengths."""
        order = sorted(range(len(self.prompts)), key=lambda i: (len(self.prompts[i]) + self.output_lens[i], i))
        chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(min(count, len(order)))]
        return Workload([self.prompts[i] for i in chosen], [self.output_lens[i] for i in chosen])

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)


class Floor:
    """The least time that a step must take, with the machine's speed at that moment."""

    def __init__(self, model: GPT2) -> None:
        self.model = model
        config, dtype = model.config, model.wte.weight.dtype
        self.kv_token_bytes = block_bytes(config, 1, dtype)
        self.block_weights = sum(weight.numel() for weight in model.h.parameters() if weight.dim() == 2)
        self.wide = torch.randn(STEP_TOKENS, config.n_inner or 4 * config.n_embd, dtype=dtype)
        self.narrow = torch.randn(STEP_TOKENS, config.n_embd, dtype=dtype)
        self.bytes_per_s = self._read_speed()
        self.timed = (0, 0)  # rows, and sampled rows, of the products that were timed last
        self.products_s = 0.0

    @staticmethod
    def _read_speed() -> float:
        """Bytes per second of a sum over 256 MiB, far more than a cache holds; the best of five."""
        large, best = torch.ones(2**26), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            large.sum()
            best = min(best, time.perf_counter() - start)
        return large.nbytes / best

    def seconds(self, size: StepSize, step: int) -> float:
        """Of a step; if it has as many rows as the one before, its products are timed every other time.

        Attention of one row reads K and V, and computes next to nothing. Attention of many rows also has two products,
        which are taken at the speed of the step's other products.
        """
        rows = size.tokens, size.logits_rows
        if rows != self.timed or step % 2 == 0:
            self.timed, self.products_s = rows, self._products(*rows)
        config = self.model.config
        attention = 2 * size.scores * config.n_layer * config.n_embd  # multiplications
        others = size.tokens * self.block_weights + size.logits_rows * self.model.wte.weight.numel()
        return self.products_s * (1 + attention / others) + size.context * self.kv_token_bytes / self.bytes_per_s

    @torch.inference_mode()
    def _products(self, num_rows: int, num_sampled: int) -> float:
        """By the same routine as the model's, without biases, and without the copies for padding."""
        narrow, wide = pad_rows(self.narrow[:num_rows]), pad_rows(self.wide[:num_rows])
        sampled = pad_rows(self.narrow[:num_sampled])
        start = time.perf_counter()
        for block in self.model.h:
            project(narrow, block.attn.c_attn.weight)
            project(narrow, block.attn.c_proj.weight)
            project(narrow, block.mlp.c_fc.weight)
            project(wide, block.mlp.c_proj.weight)
        if num_sampled:
            project(sampled, self.model.wte.weight)
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, nargs="+", help="how many, one table for each (default: 16 64)")
    parser.add_argument("--max-prompt", type=int, default=256, help="longest prompt, in tokens (default: 256)")
    parser.add_argument("--max-output", type=int, default=128, help="longest output, in tokens (default: 128)")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS",
                        help="instead: time to all first tokens (of 64 requests, unless --requests), with and without "
                        "sharing a prefix of this length")
    parser.add_argument("--layers", type=int, default=12, help="the model's layers (default: 12)")
    parser.add_argument("--width", type=int, default=768, help="the model's width, 64 for each head (default: 768)")
    parser.add_argument("--no-compile", action="store_true", help="decode attention in torch's own operations")
    parser.add_argument("--seed", type=int, default=0, help="of weights and requests (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Prints a table for each number of requests; returns every figure in them."""
    counts = args.requests or ([64] if args.shared_prefix else [16, 64])
    for count in counts:
        require_int("--requests", count, 1)
    require_int("--max-prompt", args.max_prompt, 1)
    require_int("--max-output", args.max_output, 1)
    require_int("--shared-prefix", args.shared_prefix, 0)
    longest = args.shared_prefix + args.max_prompt + args.max_output
    if longest > GPT2Config.n_positions:
        raise ValueError(f"prefix, prompt and output may have {GPT2Config.n_positions} tokens together, got {longest}")
    if args.width % 64:
        raise ValueError(f"--width must be a multiple of 64, got {args.width}")
    model, threads = random_gpt2(args.layers, args.width, args.seed), torch.get_num_threads()
    prepare_model(model, torch.device("cpu"), torch.float32)  # as in an engine: static batches run on it too
    if args.shared_prefix:
        return {"threads": threads, "shared_prefix": [_prefix_sharing(model, count, args) for count in counts]}
    largest = Workload.mixed(max(counts), args.max_prompt, args.max_output, args.seed)
    alone = _one_at_a_time(model, largest.sample(ALONE))
    print(f"GPT-2, {args.layers} layers of {args.width}, float32, {threads} threads; output tokens/s, higher is "
          "better.\n"
          '"of floor": at 1 a step takes the time of its matrix products and of reading its KV once, nothing else.\n'
          "Static: batches padded to the longest, of as many requests as fit the paged run's largest KV memory.\n"
          "Static and one at a time are rates of a sample: of whole batches with half of the requests, "
          f"and of {ALONE} requests.")
    return {"threads": threads, "one_at_a_time": alone,
            "runs": [_compare(model, count, alone, args) for count in counts]}


def _engine(model: GPT2, work: Workload, compile: bool, seats: int | None = None, sharing: bool = True) -> LLM:
    """An engine with room for every request at full length, its threads and memory warmed up."""
    blocks = sum(-(-(len(prompt) + length) // BLOCK_SIZE) for prompt, length in zip(work.prompts, work.output_lens))
    llm = LLM(model, device="cpu", block_size=BLOCK_SIZE, num_blocks=blocks, max_num_seqs=seats or len(work.prompts),
              max_num_batched_tokens=STEP_TOKENS, watermark=0.0, enable_prefix_caching=sharing, compile=compile)
    llm.kv_cache.blocks.zero_()  # pages never written are not in memory yet, and a server's pool soon is
    llm.generate([[0]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    return llm


def _send(llm: LLM, work: Workload) -> None:
    for prompt, length in zip(work.prompts, work.output_lens):
        llm.add_request(prompt, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))


def _one_at_a_time(model: GPT2, work: Workload) -> dict[str, float]:
    llm = _engine(model, work, compile=False, seats=1)
    _send(llm, work)
    seconds, steps = 0.0, 0
    for step_seconds, _ in timed_steps(llm):
        seconds += step_seconds
        steps += 1
        show_progress(f"one request at a time: {steps} of {work.output_tokens} steps")
    return {"requests": len(work.prompts), "steps": steps, "seconds": seconds,
            "tokens_per_s": work.output_tokens / seconds}


def _paged(model: GPT2, work: Workload, compile: bool) -> dict[str, float]:
    """The engine's run, each step followed by its floor, so that both see the same noise."""
    llm = _engine(model, work, compile)
    floor = Floor(llm.model)
    _send(llm, work)
    seconds = floor_seconds = 0.0
    steps = peak_blocks = 0
    for step_seconds, size in timed_steps(llm):
        seconds += step_seconds
        floor_seconds += floor.seconds(size, steps)
        steps += 1
        peak_blocks = max(peak_blocks, llm.stats().referenced_blocks)
        show_progress(f"paged, {len(work.prompts)} requests, and its floor: {steps} steps")
    return {"steps": steps, "seconds": seconds, "floor_seconds": floor_seconds,
            "tokens_per_s": work.output_tokens / seconds, "floor_tokens_per_s": work.output_tokens / floor_seconds,
            "share_of_floor": floor_seconds / seconds, "read_gb_per_s": floor.bytes_per_s / 1e9,
            "kv_mib": peak_blocks * BLOCK_SIZE * floor.kv_token_bytes / 2**20, "kv_tokens": peak_blocks * BLOCK_SIZE}


def _static(model: GPT2, work: Workload, kv_tokens: int) -> dict[str, float]:
    """In order of arrival, in as few batches of equal size as `kv_tokens` allow, each request at the longest length.

    Whole batches run until half of the requests are done: the others are drawn in the same way.
    """
    count = len(work.prompts)
    room = max(1, kv_tokens // static_cache_tokens([max(work.prompts, key=len)], work.output_lens))
    seats = -(-count // -(-count // room))
    done = steps = used = 0
    seconds = 0.0
    for i in range(0, -(-count // 2), seats):
        prompts, output_lens = work.prompts[i : i + seats], work.output_lens[i : i + seats]
        cache = static_cache(model, prompts, output_lens)
        start = time.perf_counter()
        generate_static(model, prompts, output_lens, cache, STEP_TOKENS, lambda tokens: show_progress(
            f"static batches, {count} requests: {done + tokens} tokens"))
        seconds += time.perf_counter() - start
        done, steps = done + sum(output_lens), steps + max(output_lens)
        used = max(used, cache.nbytes)
    return {"seats": seats, "output_tokens": done, "steps": steps, "seconds": seconds, "tokens_per_s": done / seconds,
            "kv_mib": used / 2**20}


def _compare(model: GPT2, count: int, alone: dict[str, float], args: argparse.Namespace) -> dict[str, object]:
    work = Workload.mixed(count, args.max_prompt, args.max_output, args.seed)
    paged = _paged(model, work, compile=not args.no_compile)
    static = _static(model, work, paged["kv_tokens"])
    show_progress("")
    rate, floor_rate = paged["tokens_per_s"], paged["floor_tokens_per_s"]
    print(f"\n{count} requests: {sum(map(len, work.prompts)):,} prompt and {work.output_tokens:,} output tokens")
    print(table(["", "tokens/s", "of floor", "paged is faster", "seconds", "steps", "KV MiB"], [
        ["the floor", floor_rate, 1.0, None, paged["floor_seconds"], paged["steps"], None],
        ["paged", rate, rate / floor_rate, None, paged["seconds"], paged["steps"], paged["kv_mib"]],
        [f"static, {static['seats']} seats", static["tokens_per_s"], None, f"{rate / static['tokens_per_s']:.2f} x",
         static["seconds"], static["steps"], static["kv_mib"]],
        ["one at a time", alone["tokens_per_s"], None, f"{rate / alone['tokens_per_s']:.2f} x", alone["seconds"],
         alone["steps"], None]]), flush=True)
    return {"requests": count, "output_tokens": work.output_tokens, "paged": paged, "static": static,
            "times_static": rate / static["tokens_per_s"], "times_one_at_a_time": rate / alone["tokens_per_s"]}


def _prefix_sharing(model: GPT2, count: int, args: argparse.Namespace) -> dict[str, float]:
    """Time until every request has its first token, with and without sharing their prefix."""
    work = Workload.mixed(count, args.max_prompt, args.max_output, args.seed, args.shared_prefix)
    work.output_lens = [1] * count
    seconds, computed, rows = {True: 0.0, False: 0.0}, {True: 0, False: 0}, []
    for sharing in (True, False):
        llm = _engine(model, work, compile=False, sharing=sharing)
        _send(llm, work)
        for step_seconds, size in timed_steps(llm):
            seconds[sharing] += step_seconds
            computed[sharing] += size.tokens
            show_progress(f"sharing {'on' if sharing else 'off'}: {llm.stats().num_finished} of {count} first tokens")
        rows.append(["on" if sharing else "off", seconds[sharing], computed[sharing],
                     1000 * seconds[sharing] / computed[sharing]])
    show_progress("")
    predicted, measured = computed[False] / computed[True], seconds[False] / seconds[True]
    print(f"{count} requests with a common prefix of {args.shared_prefix} tokens, time to all first tokens; lower is "
          "better")
    print(table(["prefix sharing", "seconds", "tokens computed", "ms a token"], rows))
    print(f"The saved tokens predict {predicted:.2f} times the speed; measured: {measured:.2f} times.", flush=True)
    return {"requests": count, "seconds_on": seconds[True], "seconds_off": seconds[False],
            "computed_on": computed[True], "computed_off": computed[False], "predicted": predicted,
            "measured": measured}
