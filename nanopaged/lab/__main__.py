"""Labs: assignments made from this source, each in a folder of your own.

    python -m nanopaged.lab                        the labs: title, hours, what one learns
    python -m nanopaged.lab start LAB DIR          a workspace: the handout, and a copy of the package with bodies out
    python -m nanopaged.lab check DIR [PART]       what holds; of what fails the first thing, in words
    python -m nanopaged.lab see DIR                the lab's scenario on your code, as a movie of its pool
    python -m nanopaged.lab hint DIR [PART]        one more hint each time
    python -m nanopaged.lab diff DIR               after it passes: your code beside the source's

For instructors (docs/labs/teaching.md):

    python -m nanopaged.lab grade FOLDER --csv FILE    a class: a workspace in each folder of FOLDER
    python -m nanopaged.lab bug [NAME]                 the planted bugs; one bug's symptom, and what caught it
    python -m nanopaged.lab prove [LAB] [--seeds N]    do the graders grade?
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nanopaged.lab import commands, labs
from nanopaged.report import until_interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 if all that was asked for holds, 1 if not, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(prog="python -m nanopaged.lab", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=commands.overview)
    verbs = parser.add_subparsers(metavar="COMMAND")

    start = verbs.add_parser("start", help="make a workspace")
    start.add_argument("lab", choices=[*labs.NAMES, "all", "hunt"], metavar="LAB",
                       help=f"{', '.join(labs.NAMES)}; all: everything at once; hunt: write tests that find bugs")
    start.add_argument("folder", type=Path, metavar="DIR", help="does not exist yet, and lies outside this checkout")
    start.set_defaults(run=commands.start)

    check = verbs.add_parser("check", help="check a workspace")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("part", type=int, nargs="?", metavar="PART", help="only this part")
    check.add_argument("--lab", choices=labs.NAMES, metavar="LAB", help="only this lab, of a workspace with all; of "
                       "the hunt only its bugs")
    check.add_argument("--seed", type=int, default=0, help="of everything random in the checks (default: %(default)s)")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the results, as Gradescope reads them")
    check.set_defaults(run=commands.check)

    hint = verbs.add_parser("hint", help="one more hint")
    hint.add_argument("folder", type=Path, metavar="DIR")
    hint.add_argument("part", type=int, nargs="?", metavar="PART", help="(default: the first that does not hold)")
    hint.add_argument("--lab", choices=labs.NAMES, metavar="LAB", help="of a workspace with all labs")
    hint.set_defaults(run=commands.hint)

    for name, run, words in (("see", commands.see, "play the lab's scenario on your code"),
                             ("diff", commands.diff, "your code beside the source's")):
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("folder", type=Path, metavar="DIR")
        verb.set_defaults(run=run)

    grade = verbs.add_parser("grade", help="check the workspaces of a class")
    grade.add_argument("folder", type=Path, metavar="FOLDER")
    grade.add_argument("--csv", type=Path, required=True, metavar="FILE", help="a row for each workspace")
    grade.set_defaults(run=commands.grade)

    bug = verbs.add_parser("bug", help="the planted bugs")
    bug.add_argument("name", nargs="?", metavar="NAME")
    bug.add_argument("--lab", choices=labs.NAMES, metavar="LAB", help="list only those of this lab")
    bug.set_defaults(run=commands.bug)

    prove = verbs.add_parser("prove", help="do the graders grade?")
    prove.add_argument("lab", nargs="*", metavar="LAB", help="(default: all)")
    prove.add_argument("--seeds", type=int, default=1, metavar="N", help="of random checks (default: %(default)s)")
    prove.set_defaults(run=commands.prove)

    args = parser.parse_args(arguments)
    return until_interrupted(partial(_run, parser.prog, args))


def _run(prog: str, args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except (ValueError, OSError) as error:  # for the user to fix: one line
        sys.stderr.write(f"{prog}: error: {error}\n")
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs for a check ends with it
    sys.exit(main())
