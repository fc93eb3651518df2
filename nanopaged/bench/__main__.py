"""python -m nanopaged.bench COMMAND: each command is a module beside this one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanopaged import report
from nanopaged.interrupts import uninterrupted
from nanopaged.validation import has_folder

COMMANDS = {
    "kernel": "attention alone, compared with contiguous attention and with a plain copy of the same bytes",
    "codegen": "registers, spills and load widths of the compiled kernels; needs no GPU",
    "decode": "whole decode steps, with and without CUDA graphs, compared with the memory floor",
    "gpu": "the demo's answers, kernel, decode, peers and kernel --tune in one run of less than 8 minutes",
    "scheduler": "the scheduler's cost for each token as queue, pool and cache grow",
    "host": "what a step costs in Python, with no model",
    "cost": "the cost of a step, fitted to real steps: the simulator's constants",
    "engine": "the whole engine, compared with static batches, one request at a time, and the floor",
    "peers": "the whole engine, compared with transformers and vLLM, if they are installed",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command's module: `add_arguments(parser)`, then `run(args)`, which prints and returns figures."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m nanopaged.bench")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, question in COMMANDS.items():
        commands.add_parser(name, help=question, add_help=False)
    if not arguments:
        parser.print_help()
        return 0
    command = parser.parse_known_args(arguments[:1])[0].command
    try:
        # Only the chosen module is imported: the scheduler's needs no torch, whose import may swallow an interrupt.
        with uninterrupted():
            module = importlib.import_module(f"nanopaged.bench.{command}")
    except ModuleNotFoundError as error:
        if (folder := deleted_folder(error.name or "")) is None:
            raise
        sys.stderr.write(f"{parser.prog} {command}: error: this needs the folder nanopaged/{folder}/, which is "
                         "missing: restore it, or choose another command\n")
        return 2
    parser = argparse.ArgumentParser(prog=f"{parser.prog} {command}", description=module.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    return report.main(parser, module.run, arguments[1:])


def deleted_folder(module: str) -> str | None:
    """The optional folder that a missing module belongs to, if the whole folder is missing."""
    for folder in ("fast", "pressure"):
        package = f"nanopaged.{folder}"
        if f"{module}.".startswith(f"{package}.") and not has_folder(folder):
            return folder
    return None


if __name__ == "__main__":
    sys.exit(report.until_interrupted(main))
