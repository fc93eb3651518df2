"""python -m nanopaged.bench COMMAND: each command is a module beside this one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanopaged import report

COMMANDS = {
    "kernel": "attention alone, beside contiguous attention and a plain copy of the same bytes",
    "compile": "what the compiler makes of the kernels, for GPUs that need not be there",
    "decode": "whole decode steps, with and without CUDA graphs, beside the memory floor",
    "gpu": "kernel and decode, all that there is to say about a GPU",
    "scheduler": "the scheduler's cost for each token as queues, pools and caches grow",
    "cost": "what a step costs, fitted to real steps: the simulator's constants",
    "engine": "the whole engine beside static batches, one request at a time, and the floor",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Hands over to the command's module: `add_arguments(parser)`, then `run(args)`, which prints and returns figures."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m nanopaged.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, question in COMMANDS.items():
        commands.add_parser(name, help=question, add_help=False)
    command = parser.parse_known_args(arguments[:1])[0].command
    # Only the chosen module is imported: the scheduler's needs no torch.
    module = importlib.import_module(f"nanopaged.bench.{command}")
    parser = argparse.ArgumentParser(prog=f"python -m nanopaged.bench {command}", description=module.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    return report.main(parser, module.run, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
