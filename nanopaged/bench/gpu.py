"""Everything that docs/benchmarks.md says about a GPU, in one run of a few minutes: `kernel`, then `decode`."""

from __future__ import annotations

import argparse

import torch

from nanopaged.bench import decode, kernel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose: each of the two commands has its own flags."""


def run(args: argparse.Namespace) -> dict[str, object]:
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: `kernel` and `decode` alone also run on a CPU")
    figures = {}
    for name, module in (("kernel", kernel), ("decode", decode)):
        print(f"\n{module.__doc__}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        figures[name] = module.run(parser.parse_args([]))
    return figures
