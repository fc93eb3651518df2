"""An argument that is not what it must be is named, with what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import pytest

from nanopaged.validation import require_choice, require_int, require_number, require_seed, require_text, shown


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(("check", "error", "message"), [
    (lambda: require_int("k", 1.0), TypeError, "k must be an int, got 1.0 (float)"),
    (lambda: require_int("k", True, 0), TypeError, "k must be an int, got True (bool)"),
    (lambda: require_int("k", None), TypeError, "k must be an int, got None (NoneType)"),
    (lambda: require_int("k", 0, 1), ValueError, "k must be at least 1, got 0 (int)"),
    (lambda: require_int("k", 9, 1, 8), ValueError, "k must be from 1 to 8, got 9 (int)"),
    (lambda: require_number("x", "1", 0.0), TypeError, "x must be a number, got '1' (str)"),
    (lambda: require_number("x", False, 0.0), TypeError, "x must be a number, got False (bool)"),
    (lambda: require_number("x", math.nan, 0.0), ValueError, "x must be finite, got nan"),
    (lambda: require_number("x", -math.inf, -math.inf), ValueError, "x must be finite, got -inf"),
    (lambda: require_number("x", -0.5, 0.0), ValueError, "x must be at least 0.0, got -0.5 (float)"),
    (lambda: require_number("x", 2, 0.0, 1.0), ValueError, "x must be from 0.0 to 1.0, got 2 (int)"),
    (lambda: require_seed("s", 2**128 + 1), ValueError, f"s must be from {-2**128} to {2**128}, got"),
    (lambda: require_seed("s", 0.0), TypeError, "s must be an int, got 0.0 (float)"),
    (lambda: require_choice("c", "z", ("x", "y")), ValueError, "c must be one of 'x', 'y', got 'z' (str)"),
    (lambda: require_choice("c", 1, (True, False)), TypeError, "c must be a bool, got 1 (int)"),
    (lambda: require_choice("c", None, ("x",)), TypeError, "c must be a str, got None (NoneType)"),
    (lambda: require_text("t", "ab\ud83d"), ValueError,
     "t holds half a character, the lone surrogate '\\ud83d' at position 2"),
])
def test_an_invalid_value_is_named_with_what_is_allowed(check: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        check()
    assert str(caught.value).startswith(message)


def test_a_valid_value_is_returned() -> None:
    assert require_int("k", 1, 1, 1) == 1 and require_int("k", -(10**30)) == -(10**30)
    assert require_int("k", Level.LOW, 0) is Level.LOW
    assert require_number("x", 0, 0.0) == 0 and require_number("x", 1.0, 0.0, 1.0) == 1.0
    assert require_seed("s", -(2**128)) == -(2**128)
    assert require_choice("c", False, (True, False)) is False
    assert require_text("t", "é😀\0") == "é😀\0"


@pytest.mark.parametrize("value", [
    "x" * 10**5, list(range(10**5)), "a\nb\n\n  c", {"a": [["deep"] * 9] * 9, "b": None}, 10**1000,
], ids=["long text", "long list", "lines", "nested", "large number"])
def test_a_value_is_shown_short_on_one_line_and_with_its_type(value: object) -> None:
    text = shown(value)
    assert "\n" not in text and len(text) < 400 and text.endswith(f"({type(value).__name__})")
