"""Exceptions and interrupts at chosen places: what several tests inject, and how they find the place."""

from __future__ import annotations

import inspect
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import nanopaged
from nanopaged import LLM
from nanopaged.interrupts import uninterrupted
from nanopaged.step import Listeners

PACKAGE = str(Path(nanopaged.__file__).parent) + os.sep


class InjectedFault(RuntimeError):
    """Raised in place of a call."""


def raise_fault() -> None:
    raise InjectedFault


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def step_with_fault(llm: LLM, rng: random.Random) -> None:
    """A step in which one part of the work raises, before or after it was done."""
    engine = sys.modules["nanopaged.engine"]
    owner, name = rng.choice([(llm.model, "forward"), (llm.kv_cache, "carry_out"), (engine, "sample")])
    original, late = getattr(owner, name), rng.random() < 0.5

    def explode(*arguments: object) -> None:
        if late:
            original(*arguments)
        raise InjectedFault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, explode)
        with pytest.raises(InjectedFault):
            llm.step()


class Calls:
    """Counts the calls of nanopaged's functions, and does something at the start of one of them.

    Calls inside `uninterrupted` blocks, which update the state and must not raise, are left out, unless
    `in_blocks` asks for them: there an interrupt must wait. So are calls of listeners, whose exceptions
    no caller sees.
    """

    def __init__(self, target: int = 0, deed: Callable[[], None] = raise_fault, in_blocks: bool = False) -> None:
        self.target, self.deed, self.in_blocks = target, deed, in_blocks
        self.functions: list[str] = []
        self.sites: list[tuple[str, int, str]] = []  # of each call: the caller's file and line, and the function
        self.blocks: list[FrameType] = []  # generators of the open `uninterrupted` blocks

    def __enter__(self) -> Calls:
        self.before = sys.getprofile()
        sys.setprofile(self.observe)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def observe(self, frame: FrameType, event: str, _: object) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code is uninterrupted.__wrapped__.__code__:  # runs twice for each block: up to its yield, and after it
            self.blocks.remove(frame) if frame in self.blocks else self.blocks.append(frame)
            if not self.in_blocks:
                return
        elif not self.in_blocks and (self.blocks or caller.f_code is Listeners.tell.__code__):
            return
        elif code.co_flags & inspect.CO_GENERATOR:
            return  # a generator is called once more to be closed, where Python swallows what it raises
        self.functions.append(code.co_qualname)
        self.sites.append((caller.f_code.co_filename, caller.f_lineno, code.co_qualname))
        if len(self.functions) == self.target:
            self.deed()

    def one_of_each_site(self, share: float) -> list[tuple[int, str]]:
        """Of each call site one call, at this share of its calls (0 is the first, 1 the last): (number, place)."""
        numbers: dict[tuple[str, int, str], list[int]] = {}
        for number, site in enumerate(self.sites, 1):
            numbers.setdefault(site, []).append(number)
        chosen = {site: calls[round(share * (len(calls) - 1))] for site, calls in numbers.items()}
        return [(number, f"call {number}, {site}") for site, number in chosen.items()]

    def last(self, function: str) -> int:
        return max(number for number, called in enumerate(self.functions, 1) if called == function)
