"""One line on a terminal that says how far a long call has come."""

from __future__ import annotations

import sys
import time

from nanopaged.outputs import SchedulerStats


def show_progress(line: str) -> None:
    """Rewrites one line of the terminal; "" clears it. Silent if stderr is no terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def time_left(share: float, elapsed_s: float) -> str:
    """Such as "25% done, about 9 s left", if the rest takes as long as what is done did; `share` from 0 to 1."""
    if share == 0:
        return "0% done"
    left_s = elapsed_s * (1 - share) / share
    return f"{share:.0%} done, about {f'{left_s:.0f} s' if left_s < 100 else f'{left_s / 60:.0f} min'} left"


class Progress:
    """How many of `wanted` continuations have finished, and the tokens per second, since it was made."""

    def __init__(self, stats: SchedulerStats, wanted: int) -> None:
        self.stats, self.wanted, self.start_s = stats, wanted, time.monotonic()
        self.finished_before, self.tokens_before = stats.num_finished, stats.output_tokens

    def show(self) -> None:
        finished = self.stats.num_finished - self.finished_before
        rate = (self.stats.output_tokens - self.tokens_before) / max(time.monotonic() - self.start_s, 1e-9)
        show_progress(f"{finished} of {self.wanted} continuations, {rate:.0f} tokens/s")
