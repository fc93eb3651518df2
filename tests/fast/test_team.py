"""Each piece of the work is done once, whoever is busy, asleep or gone, and torch's threads are as before."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from nanopaged.fast import team as teams
from nanopaged.fast.team import Team


@pytest.fixture
def three() -> Team:
    return Team(3)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_call_is_made_once(three: Team) -> None:
    made: list[int] = []
    for count in (0, 1, 2, 50):
        made.clear()
        three.run([lambda i=i: made.append(i) for i in range(count)])
        assert sorted(made) == list(range(count))


def test_while_a_thread_is_held_up_the_others_do_the_rest(three: Team) -> None:
    """The one that made the first call is let go only by the last: so others must have made all in between."""
    last, made = threading.Event(), []

    def first() -> None:
        assert last.wait(20), "nobody made the other calls"
        made.append(0)

    three.run([first, *(lambda i=i: made.append(i) for i in range(1, 20)), last.set])
    assert sorted(made) == list(range(20))


def test_calls_have_one_thread_of_torch_and_afterwards_there_are_as_many_as_before(three: Team) -> None:
    torch.set_num_threads(3)
    seen: list[int] = []
    three.run([lambda: seen.append(torch.get_num_threads())] * 12)
    assert seen == [1] * 12 and torch.get_num_threads() == 3


def test_an_exception_in_a_call_is_raised_when_all_have_ended(three: Team) -> None:
    made: list[int] = []

    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        three.run([fail, *(lambda i=i: made.append(i) for i in range(9))])
    assert sorted(made) == list(range(9))
    three.run([lambda: made.append(9)])
    assert made[-1] == 9


def test_whoever_finds_the_team_busy_does_its_work_alone(three: Team) -> None:
    made: list[int] = []
    three.run([lambda: three.run([lambda i=i: made.append(i) for i in range(5)])])
    assert sorted(made) == list(range(5))


def test_a_result_is_written_into_tensors_of_inference_mode(three: Team) -> None:
    with torch.inference_mode():
        out = torch.zeros(40, 3)
    with torch.inference_mode():
        three.run([lambda piece=piece, i=i: piece.fill_(i) for i, piece in enumerate(out.split(10))])
    assert out[:, 0].tolist() == [i // 10 for i in range(40)]


def test_what_the_calls_hold_is_let_go(three: Team) -> None:
    three.run([lambda: None])
    assert three.job is None


@pytest.mark.parametrize("threads, size", [(1, None), (2, 2), (teams.MOST_THREADS + 1, None)])
def test_there_is_a_team_where_torch_has_some_threads(
        threads: int, size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_team", None)
    torch.set_num_threads(threads)
    made = teams.team()
    assert (made and len(made)) == size and torch.get_num_threads() == threads
    assert teams.team() is made


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_makes_a_team_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "_team", Team(2))
    pid = os.fork()
    if pid == 0:
        os._exit(0 if teams._team is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
