"""Which tiles, stages, warps and parts are the fastest for one batch?

One of them is varied at a time, and what was the fastest is kept while the next is varied: a dozen measurements
instead of the thousand that all combinations would be. Whatever is tried must also compute the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nanopaged.bench.timing import seconds
from nanopaged.paged_attention import Choice

ALTERNATIVES = {  # those of a Choice
    "num_stages": (2, 3, 5, 7),
    "num_warps": (2, 4, 8),
    "tile_kv": (16, 32, 64, 128),
    "programs": (2, 4, 8, 16),
    "smallest_part": (64, 128, 256, 512),
}
GAIN = 1.01  # what is faster by less than this is noise, and not worth another choice


@dataclass(frozen=True)
class Trial:
    """The time of one call, or why there is none."""

    choice: Choice
    seconds: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Tuned:
    present: Trial
    best: Trial
    trials: list[Trial]
    complete: bool  # else the time was up

    def as_dict(self) -> dict[str, object]:
        """For JSON, where a Choice would be a list without names."""
        def named(trial: Trial) -> dict[str, object]:
            return {"choice": trial.choice._asdict(), "seconds": trial.seconds, "problem": trial.problem}

        return {"present": named(self.present), "best": named(self.best), "complete": self.complete,
                "trials": list(map(named, self.trials))}


def tune(attend: Callable[..., torch.Tensor], inputs: Sequence[tuple], present: Choice, splits: bool,
         tolerance: float, device: torch.device, deadline_s: float) -> Tuned:
    """`attend(*inputs[i], choice=...)` is timed, until `time.monotonic()` is `deadline_s`.

    Contexts are split in different ways only if `splits`. Raises what the present choice raises.
    """
    wanted = attend(*inputs[0], choice=present)
    best = Trial(present, seconds([partial(attend, *each, choice=present) for each in inputs], device))
    trials = [best]
    for field, values in ALTERNATIVES.items():
        if field in ("programs", "smallest_part") and not splits:
            continue
        start = best.choice
        for value in values:
            if value == getattr(start, field):
                continue
            if time.monotonic() >= deadline_s:
                return Tuned(trials[0], best, trials, False)
            trial = _trial(attend, inputs, start._replace(**{field: value}), wanted, tolerance, device)
            trials.append(trial)
            if trial.seconds is not None and trial.seconds * GAIN < best.seconds:
                best = trial
    return Tuned(trials[0], best, trials, True)


def _trial(attend: Callable[..., torch.Tensor], inputs: Sequence[tuple], choice: Choice, wanted: torch.Tensor,
           tolerance: float, device: torch.device) -> Trial:
    try:
        difference = (attend(*inputs[0], choice=choice).float() - wanted.float()).abs().max().item()
        if not difference < tolerance:
            return Trial(choice, None, f"its results differ by {difference:.2g}")
        return Trial(choice, seconds([partial(attend, *each, choice=choice) for each in inputs], device))
    except Exception as error:  # the compiler and the driver refuse in many ways what needs too much of something
        return Trial(choice, None, f"{type(error).__name__}: {error}".split("\n")[0])
