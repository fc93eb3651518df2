"""Each kind of event has its rule, in plain sentences."""

from __future__ import annotations

import pytest

from nanopaged.show.rules import RARE, WHY


@pytest.mark.parametrize("name", WHY)
def test_a_rule_is_one_to_three_sentences_that_fit_two_lines_of_the_page(name: str) -> None:
    assert 1 <= WHY[name].count(". ") + 1 <= 3 and WHY[name].endswith(".") and len(WHY[name]) <= 230


def test_what_happens_in_nearly_every_step_is_not_worth_a_jump() -> None:
    assert {"computes", "takes", "publishes"}.isdisjoint(RARE)
    assert {"shares", "waits", "gives way", "copies", "evicts", "finishes"} <= {*RARE} <= WHY.keys()
