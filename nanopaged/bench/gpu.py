"""How fast is it on a GPU, and are the answers right? All of it in one command of less than 8 minutes.

The demo's answers are checked first. Then come `kernel`, `decode` (1 to 256 requests, each eagerly and with
CUDA graphs), `peers`, and in the time that is left `kernel --tune`. Each part is a process of its own: one
that fails, or takes too long, costs no other its figures. --json writes its file again after each part.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanopaged.attention_kernels import triton

ROOT = Path(__file__).parents[2]
LIMIT_S = 460.0  # for all parts together
START_S = 30.0  # of a part: imports, the first use of the GPU, and its end


class Part(NamedTuple):
    name: str
    words: tuple[str, ...]  # after `python`; {seconds} is what is left to it for its work
    at_most_s: float  # far more than it should take, and together so little that the last part has a minute

    @property
    def is_demo(self) -> bool:
        return self.words[0].endswith("demo.py")


BENCH = ("-m", "nanopaged.bench")
PARTS = [
    Part("story", ("train_free_demo.py", "--device", "cuda"), 40),
    Part("storm", ("train_free_demo.py", "--device", "cuda", "--workload", "storm"), 40),
    Part("kernel", (*BENCH, "kernel"), 110),
    Part("decode", (*BENCH, "decode"), 90),
    # Without vLLM, which takes minutes to start.
    Part("peers", (*BENCH, "peers", "--only", "paged", "continuous", "static", "--limit", "35"), 120),
    Part("tune", (*BENCH, "kernel", "--tune", "{seconds}"), 320),
]


class PartError(Exception):
    """Why a part has no figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the parts run with their defaults, and have flags of their own as commands."""


def run(args: argparse.Namespace) -> dict[str, object]:
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: run `kernel` and `decode` instead, which also work on a CPU")
    if triton is None:
        raise ValueError("this measures the Triton kernels, and needs the triton package, which is not installed: run "
                         "`decode` instead")
    figures: dict[str, object] = {"problems": {}, "seconds": {}}
    end_s = time.monotonic() + LIMIT_S
    for part in PARTS:
        start_s = time.monotonic()
        try:
            figures[part.name] = _figures(part, min(part.at_most_s, end_s - start_s))
        except (PartError, OSError, ValueError) as problem:
            figures["problems"][part.name] = str(problem)
            print(f"{part.name}: {problem}", flush=True)
        figures["seconds"][part.name] = time.monotonic() - start_s
        if getattr(args, "json", None):  # what there is so far, should this process be ended
            Path(args.json).write_text(json.dumps({"figures": figures}), encoding="utf-8")
    print(f"\n{sum(figures['seconds'].values()):.0f} s; without figures: {', '.join(figures['problems']) or 'none'}.")
    return figures


def _figures(part: Part, limit_s: float) -> object:
    """Runs a part, which prints its tables. Raises PartError if it fails or is not done in time."""
    if limit_s < START_S:
        raise PartError(f"left out: {max(0.0, limit_s):.0f} s of {LIMIT_S:g} were left")
    words = [word.replace("{seconds}", f"{limit_s - START_S:.0f}") for word in part.words]
    print(f"\npython {' '.join(words)}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        status, printed = _run(words if part.is_demo else [*words, "--json", str(file)], limit_s, part.is_demo)
        if part.is_demo:
            print(printed, flush=True)
            if found := re.search(r"(\d+)/(\d+) continuations match", printed):  # also if some do not
                return {"right": int(found[1]), "of": int(found[2]), "printed": printed.splitlines()}
        elif file.exists():
            return json.loads(file.read_text(encoding="utf-8"))["figures"]
    raise PartError(f"ended with status {status} and no figures")


def _run(words: list[str], limit_s: float, capture: bool) -> tuple[int, str]:
    """The status of `python` WORDS, and what it prints, if that is to be captured. It has ended then."""
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE if capture else None) as process:
        try:
            printed, _ = process.communicate(timeout=limit_s)
            return process.returncode, printed or ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that `peers` also ends what it started
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                pass
            raise PartError(f"stopped after {limit_s:.0f} s") from None
        finally:
            process.kill()
