"""Planted bugs are planted, and each of the source's labs has its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged.lab import bugs, labs
from nanopaged.lab.bugs import Bug, plant, variant
from nanopaged.lab.workspace import PACKAGE


def test_a_bug_changes_the_lines_that_it_names_and_nothing_else(tmp_path: Path) -> None:
    folder = variant(tmp_path)
    assert not (folder / "nanopaged" / "lab").exists()
    plant(Bug("b", 1, "", "", (("request.py", "return 1 + len(self.followers)", "return 1"),)), folder)
    changed = [path.name for path in PACKAGE.glob("*.py")
               if path.read_text() != (folder / "nanopaged" / path.name).read_text()]
    assert changed == ["request.py"] and "        return 1\n" in (folder / "nanopaged" / "request.py").read_text()


def test_a_bug_whose_lines_are_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug b: its text occurs 0 times in request.py, not once: 'nothing like it'"):
        plant(Bug("b", 1, "", "", (("request.py", "nothing like it", ""),)), variant(tmp_path))


def test_there_are_at_least_forty_bugs_five_for_each_lab_and_all_have_names_of_their_own() -> None:
    planted = bugs.every_bug()
    names = [bug.name for _, bug in planted]
    assert len(planted) >= 40 and len(set(names)) == len(names)
    for name in labs.NAMES:
        own = bugs.bugs_of(name)
        assert len(own) >= 5, name
        for bug in own:
            assert bug.story and bug.symptom and 1 <= bug.part <= len(labs.get(name).parts), bug.name


def test_a_bug_is_found_by_its_name() -> None:
    lab, bug = bugs.every_bug()[0]
    assert bugs.named(bug.name) == (lab, bug)


def test_four_labs_have_another_right_solution() -> None:
    assert {name for name in labs.NAMES if bugs.has_alternative(name)} >= {"blocks", "attention", "scheduler", "prefix"}
