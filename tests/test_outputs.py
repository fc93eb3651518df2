"""What comes back? The engine's figures, and a request's own."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from nanopaged import SamplingParams
from nanopaged.config import engine_stats
from nanopaged.gpt2 import GPT2Config
from nanopaged.models.tokenizer import TextStream, Tokenizer, byte_encoding
from nanopaged.outputs import RequestOutput, SchedulerStats, recent_stats
from nanopaged.request import Request
from nanopaged.step import Admission, Step
from tests.oracle import tiny_model
from tests.test_engine import tiny_llm


def requests(count: int) -> list[Request]:
    return [Request(f"0.{i}", [1, 2, 3], SamplingParams(n=count), group_id="0") for i in range(count)]


def test_the_figures_of_the_scheduler_add_up_what_steps_did() -> None:
    stats, (one, two) = SchedulerStats(), requests(2)
    step = Step(0, requests=[one, two], num_tokens=[1, 5], computed_tokens=6, sampled=[(0, one)], preempted=[two],
                admitted=[Admission(two, 9, 4, 2, True), Admission(one, 7, 3, 0, False)],
                recomputed_tokens=2, referenced_blocks=6)
    for _ in range(2):
        stats.stepped(step)
    stats.ended(one)
    assert asdict(stats) == {
        "num_steps": 2, "num_finished": 1, "num_preemptions": 2, "prompt_tokens": 6, "prompt_hit_tokens": 8,
        "computed_tokens": 12, "recomputed_tokens": 4, "swapped_in_tokens": 4, "output_tokens": 2,
        "referenced_block_steps": 12}


@pytest.mark.parametrize("sums, expected", [
    ((4, 100, 25, 2, 20, 10), (0.75, 0.5, 0.5)),
    ((0, 0, 0, 0, 0, 10), (1.0, 0.0, 0.0)),  # before the first step
    ((1, 0, 0, 3, 10, 10), (1.0, 3.0, 1.0)),
])
def test_recent_figures_are_averages_over_the_steps(sums: tuple[int, ...], expected: tuple[float, ...]) -> None:
    recent = recent_stats(*sums)
    assert (recent.goodput, recent.preemptions_per_step, recent.pool_occupancy) == expected


def test_without_a_storm_watch_the_recent_figures_are_over_all_steps() -> None:
    llm = tiny_llm(tiny_model(), num_blocks=8, admission="greedy", enable_prefix_caching=False, max_num_seqs=3)
    for token in range(3):
        llm.add_request([token] * 9, SamplingParams(temperature=0.0, max_tokens=50))
    while llm.has_unfinished_requests():
        llm.step()
    watched, whole = llm.stats(), engine_stats(llm.scheduler, None)
    assert whole.num_steps > 64 and whole.num_preemptions > 0
    assert whole.goodput == 1 - whole.recomputed_tokens / whole.computed_tokens
    assert whole.preemptions_per_step == whole.num_preemptions / whole.num_steps
    assert whole.pool_occupancy == whole.referenced_block_steps / whole.num_steps / 8
    assert (whole.num_storms, whole.swap_blocks, whole.swap_blocks_used) == (0, 0, 0)
    differing = {name for name, value in asdict(whole).items() if value != asdict(watched)[name]}
    assert differing <= {"goodput", "preemptions_per_step", "pool_occupancy", "num_storms"}


def test_an_output_shows_each_continuation_as_it_was_when_it_was_made() -> None:
    one, two = requests(2)
    one.receive(7, now=1.0)
    two.receive(8, now=1.0)
    two.finish_reason = "stop"
    output = RequestOutput("0", {one: TextStream(None, text="shown"), two: TextStream(None, text="ended")})
    one.receive(9, now=2.0)
    assert (output.request_id, output.prompt_token_ids, output.finished) == ("0", [1, 2, 3], False)
    assert [completion.index for completion in output.outputs] == [0, 1]
    assert [completion.token_ids for completion in output.outputs] == [[7], [8]]
    assert [completion.text for completion in output.outputs] == ["shown", "ended"]
    assert [completion.finish_reason for completion in output.outputs] == [None, "stop"]
    assert output.metrics is output.outputs[0].metrics and output.metrics.output_tokens == 1


def test_what_an_output_shows_is_cut_out_only_when_it_is_read() -> None:
    """Each step makes an output for each request; what that costs must not grow with the context."""
    (request,) = requests(1)

    class CountedSlices(list):
        slices = 0

        def __getitem__(self, place: object) -> object:
            CountedSlices.slices += isinstance(place, slice)
            return super().__getitem__(place)

    request.token_ids = CountedSlices(request.token_ids)
    request.receive(7, now=1.0)
    output = RequestOutput("0", {request: TextStream(None, text="shown")})
    assert CountedSlices.slices == 0
    request.receive(8, now=2.0)
    assert output.outputs[0].token_ids == [7] and output.prompt_token_ids == [1, 2, 3] and CountedSlices.slices == 2
    assert output.outputs[0].token_ids is output.outputs[0].token_ids and CountedSlices.slices == 2


class Counted(Tokenizer):
    """Counts the tokens that are decoded."""

    decoded = 0

    def bytes_of(self, token_id: int) -> bytes:
        self.decoded += 1
        return super().bytes_of(token_id)


def test_text_is_decoded_only_when_it_is_read_and_then_each_token_once() -> None:
    tokenizer = Counted(byte_encoding())
    llm = tiny_llm(tiny_model(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2)),
                   tokenizer=tokenizer)
    llm.add_request("ab", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    outputs = [llm.step() for _ in range(6)]
    assert tokenizer.decoded == 0
    for (output,) in outputs:
        assert len(output.outputs[0].token_ids) == output.metrics.output_tokens
        assert output.outputs[0].text == output.outputs[0].text
    assert tokenizer.decoded == 6


@pytest.mark.parametrize("stop", [[], ["zz"]])
def test_an_output_that_is_read_late_shows_the_text_that_it_had(stop: list[str]) -> None:
    llm = tiny_llm(tiny_model(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2)),
                   tokenizer=Tokenizer(byte_encoding()))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, stop=stop)
    llm.add_request("ab", params)
    outputs = [llm.step()[0].outputs[0] for _ in range(12)]
    texts = [completion.text for completion in reversed(outputs)][::-1]  # the latest is read first
    llm.add_request("ab", params)
    assert texts == [llm.step()[0].outputs[0].text for _ in range(12)] and len(set(texts)) > 6


def test_an_output_is_printed_with_its_tokens_and_its_text() -> None:
    (request,) = requests(1)
    request.receive(7, now=1.0)
    request.finish_reason, request.error = "error", "not finite"
    output = RequestOutput("0", {request: TextStream(None, text="it's")})
    assert repr(output).startswith("RequestOutput(request_id='0', prompt_token_ids=[1, 2, 3], outputs=[")
    assert "CompletionOutput(index=0, text=\"it's\", token_ids=[7], finish_reason='error', metrics=" in repr(output)
    assert repr(output).endswith("error='not finite')], finished=True)")


def test_a_request_is_finished_when_all_its_continuations_are() -> None:
    members = requests(2)
    for finished, member in enumerate(members):
        assert not RequestOutput("0", {m: TextStream(None) for m in members}).finished
        member.finish_reason = "length"
    assert RequestOutput("0", {m: TextStream(None) for m in members}).finished
