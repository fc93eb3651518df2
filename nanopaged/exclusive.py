"""What if two threads call one engine at once, or a callback calls the engine that has called it?

An `LLM` is not safe to share: its requests would get each other's tokens. So a second call is refused
while one runs, before it changes anything.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class Exclusive:
    """A base for classes whose methods marked `alone` may not overlap."""

    def __init__(self) -> None:
        self._inside: dict[str, tuple[str, str]] = {}  # at most one entry: the method that runs, and its thread


def alone(method: Method) -> Method:
    """Marks a method that raises RuntimeError, with nothing changed, while another marked method of the object runs."""

    @functools.wraps(method)
    def entered(self: Exclusive, *args: object, **kwargs: object) -> Any:
        inside, me = self._inside, (method.__name__, threading.current_thread().name)
        try:
            # `setdefault` looks and enters in one operation, so of two threads one is told of the other. Ctrl-C is
            # handled after calls, and CPython's lock changes hands there: so there is no call between a look and a
            # change, and no interrupt leaves the door shut.
            if (first := inside.setdefault("call", me)) is not me:
                raise RuntimeError(
                    f"{method.__name__} was called in thread {me[1]!r} while {first[0]} runs in thread {first[1]!r}: "
                    "an LLM belongs to one thread at a time, and a callback (a policy, a listener) may not call it")
            return method(self, *args, **kwargs)
        finally:
            if "call" in inside and inside["call"] is me:
                del inside["call"]

    return entered
