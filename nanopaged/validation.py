"""Is an argument what it must be? Checked where it enters, so that a fault names itself.

Each function returns its value, or raises TypeError (wrong kind) or ValueError (wrong size) with
the argument's name, what was given and what is allowed.
"""

from __future__ import annotations

import math


def require_int(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """An int in [minimum, maximum]. A bool is not a count, and neither is a float."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum or (maximum is not None and value > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value


def require_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> float:
    """A finite int or float in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and minimum <= value <= maximum):
        allowed = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be a finite number {allowed}, got {value}")
    return float(value)


def require_bool(name: str, value: object) -> bool:
    """True or False, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """One of a few words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {value!r} ({type(value).__name__})")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
