"""The labs: where they are, and that each says what it asks for."""

from __future__ import annotations

import pytest

from nanopaged.lab import labs
from nanopaged.lab.grading import checks_of
from nanopaged.lab.workspace import HANDOUTS


@pytest.mark.parametrize("name", labs.NAMES)
def test_each_part_has_bodies_hints_and_checks(name: str) -> None:
    lab = labs.get(name)
    assert lab.name == name and lab.title and lab.hours and lab.learns and lab.scenario.watch
    for number, part in enumerate(lab.parts, 1):
        assert part.asks and part.bodies and len(part.hints) >= 3
        assert checks_of(name, number), f"part {number} has no checks"
    words = [check.words for check in checks_of(name)]
    assert len(set(words)) == len(words), "results are told apart by their words"
    assert {check.part for check in checks_of(name)} == set(range(1, len(lab.parts) + 1))


def test_bodies_are_counted_once_and_belong_to_their_first_part() -> None:
    lab = labs.get("attention")
    assert len(set(lab.bodies())) == len(lab.bodies())
    assert lab.bodies(1, 0) == [] and lab.bodies(1, 1) == list(lab.parts[0].bodies)
    for body in lab.bodies():
        assert body in lab.parts[lab.part_of(body) - 1].bodies
        assert all(body not in part.bodies for part in lab.parts[: lab.part_of(body) - 1])


@pytest.mark.parametrize("name", [*labs.NAMES, "hunt", "teaching"])
def test_each_lab_has_a_handout(name: str) -> None:
    text = (HANDOUTS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith("# ") and len(text.splitlines()) > 50


def test_a_lab_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no lab 'none': choose one of blocks, attention, "):
        labs.get("none")
