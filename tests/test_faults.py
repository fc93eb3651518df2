"""Whatever raises during a step, and whenever Ctrl-C comes: nothing is lost, and the engine goes on."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from tests.oracle import continue_densely, tiny_model

import nanopaged
from nanopaged import LLM, RequestOutput, SamplingParams
from nanopaged.block_allocator import BlockAllocator
from nanopaged.gpt2 import GPT2Config
from nanopaged.interrupts import uninterrupted
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling_params import continuation_seed
from nanopaged.scheduler import Scheduler
from nanopaged.pressure.swap_space import BlockMove

PACKAGE = str(Path(nanopaged.__file__).parent) + os.sep
BYTES = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=256)
MODEL = tiny_model(BYTES)
WORK = [  # (step of its arrival, prompt, params): together they need more than the pool
    (0, "A shared beginning, and A", SamplingParams(temperature=0.0, seed=2, max_tokens=6)),
    (0, "One, or two", SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5)),
    (2, "A shared beginning, and B", SamplingParams(temperature=0.8, seed=4, max_tokens=4, stop=["\n"])),
]
PROBE, PROBE_PARAMS = list(range(60, 75)), SamplingParams(temperature=0.0, max_tokens=2)
PROBE_TOKENS = continue_densely(MODEL, PROBE, PROBE_PARAMS)
# What a request comes to: (token ids, text, finish reason) of each continuation.
Result = list[tuple[list[int], str, str | None]]


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored; Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class InjectedFault(RuntimeError):
    """Raised in place of a call."""


def raise_fault() -> None:
    raise InjectedFault


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def engine(preemption: str) -> LLM:
    return LLM(MODEL, device="cpu", attention="torch", block_size=8, num_blocks=7, max_num_batched_tokens=14,
               admission="greedy", preemption=preemption, swap_blocks=8)


def result(output: RequestOutput) -> Result:
    return [(completion.token_ids, completion.text, completion.finish_reason) for completion in output.outputs]


class Calls:
    """Counts the calls of nanopaged's functions, and does something at the start of one of them.

    Calls inside `uninterrupted` blocks are left out, since these write the books and must not raise,
    unless `in_blocks` asks for them: there an interrupt must wait.
    """

    def __init__(self, target: int = 0, deed: Callable[[], None] = raise_fault, in_blocks: bool = False) -> None:
        self.target, self.deed, self.in_blocks = target, deed, in_blocks
        self.functions: list[str] = []
        self.sites: list[tuple[str, int, str]] = []  # of each call: the caller's file and line, and the function
        self.blocks: list[FrameType] = []  # generators of the open `uninterrupted` blocks

    def __enter__(self) -> Calls:
        self.before = sys.getprofile()
        sys.setprofile(self.observe)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)

    def observe(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        if code is uninterrupted.__wrapped__.__code__:  # runs twice for each block: up to its yield, and after it
            self.blocks.remove(frame) if frame in self.blocks else self.blocks.append(frame)
            if not self.in_blocks:
                return
        elif code.co_flags & inspect.CO_GENERATOR or (self.blocks and not self.in_blocks):
            return  # a generator is called once more to be closed, where Python swallows what it raises
        self.functions.append(code.co_qualname)
        self.sites.append((frame.f_back.f_code.co_filename, frame.f_back.f_lineno, code.co_qualname))
        if len(self.functions) == self.target:
            self.deed()


class Run:
    """A user's loop around the engine that takes a fault from any call, and makes the same call again."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.ids: list[str] = []
        self.results: dict[str, Result] = {}
        self.faults = self.steps = 0

    def unfinished(self) -> bool:
        return len(self.ids) < len(WORK) or bool(self.llm._groups or self.llm._news)

    def advance(self) -> None:
        """One call: the next request that is due, or a step."""
        llm = self.llm
        before = {member: (list(member.token_ids), member.text, member.pending, member.finish_reason)
                  for members in llm._groups.values() for member in members}
        steps_before = llm.scheduler.stats.num_steps
        try:
            if len(self.ids) < len(WORK) and WORK[len(self.ids)][0] <= self.steps:
                _, prompt, params = WORK[len(self.ids)]
                self.ids.append(llm.add_request(prompt, params))
                return
            for output in llm.step():
                if output.finished:
                    assert output.request_id not in self.results, "reported twice"
                    self.results[output.request_id] = result(output)
            self.steps += 1
        except InjectedFault:
            self.faults += 1
            llm.scheduler.check_invariants()
            recorded = llm.scheduler.stats.num_steps - steps_before
            assert set(llm._groups) <= set(self.ids), "a request that was refused is there"
            for member, state in before.items():
                if not recorded:
                    assert (member.token_ids, member.text, member.pending, member.finish_reason) == state, member
                assert_text_belongs_to_tokens(llm, member)

    def finish(self) -> dict[str, Result]:
        while self.unfinished():
            self.advance()
        return self.results


def assert_text_belongs_to_tokens(llm: LLM, member: Request) -> None:
    text, pending = "", b""
    for token in member.output_token_ids:
        if token not in member.stop_token_ids:
            piece, pending = llm.tokenizer.stream(pending, token)
            text += piece
    if member.finish_reason == "stop":
        assert text.startswith(member.text), member
    else:
        assert (member.text, member.pending) == (text, pending), member


def assert_nothing_is_left(llm: LLM, where: str) -> None:
    assert not llm.has_unfinished_requests() and not llm.scheduler.has_unfinished(), where
    llm.scheduler.check_invariants()
    stats = llm.stats()
    assert stats.referenced_blocks == stats.swap_blocks_used == 0, where
    assert stats.cached_blocks + stats.free_blocks == stats.num_blocks, where


def assert_clean_and_correct(llm: LLM, where: str) -> None:
    """Nothing is left of what ran before, and what runs now is right."""
    assert_nothing_is_left(llm, where)
    (output,) = llm.generate([PROBE], PROBE_PARAMS)
    assert output.outputs[0].token_ids == PROBE_TOKENS, where
    assert_nothing_is_left(llm, where)
    assert not llm.scheduler.moves, where


def occurrences(calls: Calls, share: float) -> list[tuple[int, str]]:
    """Of each call site, the call at this share of its calls, from 0, the first, to 1, the last: (number, place)."""
    numbers: dict[tuple[str, int, str], list[int]] = {}
    for number, site in enumerate(calls.sites, 1):
        numbers.setdefault(site, []).append(number)
    chosen = {site: those[round(share * (len(those) - 1))] for site, those in numbers.items()}
    return [(number, f"call {number}, {site}") for site, number in chosen.items()]


def last_call(calls: Calls, function: str) -> int:
    return max(number for number, called in enumerate(calls.functions, 1) if called == function)


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


def test_a_fault_at_any_call_site_costs_nothing_if_the_call_is_made_again(undisturbed: Undisturbed) -> None:
    preemption, results, calls = undisturbed
    for part in ("GPT2.forward", "Attention.qkv", "sample", "Tokenizer.encode", "Tokenizer.stream", "Batch.from_step",
                 "KVCache.carry_out", "KVCache.carry_out.<locals>.<lambda>", "LLM.add_request",
                 "LLM.step", "LLM._output"):
        assert part in calls.functions, f"no fault in {part}"
    chosen = occurrences(calls, 1.0)
    assert len(chosen) >= 50 and len(calls.functions) >= 500
    for number, where in chosen:
        run = Run(engine(preemption))
        with Calls(number):
            got = run.finish()
        assert run.faults == 1, f"{run.faults} exceptions at {where}"
        assert got == results, where


def test_a_fault_at_every_call_of_every_step_one_after_the_other_costs_nothing(undisturbed: Undisturbed) -> None:
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


def test_a_fault_at_any_call_site_leaves_nothing_if_the_requests_are_aborted(undisturbed: Undisturbed) -> None:
    preemption, _, calls = undisturbed
    for number, where in occurrences(calls, 0.5):
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
    for number, where in occurrences(calls, 0.5):
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
                 "GPT2.forward", "LLM._output", "show_progress"):
        assert part in calls.functions, f"no interrupt in {part}"
    for number, where in occurrences(calls, 0.3 if preemption == "swap" else 0.8):
        llm, handler = engine(preemption), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), Calls(number, press_ctrl_c, in_blocks=True):
            generate(llm)
        assert signal.getsignal(signal.SIGINT) is handler, where
        assert_clean_and_correct(llm, where)


@pytest.mark.parametrize("deed", [raise_fault, press_ctrl_c])
def test_what_comes_while_generate_clears_its_progress_line_leaves_nothing_behind(deed: Callable[[], None]) -> None:
    llm = engine("recompute")
    with Calls() as calls:
        generate(llm)
    llm = engine("recompute")
    with pytest.raises((InjectedFault, KeyboardInterrupt)), Calls(last_call(calls, "show_progress"), deed):
        generate(llm)
    assert_clean_and_correct(llm, "after the progress line")


def test_ctrl_c_while_the_books_are_written_comes_when_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((Scheduler, "schedule"), (Scheduler, "update"), (BlockAllocator, "take"),
                        (Scheduler, "_receive"), (LLM, "add_request")):
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


def test_ctrl_c_while_generate_cleans_up_after_a_fault_waits_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine("swap")
    abort = llm.scheduler.abort
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", lambda *_: raise_fault())
        patch.setattr(llm.scheduler, "abort", lambda member: (press_ctrl_c(), abort(member)))
        with pytest.raises(KeyboardInterrupt) as caught:
            generate(llm)
    assert isinstance(caught.value.__context__, InjectedFault)
    assert_clean_and_correct(llm, "after both")


def test_generate_leaves_nothing_behind_even_where_the_tokenizer_is_broken_for_good(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine("recompute")
    steps: list[int] = []
    forward = llm.model.forward

    def fail_late(*arguments: object) -> object:
        steps.append(1)
        return forward(*arguments) if len(steps) < 6 else raise_fault()

    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "forward", fail_late)
        patch.setattr(llm.tokenizer, "end_stream", lambda pending: raise_fault())
        # Every output ends within a character, so that each abort asks the tokenizer for its end.
        patch.setattr(llm.tokenizer, "stream", lambda pending, token_id: ("", b"\xe2"))
        with pytest.raises(InjectedFault):
            generate(llm)
    assert_clean_and_correct(llm, "after both")


def test_moves_that_were_not_made_are_made_when_the_step_is_repeated() -> None:
    cache = engine("swap").kv_cache
    cache.blocks.copy_(torch.arange(7.0).view(7, 1, 1, 1).expand_as(cache.blocks))
    cache.swapped.fill_(50.0)
    moves = [BlockMove("copy", 1, 2), BlockMove("in", 0, 3)]
    swapped, cache.swapped = cache.swapped, None
    with pytest.raises(TypeError):
        cache.carry_out(moves)
    assert moves == [BlockMove("in", 0, 3)]
    cache.swapped = swapped
    cache.carry_out(moves)
    assert moves == [] and cache.blocks[0, 0, :, 0, 0, 0].tolist() == [0, 1, 1, 50, 4, 5, 6]


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


def test_an_interrupt_comes_after_the_block_and_the_handler_is_back() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            press_ctrl_c()
            done.append("block")
        done.append("after it")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is handler
    with uninterrupted():
        pass  # the two were delivered as one, and neither is left over
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_an_interrupt_in_an_inner_block_comes_after_the_outer_one() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                press_ctrl_c()
                done.append("inner")
            done.append("outer")
        done.append("after both")
    assert done == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is handler


def test_a_block_that_raises_gives_the_handler_back_and_loses_no_interrupt() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InjectedFault), uninterrupted():
        raise_fault()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():
        press_ctrl_c()
        raise_fault()
    assert isinstance(caught.value.__context__, InjectedFault)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_handler_of_the_users_own_is_called_once_after_the_block() -> None:
    calls: list[str] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(signal.Signals(number).name))
    try:
        with uninterrupted():
            press_ctrl_c()
            assert calls == []
        assert calls == ["SIGINT"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            press_ctrl_c()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_held_and_an_engine_works() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT) is handler)
        assert_clean_and_correct(engine("swap"), "in a thread")
        done.append("engine")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True, "engine"]


WAITING, SWAPPED, RUNNING, FINISHED = (RequestStatus.WAITING, RequestStatus.SWAPPED, RequestStatus.RUNNING,
                                       RequestStatus.FINISHED)
STATES: dict[str, Callable[[list[Request]], bool]] = {  # which a request with these continuations is in
    "waiting": lambda members: members[0].status is WAITING and not members[0].metrics.preemptions,
    "waiting with followers": lambda members: members[0].status is WAITING and members[0].followers != [],
    "running its prompt": lambda members: 0 < members[0].num_computed_tokens < members[0].num_prompt_tokens,
    "running with followers": lambda members: members[0].status is RUNNING and members[0].followers != [],
    "running its output": lambda members: members[0].status is RUNNING and members[0].num_output_tokens > 1,
    "preempted": lambda members: members[0].status is WAITING and members[0].metrics.preemptions > 0,
    "swapped": lambda members: members[0].status is SWAPPED,
    "one of n finished": lambda members: {member.status for member in members} > {FINISHED},
    "one of n preempted": lambda members: (
        {member.status for member in members} >= {RUNNING, WAITING} and not members[0].followers),
    "one of n swapped": lambda members: {member.status for member in members} >= {RUNNING, SWAPPED},
}
CROWD = [(list(range(start, start + length)), SamplingParams(n=n, seed=start, max_tokens=6))
         for start, length, n in ((0, 20, 1), (30, 11, 3), (60, 18, 1), (90, 9, 2))]


def crowd_until(state: str, wanted: Callable[[list[Request]], bool]) -> tuple[LLM, str]:
    """An engine that has just put a request into this state, and the request's id."""
    for num_blocks in (7, 8, 9, 10, 11):
        llm = LLM(MODEL, device="cpu", attention="torch", block_size=8, num_blocks=num_blocks,
                  max_num_batched_tokens=15, admission="greedy", swap_blocks=12,
                  preemption="swap" if "swapped" in state else "recompute")
        for prompt, params in CROWD:
            llm.add_request(prompt, params)
        while llm.has_unfinished_requests():
            for request_id, members in llm._groups.items():
                if wanted(members):
                    return llm, request_id
            llm.step()
    raise AssertionError(f"no request was ever {state}")


@pytest.mark.parametrize("state", STATES)
def test_a_request_can_be_aborted_in_any_state_and_the_others_never_notice(state: str) -> None:
    llm, victim = crowd_until(state, STATES[state])
    finished_before = {member.request_id for member in llm._groups[victim] if member.finish_reason}
    others = {request_id: members for request_id, members in llm._groups.items() if request_id != victim}
    members = llm._groups[victim]
    output = llm.abort_request(victim)
    llm.scheduler.check_invariants()
    assert output.finished and output.request_id == victim
    assert [completion.finish_reason == "abort" for completion in output.outputs] == [
        member.request_id not in finished_before for member in members]
    with pytest.raises(ValueError, match=f"no unfinished request has the id '{victim}'"):
        llm.abort_request(victim)
    while llm.has_unfinished_requests():
        assert victim not in {output.request_id for output in llm.step()}
        llm.scheduler.check_invariants()
    for request_id, survivors in others.items():
        prompt, params = CROWD[int(request_id)]
        for i, member in enumerate(survivors):
            alone = replace(params, n=1, seed=continuation_seed(params.seed, i))
            assert member.output_token_ids == continue_densely(MODEL, prompt, alone), member
    assert_clean_and_correct(llm, state)


@pytest.mark.parametrize("status", [RUNNING, WAITING, SWAPPED])
def test_one_continuation_can_be_aborted_and_its_siblings_go_on(status: RequestStatus) -> None:
    def has_victim(members: list[Request]) -> bool:
        return not members[0].followers and [m.status for m in members].count(FINISHED) < len(members) - 1 and any(
            m.status is status for m in members)

    llm, request_id = crowd_until(status.value if status is not WAITING else "preempted", has_victim)
    victim = next(member for member in llm._groups[request_id] if member.status is status)
    tokens = victim.output_token_ids
    llm.scheduler.abort(victim)
    llm.scheduler.check_invariants()
    outputs = {}
    while llm.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.step()}
        llm.scheduler.check_invariants()
    prompt, params = CROWD[int(request_id)]
    for i, completion in enumerate(outputs[request_id].outputs):
        wanted = continue_densely(MODEL, prompt, replace(params, n=1, seed=continuation_seed(params.seed, i)))
        if f"{request_id}.{i}" == victim.request_id:
            assert (completion.finish_reason, completion.token_ids) == ("abort", tokens)
        else:
            assert completion.token_ids == wanted and completion.finish_reason != "abort"
    assert_clean_and_correct(llm, status.value)


def test_a_leader_takes_the_followers_that_have_not_started_with_it() -> None:
    llm, request_id = crowd_until("running with followers", STATES["running with followers"])
    leader, *followers = llm._groups[request_id]
    llm.scheduler.abort(leader)
    llm.scheduler.check_invariants()
    assert {member.finish_reason for member in (leader, *followers)} == {"abort"} and leader.followers == []
    with pytest.raises(ValueError, match="has finished already"):
        llm.scheduler.abort(followers[0])
