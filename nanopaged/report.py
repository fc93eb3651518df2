"""How are measurements shown and kept, and how are mistakes reported?

Every command that measures (`python -m nanopaged.bench ...`, `python -m nanopaged.simulate`) prints
tables for people and can write the same figures as JSON, with what is needed to repeat them. Every
command ends in the same way at Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial

from nanopaged.progress import show_progress

PACKAGES = ("torch", "triton", "numpy", "tiktoken")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads well as plain text; text is aligned left, all else right."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]

    def line(texts: Sequence[str]) -> str:
        padded = (text.ljust(width) if to_left else text.rjust(width)
                  for text, width, to_left in zip(texts, widths, left))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) if to_left else "-" * (width + 1) + ":"
                          for width, to_left in zip(widths, left)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def _shown(value: object) -> str:
    """None: not measured. Floats have three significant digits, more than most timings are accurate to."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def environment() -> dict[str, object]:
    """When and on what this process runs; imports nothing heavy."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "system": platform.platform(),
            "processor": _processor(), "versions": versions}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def until_interrupted(command: Callable[[], int]) -> int:
    """The exit status of `command`; Ctrl-C ends it with one line, and with the 130 that shells give for SIGINT."""
    try:
        return command()
    except KeyboardInterrupt:
        show_progress("")
        sys.stderr.write("interrupted\n")
        return 130


def refuse_unwritable(path: str) -> None:
    """Raises OSError if a file cannot be written: now, not after minutes of work. Leaves no empty file behind."""
    existed = os.path.lexists(path)
    open(path, "a", encoding="utf-8").close()
    if not existed:
        os.remove(path)


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict[str, object]],
         arguments: Sequence[str] | None = None) -> int:
    """Runs a measuring command, which prints its tables and returns its figures; gives the exit status.

    A ValueError or an unreadable file is for the user to fix: one line and status 2, as for a bad flag.
    """
    return until_interrupted(partial(_measure, parser, run, arguments))


def _measure(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict[str, object]],
             arguments: Sequence[str] | None) -> int:
    parser.add_argument("--json", metavar="FILE", help="also write the figures here, with versions and arguments")
    args = parser.parse_args(arguments)
    try:
        if args.json:
            refuse_unwritable(args.json)
        figures = run(args)
        if args.json:
            chosen = {name: value for name, value in vars(args).items() if not callable(value)}
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"environment": environment(), "arguments": chosen, "figures": figures}, file, indent=1)
                file.write("\n")
    except (ValueError, OSError) as error:
        show_progress("")
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2
    finally:
        show_progress("")
    return 0
