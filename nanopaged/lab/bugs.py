"""How can a solution be wrong? Planted bugs, and right solutions that look different: both prove the graders.

A bug is a few changed lines of the source. Its lab's grader must fail on it, in its part. An alternative is a solution
of another structure, on which every part must hold. Each lab's are in its folder: `bugs.py` and `alternative.py`.
"""

from __future__ import annotations

import ast
import importlib
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nanopaged.lab import labs
from nanopaged.lab.labs import Scenario
from nanopaged.lab.workspace import PACKAGE


@dataclass(frozen=True)
class Bug:
    """`changes` are (file, text, other text); each text occurs once in its file of the package."""

    name: str  # words with hyphens between them
    part: int  # of its lab, in which it must be caught
    story: str  # what somebody thought; which engine met it, with its issue's number, where that is so
    symptom: str  # what a user would see
    changes: tuple[tuple[str, str, str], ...]
    scenario: Scenario | None = None  # that shows it; None: the lab's own


def bugs_of(lab: str) -> list[Bug]:
    return list(importlib.import_module(f"nanopaged.lab.{lab}.bugs").BUGS)


def every_bug() -> list[tuple[str, Bug]]:
    """(lab, bug)."""
    return [(name, bug) for name in labs.NAMES for bug in bugs_of(name)]


def named(name: str) -> tuple[str, Bug]:
    """(lab, bug). Raises ValueError if there is none of this name."""
    for lab, bug in every_bug():
        if bug.name == name:
            return lab, bug
    raise ValueError(f"there is no bug {name!r}: `bug` alone lists them")


def plant(bug: Bug, folder: Path) -> None:
    """Puts a bug into the package in `folder`. Raises ValueError if the source has changed under it."""
    for file, old, new in bug.changes:
        path = folder / "nanopaged" / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"bug {bug.name}: its text occurs {text.count(old)} times in {file}, not once: {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def has_alternative(lab: str) -> bool:
    return find_spec(f"nanopaged.lab.{lab}.alternative") is not None


def plant_alternative(lab: str, folder: Path) -> None:
    """Lets a lab's alternative take the place of what it reimplements, in the package in `folder`."""
    alternative = importlib.import_module(f"nanopaged.lab.{lab}.alternative")
    path = folder / "nanopaged" / f"{alternative.REPLACES}.py"
    text = Path(alternative.__file__).read_text(encoding="utf-8").replace("from __future__ import annotations\n", "")
    path.write_text(path.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")


def plant_nothing(folder: Path) -> None:
    """Writes the same program in another way: a test that compares texts would not know it again."""
    for path in (folder / "nanopaged").glob("*.py"):
        if path.name != "attention_kernels.py":  # Triton compiles its text
            path.write_text(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")


def variant(folder: Path) -> Path:
    """A copy of the source's package, to be changed; with what Python has compiled of it, so that it starts fast."""
    shutil.copytree(PACKAGE, folder / "nanopaged", ignore=lambda _, names: {"lab"} & {*names})
    return folder
