"""The contiguous twin: five servers, the same requests, and a picture of every slot in every step."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise

import pytest

from nanopaged.request import Request
from nanopaged.simulate import twin
from nanopaged.simulate.contiguous import RESERVATIONS, MemoryUse
from nanopaged.simulate.simulator import Clock, memory_refused, simulate
from nanopaged.step import Listener, Step

CONTIGUOUS = tuple(RESERVATIONS)
PAGED = ("paged + sharing", "paged")
Scene = dict[str, object]


@cache
def scene() -> Scene:
    return twin.twin_scene()


def shown(name: str) -> Scene:
    return next(server for server in scene()["servers"] if server["name"] == name)


def test_the_scene_is_small_json_and_the_same_every_time() -> None:
    text = json.dumps(scene(), separators=(",", ":"))
    assert len(text) < 150_000
    assert json.loads(text) == scene() == twin.twin_scene()


def test_five_servers_stand_side_by_side() -> None:
    assert [server["name"] for server in scene()["servers"]] == [*PAGED, *CONTIGUOUS]
    assert "knows the future" in shown("oracle")["about"].lower()


def test_all_servers_have_the_same_slots_seats_budget_limit_order_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(twin, "simulate", lambda trace, until, server, clock, cost, watch:
                        runs.append((list(trace()), cost, server)) or simulate(trace, until, server, clock, cost,
                                                                               watch=watch))
    twin.twin_scene()
    assert len(runs) == 5 and all(run[:2] == runs[0][:2] for run in runs)
    servers = [server for _, _, server in runs]
    for limit in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "order"):
        assert len({getattr(server, limit) for server in servers}) == 1, limit
    assert {sum(server.memory(0, False)) for server in servers} == {twin.SLOTS}
    assert [server.allocator.enable_prefix_caching for server in servers[:2]] == [True, False]


@pytest.mark.parametrize("name", twin.SERVERS)
def test_the_segments_of_each_step_are_all_slots_and_add_up_to_the_memory_shown(name: str) -> None:
    server = shown(name)
    for memory, segments, head in zip(server["memory"], server["segments"], server["heads"]):
        held = [segment for segment in segments if len(segment) > 3]
        gaps = sum(slots for slots, _, _, *holders in segments if not holders)
        assert sum(slots for slots, *_ in segments) == twin.SLOTS
        assert all(0 <= tokens <= needed <= slots for slots, tokens, needed, *_ in held)
        assert memory == list(MemoryUse(
            tokens=sum(tokens for _, tokens, *_ in held),
            reserved=sum(needed - tokens for _, tokens, needed, *_ in held),
            internal=sum(slots - needed for slots, _, needed, *_ in held),
            external=gaps if head else 0, free=0 if head else gaps))


@pytest.mark.parametrize("name", twin.SERVERS)
def test_no_two_gaps_touch_and_each_running_request_is_in_the_picture(name: str) -> None:
    server = shown(name)
    for (running, *_), segments in zip(server["counts"], server["segments"]):
        holders = [tuple(segment[3:]) for segment in segments]
        assert all(left or right for left, right in pairwise(holders))
        assert len({request for some in holders for request in some}) == running


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_a_request_keeps_its_one_range_until_it_ends(name: str) -> None:
    server = shown(name)
    places: dict[int, tuple[int, int, int]] = {}
    for segments, ended in zip(server["segments"], server["ended"]):
        for request in ended:
            del places[request]
        start, seen = 0, {}
        for slots, _, needed, *holders in segments:
            if holders:
                seen[holders[0]] = (start, slots, needed)
            start += slots
        assert places.items() <= seen.items()
        places = seen
    assert places == {}


@pytest.mark.parametrize("name", twin.SERVERS)
def test_free_slots_are_external_waste_only_while_the_first_in_the_queue_waits_for_memory(name: str) -> None:
    server = shown(name)
    external = MemoryUse._fields.index("external")
    kinds = set()
    for memory, head, (running, waiting, *_) in zip(server["memory"], server["heads"], server["counts"]):
        kinds.add(head is not None)
        if memory[external]:
            assert head is not None and waiting > 0 and running < twin.SEATS
        if head is not None:
            request, needed, available = head
            assert 0 <= request < twin.NUM_REQUESTS and needed > available
    assert kinds == {True, False}, "the scene has both"


def test_heads_are_given_exactly_when_the_simulator_says_that_memory_is_refused() -> None:
    clock = Clock()
    camera = twin.Camera(twin.make_server("pow2", clock), clock)
    refused = []

    def watch(step: Step, seconds: float) -> None:
        refused.append(memory_refused(camera.server, step))
        camera.take(step, seconds)

    simulate(twin.twin_trace(), 0.0, camera.server, clock, twin.COST, watch=watch)
    assert refused == [picture[twin.Camera.COLUMNS.index("heads")] is not None for picture in camera.pictures]


@pytest.mark.parametrize("name", twin.SERVERS)
def test_every_request_finishes_with_its_own_number_of_tokens(name: str) -> None:
    server = shown(name)
    assert server["counts"][-1] == [0, 0, twin.NUM_REQUESTS, sum(output for _, output in scene()["requests"])]
    assert sorted(request for ended in server["ended"] for request in ended) == list(range(twin.NUM_REQUESTS))
    assert outputs(name) == outputs("oracle")
    assert [len(outputs(name)[i]) for i in range(twin.NUM_REQUESTS)] == [output for _, output in scene()["requests"]]


@cache
def outputs(name: str) -> dict[int, list[int]]:
    """The output tokens of each request on a server of its own."""
    class Ended(Listener):
        def ended(self, request: Request) -> None:
            found[int(request.request_id)] = request.output_token_ids

    found: dict[int, list[int]] = {}
    clock = Clock()
    server = twin.make_server(name, clock)
    server.listeners.append(Ended())
    simulate(twin.twin_trace(), 0.0, server, clock, twin.COST)
    return found


def test_the_oracle_reserves_each_request_at_its_true_full_length() -> None:
    lengths = {tuple(segment[3:]): segment[2] for segments in shown("oracle")["segments"] for segment in segments
               if len(segment) > 3}
    assert lengths == {(i,): prompt + output - 1 for i, (prompt, output) in enumerate(scene()["requests"])}


def test_prompts_share_nothing_so_both_paged_servers_do_the_same() -> None:
    assert len({request.prompt[0] for request in twin.twin_trace()()}) == twin.NUM_REQUESTS
    sharing, plain = map(shown, PAGED)
    same = ("times", "memory", "counts", "heads", "admitted", "preempted", "ended", "final")
    assert [sharing[column] for column in same] == [plain[column] for column in same]
    for server in (sharing, plain):
        assert all(len(segment) <= 4 for segments in server["segments"] for segment in segments), "one holder at most"
    camera, result = twin.run_server(PAGED[0], twin.twin_trace())
    assert result.hit_share == 0 and camera.server.allocator.stats().prefix_hit_tokens == 0


@pytest.mark.parametrize("name", twin.SERVERS)
def test_the_pictures_average_to_the_memory_that_the_simulator_reports(name: str) -> None:
    server = shown(name)
    camera, result = twin.run_server(name, twin.twin_trace())
    seconds = [after - before for before, after in pairwise(server["times"])]
    for k, field in enumerate(MemoryUse._fields):
        slots = sum(memory[k] * s for memory, s in zip(server["memory"], seconds))
        assert slots / sum(seconds) / twin.SLOTS == pytest.approx(result.memory[field], abs=1e-4), field
    running = sum(counts[0] * s for counts, s in zip(server["counts"], seconds)) / sum(seconds)
    assert running == pytest.approx(result.average_batch, abs=1e-3), "here all that run are in every step"
    assert len(seconds) == result.counts.num_steps == camera.server.stats.num_steps
    assert server["final"] == {
        "finished_s": server["times"][-1], "tokens_share": pytest.approx(result.memory["tokens"], abs=1e-6),
        "requests": pytest.approx(result.average_batch, abs=1e-6), "preemptions": result.counts.num_preemptions}


def test_time_passes_in_every_step_and_all_clocks_start_at_zero() -> None:
    for server in scene()["servers"]:
        assert server["times"][0] == 0
        assert all(before < after for before, after in pairwise(server["times"]))
        assert {len(server[column]) for column in twin.Camera.COLUMNS} == {len(server["times"])}


def test_the_contiguous_servers_fall_behind_in_the_order_of_what_they_know() -> None:
    finished = [shown(name)["final"]["finished_s"] for name in ("paged", "oracle", "pow2", "max")]
    assert finished == sorted(finished) and len(set(finished)) == 4
    assert 100 <= len(shown("max")["times"]) <= 250


def test_the_notes_say_what_is_equal_and_that_sharing_saves_nothing() -> None:
    notes = " ".join(scene()["notes"])
    for figure in (f"{twin.SLOTS} slots", f"{twin.SEATS} seats", f"{twin.BUDGET} tokens", f"{twin.MAX_MODEL_LEN}",
                   "sharing saves nothing", f"{shown('paged')['final']['preemptions']} times a request gives way"):
        assert figure in notes
