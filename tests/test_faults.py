"""An exception anywhere in a step, or Ctrl-C at any time: no block is leaked, and the engine goes on."""

from __future__ import annotations

import codecs
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from tests.crowds import by_arrival, whatever_fits
from tests.faults import Calls, InjectedFault, press_ctrl_c, raise_fault
from tests.oracle import continue_densely, tiny_model
from tests.recount import assert_consistent, assert_nothing_is_held

from nanopaged import LLM, RequestOutput, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.engine import Group
from nanopaged.gpt2 import GPT2Config
from nanopaged.models.tokenizer import TextStream
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import continuation_seed
from nanopaged.scheduler import Scheduler

BYTES = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)
MODEL = tiny_model(BYTES)
WORK = [  # (step of its arrival, prompt, params): together they need more than the pool
    (0, "A shared beginning, and A", SamplingParams(temperature=0.0, seed=2, max_tokens=6)),
    (0, "One, or two", SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5)),
    (2, "A shared beginning, and B", SamplingParams(temperature=0.8, seed=4, max_tokens=4, stop=["\n"])),
]
PROBE, PROBE_PARAMS = list(range(60, 75)), SamplingParams(temperature=0.0, max_tokens=2)
PROBE_TOKENS = continue_densely(MODEL, PROBE, PROBE_PARAMS)
# (token ids, text, finish reason) of each continuation of a request.
Result = list[tuple[list[int], str, str | None]]


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def engine(preemption: str) -> LLM:
    return LLM(MODEL, device="cpu", attention="torch", block_size=8, num_blocks=7, max_num_batched_tokens=14,
               admission=whatever_fits, order=by_arrival, preemption=preemption, swap_blocks=8)


@contextmanager
def undisturbed_reading() -> Iterator[None]:
    """Without faults: what an output shows is built when it is read, which is not a part of the step."""
    observer = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(observer)


def result(output: RequestOutput) -> Result:
    return [(completion.token_ids, completion.text, completion.finish_reason) for completion in output.outputs]


class Run:
    """A user's loop around the engine, which catches a fault in any call and makes the same call again."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.ids: list[str] = []
        self.results: dict[str, Result] = {}
        self.faults = self.steps = 0

    def unfinished(self) -> bool:
        return len(self.ids) < len(WORK) or bool(self.llm._groups or self.llm._unreported)

    def advance(self) -> None:
        """One call: the next request that is due, or a step."""
        llm = self.llm
        groups = list(llm._groups.values())
        before = [state_of(group) for group in groups]
        steps_before = llm.scheduler.stats.num_steps
        try:
            if len(self.ids) < len(WORK) and WORK[len(self.ids)][0] <= self.steps:
                _, prompt, params = WORK[len(self.ids)]
                self.ids.append(llm.add_request(prompt, params))
                return
            outputs = llm.step()
            with undisturbed_reading():
                finished = {output.request_id: result(output) for output in outputs if output.finished}
            assert not finished.keys() & self.results.keys(), "reported twice"
            self.results.update(finished)
            self.steps += 1
        except InjectedFault:
            self.faults += 1
            llm.scheduler.check_invariants()
            assert_consistent(llm.scheduler)
            assert set(llm._groups) <= set(self.ids), "a request that was refused is there"
            if llm.scheduler.stats.num_steps == steps_before:
                assert [state_of(group) for group in groups] == before, "a step that was not recorded changed a request"
            for group in groups:
                assert_text_belongs_to_tokens(llm, group)

    def finish(self) -> dict[str, Result]:
        while self.unfinished():
            self.advance()
        return self.results


def state_of(group: Group) -> list[tuple[list[int], TextStream, str | None]]:
    return [(list(member.token_ids), text, member.finish_reason) for member, text in group.items()]


def assert_text_belongs_to_tokens(llm: LLM, group: Group) -> None:
    for member, stream in group.items():
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens = [token for token in member.output_token_ids if token not in member.stop_token_ids]
        text, stream = decoder.decode(b"".join(map(llm.tokenizer.bytes_of, tokens))), stream.caught_up(tokens)
        if member.finish_reason == "stop":
            assert text.startswith(stream.text), member
        else:
            assert (stream.text, stream.pending) == (text, decoder.getstate()[0]), member


def assert_nothing_is_left(llm: LLM, where: str) -> None:
    assert not llm.has_unfinished_requests() and not llm.scheduler.has_unfinished(), where
    llm.scheduler.check_invariants()
    assert_nothing_is_held(llm.scheduler, where)
    assert llm.stats().swap_blocks_used == 0, where


def assert_clean_and_correct(llm: LLM, where: str) -> None:
    """Nothing is left of earlier requests, and another one gets the right tokens."""
    assert_nothing_is_left(llm, where)
    (output,) = llm.generate([PROBE], PROBE_PARAMS)
    assert output.outputs[0].token_ids == PROBE_TOKENS, where
    assert_nothing_is_left(llm, where)
    assert not llm.scheduler.moves, where


def step_to_the_end(llm: LLM) -> dict[str, RequestOutput]:
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler)
    return outputs


def generate(llm: LLM) -> list[RequestOutput]:
    return llm.generate([prompt for _, prompt, _ in WORK], [params for _, _, params in WORK])


Undisturbed = tuple[str, dict[str, Result], Calls]


@pytest.fixture(scope="module", params=["recompute", "swap"])
def undisturbed(request: pytest.FixtureRequest) -> Undisturbed:
    """(preemption, the results with no fault, the calls on the way)."""
    run = Run(engine(request.param))
    with Calls() as calls:
        results = run.finish()
    for request_id, (_, prompt, params) in zip(run.ids, WORK):
        for i, (token_ids, _, _) in enumerate(results[request_id]):
            alone = replace(params, n=1, seed=continuation_seed(params.seed, i))
            assert token_ids == continue_densely(MODEL, list(prompt.encode()), alone)
    stats = run.llm.stats()
    assert stats.num_preemptions > 0 and stats.prefix_hit_tokens > 0 and run.faults == 0
    assert stats.swapped_in_tokens > 0 if request.param == "swap" else stats.recomputed_tokens > 0
    return request.param, results, calls


def test_after_a_fault_at_any_call_site_the_same_call_gives_the_same_results(undisturbed: Undisturbed) -> None:
    preemption, results, calls = undisturbed
    for part in ("GPT2.forward", "Attention.forward", "sample", "Tokenizer.encode", "Tokenizer.bytes_of",
                 "TextStream.extended", "RequestOutput.__init__", "Batch.from_step", "KVCache.carry_out",
                 "KVCache.carry_out.<locals>.<lambda>", "LLM.add_request", "LLM.step"):
        assert part in calls.functions, f"no fault in {part}"
    chosen = calls.one_of_each_site(1.0)
    assert len(chosen) >= 50 and len(calls.functions) >= 500
    for number, where in chosen:
        run = Run(engine(preemption))
        with Calls(number):
            got = run.finish()
        assert run.faults == 1, f"{run.faults} exceptions at {where}"
        assert got == results, where


def test_a_step_may_fail_at_each_of_its_calls_in_turn_and_the_results_are_the_same(undisturbed: Undisturbed) -> None:
    preemption, results, calls = undisturbed
    run, number = Run(engine(preemption)), 0
    while run.unfinished():
        number += 1
        before = (run.faults, run.llm.scheduler.stats.num_steps)
        with Calls(number):
            run.advance()
        if (run.faults, run.llm.scheduler.stats.num_steps) != (before[0] + 1, before[1]):
            number = 0  # the step has happened
    assert run.results == results
    assert run.faults > 0.8 * len(calls.functions)
    run.llm.scheduler.check_invariants()


def test_after_a_fault_at_any_call_site_all_requests_can_be_aborted(undisturbed: Undisturbed) -> None:
    preemption, _, calls = undisturbed
    for number, where in calls.one_of_each_site(0.5):
        run = Run(engine(preemption))
        with Calls(number):
            while run.unfinished() and not run.faults:
                run.advance()
        assert run.faults == 1, where
        for request_id in list(run.llm._groups):
            assert run.llm.abort_request(request_id).finished, where
        for output in run.llm.step():  # what had finished, and was not reported
            assert output.finished, where
        assert_clean_and_correct(run.llm, where)


def test_a_fault_at_any_call_site_of_generate_leaves_nothing_behind(undisturbed: Undisturbed) -> None:
    preemption = undisturbed[0]
    llm = engine(preemption)
    with Calls() as calls:
        generate(llm)
    for number, where in calls.one_of_each_site(0.5):
        llm = engine(preemption)
        with pytest.raises(InjectedFault), Calls(number):
            generate(llm)
        assert_clean_and_correct(llm, where)


def test_ctrl_c_at_any_call_site_of_generate_leaves_nothing_behind(undisturbed: Undisturbed) -> None:
    preemption = undisturbed[0]
    llm = engine(preemption)
    with Calls(in_blocks=True) as calls:
        generate(llm)
    for part in ("Scheduler.schedule", "Scheduler.update", "Scheduler._preempt", "BlockAllocator.take", "uninterrupted",
                 "GPT2.forward", "RequestOutput.__init__", "show_progress"):
        assert part in calls.functions, f"no interrupt in {part}"
    for number, where in calls.one_of_each_site(0.3 if preemption == "swap" else 0.8):
        llm, handler = engine(preemption), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), Calls(number, press_ctrl_c, in_blocks=True):
            generate(llm)
        assert signal.getsignal(signal.SIGINT) is handler, where
        assert_clean_and_correct(llm, where)


@pytest.mark.parametrize("deed", [raise_fault, press_ctrl_c])
def test_a_fault_or_ctrl_c_while_the_progress_line_is_cleared_leaves_nothing_behind(deed: Callable[[], None]) -> None:
    llm = engine("recompute")
    with Calls() as calls:
        generate(llm)
    llm = engine("recompute")
    with pytest.raises((InjectedFault, KeyboardInterrupt)), Calls(calls.last("show_progress"), deed):
        generate(llm)
    assert_clean_and_correct(llm, "after the progress line")


def test_ctrl_c_in_the_middle_of_a_state_update_is_raised_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((Scheduler, "schedule"), (Scheduler, "update"), (BlockAllocator, "take"),
                        (BlockAllocator, "publish"), (Scheduler, "_finish"), (LLM, "_add")):
        llm = engine("swap")
        original = getattr(owner, name)
        finished_calls: list[str] = []

        def interrupted(*arguments: object) -> object:
            press_ctrl_c()
            answer = original(*arguments)
            press_ctrl_c()
            finished_calls.append(name)
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                generate(llm)
        assert finished_calls, f"the interrupt cut {name} short"
        assert_clean_and_correct(llm, name)


def test_ctrl_c_in_the_cleanup_after_a_fault_is_raised_after_the_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("swap")
    abort = llm.scheduler.abort
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", lambda *_: raise_fault())
        patch.setattr(llm.scheduler, "abort", lambda member: (press_ctrl_c(), abort(member)))
        with pytest.raises(KeyboardInterrupt) as caught:
            generate(llm)
    assert isinstance(caught.value.__context__, InjectedFault)
    assert_clean_and_correct(llm, "after both")


def test_ctrl_c_at_any_call_site_of_add_request_leaves_a_whole_request_or_none() -> None:
    llm = engine("recompute")
    with Calls(in_blocks=True) as calls:
        llm.add_request("text", SamplingParams(n=2, max_tokens=3))
    for part in ("Tokenizer.encode", "Scheduler.add", "WaitingQueue.push", "Listeners.tell"):
        assert part in calls.functions, f"no interrupt in {part}"
    for number, where in calls.one_of_each_site(1.0):
        llm = engine("recompute")
        with pytest.raises(KeyboardInterrupt), Calls(number, press_ctrl_c, in_blocks=True):
            llm.add_request("text", SamplingParams(n=2, max_tokens=3))
        assert llm.scheduler.has_unfinished() == llm.has_unfinished_requests(), where
        step_to_the_end(llm)
        assert_clean_and_correct(llm, where)


def test_generate_leaves_nothing_behind_even_if_no_output_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("recompute")
    steps: list[int] = []
    forward = llm.model.forward

    def fail_late(*arguments: object) -> object:
        steps.append(1)
        return forward(*arguments) if len(steps) < 6 else raise_fault()

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", fail_late)
        patch.setattr(TextStream, "shown", lambda *_: raise_fault())
        # Every output ends within a character, so that the end of its text is still to be decoded.
        patch.setattr(llm.tokenizer, "bytes_of", lambda token_id: b"\xe2")
        with pytest.raises(InjectedFault):
            generate(llm)
    assert_clean_and_correct(llm, "after both")


def test_a_prompt_on_which_the_tokenizer_raises_is_not_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("recompute")
    first = llm.add_request(PROBE, PROBE_PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(llm.tokenizer, "encode", lambda text: raise_fault())
        with pytest.raises(InjectedFault):
            llm.add_request("text", SamplingParams(n=2))
        with pytest.raises(InjectedFault):
            llm.generate([PROBE, "text"], PROBE_PARAMS)
    assert list(llm._groups) == [first]
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert [(output.request_id, output.outputs[0].token_ids) for output in outputs] == [(first, PROBE_TOKENS)]
    assert_clean_and_correct(llm, "after the prompt")


def test_an_engine_works_outside_the_main_thread() -> None:
    done: list[str] = []

    def work() -> None:
        assert_clean_and_correct(engine("swap"), "in a thread")
        done.append("engine")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["engine"]


WAITING, RUNNING, FINISHED = RequestStatus.WAITING, RequestStatus.RUNNING, RequestStatus.FINISHED
Members = list[Request]


def is_swapped(llm: LLM, member: Request) -> bool:
    return member in getattr(llm.scheduler, "swapped", ())


STATES: dict[str, Callable[[LLM, Members], bool]] = {  # which a request with these continuations is in
    "waiting": lambda llm, members: members[0].status is WAITING and not members[0].metrics.preemptions,
    "waiting with followers": lambda llm, members: members[0].status is WAITING and members[0].followers != [],
    "running its prompt": lambda llm, members: 0 < members[0].num_computed_tokens < members[0].num_prompt_tokens,
    "running with followers": lambda llm, members: members[0].status is RUNNING and members[0].followers != [],
    "running its output": lambda llm, members: members[0].status is RUNNING and members[0].num_output_tokens > 1,
    "preempted": lambda llm, members: members[0].status is WAITING and members[0].metrics.preemptions > 0,
    "swapped": lambda llm, members: is_swapped(llm, members[0]),
    "one of n finished": lambda llm, members: {member.status for member in members} > {FINISHED},
    "one of n preempted": lambda llm, members: (
        {member.status for member in members} >= {RUNNING, WAITING} and not members[0].followers),
    "one of n swapped": lambda llm, members: (
        any(member.status is RUNNING for member in members) and any(is_swapped(llm, member) for member in members)),
}
CROWD = [(list(range(start, start + length)), SamplingParams(n=n, seed=start, max_tokens=6))
         for start, length, n in ((0, 20, 1), (30, 11, 3), (60, 18, 1), (90, 9, 2))]


def crowd_until(state: str, wanted: Callable[[LLM, Members], bool]) -> tuple[LLM, str]:
    """An engine that has just put a request into this state, and the request's id."""
    for num_blocks in (7, 8, 9, 10, 11):
        llm = LLM(MODEL, device="cpu", attention="torch", block_size=8, num_blocks=num_blocks,
                  max_num_batched_tokens=15, admission=whatever_fits, order=by_arrival, swap_blocks=12,
                  preemption="swap" if "swapped" in state else "recompute")
        for prompt, params in CROWD:
            llm.add_request(prompt, params)
        while llm.has_unfinished_requests():
            for request_id, group in llm._groups.items():
                if wanted(llm, list(group)):
                    return llm, request_id
            llm.step()
    raise AssertionError(f"no request was ever {state}")


@pytest.mark.parametrize("state", STATES)
def test_a_request_can_be_aborted_in_any_state_and_the_others_get_the_same_tokens(state: str) -> None:
    llm, victim = crowd_until(state, STATES[state])
    members = list(llm._groups[victim])
    finished_before = {member for member in members if member.finish_reason}
    others = {request_id: list(group) for request_id, group in llm._groups.items() if request_id != victim}
    output = llm.abort_request(victim)
    llm.scheduler.check_invariants()
    assert_consistent(llm.scheduler)
    assert output.finished and output.request_id == victim
    assert [completion.finish_reason == "abort" for completion in output.outputs] == [
        member not in finished_before for member in members]
    with pytest.raises(ValueError, match=f"no unfinished request has the id '{victim}'"):
        llm.abort_request(victim)
    assert victim not in step_to_the_end(llm)
    for request_id, survivors in others.items():
        prompt, params = CROWD[int(request_id)]
        for i, member in enumerate(survivors):
            alone = replace(params, n=1, seed=continuation_seed(params.seed, i))
            assert member.output_token_ids == continue_densely(MODEL, prompt, alone), member
    assert_clean_and_correct(llm, state)


@pytest.mark.parametrize("state, is_victim", [
    ("running", lambda llm, member: member.status is RUNNING),
    ("preempted", lambda llm, member: member.status is WAITING),
    ("swapped", is_swapped),
], ids=lambda value: value if isinstance(value, str) else "")
def test_one_continuation_can_be_aborted_and_its_siblings_go_on(
        state: str, is_victim: Callable[[LLM, Request], bool]) -> None:
    def has_victim(llm: LLM, members: Members) -> bool:
        return not members[0].followers and [m.status for m in members].count(FINISHED) < len(members) - 1 and any(
            is_victim(llm, member) for member in members)

    llm, request_id = crowd_until(state, has_victim)
    victim = next(member for member in llm._groups[request_id] if is_victim(llm, member))
    tokens = victim.output_token_ids
    llm.scheduler.abort(victim)
    llm.scheduler.check_invariants()
    assert_consistent(llm.scheduler)
    outputs = step_to_the_end(llm)
    prompt, params = CROWD[int(request_id)]
    for i, completion in enumerate(outputs[request_id].outputs):
        wanted = continue_densely(MODEL, prompt, replace(params, n=1, seed=continuation_seed(params.seed, i)))
        if f"{request_id}.{i}" == victim.request_id:
            assert (completion.finish_reason, completion.token_ids) == ("abort", tokens)
        else:
            assert completion.token_ids == wanted and completion.finish_reason != "abort"
    assert_clean_and_correct(llm, state)


def test_aborting_a_leader_ends_the_followers_that_have_not_started() -> None:
    llm, request_id = crowd_until("running with followers", STATES["running with followers"])
    leader, *followers = llm._groups[request_id]
    llm.scheduler.abort(leader)
    llm.scheduler.check_invariants()
    assert_consistent(llm.scheduler)
    assert {member.finish_reason for member in (leader, *followers)} == {"abort"}
    with pytest.raises(ValueError, match="is not in the queue: it has finished"):
        llm.scheduler.abort(followers[0])
