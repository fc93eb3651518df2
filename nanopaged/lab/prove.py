"""Do the graders grade? Every part must fail while it is not written, hold once it is, and fail on each planted bug.

    python -m nanopaged.lab prove                 every lab, with one seed
    python -m nanopaged.lab prove prefix --seeds 20

Of each lab are checked: the workspace as it is handed out, and with the source's bodies of its first part, of its first
two, and so on: a part must hold if its bodies are there, and else fail because they are not written. A right solution
of another structure must hold in all parts. A bug must be caught in its part, with every seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from nanopaged.lab import bugs
from nanopaged.lab.check import PartResult, check_part
from nanopaged.lab.labs import Lab
from nanopaged.lab.workspace import copy_package, take_out


class Proof(NamedTuple):
    what: str
    wrong: str  # what is wrong with it; empty if it is right


def proofs_of(lab: Lab, seeds: range = range(1)) -> Iterator[Proof]:
    yield from handed_out(lab)
    if bugs.has_alternative(lab.name):
        yield from (alternative(lab, seed) for seed in seeds)
    for bug in bugs.bugs_of(lab.name):
        yield from (caught(lab, bug, seed) for seed in seeds)


def handed_out(lab: Lab) -> Iterator[Proof]:
    """For each number of parts whose bodies are there."""
    for given in range(len(lab.parts) + 1):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch).resolve()
            copy_package(folder)
            take_out(folder, [lab], given)
            for number, part in enumerate(lab.parts, 1):
                result = check_part(folder, lab, number)
                wrong = ""
                if {*part.bodies} <= {*lab.bodies(1, given)}:
                    wrong = first_failure(result)
                elif not result.not_written:
                    wrong = f"it does not fail as a part that is not written: {first_failure(result) or 'it holds'}"
                yield Proof(f"{lab.name}, {given} of {len(lab.parts)} parts written, part {number}", wrong)


def alternative(lab: Lab, seed: int) -> Proof:
    with TemporaryDirectory() as scratch:
        folder = bugs.variant(Path(scratch).resolve())
        bugs.plant_alternative(lab.name, folder)
        results = [check_part(folder, lab, number, seed) for number in range(1, len(lab.parts) + 1)]
    wrong = next((f"part {result.number}: {first_failure(result)}" for result in results if not result.holds), "")
    return Proof(f"{lab.name}, another right solution, seed {seed}", wrong)


def caught(lab: Lab, bug: bugs.Bug, seed: int) -> Proof:
    result = check_planted(lab, bug, seed)
    return Proof(f"{lab.name}, bug {bug.name}, seed {seed}", f"part {bug.part} holds" if result.holds else "")


def check_planted(lab: Lab, bug: bugs.Bug, seed: int = 0) -> PartResult:
    """The part of a bug, with the bug in it."""
    with TemporaryDirectory() as scratch:
        folder = bugs.variant(Path(scratch).resolve())
        bugs.plant(bug, folder)
        return check_part(folder, lab, bug.part, seed)


def first_failure(result: PartResult) -> str:
    failure = result.first_failure
    return f"{failure.words} {failure.message}" if failure else ""
