"""The engine as a user meets it, against the dense oracle."""

from __future__ import annotations

import gc
import random
import sys
import weakref

import pytest
import torch
from tests.oracle import TINY, continue_densely, tiny_model

from nanopaged import LLM, SamplingParams
from nanopaged.models.copycat import CONFIG as COPYCAT_CONFIG
from nanopaged.gpt2 import GPT2, GPT2Config

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
BYTES = GPT2Config(vocab_size=257, n_positions=96, n_embd=32, n_layer=2, n_head=2, eos_token_id=256)


def tiny_llm(model: GPT2 | None = None, **options) -> LLM:
    """An engine on the CPU, over a tiny random model."""
    return LLM(model or tiny_model(), **{"device": "cpu", "block_size": 8, "num_blocks": 40, **options})


def random_prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of different lengths, most of which share a prefix."""
    stem = [rng.randrange(TINY.vocab_size) for _ in range(40)]
    return [stem[: rng.choice([0, 0, 7, 16, 33])] + [rng.randrange(TINY.vocab_size) for _ in range(rng.randint(1, 12))]
            for _ in range(count)]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]), top_k=rng.choice([0, 5, 20]), top_p=rng.choice([1.0, 0.9, 0.5]),
        max_tokens=rng.randint(1, 30), seed=rng.randrange(1000),
        stop_token_ids=rng.sample(range(TINY.vocab_size), rng.choice([0, 0, 2])))


def run_random_mixture(seed: int, check_every_step: bool = True, **fixed) -> int:
    """Runs random requests through a random engine, compares each with the oracle; returns the preemptions."""
    rng = random.Random(seed)
    model = tiny_model(seed=seed % 3)
    prompts = random_prompts(rng, rng.randint(2, 9))
    params = [random_params(rng) for _ in prompts]
    block_size = rng.choice([8, 8, 16])
    barely = max(-(-(len(p) + q.max_tokens) // block_size) for p, q in zip(prompts, params))
    options = {
        "block_size": block_size, "num_blocks": barely + rng.choice([0, 1, 2, 20]),
        "max_num_seqs": rng.choice([1, 3, 9, 9]),
        "max_num_batched_tokens": rng.choice([2, 9, 30, 100, 500]), "enable_prefix_caching": rng.random() < 0.7,
        "watermark": rng.choice([0.0, 0.0, 0.3])} | fixed
    llm = tiny_llm(model, **options)
    ids: list[str] = []
    outputs = {}
    while len(ids) < len(prompts) or llm.has_unfinished_requests():
        while len(ids) < len(prompts) and (not ids or rng.random() < 0.5):
            ids.append(llm.add_request(prompts[len(ids)], params[len(ids)]))
        for output in llm.step():
            outputs[output.request_id] = output
        if check_every_step:
            llm.scheduler.check_invariants()
    for request_id, prompt, own_params in zip(ids, prompts, params):
        wanted = continue_densely(model, prompt, own_params)
        assert outputs[request_id].outputs[0].token_ids == wanted, f"request {request_id}, seed {seed}, {options}"
        assert outputs[request_id].finished, f"seed {seed}"
    stats = llm.stats()
    assert stats.referenced_blocks == 0 and stats.cached_blocks + stats.free_blocks == stats.num_blocks, f"seed {seed}"
    return stats.num_preemptions


def test_scheduling_is_invisible_and_preemptions_do_happen() -> None:
    preemptions = sum(run_random_mixture(seed) for seed in range(60))
    assert preemptions > 40, "the pools were meant to be too small"


@pytest.mark.gpu_too
@pytest.mark.parametrize("seed", range(3))
def test_scheduling_is_invisible_with_the_triton_kernels(seed: int) -> None:
    pytest.importorskip("triton", reason="there is no Triton on this system")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU: the interpreter
    rng = random.Random(seed)
    model, prompts = tiny_model(), random_prompts(rng, 4)
    params = [SamplingParams(temperature=0.0, max_tokens=rng.randint(2, 5)) for _ in prompts]
    llm = tiny_llm(model, attention="triton", device=device, dtype="float32", num_blocks=12, max_num_batched_tokens=32)
    for output, prompt, own_params in zip(llm.generate(prompts, params), prompts, params):
        assert output.outputs[0].token_ids == continue_densely(model, prompt, own_params), f"seed {seed}"


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_grouped_query_models_run_with_a_smaller_cache(n_kv_head: int) -> None:
    config = GPT2Config(vocab_size=61, n_positions=96, n_embd=64, n_layer=2, n_head=4, n_kv_head=n_kv_head)
    model, prompts = tiny_model(config), random_prompts(random.Random(0), 5)
    llm = tiny_llm(model)
    assert llm.kv_cache.blocks.shape == (2, 2, 40, n_kv_head, 8, 16)
    for output, prompt in zip(llm.generate(prompts, GREEDY), prompts):
        assert output.outputs[0].token_ids == continue_densely(model, prompt, GREEDY)


def test_a_seeded_request_gets_the_same_tokens_alone_and_beside_others() -> None:
    params = SamplingParams(seed=5, max_tokens=20)
    alone = tiny_llm().generate([[1, 2, 3]], params)[0]
    rng = random.Random(1)
    together = tiny_llm(seed=9).generate([*random_prompts(rng, 5), [1, 2, 3]],
                                         [random_params(rng) for _ in range(5)] + [params])
    assert together[-1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_requests_without_a_seed_differ_from_each_other_but_not_from_run_to_run() -> None:
    runs = [[output.outputs[0].token_ids for output in tiny_llm(seed=3).generate([[1, 2]] * 3, SamplingParams())]
            for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1] != runs[0][2]
    assert runs[0] != [o.outputs[0].token_ids for o in tiny_llm(seed=4).generate([[1, 2]] * 3, SamplingParams())]


def test_work_can_be_added_while_other_work_runs() -> None:
    llm = tiny_llm()
    first = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=6))
    seen = [llm.step(), llm.step()]
    second = llm.add_request([4, 5], SamplingParams(temperature=0, max_tokens=2))
    while llm.has_unfinished_requests():
        seen.append(llm.step())
    counts = [{output.request_id: len(output.outputs[0].token_ids) for output in outputs} for outputs in seen]
    assert counts == [{first: 1}, {first: 2}, {first: 3, second: 1}, {first: 4, second: 2}, {first: 5}, {first: 6}]
    assert llm.step() == []


def test_generate_leaves_the_outputs_of_others_to_step() -> None:
    llm = tiny_llm()
    other = llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=2))
    mine = llm.generate([[4, 5]], GREEDY)
    assert [output.request_id for output in mine] != [other]
    assert llm.has_unfinished_requests()
    (output,) = llm.step()
    assert output.request_id == other and output.finished
    params = SamplingParams(temperature=0, max_tokens=2)
    assert output.outputs[0].token_ids == continue_densely(tiny_model(), [1, 2, 3], params)
    assert not llm.has_unfinished_requests()


def test_an_aborted_request_gives_its_blocks_back_and_the_others_go_on() -> None:
    llm = tiny_llm(max_num_seqs=2, enable_prefix_caching=False)
    ids = [llm.add_request([token] * 10, GREEDY) for token in (1, 2, 3)]
    llm.step()
    for victim in (ids[0], ids[2]):  # one that runs, one that waits
        output = llm.abort_request(victim)
        assert output.finished and output.outputs[0].finish_reason == "abort"
        llm.scheduler.check_invariants()
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} == {ids[1]}
    assert outputs[-1].outputs[0].token_ids == continue_densely(tiny_model(), [2] * 10, GREEDY)
    with pytest.raises(ValueError, match=f"no unfinished request has the id '{ids[0]}'"):
        llm.abort_request(ids[0])


def test_the_prompts_of_one_call_may_be_one_text_many_texts_or_ids() -> None:
    llm = tiny_llm(tiny_model(BYTES))
    (one,) = llm.generate("ab", GREEDY)
    many = llm.generate(["ab", [97, 98]], [GREEDY, GREEDY])
    assert one.prompt_token_ids == [97, 98] == many[1].prompt_token_ids
    assert one.outputs[0].token_ids == many[0].outputs[0].token_ids == many[1].outputs[0].token_ids
    assert llm.generate([], GREEDY) == []


def test_a_stop_string_ends_the_text_before_it_and_is_never_shown_in_part() -> None:
    llm = LLM("copycat", device="cpu", num_blocks=64)
    sentence = "The cat sat on the mat and looked at the moon. "
    prompt = sentence + "The cat sat on the mat"
    (plain,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20))
    assert plain.outputs[0].text == " and looked at the m" and plain.outputs[0].finish_reason == "length"
    llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=40, stop=["at the moon", "zebra"]))
    shown = []
    while llm.has_unfinished_requests():
        shown += [(output.outputs[0].text, output.outputs[0].finish_reason) for output in llm.step()]
    assert shown[-1] == (" and looked ", "stop")
    assert all(" and looked ".startswith(text) for text, _ in shown)


def test_the_end_of_text_token_stops_a_request_unless_it_is_ignored() -> None:
    llm = LLM("copycat", device="cpu", num_blocks=64)
    story = list(b"A short story comes to its end here.")
    prompt = [*story, 256, *story[:20]]
    (stopped,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30))
    assert stopped.outputs[0].text == "to its end here." and stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].token_ids[-1] == 256
    (ignored,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert len(ignored.outputs[0].token_ids) == 30 and ignored.outputs[0].token_ids[16] == 256


def test_a_stop_token_id_ends_the_output_and_is_no_text() -> None:
    llm = LLM("copycat", device="cpu", num_blocks=64)
    params = SamplingParams(temperature=0, stop_token_ids=[ord("u")])
    (output,) = llm.generate("one two three four; one two three", params)
    assert output.outputs[0].text == " fo" and output.outputs[0].token_ids == list(b" fou")


def test_a_request_ends_where_the_models_context_ends() -> None:
    llm = tiny_llm(max_model_len=20)
    (output,) = llm.generate([[3] * 15], SamplingParams(temperature=0, max_tokens=50))
    assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].finish_reason == "length"
    full = tiny_llm(num_blocks=12)  # 12 * 8 = 96 positions: the model's context and the pool, to the last slot
    params = SamplingParams(temperature=0, max_tokens=50)
    (output,) = full.generate([[3] * 90], params)
    assert output.outputs[0].token_ids == continue_densely(tiny_model(), [3] * 90, params)


def test_a_prompt_that_is_cached_to_its_last_token_is_answered_again() -> None:
    llm = tiny_llm()
    prompt = [7] * 32  # four whole blocks
    first, second = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids == continue_densely(tiny_model(), prompt, GREEDY)
    assert first.metrics.prefix_hit_tokens == 0 and second.metrics.prefix_hit_tokens == 24


def test_a_reused_block_never_serves_its_former_contents() -> None:
    model = tiny_model()
    llm = tiny_llm(model, num_blocks=6)
    for token in [1, 2, 3, 1, 2, 3]:  # each prompt needs most of the pool, so it overwrites the one before
        prompt = [token] * 30
        (output,) = llm.generate([prompt], GREEDY)
        assert output.outputs[0].token_ids == continue_densely(model, prompt, GREEDY)


def test_the_statistics_are_plain_numbers_that_add_up() -> None:
    llm = tiny_llm(block_size=8)
    ids = [llm.add_request([5] * 20, SamplingParams(temperature=0, max_tokens=3)) for _ in range(2)]
    llm.step()
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 0, 1)
    # 20 tokens each: two full blocks, which turned out equal and are held once, and 4 slots of a third.
    assert (stats.referenced_blocks, stats.shared_blocks) == (4, 2)
    assert (stats.reserved_slots, stats.filled_slots) == (32, 24)
    assert (stats.computed_tokens, stats.prompt_tokens, stats.output_tokens) == (40, 40, 2)
    for request_id in ids:
        llm.abort_request(request_id)
    stats = llm.stats()
    assert (stats.referenced_blocks, stats.cached_blocks, stats.free_blocks, stats.filled_slots) == (0, 2, 38, 0)


def test_the_pool_is_sized_from_free_memory_but_never_larger_than_useful(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_model(), device="cpu", block_size=8, max_num_seqs=3)
    assert llm.stats().num_blocks == 3 * 96 // 8
    ten_blocks = 10 * 2 * 2 * 2 * 8 * 16 * 4
    monkeypatch.setattr("nanopaged.kv_cache.free_bytes", lambda *_: ten_blocks + 1)
    assert LLM(tiny_model(), device="cpu", block_size=8).stats().num_blocks == 10


def test_a_step_on_a_cpu_has_512_tokens_unless_told_otherwise() -> None:
    assert LLM(tiny_model(), device="cpu", num_blocks=4).scheduler.max_num_batched_tokens == 512
    assert LLM(tiny_model(), device="cpu", num_blocks=4, max_num_batched_tokens=7).scheduler.max_num_batched_tokens == 7


def test_the_users_own_model_is_left_as_it_is() -> None:
    model = tiny_model()
    LLM(model, device="cpu", dtype="bfloat16", num_blocks=4)
    assert model.wte.weight.dtype == torch.float32


def test_an_engine_without_references_gives_its_memory_back_at_once() -> None:
    gc.disable()  # on a GPU the next engine's pool would find no room if this had to wait for the collector
    try:
        llm = tiny_llm()
        llm.generate([[1, 2, 3]], GREEDY)
        left = [weakref.ref(thing) for thing in (llm, llm.model, llm.kv_cache.blocks)]
        del llm
        assert [ref() for ref in left] == [None] * 3
    finally:
        gc.enable()


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    llm = tiny_llm()
    llm.generate([[1]], GREEDY)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate([[1]], GREEDY)
    captured = capsys.readouterr()
    assert "0 of 1 continuations" in captured.err and captured.out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_copycat_is_right_on_a_gpu_under_pressure(dtype: str) -> None:
    from train_free_demo import story_jobs

    jobs = story_jobs(24, 32, seed=1)
    llm = LLM("copycat", device="cuda", dtype=dtype, num_blocks=180)
    outputs = llm.generate([job.prompt for job in jobs], SamplingParams(temperature=0, max_tokens=32))
    assert [output.outputs[0].text for output in outputs] == [job.expected for job in jobs]
    assert llm.stats().num_preemptions > 0


def test_copycats_config_is_what_the_engine_serves() -> None:
    llm = LLM(device="cpu", num_blocks=4)
    assert llm.model.config == COPYCAT_CONFIG and llm.device.type == "cpu" and llm.dtype == torch.float32
