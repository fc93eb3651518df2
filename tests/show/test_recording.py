"""What is in a recording, what recording changes (nothing), and disks that are full."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tests.recordings
from tests.crowds import request_with
from tests.faults import InjectedFault
from tests.oracle import tiny_model
from tests.recordings import RandomRun, recorded, storm, tight_scheduler
from tests.test_engine import BYTES, random_params, random_prompts, tiny_llm

from nanopaged import LLM, SamplingParams, engine
from nanopaged.gpt2 import GPT2
from nanopaged.scheduler import Scheduler
from nanopaged.show.reading import Line, read
from nanopaged.show.recording import record
from nanopaged.show.replay import frames
from nanopaged.step import Step

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def model() -> GPT2:
    return tiny_model(BYTES)


def lines_of(path: Path) -> list[Line]:
    return list(read(str(path)))


def steps_of(path: Path) -> list[Line]:
    return [line for line in lines_of(path) if "step" in line]


# What recording changes.

def test_results_and_figures_are_those_without_a_recording(model: GPT2, tmp_path: Path) -> None:
    def serve(recording: bool) -> tuple[list[object], object]:
        rng = random.Random(7)
        llm = tiny_llm(model, num_blocks=12, admission="greedy")
        prompts = random_prompts(rng, 8)
        params = [random_params(rng) for _ in prompts]
        if not recording:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)], llm.stats()
        with record(llm, str(tmp_path / "run.jsonl")):
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params)], llm.stats()

    plain = serve(recording=False)
    assert serve(recording=True) == plain and plain[1].num_preemptions > 0


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_engine_is_the_plain_one_again(fails: bool, model: GPT2, tmp_path: Path) -> None:
    llm, path = tiny_llm(model, preemption="swap", swap_blocks=4), tmp_path / "run.jsonl"
    kind, attributes, logits_of = type(llm.scheduler), vars(llm.scheduler).keys() - {"recorder"}, llm.logits_of
    try:
        with record(llm, str(path)):
            assert type(llm.scheduler) is not kind and isinstance(llm.scheduler, kind)
            llm.generate([[1, 2, 3]], GREEDY)
            if fails:
                raise InjectedFault
    except InjectedFault:
        pass
    assert type(llm.scheduler) is kind and vars(llm.scheduler).keys() == attributes and llm.logits_of is logits_of
    size = path.stat().st_size
    llm.generate([[1, 2, 3]], GREEDY)
    assert path.stat().st_size == size and len(steps_of(path)) == 8


def test_an_engine_is_recorded_once_at_a_time(model: GPT2, tmp_path: Path) -> None:
    llm, first, second = tiny_llm(model), tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    with record(llm, str(first)):
        for recordable in (llm, llm.scheduler):
            with pytest.raises(ValueError, match="is being recorded already: end that recording first"):
                with record(recordable, str(second)):
                    pass
        assert not second.exists()
        llm.generate([[1, 2, 3]], GREEDY)
    with record(llm, str(second)), record(tiny_llm(model), str(tmp_path / "other.jsonl")):
        llm.generate([[1, 2, 3]], GREEDY)
    assert len(steps_of(first)) == len(steps_of(second)) == 8


def test_a_file_that_cannot_be_opened_leaves_the_engine_plain(tmp_path: Path) -> None:
    scheduler = tight_scheduler(0)
    with pytest.raises(FileNotFoundError), record(scheduler, str(tmp_path / "no such folder" / "run.jsonl")):
        pass
    assert type(scheduler) is Scheduler


class FullDisk:
    """A file on a disk without room."""

    name = "full.jsonl"

    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")

    close = flush = lambda self: None


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_on_a_full_disk_the_engine_goes_on_and_one_error_is_logged(
        model: GPT2, caplog: pytest.LogCaptureFixture) -> None:
    llm = tiny_llm(model)
    plain = llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    with record(llm, "/dev/full"):
        assert llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == plain
    (message,) = errors(caplog)
    assert message.startswith("the recording ends here, since /dev/full cannot be written: ")


def test_a_disk_that_fills_up_leaves_the_steps_before(
        model: GPT2, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm, path = tiny_llm(model), tmp_path / "run.jsonl"
    with record(llm, str(path)) as recorder:
        llm.generate([[1, 2, 3]], GREEDY)
        recorder.file.close()
        recorder.file = FullDisk()
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids) == 8
    assert len(errors(caplog)) == 1 and "full.jsonl cannot be written" in errors(caplog)[0]
    assert len(steps_of(path)) == 8


# What is in it.

def test_a_recording_without_text_depends_on_no_token(model: GPT2, tmp_path: Path) -> None:
    """Two runs in which all tokens differ have the same recording, but for its times."""
    lines = []
    for name, shift in (("one", 0), ("other", 100)):
        path = tmp_path / name
        llm = tiny_llm(model, num_blocks=6, admission="greedy", enable_prefix_caching=False)
        with record(llm, str(path), text=False):
            llm.generate([[shift + i] * 9 for i in range(3)],
                         SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, n=2, seed=shift))
        lines.append([{key: value for key, value in line.items() if key not in ("t", "seconds")}
                      for line in lines_of(path)])
    assert lines[0] == lines[1] and any(line.get("tokens") for line in lines[0])


def test_a_recording_has_words_unless_it_is_without_text(model: GPT2, tmp_path: Path) -> None:
    path, prompt = tmp_path / "run.jsonl", "a secret </script> \N{SNOWMAN}"
    for text in (True, False):
        llm = tiny_llm(model)
        with record(llm, str(path), text):
            (output,) = llm.generate([prompt], GREEDY)
        header, added, *_ = lines_of(path)
        assert header["text"] is text
        assert ("texts" in path.read_text(encoding="utf-8")) is text
    assert added["prompt"] == len(output.prompt_token_ids) and output.outputs[0].token_ids != [0] * 8
    assert all(token_id == 0 for line in steps_of(path) for _, token_id in line["tokens"])


def test_the_texts_of_all_tokens_are_those_of_the_tokenizer(model: GPT2, tmp_path: Path) -> None:
    llm, path = tiny_llm(model), tmp_path / "run.jsonl"
    with record(llm, str(path)):
        outputs = llm.generate(["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{SNOWMAN}", [256, 0, 255]], GREEDY)
    texts: dict[str, str] = {}
    for line in lines_of(path):
        assert not texts.keys() & line.get("texts", {}).keys(), "each text is written once"
        texts |= line.get("texts", {})
    for output in outputs:
        for token_id in output.prompt_token_ids + output.outputs[0].token_ids:
            assert texts[str(token_id)].encode("latin-1") == llm.tokenizer.bytes_of(token_id)


def test_a_step_has_its_plan_its_tokens_and_why_the_first_request_waits(model: GPT2, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    llm = tiny_llm(model, max_num_seqs=3, max_num_batched_tokens=20, admission="greedy", order="fcfs")
    with record(llm, str(path)):
        outputs = llm.generate([[i] * 17 for i in range(4)], GREEDY)
    steps = steps_of(path)
    assert steps[0]["plan"] == [["0.0", 0, 17], ["1.0", 0, 3]]
    first = outputs[0].outputs[0].token_ids
    assert [line["tokens"][0] for line in steps[:8]] == [["0.0", token_id] for token_id in first]
    assert all(line["recorded"] for line in steps)
    reasons = [line.get("waits") for line in steps]
    assert reasons[:2] == [["2.0", "budget"], ["3.0", "seats", 1, 0]] and reasons[-1] is None


def test_the_reason_of_waiting_for_memory_has_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    scheduler = tight_scheduler(0)
    with record(scheduler, str(path)):
        storm(scheduler, random.Random(0))
    memory = [line["waits"] for line in steps_of(path) if line.get("waits", [None, None])[1] == "memory"]
    assert memory and all(needed > available and found == 0 for _, _, needed, available, found in memory)


def test_a_steps_seconds_are_those_of_its_phases(model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, path, now = tiny_llm(model), tmp_path / "run.jsonl", [100.0]
    llm.scheduler.clock = lambda: now[0]

    def passing(owner: object, name: str, seconds: float) -> None:
        plain: Callable[..., object] = getattr(owner, name)

        def slower(*arguments: object) -> object:
            now[0] += seconds
            return plain(*arguments)

        monkeypatch.setattr(owner, name, slower)

    passing(llm.scheduler, "_admit", 1.0)
    passing(llm.kv_cache, "carry_out", 2.0)
    passing(llm.model, "forward", 4.0)
    passing(engine, "sample", 8.0)
    passing(llm.scheduler, "_start_followers", 16.0)
    with record(llm, str(path)):
        llm.generate([[1, 2, 3]], SamplingParams(n=2, max_tokens=1))
    (step,) = steps_of(path)
    assert step["t"] == 100.0 and step["seconds"] == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_step_that_the_model_did_not_survive_says_what_it_raised(
        model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, path = tiny_llm(model), tmp_path / "run.jsonl"

    def explode(*_: object) -> None:
        raise InjectedFault("out of memory")

    with record(llm, str(path)):
        llm.add_request([1, 2, 3], GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(llm.model, "forward", explode)
            with pytest.raises(InjectedFault):
                llm.step()
        llm.step()
    failed, good = steps_of(path)
    assert failed["recorded"] is False and failed["error"] == "InjectedFault: out of memory"
    assert failed["plan"] == good["plan"] == [["0.0", 0, 3]] and "tokens" not in failed
    assert good["recorded"] is True and "error" not in good and good["tokens"][0][0] == "0.0"


def test_a_step_in_whose_planning_a_policy_raises_keeps_what_has_happened(tmp_path: Path) -> None:
    """Random runs have such steps; here one is looked for."""
    path, found = tmp_path / "run.jsonl", 0
    for seed in range(30):
        run = RandomRun(seed)
        with record(run.scheduler, str(path)):
            run.go_on(120)
        found += sum("plan" not in line and bool(line.get("events")) for line in steps_of(path))
    assert found > 0


def test_a_request_that_arrives_between_a_plan_and_its_end_does_not_lose_the_step(tmp_path: Path) -> None:
    scheduler, path = tight_scheduler(0), tmp_path / "run.jsonl"
    with record(scheduler, str(path)):
        scheduler.add(request_with(0, [1, 2, 3]))
        step = scheduler.schedule()
        scheduler.add(request_with(1, [4, 5]))
        scheduler.update(step, {request: 7 for _, request in step.sampled})
    assert [line.get("add", line.get("recorded")) for line in lines_of(path)[1:]] == ["0.0", True, "1.0"]


def test_a_storm_is_in_the_step_in_which_it_begins_with_its_cause(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, scheduler = tmp_path / "run.jsonl", tight_scheduler(1)
    with record(scheduler, str(path)):
        storm(scheduler, random.Random(1))
    (warning,) = [entry.getMessage() for entry in caplog.records if "eviction storm" in entry.getMessage()]
    (line,) = [line for line in steps_of(path) if "storm" in line]
    assert line["step"] >= 64 and warning.endswith(line["storm"][0]) and "ikely cause" in line["storm"][0]
    assert f"({line['storm'][1]} of {line['storm'][2]} tokens were computed before)" in warning
    storms = [(frame.step, frame.events) for frame in frames(lines_of(path)[1:]) if frame.kind == "storm"]
    assert storms == [(line["step"], [["storm", *line["storm"]]])]


# Beside the report of a test that fails.

def fail_in_step(llm: LLM, number: int, folder: Path) -> None:
    """A test that fails when this step has been planned."""
    with recorded(llm, folder):
        for prompt in random_prompts(random.Random(0), 5):
            llm.add_request([token_id % 200 for token_id in prompt], GREEDY)
        plain = llm.logits_of

        def fails_then(step: Step) -> object:
            assert llm.stats().num_steps < number - 1, "the fault that the test has found"
            return plain(step)

        llm.logits_of = fails_then
        while llm.has_unfinished_requests():
            llm.step()


def test_a_test_that_fails_says_where_its_recording_is_and_that_reaches_the_failure(
        model: GPT2, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(AssertionError, match="the fault that the test has found"):
        fail_in_step(tiny_llm(model), 4, tmp_path)
    path = tmp_path / "run.jsonl"
    assert capsys.readouterr().out == f"what happened is recorded in {path}\n"
    assert [line["recorded"] for line in steps_of(path)] == [True, True, True, False]
    assert steps_of(path)[-1]["plan"], "what was planned when it failed"


def test_a_test_that_passes_prints_nothing_and_without_the_folder_show_nothing_is_recorded(
        model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    fail_in_step(tiny_llm(model), 1000, tmp_path)
    (tmp_path / "run.jsonl").unlink()
    monkeypatch.setattr(tests.recordings, "has_folder", lambda name: name != "show")
    with pytest.raises(AssertionError, match="the fault that the test has found"):
        fail_in_step(tiny_llm(model), 4, tmp_path)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
