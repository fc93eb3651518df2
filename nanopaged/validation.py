"""Is an argument what it must be? Checked where it enters, so that a fault names itself.

Each function returns its value, or raises TypeError (wrong kind) or ValueError (wrong size).
"""

from __future__ import annotations

import math


def require_int(name: str, value: object, minimum: float = -math.inf, maximum: float = math.inf) -> int:
    """An int in [minimum, maximum]. A bool is not a count, and neither is a float."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    return _require_range(name, value, minimum, maximum)


def require_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> float:
    """A finite int or float in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return _require_range(name, value, minimum, maximum)


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> object:
    if type(value) is not type(allowed[0]):
        raise TypeError(f"{name} must be a {type(allowed[0]).__name__}, got {value!r} ({type(value).__name__})")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _require_range(name: str, value: float, minimum: float, maximum: float) -> float:
    if not minimum <= value <= maximum:
        allowed = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value
