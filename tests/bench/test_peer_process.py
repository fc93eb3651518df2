"""What the process of one engine does: warm up, serve the requests, write result.json."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from nanopaged import LLM, SamplingParams
from nanopaged.bench import peer_process
from nanopaged.bench.engine import Workload
from nanopaged.bench.inputs import random_gpt2
from nanopaged.bench.peers import write_checkpoint
from nanopaged.gpt2 import GPT2

WORK = Workload.mixed(2, 16, 4, seed=0)


@pytest.fixture
def model() -> GPT2:
    return random_gpt2(layers=1, width=64, seed=0)


@pytest.fixture
def folder(model: GPT2, tmp_path: Path) -> Path:
    write_checkpoint(model, tmp_path)
    requests = {"prompts": WORK.prompts, "output_lens": WORK.output_lens, "device": "cpu", "dtype": "float32",
                "vocab_size": model.config.vocab_size}
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    return tmp_path


def test_paged_gives_the_tokens_that_the_model_gives(model: GPT2, folder: Path) -> None:
    result = peer_process.measure("paged", folder)
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in WORK.output_lens]
    outputs = LLM(model, device="cpu").generate(WORK.prompts, params)
    assert result["outputs"] == [list(output.outputs[0].token_ids) for output in outputs]
    assert result["seconds"] > 0 and result["versions"]["torch"] == torch.__version__


def test_an_engine_warms_up_on_other_tokens_and_must_give_all_that_were_asked_for(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[list[list[int]], list[int]]] = []

    def serve(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        served.append((prompts, lengths))
        return [[0] * (length - 1) for length in lengths]

    monkeypatch.setitem(peer_process.ENGINES, "paged", lambda *_: serve)
    peer_process.main("paged", str(folder))
    (others, few), timed = served
    assert timed == (WORK.prompts, WORK.output_lens) and max(few) <= 2
    assert all(len(other) == len(prompt) and other[0] != prompt[0] for other, prompt in zip(others, WORK.prompts))
    error, total = json.loads((folder / "result.json").read_text())["error"], sum(WORK.output_lens)
    assert error.startswith(f"RuntimeError: gave {total - 2} output tokens in 2 requests, not the {total} in 2 that")


@pytest.mark.parametrize("engine, package", [("continuous", "transformers"), ("static", "transformers"),
                                             ("vllm", "vllm")])
def test_an_engine_whose_package_is_not_installed_says_which(engine: str, package: str, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    peer_process.main(engine, str(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text()) == {"missing": package}
