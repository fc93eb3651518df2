"""One call at a time: a second thread or a callback is refused, and the call that runs notices nothing."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable

import pytest
from tests.crowds import whatever_fits
from tests.oracle import continue_densely, tiny_model

from nanopaged import LLM, SamplingParams
from nanopaged.exclusive import Exclusive, alone
from nanopaged.waiting import PolicyError

MODEL = tiny_model()
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
CALLS: dict[str, Callable[[LLM], object]] = {
    "add_request": lambda llm: llm.add_request([7], GREEDY),
    "step": lambda llm: llm.step(),
    "generate": lambda llm: llm.generate([[7]], GREEDY),
    "abort_request": lambda llm: llm.abort_request("0"),
}


def engine(**options: object) -> LLM:
    return LLM(MODEL, device="cpu", block_size=8, num_blocks=40, **options)


class Caller:
    """A listener that makes one call from inside a step, in this thread or in another."""

    def __init__(self, llm: LLM, name: str, in_thread: bool) -> None:
        self.llm, self.name, self.in_thread = llm, name, in_thread
        self.errors: list[BaseException] = []
        self.stats: list[int] = []

    def stepped(self, step: object) -> None:
        if self.in_thread:
            thread = threading.Thread(target=self.call, name="the second")
            thread.start()
            thread.join()
        else:
            self.call()

    def call(self) -> None:
        before = len(self.llm._groups)
        try:
            CALLS[self.name](self.llm)
        except BaseException as error:
            self.errors.append(error)
        assert len(self.llm._groups) == before
        self.stats.append(self.llm.stats().num_steps)


@pytest.mark.parametrize("in_thread", [True, False], ids=["thread", "callback"])
@pytest.mark.parametrize("running", ["generate", "step"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_while_another_runs_is_refused_and_changes_nothing(name: str, running: str, in_thread: bool) -> None:
    llm = engine()
    caller = Caller(llm, name, in_thread)
    llm.scheduler.listeners.append(caller)
    if running == "generate":
        (output,) = llm.generate([[1, 2, 3]], GREEDY)
    else:
        llm.add_request([1, 2, 3], GREEDY)
        while llm.has_unfinished_requests():
            (output,) = llm.step()
    assert output.outputs[0].token_ids == continue_densely(MODEL, [1, 2, 3], GREEDY)
    assert len(caller.errors) == llm.stats().num_steps == caller.stats[-1] == 6
    thread = "the second" if in_thread else threading.current_thread().name
    for error in caller.errors:
        assert isinstance(error, RuntimeError)
        assert re.match(f"{name} was called in thread '{thread}' while {running} runs in thread '.*': an LLM belongs "
                        "to one thread at a time", str(error))
    assert llm.add_request([4], GREEDY) == "1", "the refused calls took no id"


def test_threads_that_take_turns_are_welcome() -> None:
    llm = engine()
    outputs = []
    for start in range(4):
        thread = threading.Thread(target=lambda: outputs.extend(llm.generate([[start, 1]], GREEDY)))
        thread.start()
        thread.join()
    assert [output.outputs[0].token_ids for output in outputs] == [
        continue_densely(MODEL, [start, 1], GREEDY) for start in range(4)]


def test_of_threads_that_come_at_once_all_but_one_are_refused_and_no_token_is_wrong() -> None:
    llm = engine()
    refused: list[RuntimeError] = []
    results: dict[int, list[int]] = {}

    def serve(start: int) -> None:
        for _ in range(30):
            try:
                results[start] = llm.generate([[start, 1]], GREEDY)[0].outputs[0].token_ids
            except RuntimeError as error:
                refused.append(error)

    threads = [threading.Thread(target=serve, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused and results
    for start, tokens in results.items():
        assert tokens == continue_densely(MODEL, [start, 1], GREEDY)
    llm.scheduler.check_invariants()


def test_a_policy_that_calls_its_engine_is_told_so_and_nothing_is_lost() -> None:
    answers: list[bool] = []

    def reenters(context: object) -> bool:
        if len(answers) == 3:  # two requests were added, the second waits for the policy
            answers.append(False)
            llm.step()
        answers.append(True)
        return True

    llm = engine(admission=reenters)
    ids = [llm.add_request([i, 2, 3], GREEDY) for i in range(3)]
    with pytest.raises(PolicyError, match="admission policy raised RuntimeError.*step was called .* while step runs"):
        llm.step()
    results = {}
    while llm.has_unfinished_requests():
        results |= {output.request_id: output.outputs[0].token_ids for output in llm.step()}
        llm.scheduler.check_invariants()
    assert results == {request_id: continue_densely(MODEL, [i, 2, 3], GREEDY) for i, request_id in enumerate(ids)}


def test_a_call_that_raises_or_is_interrupted_leaves_the_engine_open(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine(admission=whatever_fits)
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.add_request([], GREEDY)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1]], GREEDY)
    finally:
        signal.signal(signal.SIGINT, before)
    assert llm.generate([[1]], GREEDY)[0].outputs[0].token_ids == continue_densely(MODEL, [1], GREEDY)


def test_an_interrupt_just_before_the_method_leaves_the_object_open() -> None:
    class Counter(Exclusive):
        @alone
        def call(self) -> None:
            pass

    counter = Counter()

    class Entry(dict):
        """Interrupts right after the entry was made, as a signal would."""

        def setdefault(self, key: str, value: object) -> object:
            super().setdefault(key, value)
            raise KeyboardInterrupt

    inside, counter._inside = counter._inside, Entry()
    with pytest.raises(KeyboardInterrupt):
        counter.call()
    assert not counter._inside
    counter._inside = inside
    counter.call()
    assert not inside
