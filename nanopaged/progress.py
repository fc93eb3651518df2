"""One line on a terminal that says how far a long call has come."""

from __future__ import annotations

import sys


def show_progress(line: str) -> None:
    """Rewrites one line of the terminal; "" clears it. Silent if stderr is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
