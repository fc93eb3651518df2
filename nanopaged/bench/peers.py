"""How fast are other engines, on the same weights and requests?

Paged (on a CPU with compile=True and without, on a GPU with CUDA graphs), transformers' continuous
batching and its static `generate` of all requests in one batch, and vLLM: GPT-2 124M with random weights,
requests of mixed lengths, greedy. The engines run in turn, each in a process of its own and with its own
defaults; an engine that is not installed is left out. One that needs an environment of its own is named
with its interpreter: --python vllm=PATH. torch's threads sleep rather than spin, in all of them
(GOMP_SPINCOUNT, unless it or OMP_WAIT_POLICY is set).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanopaged.bench.engine import Workload
from nanopaged.bench.inputs import random_gpt2
from nanopaged.bench.peer_process import PACKAGES
from nanopaged.bench.timing import device_name
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.checkpoint import CONV1D, FIXED_FIELDS
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.validation import require_int, require_number

LABELS = {"compiled": "paged, compile=True", "paged": "paged", "continuous": "transformers, continuous batching",
          "static": "transformers, static batch", "vllm": "vLLM"}
GET = {"transformers": "pip install transformers psutil",
       "vllm": "pip install vllm; for a CPU see \"CPU\" on the installation page of vLLM's documentation"}
# Nothing is looked up, and nothing reported, over the network.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
ROOT = Path(__file__).parents[2]


class PeerError(Exception):
    """Why an engine has no figures, in one line."""


class NotInstalled(PeerError):
    """Says how to get it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--max-prompt", type=int, default=256, help="longest prompt, in tokens (default: %(default)s)")
    parser.add_argument("--max-output", type=int, default=128, help="longest output, in tokens (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="the model's layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=768, help="the model's width, 64 for each head (default: 768)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"),
                        help="(default: float16; on a CPU float32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and requests (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each engine runs, in turn; the median counts "
                        "(default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=LABELS, help="run only these")
    parser.add_argument("--python", action="append", metavar="PACKAGE=PATH", default=[],
                        help="the interpreter for nanopaged, transformers or vllm; may be repeated (default: this one)")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which an engine is stopped, with its "
                        "start (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Prints a table of the engines that ran, and a line for each other one; returns all figures."""
    for flag in ("requests", "max-prompt", "max-output", "layers", "rounds"):
        require_int(f"--{flag}", getattr(args, flag.replace("-", "_")), 1)
    if (longest := args.max_prompt + args.max_output) > GPT2Config.n_positions:
        raise ValueError(f"prompt and output may have {GPT2Config.n_positions} tokens together, got {longest}")
    if args.width < 64 or args.width % 64:
        raise ValueError(f"--width must be a positive multiple of 64, got {args.width}")
    require_number("--limit", args.limit, 0.0)
    pythons = _interpreters(args.python)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "float16")
    work = Workload.mixed(args.requests, args.max_prompt, args.max_output, args.seed)
    with tempfile.TemporaryDirectory(prefix="nanopaged-peers-") as name:
        show_progress("writing the weights")
        write_checkpoint(random_gpt2(args.layers, args.width, args.seed), Path(name))
        Path(name, "requests.json").write_text(json.dumps({
            "prompts": work.prompts, "output_lens": work.output_lens, "vocab_size": GPT2Config.vocab_size,
            "device": device.type, "dtype": dtype}), encoding="utf-8")
        results, problems = _in_turn(_engines(args.only, device), pythons, Path(name), args.rounds, args.limit)
    show_progress("")
    figures = _figures(results, work)
    print(f"GPT-2, {args.layers} layers of {args.width}, {dtype}, on {device_name(device)}; {args.requests} requests: "
          f"{sum(map(len, work.prompts)):,} prompt and {work.output_tokens:,} output tokens.")
    if figures:
        _print_table(figures)
    for line in dict.fromkeys(problems.values()):  # a package that is not installed, once
        print(line)
    return {"device": device_name(device), "dtype": dtype, "output_tokens": work.output_tokens, "engines": figures,
            "problems": problems}


def _engines(only: list[str] | None, device: torch.device) -> list[str]:
    """Ours first. `compile` is for CPUs; on a GPU decode steps are CUDA graphs."""
    if only is None:
        only = [engine for engine in LABELS if engine != "compiled" or device.type == "cpu"]
    return [engine for engine in LABELS if engine in only]


def _interpreters(given: list[str]) -> dict[str, str]:
    """The interpreter of each package."""
    pythons = dict.fromkeys(PACKAGES.values(), sys.executable)
    for choice in given:
        package, _, path = choice.partition("=")
        if package not in pythons or (found := shutil.which(path)) is None:
            raise ValueError(f"--python must be one of {', '.join(pythons)}, then = and an interpreter that is there, "
                             f"got {choice!r}")
        pythons[package] = os.path.abspath(found)
    return pythons


def _in_turn(engines: list[str], pythons: dict[str, str], folder: Path, rounds: int,
             limit_s: float) -> tuple[dict[str, list[dict[str, object]]], dict[str, str]]:
    """The results of each engine that ended well in all rounds, and why there are none of each other one."""
    results: dict[str, list[dict[str, object]]] = {engine: [] for engine in engines}
    problems: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for engine in list(results):
            command = [pythons[PACKAGES[engine]], "-m", "nanopaged.bench.peer_process", engine, str(folder)]
            label = f"{LABELS[engine]}, round {number} of {rounds}"
            try:
                results[engine].append(run_peer(command, folder, limit_s, label))
            except NotInstalled as problem:
                problems[engine] = f"{PACKAGES[engine]}: {problem}"
            except PeerError as problem:
                problems[engine] = f"{LABELS[engine]}: {problem}"
            if engine in problems:
                del results[engine]
    return results, problems


def write_checkpoint(model: GPT2, folder: Path) -> None:
    """In Hugging Face's layout, which all engines read; no token ends a text."""
    config = model.config
    fields = {**FIXED_FIELDS, "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
              "n_positions": config.n_positions, "n_embd": config.n_embd, "n_layer": config.n_layer,
              "n_head": config.n_head, "bos_token_id": None, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    state = {f"transformer.{name}": (tensor.t().contiguous() if name.endswith(CONV1D) else tensor).detach()
             for name, tensor in model.named_parameters()}
    torch.save(state, folder / "pytorch_model.bin")


def run_peer(command: list[str], folder: Path, limit_s: float, label: str) -> dict[str, object]:
    """What a command writes to result.json in the folder. Its process, and those it started, have ended then.

    Raises PeerError if the engine is not installed, fails, or is not done within `limit_s` seconds.
    """
    result, log = folder / "result.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w", encoding="utf-8") as output:
        # A session of its own: Ctrl-C comes to this process alone, which then ends all of the other's.
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **SETTINGS, "PYTHONPATH": path},
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    start = time.monotonic()
    try:
        while _runs(process):
            seconds = time.monotonic() - start
            if seconds > limit_s:
                raise PeerError(f"stopped, since it was not done after {limit_s:g} s: see --limit")
            show_progress(f"{label}: {seconds:.0f} s of {limit_s:g} at most")
    finally:
        _kill(process)
    if not result.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise PeerError(f"ended with status {process.returncode}: {lines[-1][:300] if lines else 'no output'}")
    figures = json.loads(result.read_text(encoding="utf-8"))
    if "missing" in figures:
        raise NotInstalled(f"not installed: {GET[figures['missing']]}")
    if "error" in figures:
        raise PeerError(f"failed: {figures['error']}")
    return figures


def _runs(process: subprocess.Popen) -> bool:
    """Waits for a moment."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(process: subprocess.Popen) -> None:
    """With what it started: vLLM's engine is a process too. Windows has no groups of processes."""
    if not hasattr(os, "killpg"):
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # all have ended
            pass
    process.wait()


def _figures(results: dict[str, list[dict[str, object]]], work: Workload) -> dict[str, dict[str, object]]:
    """Of each engine, by name; the first of ours is what the others are compared with."""
    ours = next((engine for engine in results if PACKAGES[engine] == "nanopaged"), None)
    figures: dict[str, dict[str, object]] = {}
    for engine, rounds in results.items():
        seconds = [result["seconds"] for result in rounds]
        figures[engine] = {"round_seconds": seconds, "seconds": statistics.median(seconds),
                           "tokens_per_s": work.output_tokens / statistics.median(seconds),
                           "versions": rounds[0]["versions"]}
    if ours is not None:
        for engine in figures:
            figures[engine]["times"] = figures[engine]["seconds"] / figures[ours]["seconds"]
            figures[engine]["same_tokens"] = _same_tokens(results[engine][0]["outputs"], results[ours][0]["outputs"])
    return figures


def _same_tokens(outputs: list[list[int]], ours: list[list[int]]) -> float:
    """The share of output tokens that are ours; where one differs, usually all after it do."""
    pairs = [pair for theirs, mine in zip(outputs, ours, strict=True) for pair in zip(theirs, mine, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _print_table(figures: dict[str, dict[str, object]]) -> None:
    ours = next(iter(figures))
    compared = "times" in figures[ours]
    print(table(["", "tokens/s", "seconds", "first row is faster", "same tokens", "versions"], [
        [LABELS[engine], figure["tokens_per_s"], figure["seconds"],
         f"{figure['times']:.2f} x" if compared and engine != ours else None,
         f"{figure['same_tokens']:.1%}" if compared and engine != ours else None,
         ", ".join(f"{name} {version}" for name, version in figure["versions"].items())]
        for engine, figure in figures.items()]))
    print("tokens/s: of output, higher is better. same tokens: as in the first row; they differ where two logits are "
          "closer\nthan rounding, and usually from there to the end of that request.", flush=True)
