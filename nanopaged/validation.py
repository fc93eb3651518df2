"""Is an argument valid? Checked where it enters, so that a fault names itself.

Each `require_` function returns its value, or raises TypeError (wrong kind) or ValueError (wrong size).
"""

from __future__ import annotations

import math
import reprlib
from importlib.util import find_spec


def require_int(name: str, value: object, minimum: float = -math.inf, maximum: float = math.inf) -> int:
    """An int in [minimum, maximum]. A bool is not a count, and neither is a float."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    return _require_range(name, value, minimum, maximum)


def require_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> float:
    """A finite int or float in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return _require_range(name, value, minimum, maximum)


def require_seed(name: str, value: object) -> int:
    """Any int of at most 128 bits."""
    return require_int(name, value, -(2**128), 2**128)


def require_choice(name: str, value: object, allowed: tuple[object, ...]) -> object:
    """One of a few values, of the same type as they."""
    if type(value) is not type(allowed[0]):
        raise TypeError(f"{name} must be a {type(allowed[0]).__name__}, got {shown(value)}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")
    return value


def require_text(name: str, value: str) -> str:
    """A str that has bytes: no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character, the lone surrogate {value[error.start]!r} at position "
                         f"{error.start}: it has no bytes, so it cannot be encoded") from None
    return value


def shown(value: object) -> str:
    """A value and its type as an error message shows them: short, and on one line."""
    return f"{' '.join(reprlib.repr(value).split())} ({type(value).__name__})"


def _require_range(name: str, value: float, minimum: float, maximum: float) -> float:
    if not minimum <= value <= maximum:
        allowed = f"at least {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return value


def has_folder(name: str) -> bool:
    """Whether an optional folder of the package is there; Python takes even an empty one for a package."""
    spec = find_spec(f"nanopaged.{name}")
    return spec is not None and spec.origin is not None
