"""python -m nanopaged.show: what happened in a recorded run, as a page for a browser, or as a trace.

A recording is made with `--record FILE` of train_free_demo.py or of python -m nanopaged.simulate, or in a program:

    from nanopaged.show.recording import record
    with record(llm, "run.jsonl"):
        llm.generate(prompts)
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from nanopaged.report import until_interrupted


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nanopaged.show", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="?", metavar="FILE", help="a recording")
    parser.add_argument("--out", metavar="FILE", help="the page to write (default: the recording's name with .html)")
    parser.add_argument("--steps", metavar="A:B", help="show the steps from A to B only")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for Perfetto or chrome://tracing instead")
    parser.add_argument("--tour", metavar="FOLDER", nargs="?", const="docs",
                        help="play a small run, and draw the pictures of docs/tour.md into this folder (default: docs)")
    return parser


def run(parser: argparse.ArgumentParser) -> int:
    """Writes what was asked for; the exit status. A wrong argument, or file, gets one line and status 2."""
    args = parser.parse_args()
    try:
        written = write(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (KeyError, IndexError, TypeError) as error:  # a line lacks what others need
        parser.exit(2, f"{parser.prog}: error: {args.recording} is damaged: {type(error).__name__}: {error}\n")
    for path in written:
        print(f"{path}: {Path(path).stat().st_size:,} bytes")
    return 0


def write(args: argparse.Namespace) -> list[str]:
    """The files that were written. Each part is imported where it is needed: a tour needs torch, the rest does not."""
    refuse_what_has_no_effect(args)
    if args.tour is not None:
        from nanopaged.show.tour import write_tour
        return write_tour(args.tour)
    if args.recording is None:
        raise ValueError("give the FILE of a recording, or --tour")
    if args.trace is not None:
        from nanopaged.show.reading import read
        from nanopaged.show.trace import write_trace
        write_trace(read(args.recording), args.trace)
        return [args.trace]
    from nanopaged.show.movie import page, pool_scene
    scene = pool_scene(args.recording, steps=chosen_steps(args.steps) if args.steps else None)
    out = args.out or page_of(args.recording)
    Path(out).write_text(page([scene], f"nanopaged: {Path(args.recording).stem}"), encoding="utf-8")
    return [out]


def refuse_what_has_no_effect(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that would be ignored, or would overwrite the recording."""
    if args.tour is not None:
        beside = "--tour"
        given = {"FILE": args.recording, "--out": args.out, "--steps": args.steps, "--trace": args.trace}
    elif args.trace is not None:
        beside, given = "--trace", {"--out": args.out, "--steps": args.steps}
    else:
        beside, given = "", {}
    ignored = [name for name, value in given.items() if value is not None]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} would have no effect beside {beside}: give one or the other")
    for out in (args.trace, args.out or (args.recording and page_of(args.recording))):
        if out and args.recording and os.path.realpath(out) == os.path.realpath(args.recording):
            raise ValueError(f"{out} is the recording itself, which would be overwritten: give another file to write")


def page_of(recording: str) -> str:
    """The page beside a recording."""
    return str(Path(recording).with_suffix(".html"))


def chosen_steps(text: str) -> tuple[int, int]:
    """From "A:B"; either may be missing."""
    from nanopaged.show.movie import LAST

    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        steps = int(first or 1), int(last or LAST)
    except ValueError:
        raise ValueError(f"--steps must be A:B, two numbers of steps, got {text!r}") from None
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--steps must go from 1 or more to no less, got {text!r}")
    return steps


if __name__ == "__main__":
    sys.exit(until_interrupted(partial(run, make_parser())))
