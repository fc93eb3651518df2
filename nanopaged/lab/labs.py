"""What is a lab? Which are there?

Each lab is a folder beside this file: `__init__.py` says which functions it takes out, `grader.py` what must hold
of them, `bugs.py` how they can be wrong, and `alternative.py`, where there is one, how else they can be right.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

NAMES = ("blocks", "attention", "batch", "scheduler", "prefix", "copies", "kernel")  # in the order of an engine's life


@dataclass(frozen=True)
class Part:
    """A step of a lab. `asks` completes "write what ..."; `bodies` are named module:Class.function.

    A body that several parts need is named by each of them.
    """

    asks: str
    bodies: tuple[str, ...]
    hints: tuple[str, ...]  # from the gentlest to the plainest


@dataclass(frozen=True)
class Scenario:
    """A small run of the engine, in which the lab's subject shows. Each request is (step of its arrival, prompt,
    what SamplingParams is called with); `options` are those of LLM."""

    requests: tuple[tuple[int, str, dict[str, object]], ...]
    options: dict[str, object]
    watch: str  # what to look for in its movie


@dataclass(frozen=True)
class Lab:
    name: str
    title: str
    hours: str  # an estimate
    learns: str  # what one learns, in a sentence
    parts: tuple[Part, ...]
    scenario: Scenario
    needs_torch: bool = True  # whether its grader computes with tensors
    launchers: tuple[str, ...] = ()  # modules that launch the bodies, if these are kernels: they raise in their place

    def bodies(self, first: int = 1, last: int | None = None) -> list[str]:
        """Of parts `first` to `last`, each once, in order."""
        return list(dict.fromkeys(body for part in self.parts[first - 1 : last] for body in part.bodies))

    def part_of(self, body: str) -> int:
        """The first part that needs it, counted from 1."""
        return next(number for number, part in enumerate(self.parts, 1) if body in part.bodies)


def get(name: str) -> Lab:
    """Raises ValueError if there is no lab of this name."""
    if name not in NAMES:
        raise ValueError(f"there is no lab {name!r}: choose one of {', '.join(NAMES)}")
    return importlib.import_module(f"nanopaged.lab.{name}").LAB


def every() -> list[Lab]:
    return [get(name) for name in NAMES]
