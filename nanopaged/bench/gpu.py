"""How fast is it on a GPU? Runs `kernel`, then `decode`, which takes a few minutes together."""

from __future__ import annotations

import argparse

import torch

from nanopaged.bench import decode, kernel
from nanopaged.attention_kernels import triton


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the two commands have flags of their own."""


def run(args: argparse.Namespace) -> dict[str, object]:
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: run `kernel` and `decode` instead, which also work on a CPU")
    if triton is None:
        raise ValueError("this measures the Triton kernels, and needs the triton package, which is not installed: run "
                         "`decode` instead")
    figures = {}
    for name, module in (("kernel", kernel), ("decode", decode)):
        print(f"\n{module.__doc__}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        figures[name] = module.run(parser.parse_args([]))
    return figures
