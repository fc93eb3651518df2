"""What does a grader say? The vocabulary of `grader.py`: checks, expectations, and the story of what was done.

A check is a function without arguments. It holds if it returns. What it does to the student's objects through `Told` is
written down, and shown if it fails: so a check tries short scenarios first. Graders look at behaviour only. What a
contract leaves open (which id, which order) they leave open.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

TOLD_LINES = 16  # the last lines of a story; a longer one explains nothing

story: list[str] = []  # what the running check has done
notes: list[str] = []  # what it has found out that is no grade, such as a speed
seed = 0  # of everything random in a check


class Failed(Exception):
    """What should have been, and what was."""


class Check(NamedTuple):
    part: int
    words: str  # what holds
    run: Callable[[], None]
    seconds: float  # it may take, before it counts as hanging


def check(part: int, words: str, seconds: float = 10.0) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a function of a grader a check of one part. `words` say what holds, as a sentence."""

    def mark(function: Callable[[], None]) -> Callable[[], None]:
        function.check = Check(part, words, function, seconds)
        return function

    return mark


def checks_of(lab: str, part: int | None = None) -> list[Check]:
    """In the order in which they stand in the lab's grader. Imports it, and with it the package that it grades."""
    grader = importlib.import_module(f"nanopaged.lab.{lab}.grader")
    found = [value.check for value in vars(grader).values() if isinstance(getattr(value, "check", None), Check)]
    return [each for each in found if part in (None, each.part)]


def numbers(name: str) -> random.Random:
    """Random numbers that depend on the seed and on this name alone."""
    return random.Random(f"{seed} {name}")


def expect(holds: object, message: str) -> None:
    if not holds:
        raise Failed(message)


def expect_equal(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise Failed(f"{what} should be {_short(expected)}, and is {_short(got)}")


@contextmanager
def raising(kind: type[BaseException], what: str) -> Iterator[None]:
    """What is done inside must raise `kind`."""
    try:
        yield
    except kind as error:
        tell(f"   raised {kind.__name__}")
        if isinstance(error, NotImplementedError):
            raise
    else:
        raise Failed(f"{what} should raise {kind.__name__}, and raised nothing")


def begin(title: str = "") -> None:
    """A scenario begins: what was told before does not belong to it."""
    story[:] = [title] if title else []


def note(text: str) -> None:
    """Shown whether the check holds or not."""
    notes.append(text)


def tell(line: str) -> None:
    story.append(line)


class Told:
    """Stands before an object of the student's: method calls go through, and are told. Attributes can be read."""

    def __init__(self, name: str, subject: object) -> None:
        self._name, self._subject = name, subject

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._subject, name)
        if not callable(value):
            return value

        def call(*arguments: object, **options: object) -> object:
            shown = [_short(argument) for argument in arguments]
            shown += [f"{key}={_short(option)}" for key, option in options.items()]
            tell(f"{self._name}.{name}({', '.join(shown)})")
            result = value(*arguments, **options)
            if result is not None:
                story[-1] += f" -> {_short(result)}"
            return result

        return call


def _short(value: object) -> str:
    if hasattr(value, "dtype") and getattr(value, "ndim", 0) > 1:
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def told_lines() -> list[str]:
    return story if len(story) <= TOLD_LINES else ["...", *story[-TOLD_LINES:]]
