"""The simulator: the real scheduler, a formula for the seconds of a step, and the figures that come of it."""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from nanopaged import report, simulate, traces
from nanopaged.pressure.admission import greedy, watermark
from nanopaged.block_allocator import BlockAllocator
from nanopaged.simulate.contiguous import RESERVATIONS, ContiguousAllocator, ContiguousScheduler, MemoryUse
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.simulate.simulator import (SHORTEST_STEP_S, Averages, Clock, Histogram, PagedServer, Result, Server, StepCost,
                                 Trace, summarize)
from nanopaged.simulate.simulator import simulate as serve
from nanopaged.simulate.traces import DATASETS, LATEST_ARRIVAL_S, TraceRequest

ROOT = Path(__file__).parents[1]
SECOND = StepCost(1.0, 0.0, 0.0)  # every step takes one


def paged(clock: Clock, num_blocks: int, block_size: int = 4, seats: int = 8, **others: object) -> PagedServer:
    return PagedServer(BlockAllocator(num_blocks, block_size), seats, 64, 128, clock=clock, **others)


def fixed(*requests: tuple[float, int, int]) -> Trace:
    """A trace of (arrival, prompt length, output length)."""
    return lambda: iter([TraceRequest(arrival, [i] * prompt, output)
                         for i, (arrival, prompt, output) in enumerate(requests)])


def small_trace(seed: int, num_requests: int = 60) -> Trace:
    return partial(traces.generate, DATASETS["alpaca"], num_requests, 2.0, 256, 0.3, seed)


def small_server(name: str, clock: Clock) -> Server:
    if name == "paged":
        return PagedServer(BlockAllocator(64, 16), 32, 256, 256, clock=clock)
    return ContiguousScheduler(ContiguousAllocator(64 * 16), RESERVATIONS[name], 32, 256, 256, clock)


def small_run(name: str, seed: int) -> tuple[Server, Result]:
    clock, trace = Clock(), small_trace(seed)
    server = small_server(name, clock)
    return server, serve(trace, summarize(trace).last_arrival_s, server, clock, SECOND)


def test_a_run_of_two_requests_adds_up_by_hand() -> None:
    """8 blocks of 4 slots, steps of one second. A comes at 0 s, 3 + 3 tokens; B at 1 s, 2 + 2 tokens."""
    clock = Clock()
    result = serve(fixed((0.0, 3, 3), (1.0, 2, 2)), 0, paged(clock, 8), clock, SECOND)
    # seconds   0-1   1-2     2-3
    # A writes  3     1       1      in 1, 1 and 2 blocks
    # B writes        2       1      in    1 and 1 block
    assert clock.now == result.simulated_s == 3
    assert result.counts.num_finished == 2 and result.tokens_per_s == pytest.approx(5 / 3)
    assert result.memory["tokens"] == pytest.approx((3 + (4 + 2) + (5 + 3)) / 3 / 32)
    assert result.memory["internal"] == pytest.approx((1 + (0 + 2) + (3 + 1)) / 3 / 32)
    assert result.memory["free"] == pytest.approx((28 + 24 + 20) / 3 / 32)
    assert result.memory["external"] == result.memory["reserved"] == 0
    assert result.average_batch == pytest.approx((1 + 2 + 2) / 3)
    assert result.average_table == pytest.approx((1 + 2 + 3) / (1 + 2 + 2))
    assert result.ttft_p50_s == result.ttft_p99_s == pytest.approx(1.0, rel=0.01)
    assert result.tbt_p50_s == result.tbt_p99_s == pytest.approx(1.0, rel=0.01)
    assert result.goodput == 1 and result.hit_share == 0


def test_the_shortest_step_moves_the_clock_even_at_the_latest_arrival() -> None:
    clock = Clock()
    result = serve(fixed((LATEST_ARRIVAL_S, 3, 9)), 0, paged(clock, 8), clock, StepCost(SHORTEST_STEP_S, 0.0, 0.0))
    assert result.simulated_s == pytest.approx(9 * SHORTEST_STEP_S, rel=0.2)
    assert result.tbt_p99_s == pytest.approx(SHORTEST_STEP_S, rel=0.2)


def test_time_to_first_token_counts_from_the_arrival_even_in_the_middle_of_a_step() -> None:
    clock = Clock()
    result = serve(fixed((0.0, 3, 2), (0.25, 3, 1)), 0, paged(clock, 8), clock, SECOND)
    assert result.ttft_p50_s == pytest.approx(1.0, rel=0.01)
    assert result.ttft_p99_s == pytest.approx(1.75, rel=0.01)


def test_time_between_tokens_is_of_every_gap_of_every_request() -> None:
    """Two decode steps of four requests take 5 s each, then three of the last one 2 s each: 8 long gaps, 3 short."""
    clock = Clock()
    result = serve(fixed(*[(0.0, 1, 3)] * 3, (0.0, 1, 6)), 0, paged(clock, 16), clock, StepCost(1.0, 1.0, 0.0))
    assert result.tbt_p50_s == result.tbt_p99_s == pytest.approx(5.0, rel=0.01)
    clock = Clock()
    result = serve(fixed((0.0, 1, 3), (0.0, 1, 9)), 0, paged(clock, 16), clock, StepCost(1.0, 1.0, 0.0))
    assert result.tbt_p50_s == pytest.approx(2.0, rel=0.01), "4 gaps of 3 s, 6 of 2 s"


def test_idle_time_is_skipped_and_counts_as_free_memory() -> None:
    clock = Clock()
    result = serve(fixed((0.0, 3, 1), (9.0, 4, 1)), 0, paged(clock, 1, 8), clock, SECOND)
    assert result.simulated_s == 10 and result.counts.num_steps == 2
    assert result.memory["tokens"] == pytest.approx((3 + 4) / 8 / 10) and result.average_batch == pytest.approx(0.2)


def test_a_trace_of_one_request_has_averages_too() -> None:
    clock, trace = Clock(), fixed((5.0, 3, 2))
    result = serve(trace, summarize(trace).last_arrival_s, paged(clock, 8), clock, SECOND)
    assert result.average_table == 1 and result.tbt_p50_s == pytest.approx(1.0, rel=0.01) and result.simulated_s == 2


@pytest.mark.parametrize("start", [3600.0, 1.7e9])
@pytest.mark.parametrize("last", [0.0, 20.0])
def test_averages_start_with_the_first_arrival_whatever_the_time_of_day(start: float, last: float) -> None:
    """Also where all arrive at once, and the averages are over the whole run."""
    results = []
    for midnight in (0.0, start):
        clock, trace = Clock(), fixed((midnight, 3, 9), (midnight, 3, 3), (midnight + last, 2, 30))
        results.append(asdict(serve(trace, summarize(trace).last_arrival_s, paged(clock, 16), clock, SECOND)))
    assert results[0] == results[1]
    assert summarize(trace)[1:3] == (start, start + last)


def test_averages_end_where_they_are_told_to() -> None:
    clock = Clock()
    result = serve(fixed((0.0, 4, 8)), 1.5, paged(clock, 4), clock, SECOND)
    assert result.memory["tokens"] == pytest.approx((4 + 5) / 2 / 16) and result.simulated_s == 8


def test_free_blocks_that_were_refused_to_the_head_of_the_queue_are_told_apart() -> None:
    """One of 3 blocks runs, beside a watermark of half the pool."""
    clock = Clock()
    server = paged(clock, 4, admission=watermark(0.5))
    result = serve(fixed((0.0, 9, 1), (0.0, 8, 1)), 0.5, server, clock, SECOND)
    assert result.memory == {name: pytest.approx(slots / 16) for name, slots in zip(MemoryUse._fields, (9, 0, 3, 4, 0))}


def test_hits_are_the_prompt_tokens_that_others_have_left_in_full_blocks() -> None:
    """Prompts of 9, 8 and 10 equal tokens in blocks of 4. The last token of a prompt is always computed."""
    clock, prompts = Clock(), (9, 8, 10)
    result = serve(lambda: iter([TraceRequest(5.0 * i, [7] * prompts[i], 2) for i in range(3)]), 0, paged(clock, 8),
                   clock, SECOND)
    assert result.hit_share == pytest.approx((0 + 4 + 8) / (9 + 8 + 10))


def test_the_cost_of_a_step_is_what_its_three_parts_say() -> None:
    clock = Clock()
    result = serve(fixed((0.0, 5, 3)), 0, paged(clock, 8), clock, StepCost(1.0, 0.1, 0.01))
    assert result.simulated_s == pytest.approx(3 * 1.0 + 0.1 * (5 + 1 + 1) + 0.01 * (5 + 6 + 7))


@pytest.mark.parametrize("values", [(0.0, 1.0, 1.0), (1.0, -1.0, 0.0), (1.0, 0.0, math.nan), (1.0, 1e308, 0.0)])
def test_a_cost_that_cannot_be_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError):
        StepCost(*values)


@pytest.mark.parametrize("name", ["paged", *RESERVATIONS])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_the_output_length_of_the_trace_and_nothing_is_left_behind(name: str, seed: int) -> None:
    clock, trace, added = Clock(), small_trace(seed), list[Request]()
    server = small_server(name, clock)
    add = server.add
    server.add = lambda request: (added.append(request), add(request))[1]
    result = serve(trace, 0, server, clock, SECOND)
    assert [r.num_output_tokens for r in added] == [wanted.output_tokens for wanted in trace()], f"seed {seed}"
    assert [r.token_ids[: r.num_prompt_tokens] for r in added] == [wanted.prompt for wanted in trace()], f"seed {seed}"
    assert [r.metrics.arrival_time for r in added] == [wanted.arrival_s for wanted in trace()], f"seed {seed}"
    assert sum(result.memory.values()) == pytest.approx(1) and min(result.memory.values()) >= 0, f"seed {seed}"
    assert not server.has_unfinished() and server.memory(0, False) == MemoryUse(0, 0, 0, 0, 64 * 16)
    if name == "paged":
        server.check_invariants()
        assert server.allocator.stats().referenced_blocks == 0, f"seed {seed}"
    else:
        assert server.allocator.gaps == [(0, 64 * 16)], f"seed {seed}"


def test_a_pool_that_is_too_small_preempts_and_loses_goodput() -> None:
    clock = Clock()
    server = paged(clock, 12, admission=greedy)
    result = serve(fixed(*[(0.0, 8, 20)] * 6), 0, server, clock, SECOND)
    server.check_invariants()
    assert result.counts.num_preemptions > 0 and result.goodput < 1 and result.counts.num_finished == 6
    assert result.goodput == 1 - result.counts.recomputed_tokens / result.counts.computed_tokens


def test_swapped_requests_come_back_without_being_computed_again() -> None:
    clock = Clock()
    server = paged(clock, 12, admission=greedy, swap_blocks=64)
    result = serve(fixed(*[(0.0, 8, 20)] * 6), 0, server, clock, SECOND)
    assert result.counts.num_preemptions > 0 and result.goodput == 1 and result.counts.swapped_in_tokens > 0
    assert server.moves == [], "they are carried out, so they do not pile up"


def test_the_queue_never_holds_more_than_a_step_could_admit() -> None:
    clock, lengths = Clock(), []
    server = paged(clock, 64, seats=3)
    schedule = server.schedule
    server.schedule = lambda: (lengths.append(len(server.waiting)), schedule())[1]
    serve(fixed(*[(0.0, 4, 4)] * 200), 0, server, clock, SECOND)
    assert max(lengths) == 3 and server.stats.num_finished == 200


@pytest.mark.parametrize("seed", range(2))
def test_holding_back_arrivals_changes_no_decision(seed: int) -> None:
    """Beside a loop that queues everybody the moment they arrive."""
    clock, trace = Clock(), small_trace(seed, 40)
    server = small_server("paged", clock)
    arrivals, requests = list(enumerate(trace())), list[Request]()
    while arrivals or server.has_unfinished():
        while arrivals and arrivals[0][1].arrival_s <= clock.now:
            index, arrival = arrivals.pop(0)
            params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
            requests.append(Request(str(index), arrival.prompt, params))
            server.add(requests[-1])
        if not server.has_unfinished():
            clock.now = arrivals[0][1].arrival_s
            continue
        step = server.schedule()
        clock.now += 1.0
        server.update(step, [0] * len(step.sampled()))
    finished = {request.request_id: request.metrics.finished_time for request in requests}

    clock, added = Clock(), list[Request]()
    held_back = PagedServer(BlockAllocator(64, 16), 32, 256, 256, clock=clock)
    add = held_back.add
    held_back.add = lambda request: (added.append(request), add(request))[1]
    serve(trace, 0, held_back, clock, SECOND)
    assert {request.request_id: request.metrics.finished_time for request in added} == finished, f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_contiguous_servers_never_run_more_together_than_paging_and_knowing_more_helps(seed: int) -> None:
    results = {name: small_run(name, seed)[1] for name in ("paged", *RESERVATIONS)}
    batches = [results[name].average_batch for name in ("paged", "oracle", "pow2", "max")]
    assert batches == sorted(batches, reverse=True) and batches[0] > batches[-1], f"seed {seed}: {batches}"
    shares = [results[name].memory["tokens"] for name in ("paged", "oracle", "pow2", "max")]
    assert shares == sorted(shares, reverse=True), f"seed {seed}: {shares}"


@pytest.mark.parametrize("name", ["paged", "pow2"])
def test_the_same_seed_gives_the_same_result_and_another_does_not(name: str) -> None:
    first, again, other = (asdict(small_run(name, seed)[1]) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_within_one_percent_of_the_sorted_list(seed: int) -> None:
    rng, histogram = random.Random(seed), Histogram()
    values = sorted(rng.lognormvariate(-3, 2) for _ in range(2000))
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 99, 100):
        wanted = values[20 * percent - 1]
        assert histogram.percentile(percent) == pytest.approx(wanted, rel=0.01), f"seed {seed}, {percent}"
    assert Histogram().percentile(50) is None
    assert len(histogram.counts) < 1700


def test_averages_weigh_by_seconds() -> None:
    averages = Averages()
    averages.add(1.0, MemoryUse(8, 0, 0, 0, 2), requests=4, output_tokens=4)
    averages.add(3.0, MemoryUse(0, 0, 0, 0, 10), requests=0, output_tokens=1)
    assert (averages.seconds, averages.requests, averages.output_tokens) == (4.0, 4.0, 5)
    assert averages.memory == [8, 0, 0, 0, 32]


def command(*arguments: str) -> int:
    """What `python -m nanopaged.simulate` does, in this process; argparse's exit is its status."""
    parser = argparse.ArgumentParser(prog="simulate")
    simulate.add_arguments(parser)
    try:
        return report.main(parser, simulate.run, arguments)
    except SystemExit as end:
        return int(end.code)


SMALL = ("--dataset", "alpaca", "--requests", "40", "--slots", "2400", "--max-model-len", "256")


def test_the_command_shows_every_server_and_writes_the_same_as_json(tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--json", str(path)) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    for name in ("paged", "max", "pow2", "oracle"):
        result = written["figures"]["results"][name]
        assert printed.count(f"| {name} ") == 2
        assert f"{result['memory']['tokens']:.1%}" in printed and result["counts"]["num_finished"] == 40
    assert written["figures"]["trace"]["requests"] == 40 and written["arguments"]["slots"] == 2400
    assert written["environment"]["versions"]["python"]


@pytest.mark.parametrize("sweep, rows, rate", [("block-size", simulate.BLOCK_SIZES, simulate.RATES["alpaca"]),
                                               ("pool", simulate.POOL_SHARES, simulate.RATES["alpaca"] / 4)])
def test_a_sweep_has_a_row_for_each_size(sweep: str, rows: tuple[float, ...], rate: float, tmp_path: Path,
                                         capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--sweep", sweep, "--json", str(path)) == 0
    assert capsys.readouterr().out.count("\n| ") == 1 + len(rows)
    assert json.loads(path.read_text())["arguments"]["rate"] == rate


def test_smaller_blocks_waste_less_share_more_and_need_longer_tables(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--sweep", "block-size", "--json", str(path)) == 0
    results = json.loads(path.read_text())["figures"]["results"]
    small, middle, large = (results[size] for size in ("1", "16", "128"))
    assert 0 == small["memory"]["internal"] < middle["memory"]["internal"] < large["memory"]["internal"]
    assert small["average_table"] > middle["average_table"] > large["average_table"] >= 1
    assert small["hit_share"] > middle["hit_share"] > large["hit_share"] == 0


@pytest.mark.parametrize("arguments, message", [
    (["--requests", "0"], "num_requests must be at least 1"), (["--rate", "1e-300"], "rate must be at least 0.0001"),
    (["--rate", "nan"], "rate must be finite"), (["--slots", "0"], "slots must be from 1 to 10000000"),
    (["--slots", "1000000000000"], "slots must be from 1 to 10000000"), (["--block-size", "0"], "must be at least 1"),
    (["--block-size", "99999"], "15,700 slots make no block of 99,999: raise --slots, or choose smaller blocks"),
    (["--sweep", "pool", "--slots", "99"], "14 slots make no block of 16"), (["--max-model-len", "99"], "raise max_mo"),
    (["--max-model-len", "1000000000000"], "from 2 to 10000000"), (["--sweep", "pool", "--slots", "1"], "0 slots make"),
    (["--fixed-s", "0"], "fixed_s must be from 1e-05"), (["--watermark", "2"], "watermark must be from 0.0 to 1.0"),
    (["--per-token-s", "1e308"], "per_token_s must be from 0.0 to 1000.0"),
    (["--swap-blocks", "1000000000000"], "from 0 to 1000000, got"), (["--max-num-seqs", "0"], "must be at least 1"),
    (["--shared-prefix", "7"], "shared_prefix must be from"), (["--trace", "no/such/file"], "no/such/file"),
    (["--trace", ""], "No such file"),
    (["--dataset", "other"], "invalid choice"), (["--servers", "orca"], "invalid choice"),
    (["--requests", "many"], "invalid int")])
def test_bad_arguments_get_one_clear_line_and_status_2(arguments: list[str], message: str,
                                                       capsys: pytest.CaptureFixture) -> None:
    assert command(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("simulate: error: ") and message in last


def test_a_damaged_trace_file_names_its_line_before_anything_is_simulated(tmp_path: Path,
                                                                          capsys: pytest.CaptureFixture) -> None:
    good = '{"arrival_s": 0, "prompt": 9, "output_tokens": 4}\n'
    path = tmp_path / "trace.jsonl"
    path.write_text(good * 6 + '{"arrival_s": 0, "prompt": 9, "output\n' + good)
    assert command("--trace", str(path)) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "trace.jsonl, line 7: not JSON" in streams.err and streams.err.count("\n") == 1
    path.write_text(good * 6)
    assert command("--trace", str(path), "--servers", "paged", "max") == 0
    assert "6 requests in 0 s, of 9 prompt and 4 output tokens" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, needed, room, row", [
    (["--servers", "paged", "oracle"], 48, 32, "server paged"), (["--servers", "oracle"], 37, 35, "server oracle"),
    (["--servers", "oracle", "--contiguous", "buddy"], 37, 32, "server oracle"),
    (["--servers", "max"], 63, 35, "server max"), (["--servers", "pow2"], 40, 35, "server pow2"),
    (["--sweep", "pool", "--slots", "190"], 48, 16, "slots 28")])
def test_a_request_that_can_never_fit_is_named_before_anything_is_simulated(
        arguments: list[str], needed: int, room: int, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(simulate, "simulate", lambda *args: pytest.fail("a server ran"))
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"arrival_s": 1, "prompt": {prompt}, "output_tokens": {output}}}\n'
                            for prompt, output in ((9, 4), (9, 29))))
    assert command("--trace", str(path), "--slots", "35", "--max-model-len", "64", *arguments) == 2
    prompt, output, line = (9, 4, 1) if row == "server max" else (9, 29, 2)
    assert capsys.readouterr().err == (
        f"simulate: error: {path}, line {line}: {prompt} prompt and {output} output tokens need {needed} slots, "
        f"and a request can have at most {room} ({row}): raise --slots\n")


def test_a_random_request_that_can_never_fit_is_numbered(capsys: pytest.CaptureFixture) -> None:
    assert command("--slots", "2040") == 2
    assert "request 1: " in capsys.readouterr().err, "for max every request is as long as the context"


def test_a_request_that_just_fits_is_served(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 24}\n')  # 32 slots: the last token takes none
    assert command("--trace", str(path), "--slots", "32", "--max-model-len", "33") == 0


@pytest.mark.parametrize("option, others", [
    (["--trace", "a"], ["--dataset", "alpaca"]), (["--trace", "a"], ["--requests", "2000"]),
    (["--trace", "a"], ["--rate", "0.8"]), (["--trace", "a"], ["--shared-prefix", "0"]),
    (["--trace", "a"], ["--seed", "0"]), (["--sweep", "pool"], ["--servers", "paged"]),
    (["--sweep", "pool"], ["--contiguous", "buddy"]), (["--sweep", "block-size"], ["--block-size", "16"])])
def test_what_another_option_leaves_without_effect_is_refused(option: list[str], others: list[str],
                                                              capsys: pytest.CaptureFixture) -> None:
    assert command(*option, *others) == 2
    message = f"leaves nothing for {others[0]} to say: give one or the other"
    assert message in capsys.readouterr().err


def test_the_written_arguments_are_those_that_were_used(tmp_path: Path) -> None:
    path, trace = tmp_path / "figures.json", tmp_path / "trace"
    assert command("--requests", "3", "--json", str(path)) == 0
    used = {"dataset": "sharegpt", "requests": 3, "rate": 0.8, "shared_prefix": 0.0, "seed": 0, "block_size": 16,
            "servers": ["paged", "max", "pow2", "oracle"], "contiguous": "first-fit"}
    assert used.items() <= json.loads(path.read_text())["arguments"].items()
    trace.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 4}\n')
    assert command("--trace", str(trace), "--json", str(path)) == 0
    written = json.loads(path.read_text())["arguments"]
    assert written["dataset"] is written["seed"] is written["requests"] is None, "they had no say"


def test_shares_are_of_the_same_memory_where_blocks_do_not_fill_it(tmp_path: Path) -> None:
    """100 slots are six blocks of 16, and four slots. 9 tokens are in one of the blocks; the others are free."""
    path, trace = tmp_path / "figures.json", tmp_path / "trace"
    trace.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 1}\n')
    assert command("--trace", str(trace), "--slots", "100", "--servers", "paged", "oracle", "--json", str(path)) == 0
    memory = {name: result["memory"] for name, result in json.loads(path.read_text())["figures"]["results"].items()}
    assert memory["paged"] == pytest.approx(dict(tokens=0.09, reserved=0, internal=0.07 + 0.04, external=0, free=0.8))
    assert memory["oracle"] == pytest.approx(dict(tokens=0.09, reserved=0, internal=0, external=0, free=0.91))


def test_buddies_waste_more_than_first_fit(tmp_path: Path) -> None:
    tokens = []
    for contiguous in ("first-fit", "buddy"):
        path = tmp_path / contiguous
        assert command(*SMALL, "--slots", "500", "--servers", "oracle", "--contiguous", contiguous,
                       "--json", str(path)) == 0
        tokens.append(json.loads(path.read_text())["figures"]["results"]["oracle"]["memory"]["tokens"])
    assert tokens[0] > 1.1 * tokens[1]


@pytest.mark.parametrize("before", [None, "figures of another run"])
def test_a_run_that_fails_leaves_the_file_of_its_figures_as_it_was(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    assert command("--slots", "0", "--json", str(path)) == 2
    assert (path.read_text() if path.exists() else None) == before


def test_neither_simulating_nor_its_benchmark_imports_torch() -> None:
    code = ("import sys, nanopaged.simulate, nanopaged.bench.__main__, nanopaged.bench.scheduler; "
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_command_runs_as_a_module_and_keeps_quiet_about_storms(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "nanopaged.simulate", *SMALL, "--slots", "600", "--admission", "greedy"]
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "| paged " in done.stdout
    assert json.loads(path.read_text())["figures"]["results"]["paged"]["counts"]["num_storms"] > 0
    assert done.stderr == "", "no storm is logged, and there is no progress where there is no terminal"
