"""How operations and the engine's steps are timed."""

from __future__ import annotations

import pytest
import torch
from tests.test_engine import GREEDY, tiny_llm

from nanopaged.bench import timing

CPU = torch.device("cpu")


def test_on_a_cpu_the_median_of_three_passes_is_divided_by_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, speeds = 0.0, iter([1, 1, 9, 9, 1, 1, 3, 3])  # two calls that warm up, then three passes

    def call() -> None:
        nonlocal now
        now += next(speeds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.seconds([call, call], CPU) == 3.0


def test_inputs_in_turn_are_larger_than_a_cache() -> None:
    assert timing.num_input_sets(timing.CACHE_BYTES // 10) * (timing.CACHE_BYTES // 10) >= timing.CACHE_BYTES
    assert timing.num_input_sets(10 * timing.CACHE_BYTES) == 2


def test_a_copy_of_some_bytes_reads_half_of_them_and_writes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: copied.append((target.nbytes, source.nbytes)))
    monkeypatch.setattr(timing, "CACHE_BYTES", 1)
    assert timing.copy_seconds(1000, CPU) > 0
    assert set(copied) == {(500, 500)}


def test_each_step_of_the_engine_is_timed_and_its_size_noted() -> None:
    llm = tiny_llm(max_num_batched_tokens=10)
    listeners = list(llm.scheduler.listeners)
    llm.add_request([1] * 12, GREEDY)  # 10 tokens (whose last row is checked), then 2; then one in each step
    llm.add_request([2] * 8, GREEDY)  # 8 tokens beside the 2; its last token comes one step later
    steps = list(timing.timed_steps(llm))
    scores = 55, (11 + 12) + 36  # the rows of a chunk see 1 to 10 positions, or 11 and 12, or 1 to 8
    assert [size for _, size in steps] == [
        (10, 1, 10, scores[0]), (10, 2, 12 + 8, scores[1]), *((2, 2, 20 + 2 * i, 0) for i in range(1, 8))]
    assert all(seconds > 0 for seconds, _ in steps)
    assert not llm.has_unfinished_requests() and llm.scheduler.listeners == listeners
