"""The trace of a run: slices that cover each request's life, counters that are the pool's, and every kind of event."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from tests.oracle import tiny_model
from tests.recordings import RandomRun, clock, recorded, storm, tight_scheduler
from tests.test_engine import random_params, random_prompts, tiny_llm

from nanopaged import SamplingParams
from nanopaged.show.reading import Line, read
from nanopaged.show.replay import State, frames
from nanopaged.show.trace import ENGINE, PHASES, trace, write_trace

Events = list[Line]


def events_of(path: Path) -> Events:
    """As a viewer reads them, from a file."""
    target = path.with_suffix(".json")
    write_trace(read(str(path)), str(target))
    return json.loads(target.read_text(encoding="utf-8"))["traceEvents"]


def random_trace(seed: int, folder: Path) -> tuple[list[Line], Events]:
    """The lines of a recording of a random run, some of which begin in its middle, and the events of its trace."""
    print(f"seed {seed}")
    run = RandomRun(seed)
    run.go_on(run.rng.choice([0, 20]))
    with recorded(run.scheduler, folder):
        run.go_on(150)
    path = folder / "run.jsonl"
    return list(read(str(path))), events_of(path)


def slices_by_track(events: Events) -> dict[str, Events]:
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def micros(lines: list[Line], t: float) -> int:
    return round((t - lines[0]["t"]) * 1e6)


def end_of(lines: list[Line], line: Line) -> int:
    """When what this line says was over."""
    return micros(lines, line["t"] + sum(line.get("seconds", ())))


@pytest.mark.parametrize("seed", range(6))
def test_the_slices_of_each_request_cover_its_life_without_a_gap_or_an_overlap(seed: int, tmp_path: Path) -> None:
    lines, events = random_trace(seed, tmp_path)
    tracks = slices_by_track(events)
    lives = {request_id: [micros(lines, line["t"]), end_of(lines, lines[-1])]
             for line in lines if "add" in line for request_id in (line["add"], *line["followers"])}
    for line in lines:
        for event in (*line.get("events", ()), *line.get("after", ())):
            if event[0] == "end":
                lives[event[1]][1] = end_of(lines, line)
    assert tracks.keys() - {"engine"} <= {f"request {request_id}" for request_id in lives}
    for request_id, (start, end) in lives.items():
        at = start
        for piece in tracks[f"request {request_id}"]:
            assert abs(piece["ts"] - at) <= 1 and piece["dur"] > 0, f"request {request_id}, seed {seed}"
            at = piece["ts"] + piece["dur"]
        assert abs(at - end) <= 1, f"request {request_id}, seed {seed}"


def assert_slices_nest(events: Events, where: str) -> None:
    """What Perfetto demands; it drops a slice that overlaps another by a nanosecond."""
    times: dict[int, int] = defaultdict(int)
    stacks: dict[int, list[int]] = defaultdict(list)  # where the open slices of each track end
    for event in events:
        if event["ph"] == "M":
            continue
        assert isinstance(event["ts"], int) and event["ts"] >= times[event["tid"]], f"{event}, {where}"
        times[event["tid"]] = event["ts"]
        if event["ph"] == "X":
            stack = stacks[event["tid"]]
            while stack and stack[-1] <= event["ts"]:
                stack.pop()
            assert isinstance(event["dur"], int) and event["dur"] > 0, f"{event}, {where}"
            assert not stack or event["ts"] + event["dur"] <= stack[-1], f"{event} overlaps, {where}"
            stack.append(event["ts"] + event["dur"])


@pytest.mark.parametrize("seed", range(6))
def test_slices_nest_and_times_never_go_back(seed: int, tmp_path: Path) -> None:
    _, events = random_trace(seed, tmp_path)
    assert_slices_nest(events, f"seed {seed}")


def test_slices_nest_if_a_steps_rounded_seconds_reach_into_the_next(tmp_path: Path) -> None:
    lines, _ = random_trace(1, tmp_path)
    for line, following in zip(lines, lines[1:]):
        if line.get("recorded"):
            line["seconds"][-1] += following["t"] - line["t"] - sum(line["seconds"]) + 2e-6
    assert_slices_nest(trace(lines)["traceEvents"], "two microseconds too late")


@pytest.mark.parametrize("seed", range(6))
def test_counters_are_the_figures_of_the_state_after_each_step(seed: int, tmp_path: Path) -> None:
    lines, events = random_trace(seed, tmp_path)
    state, wanted = State(lines[0]), []
    for frame in frames(lines[1:]):
        for event in frame.events:
            state.apply(event)
        if frame.kind in ("record", "abort"):
            figures = state.figures()
            unfilled = figures["reserved_slots"] - figures["filled_slots"]
            cached, free = (figures[name] * state.block_size for name in ("cached_blocks", "free_blocks"))
            wanted.append(({"computed tokens": figures["filled_slots"], "unfilled": unfilled, "cached": cached,
                            "free": free},
                           {"running": figures["num_running"], "waiting": figures["num_waiting"]}))
    counters = [event["args"] for event in events if event["ph"] == "C"]
    assert list(zip(counters[::2], counters[1::2])) == wanted and wanted, f"seed {seed}"
    assert all(sum(slots.values()) == state.num_blocks * state.block_size for slots, _ in wanted)


@pytest.mark.parametrize("seed", range(6))
def test_the_phases_of_a_step_are_in_order_and_add_up_to_its_seconds(seed: int, tmp_path: Path) -> None:
    lines, events = random_trace(seed, tmp_path)
    engine = slices_by_track(events)["engine"]
    steps = {line["step"]: line for line in lines if line.get("recorded")}
    assert {f"step {number}" for number in steps} == {event["name"] for event in engine} - set(PHASES)
    phases: Events = []
    for event in reversed(engine):
        if event["name"] in PHASES:
            phases.insert(0, event)
            continue
        line = steps[int(event["name"].removeprefix("step "))]
        assert abs(event["ts"] - micros(lines, line["t"])) <= 1 and abs(event["dur"] - sum(line["seconds"]) * 1e6) <= 2
        assert sum(phase["dur"] for phase in phases) == event["dur"], f"seed {seed}"
        assert [phase["name"] for phase in phases] == [
            name for name, seconds in zip(PHASES, line["seconds"]) if seconds > 0], f"seed {seed}"
        for phase, seconds in zip(phases, filter(None, line["seconds"])):
            assert abs(phase["dur"] - seconds * 1e6) <= 2, f"seed {seed}"
        assert event["args"]["tokens"] == sum(num_tokens for *_, num_tokens in line["plan"])
        phases = []


def test_every_kind_of_event_and_state_is_seen(tmp_path: Path) -> None:
    instants, states, recorded_events = set(), set(), defaultdict(int)
    for seed in range(12):
        lines, events = random_trace(seed, tmp_path)
        instants |= {(event["name"], event["s"]) for event in events if event["ph"] == "i"}
        states |= {event["name"] for event in events if event["ph"] == "X" and event["tid"] != ENGINE}
        for name in ("preempt", "copy"):
            told = [event for line in lines for event in line.get("events", ()) if event[0] == name]
            seen = {"preempt": "preemption"}.get(name, name)
            assert len(told) == sum(event["name"] == seen for event in events if event["ph"] == "i"), f"seed {seed}"
            recorded_events[name] += len(told)
    assert instants == {("preemption", "t"), ("copy", "t"), ("eviction", "t"), ("failed step", "g")}
    assert states == {"waiting", "prefill", "decode", "idle", "preempted", "swapped"}
    assert all(recorded_events.values())


def test_evictions_are_all_there_with_their_blocks(tmp_path: Path) -> None:
    for seed in range(12):
        run = RandomRun(seed)
        before = run.scheduler.allocator.stats().evicted_blocks
        with recorded(run.scheduler, tmp_path):
            run.go_on(150)
        evicted = [block for event in events_of(tmp_path / "run.jsonl") if event["name"] == "eviction"
                   for block in event["args"]["blocks"]]
        assert len(evicted) == run.scheduler.allocator.stats().evicted_blocks - before, f"seed {seed}"


def test_a_storm_crosses_all_tracks_with_its_cause(tmp_path: Path) -> None:
    scheduler = tight_scheduler(1)
    with recorded(scheduler, tmp_path):
        storm(scheduler, random.Random(1))
    (event,) = [event for event in events_of(tmp_path / "run.jsonl") if event["name"] == "storm"]
    assert (event["ph"], event["s"]) == ("i", "g") and "ikely cause" in event["args"]["cause"]


def test_a_requests_slices_say_how_many_tokens_they_computed(tmp_path: Path) -> None:
    llm = tiny_llm(tiny_model(), max_num_batched_tokens=10, max_num_seqs=2)
    llm.scheduler.clock = clock(random.Random(0))
    with recorded(llm, tmp_path):
        llm.generate([[1] * 25, [2] * 5, [3]], SamplingParams(temperature=0.0, max_tokens=4))
    tracks = slices_by_track(events_of(tmp_path / "run.jsonl"))
    told = {name: [(piece["name"], args.get("tokens"), args.get("ended"))
                   for piece in pieces for args in [piece.get("args", {})]] for name, pieces in tracks.items()}
    assert told["request 0.0"] == [("waiting", None, None), ("prefill", 10, None), ("prefill", 10, None),
                                   ("prefill", 5, None), ("decode", 3, "length")]
    assert told["request 1.0"] == [("waiting", None, None), ("prefill", 5, None), ("decode", 3, "length")]
    assert told["request 2.0"] == [("waiting", None, None), ("prefill", 1, None), ("decode", 3, "length")]
    decode = tracks["request 0.0"][-1]["args"]
    assert (decode["first step"], decode["last step"]) == (4, 6)


def test_tracks_have_names_an_order_and_numbers_of_their_own(tmp_path: Path) -> None:
    lines, events = random_trace(1, tmp_path)
    named = [event for event in events if event["ph"] == "M"]
    assert events[: len(named)] == named, "a viewer that reads them in order knows each track first"
    tracks = {event["tid"]: event["pid"] for event in named if event["name"] == "thread_name"}
    ids = [request_id for line in lines if "add" in line for request_id in (line["add"], *line["followers"])]
    assert [event["args"]["name"] for event in named if event["name"] == "thread_name"] == [
        "engine", *(f"request {request_id}" for request_id in ids)]
    order = [event["args"]["sort_index"] for event in named if event["name"] == "thread_sort_index"]
    assert order == sorted(set(order)) and len(tracks) == len(order) == 1 + len(ids)
    assert all(tracks[event["tid"]] == event["pid"] for event in events if event["ph"] != "M")


def test_a_recording_that_was_cut_off_has_a_trace_too(tmp_path: Path) -> None:
    lines, events = random_trace(2, tmp_path)
    path, cut = tmp_path / "run.jsonl", tmp_path / "cut.jsonl"
    data = path.read_bytes()
    header_end = data.index(b"\n")
    for position in range(header_end, len(data), 997):
        cut.write_bytes(data[:position])
        opened = list(read(str(cut)))
        instants = [event for event in events_of(cut) if event["ph"] == "i"]
        assert instants == [event for event in events if event["ph"] == "i"][: len(instants)]
        end = end_of(lines, opened[-1])
        assert all(event["ts"] + event["dur"] <= end + 1 for event in events_of(cut) if event["ph"] == "X")
    assert trace(lines[:1])["traceEvents"], "a recording that ends with its header"


def test_what_is_no_recording_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("rubbish\n")
    with pytest.raises(ValueError, match="this is no recording"):
        write_trace(read(str(path)), str(tmp_path / "trace.json"))
    assert not (tmp_path / "trace.json").exists()


def test_the_trace_of_a_real_engine_has_every_request_and_the_models_part_of_every_step(tmp_path: Path) -> None:
    rng = random.Random(5)
    llm = tiny_llm(tiny_model(), num_blocks=12, admission="greedy")
    prompts = random_prompts(rng, 8)
    with recorded(llm, tmp_path):
        llm.generate(prompts, [random_params(rng) for _ in prompts])
    tracks = slices_by_track(events_of(tmp_path / "run.jsonl"))
    assert tracks.keys() == {"engine", *(f"request {i}.0" for i in range(8))}
    steps = sum(event["name"].startswith("step ") for event in tracks["engine"])
    assert sum(event["name"] == "model" for event in tracks["engine"]) == steps == llm.stats().num_steps
