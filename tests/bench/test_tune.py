"""Tuning finds the choice that is fastest, whatever is timed: here no kernel is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from nanopaged.bench import tune
from nanopaged.paged_attention import Choice

PRESENT = Choice(64, 3, 4)
CPU = torch.device("cpu")


def attend(q: torch.Tensor, *, choice: Choice) -> torch.Tensor:
    """Wrong with 128 tokens in a tile, and impossible with 8 warps."""
    if choice.num_warps == 8:
        raise MemoryError("out of registers\nwith a long explanation")
    return q + (choice.tile_kv == 128)


def seconds_of(choice: Choice) -> float:
    """Least with a tile of 32, 5 stages, 2 warps and 8 programs. All else costs more, and so does a product of two."""
    return (10 + abs(choice.tile_kv - 32) + 5 * abs(choice.num_stages - 5) + abs(choice.num_warps - 2)
            + abs(choice.programs - 8) + choice.num_stages * choice.num_warps)


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """What was timed, in order."""
    choices: list[Choice] = []

    def seconds(calls: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> float:
        assert len(calls) == 2, "there are two sets of inputs"
        choices.append(calls[0].keywords["choice"])
        return seconds_of(choices[-1])

    monkeypatch.setattr(tune, "seconds", seconds)
    return choices


def tuned(splits: bool = True, limit_s: float = 100) -> tune.Tuned:
    inputs = [(torch.ones(3),), (torch.zeros(3),)]
    return tune.tune(attend, inputs, PRESENT, splits, 1e-3, CPU, time.monotonic() + limit_s)


def test_what_was_the_fastest_of_one_thing_is_kept_while_the_next_is_varied(timed: list[Choice]) -> None:
    found = tuned()
    assert found.present == tune.Trial(PRESENT, seconds_of(PRESENT))
    assert found.best == tune.Trial(Choice(32, 5, 2, programs=8), seconds_of(Choice(32, 5, 2, programs=8)))
    assert found.complete and len(timed) < len(found.trials) < 20
    assert len(set(timed)) == len(timed), "nothing is timed twice"


def test_a_choice_that_fails_or_computes_something_else_is_not_timed_and_says_why(timed: list[Choice]) -> None:
    problems = {trial.problem for trial in tuned().trials if trial.seconds is None}
    assert problems == {"MemoryError: out of registers", "its results differ by 1"}
    assert not any(choice.num_warps == 8 or choice.tile_kv == 128 for choice in timed)


def test_parts_are_left_as_they_are_where_contexts_are_not_split(timed: list[Choice]) -> None:
    assert tuned(splits=False).best.choice == Choice(32, 5, 2)
    assert {choice[3:] for choice in timed} == {PRESENT[3:]}


def test_a_gain_that_may_be_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "seconds", lambda calls, device: 1.0 - 0.005 * (calls[0].keywords["choice"] != PRESENT))
    assert tuned().best.choice == PRESENT


def test_when_the_time_is_up_the_best_so_far_is_found(timed: list[Choice]) -> None:
    found = tuned(limit_s=0)
    assert timed == [PRESENT] and found.best.choice == PRESENT and not found.complete
    assert found.as_dict()["best"] == {"choice": PRESENT._asdict(), "seconds": seconds_of(PRESENT), "problem": None}
