"""Each frame is told in one short sentence, whose figures are those of that moment."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crowds import request_with, whatever_fits
from tests.recordings import RandomRun, storm, tight_scheduler

from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.swap_space import SwappingScheduler
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler
from nanopaged.show.captions import LONGEST, Told, narrate
from nanopaged.show.reading import read
from nanopaged.show.recording import record
from nanopaged.show.replay import Frame, State
from nanopaged.show.rules import WHY


class Story:
    """A scheduler with blocks of 4 tokens; every request gains the tokens 50, 51 and so on."""

    def __init__(self, path: Path, num_blocks: int, budget: int = 64, seats: int = 8, swap_blocks: int = 0) -> None:
        self.path, pool = str(path), BlockAllocator(num_blocks, 4)
        arguments = (pool, seats, budget, 64, whatever_fits)
        self.scheduler = SwappingScheduler(*arguments, swap_blocks=swap_blocks) if swap_blocks else \
            Scheduler(*arguments)
        self.recording = record(self.scheduler, self.path)
        self.recording.__enter__()
        self.added: list[Request] = []

    def add(self, prompt: list[int], max_tokens: int = 8, n: int = 1) -> None:
        self.added.append(request_with(len(self.added), prompt, max_tokens, n))
        self.scheduler.add(self.added[-1])

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            step = self.scheduler.schedule()
            self.scheduler.moves.clear()
            self.scheduler.update(step, {request: 50 + i + 10 * request.num_output_tokens
                                         for i, (_, request) in enumerate(step.sampled)})

    def told(self) -> list[Told]:
        self.recording.__exit__(None, None, None)
        lines = read(self.path)
        return [told for _, told in narrate(next(lines), lines)]

    def captions(self) -> str:
        return "\n".join(told.caption for told in self.told())


@pytest.fixture
def story(tmp_path: Path) -> Callable[..., Story]:
    return lambda *arguments, **options: Story(tmp_path / "run.jsonl", *arguments, **options)


def test_one_request_is_told_from_arrival_to_end(story: Callable[..., Story]) -> None:
    run = story(8)
    run.add([1, 2, 3, 4, 5, 6, 7], max_tokens=3)
    run.step(3)
    assert run.captions().splitlines() == [
        "Request 0.0 arrives: 7 tokens of prompt.", "Request 0.0 is admitted: 2 blocks taken.",
        "Request 0.0 computes 7 tokens.", "Block 0 is full, and can be found.",
        "Request 0.0 computes its newest token.", "Block 1 is full, and can be found.",
        "Request 0.0 takes block 2 for the next tokens.", "Request 0.0 computes its newest token.",
        "Request 0.0 is done: of its 3 blocks 2 stay cached, 1 is free."]


def test_a_prefix_that_is_found_is_told_with_its_holder_and_asked_about_first(story: Callable[..., Story]) -> None:
    run = story(16)
    run.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    run.step()
    run.add([1, 2, 3, 4, 5, 6, 7, 8, 10])
    run.step()
    told = next(told for told in run.told() if told.names[0] == "shares")
    assert told.caption == "Request 1.0 is admitted: 2 blocks found beside request 0.0, 1 taken."
    assert told.question.choices[told.question.answer] == "what is not in the pool"


def test_copies_are_counted_down_and_the_last_writer_needs_none(story: Callable[..., Story]) -> None:
    run = story(16)
    run.add([1, 2, 3, 4, 5, 6], n=3)
    run.step(2)
    captions = run.captions()
    assert "2 more continuations of request 0.0 start, from the same blocks." in captions
    assert "Request 0.0 writes into block 1: held by 3, so it gets a copy, block 2. ×3 becomes ×2." in captions
    assert "Request 0.1 writes into block 1: held by 2, so it gets a copy, block 3. ×2 becomes ×1." in captions
    assert "Request 0.2 writes into block 1: no copy, nobody else holds it." in captions


def test_a_request_that_gives_way_is_told_with_the_one_that_needs_a_block(story: Callable[..., Story]) -> None:
    run = story(4)
    run.add([1, 2, 3, 4, 5, 6, 7], max_tokens=6)
    run.add([11, 12, 13, 14, 15, 16], max_tokens=6)
    run.step(3)
    told = next(told for told in run.told() if told.names[0] == "gives way")
    assert told.caption == "Request 0.0 needs 1 block, none is free: request 1.0, the youngest, gives back 2."
    assert told.question.text == "Request 0.0 needs a block, and none is free. Who gives way?"
    assert told.question.choices[told.question.answer] == "the youngest, request 1.0"


def test_one_that_gives_way_for_itself_resumes_and_computes_lost_tokens_again(story: Callable[..., Story]) -> None:
    run = story(4)
    run.add([1, 2, 3, 4, 5], max_tokens=3)
    run.add([11, 12, 13, 14, 15, 16, 17], max_tokens=5)
    run.step(6)
    captions = run.captions()
    assert "Request 1.0 needs 1 block, none is free: as the youngest, it gives back its own 2." in captions
    assert "Request 1.0 resumes: 2 blocks found, 1 taken." in captions


def test_blocks_that_go_to_cpu_memory_and_back_are_told(story: Callable[..., Story]) -> None:
    run = story(4, swap_blocks=4)
    run.add([1, 2, 3, 4, 5, 6, 7], max_tokens=4)
    run.add([11, 12, 13, 14, 15, 16], max_tokens=6)
    run.step(6)
    captions = run.captions()
    assert "Request 0.0 needs 1 block, none is free: request 1.0, the youngest, swaps out 2." in captions
    assert re.search(r"Request 1\.0 resumes: .*back from CPU memory", captions), captions


def test_an_evicted_block_is_told_beside_the_request_that_takes_it(story: Callable[..., Story]) -> None:
    run = story(3)
    run.add([1, 2, 3, 4, 5], max_tokens=1)
    run.step()
    run.add([11, 12, 13, 14, 15, 16, 17, 18, 19], max_tokens=2)
    run.step()
    told = next(told for told in run.told() if "evicts" in told.names)
    assert told.caption == "Request 1.0 is admitted: 3 blocks taken. Cached block 0 is evicted."


def test_only_requests_that_found_no_free_block_are_named_with_an_evicted_one(story: Callable[..., Story]) -> None:
    run = story(6)
    run.add([1, 2, 3, 4, 5], max_tokens=1)
    run.step()  # block 0 is cached
    run.add([11, 12, 13, 14, 15, 16, 17], max_tokens=4)
    run.add([21, 22, 23, 24, 25, 26, 27], max_tokens=4)
    run.step(3)
    assert "1 free block first, then cached block 0 is evicted for request 2.0." in run.captions()


def test_requests_that_resume_and_those_that_come_first_are_counted_apart(story: Callable[..., Story]) -> None:
    run = story(5)
    run.add([1, 2, 3, 4, 5, 6, 7], max_tokens=6)
    run.add([11, 12, 13, 14, 15, 16], max_tokens=6)
    run.step(4)
    run.add([21, 22], max_tokens=2)
    run.step(5)
    captions = run.captions()
    assert re.search(r"1 request resumes, 1 is admitted: ", captions), captions


def test_ends_of_different_kinds_are_told_apart(story: Callable[..., Story]) -> None:
    run = story(16)
    for first in (1, 11, 21):
        run.add([first, 2, 3, 4, 5], max_tokens=1)
    step = run.scheduler.schedule()
    failing = step.requests[1]
    run.scheduler.update(step, {request: 50 for _, request in step.sampled}, failed={failing: "not finite"})
    run.add([31, 2], n=2)
    run.scheduler.abort(run.added[-1])
    told = run.told()
    (ends,) = [each for each in told if "error" in each.names]
    assert ends.caption == "Requests 0.0 and 2.0 are done. Request 1.0 ends with an error."
    assert told[-1].caption == "Requests 3.0 and 3.1 are aborted, and held no block."


def test_no_question_has_two_right_answers(story: Callable[..., Story]) -> None:
    run = story(4)
    run.add([1, 2, 3, 4, 5], max_tokens=3)
    run.add([11, 12, 13, 14, 15, 16, 17], max_tokens=5)
    run.step(6)
    (gives_way,) = [told for told in run.told() if told.names[0] == "gives way"]
    assert "gives back its own" in gives_way.caption and gives_way.question is None


def test_continuations_that_run_when_the_recording_begins_have_names_of_their_own(story: Callable[..., Story],
                                                                                  tmp_path: Path) -> None:
    run = story(16)
    run.add([1, 2, 3, 4, 5], n=2)
    run.step()
    run.recording.__exit__(None, None, None)
    run.recording = record(run.scheduler, run.path)
    run.recording.__enter__()
    run.add([9, 8])
    run.step()
    captions = run.captions().splitlines()
    assert captions[:2] == ["The recording begins: requests 0.0 and 0.1 are here, 2 run.",
                            "Request 1.0 arrives: 2 tokens of prompt."]


@pytest.mark.parametrize("options, reason", [
    ({"num_blocks": 4}, "it needs 3 blocks, 1 is available"),
    ({"num_blocks": 9, "seats": 1}, "it needs 1 seat in the batch, none is free"),
    ({"num_blocks": 9, "budget": 9}, "this step's tokens are used up")])
def test_the_first_that_waits_is_told_with_the_reason(options: dict[str, int], reason: str,
                                                      story: Callable[..., Story]) -> None:
    run = story(**options)
    run.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=2)
    run.add([11, 12, 13, 14, 15, 16, 17, 18, 19], max_tokens=2)
    run.step()
    assert f"Request 1.0 waits: {reason}" in run.captions()


def test_a_failed_step_and_an_aborted_request_are_told(story: Callable[..., Story]) -> None:
    run = story(8)
    run.add([1, 2, 3, 4, 5], max_tokens=4)
    run.scheduler.schedule()  # and nothing is carried out
    run.step()
    run.scheduler.abort(run.added[0])
    captions = run.captions()
    assert "The step failed (it was not carried out): nothing is lost." in captions
    assert "Request 0.0 is aborted: of its 2 blocks 1 stays cached, 1 is free." in captions


def test_two_blocks_with_equal_words_become_one(story: Callable[..., Story]) -> None:
    run = story(8)
    run.add([1, 2, 3, 4, 5], max_tokens=4)
    run.add([1, 2, 3, 4, 6], max_tokens=4)
    run.step()
    assert "Block 2 equals block 0: request 1.0 holds 0 instead." in run.captions()


def test_a_storm_is_told_with_its_cause(tmp_path: Path) -> None:
    scheduler, path = tight_scheduler(0), str(tmp_path / "run.jsonl")
    with record(scheduler, path):
        storm(scheduler, random.Random(0))
    lines = read(path)
    told = next(told for _, told in narrate(next(lines), lines) if told.frame.kind == "storm")
    again, computed, steps = re.fullmatch(r"Eviction storm: (\d+) of the (\d+) tokens of the last (\d+) steps were "
                                          r"computed again\.", told.caption).groups()
    assert "Likely cause: " in told.why and int(again) > 0.2 * int(computed) and steps == "64"


def test_captions_of_random_runs_are_short_and_their_figures_are_those_of_the_state(tmp_path: Path) -> None:
    path, seen = str(tmp_path / "run.jsonl"), set()
    for seed in range(60):
        print(f"seed {seed}")
        run = RandomRun(seed)
        run.go_on(run.rng.choice([0, 20]))
        with record(run.scheduler, path):
            run.go_on(100)
        lines, held = read(path), {}

        def note(state: State, frame: Frame) -> None:
            held.update({request.request_id: len(request.table) for request in state.sequences.values()})

        for state, told in narrate(next(lines), lines, note):
            assert len(told.caption) < LONGEST, told.caption
            assert not told.caption[0].islower() and told.caption[-1] in ".…", told.caption
            assert set(told.names) <= WHY.keys() and told.why
            seen.update(told.names)
            if told.question:
                assert 0 <= told.question.answer < len(told.question.choices) == 3
            if told.names[0] == "gives way":
                _, victim, needy, needed, available = told.frame.events[0]
                numbers = re.search(r"equest (\S+) needs (\d+) blocks?, (\w+) (?:is|are) free: "
                                    r".* (?:gives back|swaps out).* (\d+)[.…]", told.caption)
                free = "none" if available == 0 else str(available)
                assert numbers.groups() == (needy, str(needed), free, str(held[victim])), told.caption
            if told.frame.kind == "copy" and told.names[0] == "copies":
                _, _, source, target = told.frame.events[0]
                assert f"held by {state.holders[source] + 1}, so it gets a copy, block {target}" in told.caption
    assert seen == WHY.keys() - {"storm"}, WHY.keys() - seen
