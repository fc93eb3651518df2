"""`python -m nanopaged.bench cost`: what its equations say, and that it finds their solution."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.oracle import tiny_model
from tests.test_engine import tiny_llm

from nanopaged import SamplingParams
from nanopaged.bench import cost as cost_bench
from nanopaged.bench.__main__ import main


def test_the_cost_of_a_step_is_recovered_from_steps_of_a_known_cost(monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """In every second round the machine is busy with something else."""
    rounds = count()

    def equations_of(llm: object, rng: random.Random, batch_size: int) -> list[cost_bench.Equation]:
        busy = 1 + next(rounds) // len(cost_bench.BATCH_SIZES) % 2
        sizes = [(rng.randint(1, 500), rng.randint(500, 9000)) for _ in range(9)]
        return [(1.0, n, context, busy * (0.05 + 0.004 * n + 3e-5 * context)) for n, context in sizes]

    monkeypatch.setattr(cost_bench, "equations_of", equations_of)
    monkeypatch.setattr(cost_bench, "LLM", lambda *args, **options: SimpleNamespace(device="cpu"))
    figures = cost_bench.run(Namespace(layers=1, device="cpu", rounds=4, seed=0))
    assert [figures["fixed_s"], figures["per_token_s"], figures["per_kv_token_s"]] == pytest.approx([0.05, 0.004, 3e-5])
    assert figures["median_relative_error"] < 1e-6 and "50,000" in capsys.readouterr().out


def test_there_is_an_equation_for_each_step_of_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, prompts = tiny_llm(max_num_batched_tokens=1000), []
    add_request = llm.add_request

    def remember(prompt: list[int], params: SamplingParams) -> str:
        prompts.append(prompt)
        return add_request(prompt, params)

    monkeypatch.setattr(llm, "add_request", remember)
    equations = cost_bench.equations_of(llm, random.Random(1), 3)
    tokens = sum(map(len, prompts))
    assert len(prompts) == 3 and len({len(prompt) for prompt in prompts}) > 1
    # All prompts in the first step; then a token of each, until each has OUTPUT_TOKENS.
    assert [equation[:3] for equation in equations] == [
        (1.0, tokens, tokens), *((1.0, 3, tokens + 3 * i) for i in range(1, cost_bench.OUTPUT_TOKENS))]
    assert all(seconds > 0 for *_, seconds in equations)
    assert not llm.has_unfinished_requests()


def test_the_command_prints_and_writes_three_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cost_bench, "random_gpt2", lambda layers, seed: tiny_model())
    path = tmp_path / "figures.json"
    assert main(["cost", "--device=cpu", "--rounds=2", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert figures["device"] == "cpu" and figures["steps"] >= len(cost_bench.BATCH_SIZES) * cost_bench.OUTPUT_TOKENS
    assert {"fixed_s", "per_token_s", "per_kv_token_s"} <= set(figures)
    assert "| each token of context read | " in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--rounds", "0"], "rounds must be at least 1"), (["--layers", "0"], "n_layer must be at least 1"),
    (["--layers", "1", "--device", "gpu"], "device must be"), (["--seed", "-1"], "seed must be from 0")])
def test_bad_arguments_get_one_line_and_status_2(arguments: list[str], message: str,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench cost: error: ") and message in error and error.count("\n") == 1
