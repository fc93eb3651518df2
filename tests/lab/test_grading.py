"""The vocabulary of the graders: what fails says what was done."""

from __future__ import annotations

import pytest

from nanopaged.lab import grading
from nanopaged.lab.grading import Failed, Told, begin, check, expect, expect_equal, numbers, raising, tell, told_lines


class Pool:
    room = 2

    def take(self, count: int = 1) -> int:
        return count

    def refuse(self) -> None:
        raise ValueError("no")


def test_what_is_done_to_an_object_is_told_in_order_with_its_results() -> None:
    begin("pool = Pool()")
    pool = Told("pool", Pool())
    pool.take()
    pool.take(count=5)
    with raising(ValueError, "refuse"):
        pool.refuse()
    assert pool.room == 2
    assert told_lines() == ["pool = Pool()", "pool.take() -> 1", "pool.take(count=5) -> 5", "pool.refuse()",
                            "   raised ValueError"]


def test_a_long_story_is_told_from_its_end() -> None:
    begin()
    for number in range(50):
        tell(f"line {number}")
    assert told_lines() == ["...", *(f"line {number}" for number in range(50 - grading.TOLD_LINES, 50))]


def test_an_expectation_that_does_not_hold_says_what_was_expected() -> None:
    expect(True, "")
    expect_equal("the answer", 42, 42)
    with pytest.raises(Failed, match="^the answer should be 42, and is 41$"):
        expect_equal("the answer", 41, 42)
    with pytest.raises(Failed, match="^it should rain$"):
        expect(False, "it should rain")


def test_what_should_raise_and_does_not_is_a_failure_and_another_error_is_not_caught() -> None:
    with pytest.raises(Failed, match="taking should raise ValueError, and raised nothing"):
        with raising(ValueError, "taking"):
            pass
    with pytest.raises(KeyError):
        with raising(ValueError, "taking"):
            raise KeyError


def test_a_body_that_is_not_written_is_not_taken_for_the_error_that_is_wanted() -> None:
    with pytest.raises(NotImplementedError):
        with raising(RuntimeError, "taking"):  # NotImplementedError is one
            raise NotImplementedError("lab blocks, part 1: write it")


def test_random_numbers_depend_on_the_seed_and_on_a_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = numbers("a").random()
    assert numbers("a").random() == first != numbers("b").random()
    monkeypatch.setattr(grading, "seed", 1)
    assert numbers("a").random() != first


def test_a_check_knows_its_part_and_its_words() -> None:
    @check(3, "It holds.", seconds=2.0)
    def holds() -> None:
        pass

    assert holds.check == (3, "It holds.", holds, 2.0)
