"""Replaying the events alone gives the block tables, counts and figures of every step of random runs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests.faults import step_with_fault
from tests.oracle import TINY, tiny_model
from tests.recordings import Moment, RandomRun, recorded
from tests.test_engine import random_params, random_prompts, tiny_llm

from nanopaged import LLM
from nanopaged.gpt2 import GPT2
from nanopaged.show.reading import read
from nanopaged.show.replay import State, frames


def assert_replay_gives(moments: dict[int, Moment], path: Path, where: str) -> Counter[str]:
    """At each recorded step; returns how often each event and kind of frame came."""
    lines = read(str(path))
    state = State(next(lines))
    seen: Counter[str] = Counter()
    checked = set()
    for frame in frames(lines):
        seen[frame.kind] += 1
        seen["failed requests"] += frame.kind == "record" and "failed" in frame.line
        for event in frame.events:
            seen[f"event {event[0]}"] += 1
            state.apply(event)
        if frame.kind == "record":
            number, here = state.counts["num_steps"], f"frame {frame.name}, {where}"
            moment = moments[number]
            figures = state.figures()
            assert {name: figures[name] for name in moment.figures} == moment.figures, here
            running = {request.request_id: (request.table, request.computed, request.length)
                       for request in state.with_status("running")}
            assert running == moment.running, here
            waiting = {request.request_id for request in state.with_status("waiting", "preempted")}
            assert waiting == moment.waiting, here
            checked.add(number)
    assert checked == moments.keys(), where
    return seen


@pytest.mark.parametrize("first", range(0, 120, 40))
def test_replay_gives_the_schedulers_own_figures_at_every_step_of_random_runs(first: int, tmp_path: Path) -> None:
    """Of runs that are recorded from the start or from the middle, with text or without."""
    path, seen = tmp_path / "run.jsonl", Counter()
    for seed in range(first, first + 40):
        print(f"seed {seed}")
        run = RandomRun(seed)
        run.go_on(run.rng.choice([0, run.rng.randint(1, 40)]))
        run.moments.clear()
        with recorded(run.scheduler, tmp_path, text=run.rng.random() < 0.7):
            run.go_on(120)
        seen += assert_replay_gives(run.moments, path, f"seed {seed}")
    events = ("add", "seat", "take", "in", "copy", "keep", "preempt", "out", "back", "fill", "token", "publish", "twin",
              "start", "end", "wait", "fail", "recorded")
    for event in events:
        assert seen[f"event {event}"] > 0, f"seeds {first} to {first + 39} have no {event}: {seen}"
    kinds = {"failed requests", "arrive", "give back", "take", "copy", "wait", "write", "record", "fail", "abort"}
    assert kinds <= seen.keys(), f"{first}: {seen}"


@pytest.fixture(scope="module")
def model() -> GPT2:
    return tiny_model()


def random_llm(rng: random.Random, model: GPT2) -> LLM:
    return tiny_llm(model, num_blocks=rng.randint(10, 20), max_num_seqs=rng.randint(4, 9), admission="greedy",
                    max_num_batched_tokens=rng.choice([9, 30, 100]), enable_prefix_caching=rng.random() < 0.7,
                    preemption=rng.choice(["recompute", "swap"]), swap_blocks=rng.choice([1, 4, 40]))


@pytest.mark.parametrize("seed", range(8))
def test_replay_gives_the_figures_of_stats_at_every_step_of_an_engine(seed: int, model: GPT2, tmp_path: Path) -> None:
    rng = random.Random(seed)
    llm = random_llm(rng, model)
    work = [(prompt, random_params(rng)) for prompt in random_prompts(rng, 9)]
    moments = {}
    with recorded(llm, tmp_path):
        while work or llm.has_unfinished_requests():
            if work and rng.random() < 0.6:
                prompt, params = work.pop()
                llm.add_request(prompt, replace(params, n=rng.choice([1, 1, 2, 4])))
            chance = rng.random()
            if chance < 0.08 and llm.scheduler.has_unfinished():
                step_with_fault(llm, rng)
            elif chance < 0.12 and llm.scheduler.has_unfinished():
                present = [*llm.scheduler.running, *llm.scheduler.waiting]
                llm.abort_request(rng.choice(present).group_id)
            elif llm.scheduler.has_unfinished():
                llm.step()
                moment = Moment.of(llm.scheduler)
                moments[llm.stats().num_steps] = moment._replace(
                    figures={name: value for name, value in vars(llm.stats()).items() if isinstance(value, int)
                             and name not in ("num_storms", "swap_blocks")})
            else:
                llm.step()
        assert_replay_gives(moments, tmp_path / "run.jsonl", f"seed {seed}")
    assert len(moments) > 10


def test_a_requests_words_are_known_at_every_moment(model: GPT2, tmp_path: Path) -> None:
    llm = tiny_llm(model)
    with recorded(llm, tmp_path):
        outputs = llm.generate(random_prompts(random.Random(0), 5))
    lines = read(str(tmp_path / "run.jsonl"))
    state = State(next(lines))
    for frame in frames(lines):
        for event in frame.events:
            state.apply(event)
    assert len(outputs) == 5
    for output in outputs:
        request = state.sequences[f"{output.request_id}.0"]
        assert request.token_ids == output.prompt_token_ids + output.outputs[0].token_ids
        assert (request.status, request.reason) == ("finished", output.outputs[0].finish_reason)
        assert all(token_id < TINY.vocab_size for token_id in request.token_ids)


def test_steps_are_numbered_and_so_are_the_frames_of_each(tmp_path: Path) -> None:
    run = RandomRun(3)
    with recorded(run.scheduler, tmp_path):
        run.go_on(100)
    header, *lines = read(str(tmp_path / "run.jsonl"))
    names = [(frame.step, frame.part) for frame in frames(lines)]
    steps = [step for step, _ in names]
    assert steps == sorted(steps) and set(steps) == set(range(1, steps[-1] + 1))
    for step in set(steps):
        parts = [part for other, part in names if other == step]
        assert parts == list(range(1, len(parts) + 1)), f"step {step}"
