"""What would a person see on a terminal? Commands run in a pseudo-terminal, and an emulator reads what they write."""

from __future__ import annotations

import os
import re
import select
import signal
import struct
from collections.abc import Mapping
from typing import NamedTuple

import pytest
from tests.processes import start_python


class Resize(NamedTuple):
    """The window gets another size once what was written ends as `sign` says, a regular expression."""

    sign: str
    columns: int
    rows: int

    def note(self) -> str:  # for `screen`, where the window was resized
        return f"\x1b]window {self.columns} {self.rows}\a"


class Shown(NamedTuple):
    """What the window shows in the end, and what has left it at its top."""

    scrollback: list[str]
    window: list[str]


def in_terminal(*command: str, ctrl_c_at: str | None = None, columns: int = 80, rows: int = 24,
                resize: Resize | None = None, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """The status of `python COMMAND` in a pseudo-terminal, and all that was written to it.

    Ctrl-C is pressed when `ctrl_c_at` has been written.
    """
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals on this system")
    keyboard, terminal = pty.openpty()
    set_size(keyboard, columns, rows)
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = start_python(*command, streams=(terminal, terminal, terminal),
                           environment={**inherited, "TERM": "xterm", **(environment or {})})
    os.close(terminal)
    written = b""
    try:
        while select.select([keyboard], [], [], 120)[0]:
            try:
                written += os.read(keyboard, 65536)
            except OSError:  # the process has closed it
                break
            if ctrl_c_at is not None and ctrl_c_at.encode() in written:
                os.write(keyboard, b"\x03")
                ctrl_c_at = None
            if resize is not None and re.search(resize.sign.encode() + rb"\Z", written, re.DOTALL):
                process.send_signal(signal.SIGSTOP)  # it writes nothing between our last look and the resize
                if not select.select([keyboard], [], [], 0)[0]:
                    set_size(keyboard, resize.columns, resize.rows)
                    written += resize.note().encode()
                    resize = None
                process.send_signal(signal.SIGCONT)
        assert ctrl_c_at is None, f"{ctrl_c_at!r} was never written: {written.decode()}"
        assert resize is None, f"{resize} never came: {written.decode()}"
        return process.wait(60), written.decode()
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def set_size(keyboard: int, columns: int, rows: int) -> None:
    import fcntl
    import termios
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def screen(written: str, columns: int = 80, rows: int = 24, wraps_again: bool = True) -> Shown:
    """What a terminal shows of what was written to it.

    When its window is resized it wraps the lines that are there again, as most terminals do; or it cuts them.
    """
    pyte = pytest.importorskip("pyte", reason="without pyte there is no terminal to look at")

    def window(columns: int, rows: int) -> pyte.HistoryScreen:
        return pyte.HistoryScreen(columns, rows, history=100_000)

    def lines(rows: list[Mapping[int, pyte.screens.Char]]) -> list[str]:
        return ["".join(row[x].data for x in range(shown.columns)).rstrip() for row in rows]

    shown = window(columns, rows)
    first, *later = re.split("\x1b\\]window (\\d+) (\\d+)\a", written)
    pyte.Stream(shown).feed(first)
    for columns, rows, text in zip(map(int, later[::3]), map(int, later[1::3]), later[2::3]):
        before = lines([*shown.history.top, *(shown.buffer[y] for y in range(shown.cursor.y + 1))])
        shown = window(columns, rows)
        pyte.Stream(shown).feed("\r\n".join(line if wraps_again else line[:columns] for line in before) + text)
    return Shown(lines(list(shown.history.top)), lines([shown.buffer[y] for y in range(shown.lines)]))
