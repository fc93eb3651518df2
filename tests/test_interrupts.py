"""Ctrl-C inside a block that must not be torn apart: it is held back, and delivered once the block is done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from nanopaged.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored; Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_is_delivered_after_the_block_and_the_handler_is_restored() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            press_ctrl_c()
            done.append("block")
        done.append("after it")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is handler
    with uninterrupted():
        pass  # the two were delivered as one, and neither is left over
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_an_interrupt_in_an_inner_block_is_delivered_after_the_outer_one() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                press_ctrl_c()
                done.append("inner")
            done.append("outer")
        done.append("after both")
    assert done == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is handler


def test_a_block_that_raises_restores_the_handler_and_loses_no_interrupt() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        press_ctrl_c()
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_users_own_handler_is_called_once_after_the_block() -> None:
    calls: list[str] = []
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(signal.Signals(number).name))
    with uninterrupted():
        press_ctrl_c()
        press_ctrl_c()
        assert calls == []
    assert calls == ["SIGINT"]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=lambda handler: handler.name)
def test_a_signal_that_python_does_not_handle_is_left_to_the_system(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with uninterrupted():
        if handler is signal.SIG_IGN:
            press_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is handler
    assert signal.getsignal(signal.SIGINT) is handler


def test_outside_the_main_thread_nothing_is_held_back() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT) is handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
