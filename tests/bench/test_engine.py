"""`python -m nanopaged.bench engine`: its baseline, its floor, and what it prints and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.oracle import continue_densely, tiny_model

from nanopaged import SamplingParams
from nanopaged.bench.__main__ import main
from nanopaged.bench.engine import Workload
from nanopaged.bench.static_batch import generate_static, static_cache, static_cache_tokens
from nanopaged.gpt2 import GPT2Config

TINY = ["engine", "--layers", "1", "--width", "64", "--max-prompt", "24", "--max-output", "8", "--no-compile"]


@pytest.mark.parametrize("prefill_rows", [1, 26, 1000])
@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_a_static_batch_gives_each_request_the_tokens_of_the_dense_model(prefill_rows: int, n_kv_head: int) -> None:
    model = tiny_model(GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2, n_kv_head=n_kv_head))
    prompts = [[1], [7, 3, 9, 60, 2], list(range(13)), [5, 5, 5]]
    output_lens = [9, 1, 20, 4]
    outputs = generate_static(model, prompts, output_lens, static_cache(model, prompts, output_lens), prefill_rows)
    assert outputs == [continue_densely(model, prompt, SamplingParams(temperature=0.0, max_tokens=length))
                       for prompt, length in zip(prompts, output_lens)]


def test_a_static_batch_takes_memory_for_each_request_at_the_longest() -> None:
    prompts, output_lens = [[1] * 3, [1] * 10], [7, 2]
    assert static_cache_tokens(prompts, output_lens) == 2 * (10 + 7 - 1)
    model = tiny_model(GPT2Config(vocab_size=61, n_positions=96, n_embd=32, n_layer=2, n_head=2, n_kv_head=1))
    assert static_cache(model, prompts, output_lens).shape == (2, 2, 2, 1, 16, 16)


def test_the_workload_is_the_same_for_the_same_seed_and_within_its_bounds() -> None:
    work = Workload.mixed(50, 256, 128, seed=1, prefix_len=4)
    assert work == Workload.mixed(50, 256, 128, seed=1, prefix_len=4)
    assert work != Workload.mixed(50, 256, 128, seed=2, prefix_len=4)
    assert all(4 + 16 <= len(prompt) <= 4 + 256 and prompt[:4] == work.prompts[0][:4] for prompt in work.prompts)
    assert all(16 <= length <= 128 for length in work.output_lens)


def test_a_sample_of_the_workload_is_spread_over_its_lengths() -> None:
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


def test_the_floor_is_made_of_the_matrix_products_of_the_very_step(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, int]] = []

    def project(x: torch.Tensor, weight: torch.Tensor) -> None:
        products.append((len(x), len(weight)))

    monkeypatch.setattr("nanopaged.bench.engine.project", project)
    assert main([*TINY, "--requests", "1"]) == 0
    work = Workload.mixed(1, 24, 8, seed=0)
    decodes = work.output_lens[0] - 1
    prompt = -(-len(work.prompts[0]) // 8) * 8  # as it is padded, which is not timed
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
