"""`python -m nanopaged.bench engine`: its workload, its floor, and what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanopaged import LLM
from nanopaged.bench import engine as engine_bench
from nanopaged.bench.__main__ import main
from nanopaged.bench.engine import Floor, Workload
from nanopaged.bench.timing import StepSize
from nanopaged.gpt2 import GPT2, GPT2Config

TINY = ["engine", "--layers", "1", "--width", "64", "--max-prompt", "24", "--max-output", "8", "--no-compile"]


def test_a_workload_depends_on_its_seed_alone_and_keeps_its_bounds() -> None:
    work = Workload.mixed(50, 256, 128, seed=1, prefix_len=4)
    assert work == Workload.mixed(50, 256, 128, seed=1, prefix_len=4)
    assert work != Workload.mixed(50, 256, 128, seed=2, prefix_len=4)
    assert all(4 + 16 <= len(prompt) <= 4 + 256 and prompt[:4] == work.prompts[0][:4] for prompt in work.prompts)
    assert all(16 <= length <= 128 for length in work.output_lens)


def test_a_sample_of_a_workload_is_spread_over_its_lengths() -> None:
    work = Workload([[0] * n for n in range(1, 9)], [1] * 8)
    assert sorted(len(prompt) for prompt in work.sample(4).prompts) == [2, 4, 6, 8]
    assert len(work.sample(20).prompts) == 8


def test_the_command_compares_the_engine_with_its_floor_and_the_baselines(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*TINY, "--requests", "3", "6", "--json", str(file)]) == 0
    kept = json.loads(file.read_text())
    assert kept["arguments"]["requests"] == [3, 6] and kept["figures"]["threads"] == torch.get_num_threads()
    for run, count in zip(kept["figures"]["runs"], (3, 6), strict=True):
        work = Workload.mixed(count, 24, 8, seed=0)
        assert run["output_tokens"] == work.output_tokens
        assert run["paged"]["share_of_floor"] == run["paged"]["floor_seconds"] / run["paged"]["seconds"] > 0
        assert run["paged"]["steps"] == max(work.output_lens)  # all prompts fit the first step
        longest = max(map(len, work.prompts)) + max(work.output_lens) - 1
        batches = -(-count // (run["paged"]["kv_tokens"] // longest))  # the fewest that the same memory allows
        assert run["static"]["seats"] == -(-count // batches)
        assert 0 < run["static"]["kv_mib"] <= run["paged"]["kv_mib"]
    printed = capsys.readouterr().out
    assert "3 requests" in printed and "6 requests" in printed
    for word in ("the floor", "paged", "static, ", "one at a time", "tokens/s", "KV MiB"):
        assert word in printed


def test_static_batches_run_on_the_same_modules_as_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, GPT2] = {}
    generate_static, step = engine_bench.generate_static, LLM.step

    def static(model: GPT2, *rest: object) -> list[list[int]]:
        models["static"] = model
        return generate_static(model, *rest)

    def paged(llm: LLM) -> list[object]:
        models["paged"] = llm.model
        return step(llm)

    monkeypatch.setattr(engine_bench, "generate_static", static)
    monkeypatch.setattr(LLM, "step", paged)
    assert main([*TINY, "--requests", "2"]) == 0
    static_modules, paged_modules = (list(map(type, model.modules())) for model in (models["static"], models["paged"]))
    assert static_modules == paged_modules
    assert models["static"].head.func is models["paged"].head.func


def test_the_floor_is_made_of_the_matrix_products_of_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, int]] = []

    def project(x: torch.Tensor, weight: torch.Tensor) -> None:
        products.append((len(x), len(weight)))

    monkeypatch.setattr("nanopaged.bench.engine.project", project)
    assert main([*TINY, "--requests", "1"]) == 0
    work = Workload.mixed(1, 24, 8, seed=0)
    decodes = work.output_lens[0] - 1
    prompt = -(-len(work.prompts[0]) // 8) * 8  # padded, which is not timed
    steps = [prompt] + [1] * (1 + decodes // 2)  # of the decodes the first, and then every other one
    assert products == [product for rows in steps
                        for product in ((rows, 192), (rows, 64), (rows, 256), (rows, 64), (1, GPT2Config.vocab_size))]


def test_the_command_predicts_what_sharing_a_prefix_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*TINY, "--requests", "6", "--shared-prefix", "512", "--json", str(file)]) == 0
    run, = json.loads(file.read_text())["figures"]["shared_prefix"]
    prompts = Workload.mixed(6, 24, 8, seed=0, prefix_len=512).prompts
    assert run["computed_off"] == sum(map(len, prompts))
    # The first step computes 512 tokens of the first request, and the other five find them.
    assert run["computed_on"] == sum(map(len, prompts)) - 5 * 512
    assert run["predicted"] == run["computed_off"] / run["computed_on"]
    assert "predict" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--requests", "0"], "--requests must be at least 1"),
    (["--width", "65"], "multiple of 64"),
    (["--seed", str(2**63)], "seed must be from 0 to 9223372036854775807"),
    (["--shared-prefix", "1000"], "1024 tokens together"),
    (["--max-output", "0"], "--max-output must be at least 1"),
])
def test_bad_arguments_get_one_line_and_status_2(arguments: list[str], message: str,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_floor_counts_the_products_of_prompts_attention_at_the_speed_of_the_others(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT2(GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=1))
    monkeypatch.setattr(Floor, "_read_speed", staticmethod(lambda: 1e9))
    monkeypatch.setattr(Floor, "_products", lambda self, rows, sampled: 3.0)
    floor = Floor(model)
    read = 20 * floor.kv_token_bytes / 1e9
    assert floor.seconds(StepSize(10, 1, 20, scores=0), 0) == 3.0 + read
    others = 10 * 2 * 12 * 64 * 64 + 100 * 64  # rows times weights; attention: scores, 2 products, layers, width
    attention = 55 * 2 * 2 * 64
    assert floor.seconds(StepSize(10, 1, 20, scores=55), 0) == pytest.approx(3.0 * (1 + attention / others) + read)
