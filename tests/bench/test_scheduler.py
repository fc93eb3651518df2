"""`python -m nanopaged.bench scheduler`: each experiment measures what its name says, and no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanopaged.bench import scheduler as scheduler_bench
from nanopaged.bench.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments, message", [(["--rounds", "0"], "rounds must be at least 1"),
                                                (["--steps", "500"], "steps must be from 1 to 184"),
                                                (["--json", "no/such/folder/file"], "no/such/folder/file")])
def test_bad_values_get_one_line_and_status_2(arguments: list[str], message: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scheduler", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench scheduler: error: ") and message in error
    assert error.count("\n") == 1


def test_costs_and_slopes_are_printed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scheduler_bench, "FACTORS", (1, 3))
    path = tmp_path / "figures.json"
    assert main(["scheduler", "--rounds", "1", "--steps", "10", "--json", str(path)]) == 0
    printed, figures = capsys.readouterr().out, json.loads(path.read_text())["figures"]
    assert list(figures) == ["waiting", "blocks", "cached"]
    for name, smallest in (("waiting", 100), ("blocks", 1000), ("cached", 100)):
        assert figures[name]["sizes"] == [smallest, 3 * smallest]
        assert all(1e-8 < cost < 1e-3 for cost in figures[name]["seconds_per_token"])
        assert f"{figures[name]['slope']:+.3f}" in printed
    assert printed.count("\n| ") == 4 and "0: the cost does not grow" in printed


def test_it_runs_without_torch() -> None:
    code = ("import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
            "from nanopaged.bench.__main__ import main\n"
            "sys.exit(main(['scheduler', '--rounds', '1', '--steps', '1']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slope_is_the_power_with_which_the_cost_grows() -> None:
    sizes = [100, 1000, 10000]
    assert scheduler_bench.slope(sizes, [3e-6] * 3) == pytest.approx(0)
    assert scheduler_bench.slope(sizes, [1e-6, 1e-5, 1e-4]) == pytest.approx(1)
    assert scheduler_bench.slope(sizes, [2.0, 2.0 * 10**0.5, 20.0]) == pytest.approx(0.5)


def test_the_queue_waits_throughout_and_its_head_is_refused_in_every_step() -> None:
    scheduler, arrivals = scheduler_bench.behind_a_queue(50, 0)
    asked = []
    admission = scheduler.admission
    scheduler.admission = lambda context: asked.append(admission(context)) or asked[-1]
    scheduler_bench.seconds_per_token(scheduler, arrivals, 20)
    assert asked == [False] * 20 and len(scheduler.waiting) == 50 and len(scheduler.running) == scheduler_bench.RUNNING


def test_the_pool_has_the_given_size_and_its_free_blocks_are_scattered() -> None:
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
