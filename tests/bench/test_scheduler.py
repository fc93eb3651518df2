"""The measuring commands: one frame for all, and what the scheduler's own measurement promises."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanopaged.bench import __main__ as bench
from nanopaged.bench import cost as cost_bench
from nanopaged.bench import scheduler as scheduler_bench
from nanopaged.report import table


def run(*arguments: str) -> int:
    try:
        return bench.main(arguments)
    except SystemExit as end:
        return int(end.code)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_bench, "FACTORS", (1, 3))


@pytest.mark.parametrize("arguments", [[], ["no such command"], ["scheduler", "--no-such-flag"],
                                       ["scheduler", "--rounds", "x"]])
def test_what_is_no_command_and_no_flag_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*arguments) == 2
    assert "usage: python -m nanopaged.bench" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [(["--rounds", "0"], "rounds must be at least 1"),
                                                (["--steps", "500"], "steps must be from 1 to 184"),
                                                (["--json", "no/such/folder/file"], "no/such/folder/file")])
def test_bad_values_get_one_line_and_status_2(arguments: list[str], message: str,
                                              capsys: pytest.CaptureFixture) -> None:
    assert run("scheduler", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench scheduler: error: ") and message in error
    assert error.count("\n") == 1


def test_every_command_has_a_module_of_its_name() -> None:
    rooms = {path.stem for path in Path(bench.__file__).parent.glob("*.py")}
    assert set(bench.COMMANDS) <= rooms


def test_the_scheduler_is_measured_and_its_slopes_are_shown_and_kept(tiny: None, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    assert run("scheduler", "--rounds", "1", "--steps", "10", "--json", str(path)) == 0
    printed, figures = capsys.readouterr().out, json.loads(path.read_text())["figures"]
    assert list(figures) == ["waiting", "blocks", "cached"]
    for name, smallest in (("waiting", 100), ("blocks", 1000), ("cached", 100)):
        assert figures[name]["sizes"] == [smallest, 3 * smallest]
        assert all(1e-8 < cost < 1e-3 for cost in figures[name]["seconds_per_token"])
        assert f"{figures[name]['slope']:+.3f}" in printed
    assert printed.count("\n| ") == 4 and "0: the cost does not grow" in printed


def test_a_slope_is_the_power_with_which_the_cost_grows() -> None:
    sizes = [100, 1000, 10000]
    assert scheduler_bench.slope(sizes, [3e-6] * 3) == pytest.approx(0)
    assert scheduler_bench.slope(sizes, [1e-6, 1e-5, 1e-4]) == pytest.approx(1)
    assert scheduler_bench.slope(sizes, [2.0, 2.0 * 10**0.5, 20.0]) == pytest.approx(0.5)


def test_the_cost_of_a_step_is_recovered_from_steps_of_a_known_cost(monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: pytest.CaptureFixture) -> None:
    """In every second round the machine is busy with something else."""
    rounds = count()

    def timed_steps(llm: object, rng: random.Random, batch_size: int) -> list[tuple[float, int, int, float]]:
        busy = 1 + next(rounds) // len(cost_bench.BATCH_SIZES) % 2
        sizes = [(rng.randint(1, 500), rng.randint(500, 9000)) for _ in range(9)]
        return [(1.0, n, context, busy * (0.05 + 0.004 * n + 3e-5 * context)) for n, context in sizes]

    monkeypatch.setattr(cost_bench, "timed_steps", timed_steps)
    monkeypatch.setattr(cost_bench, "LLM", lambda *args, **options: SimpleNamespace(device="cpu"))
    figures = cost_bench.run(Namespace(layers=1, device="cpu", rounds=4, seed=0))
    assert [figures["fixed_s"], figures["per_token_s"], figures["per_kv_token_s"]] == pytest.approx([0.05, 0.004, 3e-5])
    assert figures["median_relative_error"] < 1e-6 and "50,000" in capsys.readouterr().out


def test_the_queue_waits_throughout_and_its_head_is_refused() -> None:
    scheduler, arrivals = scheduler_bench.behind_a_queue(50, 0)
    asked = []
    admission, scheduler.admission = scheduler.admission, lambda now: asked.append(admission(now)) or asked[-1]
    scheduler_bench.seconds_per_token(scheduler, arrivals, 20)
    assert asked == [False] * 20 and len(scheduler.waiting) == 50 and len(scheduler.running) == scheduler_bench.RUNNING


def test_the_pool_is_as_large_as_it_says_and_its_blocks_are_scattered() -> None:
    scheduler, arrivals = scheduler_bench.in_a_large_pool(1000, 0)
    scheduler_bench.seconds_per_token(scheduler, arrivals, 20)
    table = scheduler.running[0].block_table
    assert scheduler.allocator.num_blocks == 1000 and sorted(table) != table
    scheduler.check_invariants()


def test_requests_find_cached_prefixes_and_evict_others() -> None:
    scheduler, arrivals = scheduler_bench.among_cached_prefixes(200, 0)
    assert scheduler.allocator.stats().cached_blocks == 400
    scheduler_bench.seconds_per_token(scheduler, arrivals, 150)
    stats = scheduler.allocator.stats()
    assert scheduler.stats.prompt_hit_tokens > 0.3 * scheduler.stats.prompt_tokens
    assert stats.evicted_blocks > 100 and stats.cached_blocks > 300
    assert scheduler.stats.num_finished > 300 and len(scheduler.running) == scheduler_bench.RUNNING
    scheduler.check_invariants()


def test_a_table_aligns_words_to_the_left_and_figures_to_the_right() -> None:
    assert table(["name", "n"], [["a", 1234], ["long", None]]) == (
        "| name |     n |\n"
        "|------|------:|\n"
        "| a    | 1,234 |\n"
        "| long |     - |")
