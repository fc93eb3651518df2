"""What must hold of a scheduler? The checks of all parts, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

MODULES = ("recording", "admitting", "planning", "giving_way", "aborting")


def _checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for module in MODULES:
        for name, value in vars(import_module(f"nanopaged.lab.scheduler.{module}")).items():
            if hasattr(value, "check"):
                yield f"{module}_{name}", value


globals().update(_checks())
