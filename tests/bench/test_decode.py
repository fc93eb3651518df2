"""`python -m nanopaged.bench decode`, on shapes so small that its times mean nothing."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanopaged.bench import decode
from nanopaged.bench.__main__ import main


def test_decode_steps_are_timed_and_compared_with_their_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "NUM_STEPS", 1)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e9)
    file = tmp_path / "figures.json"
    assert main(["decode", "--requests=2", "--context=64", "--layers=1", "--dtype=float32", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    (timing,) = figures["timings"]
    weights = 4 * (50257 * 768 + 12 * 768 * 768 + 13 * 768 + 2 * 768)
    assert timing["floor_s"] == pytest.approx((weights + 2 * timing["context"] * 2 * 768 * 4) / 1e9)
    assert 60 < timing["context"] < 68 and timing["eager_s"] > 0


@pytest.mark.parametrize("graphs_s", [1.0, None])
def test_cuda_graphs_are_timed_if_their_folder_is_there(graphs_s: float | None,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, stub in {
            "triton": object(), "has_folder": lambda name: graphs_s is not None, "device_name": lambda device: "a GPU",
            "copy_bandwidth": lambda device: 1e9,
            "LLM": lambda model, enforce_eager, **options: SimpleNamespace(model=model, dtype=torch.float16,
                                                                           eager=enforce_eager),
            "step_seconds": lambda llm, *rest: (2.0 if llm.eager else 1.0, 64.0)}.items():
        monkeypatch.setattr(decode, name, stub)
    (timing,) = decode.run(Namespace(requests=[2], context=64, layers=1, dtype=None))["timings"]
    assert (timing["eager_s"], timing["graphs_s"]) == (2.0, graphs_s)


@pytest.mark.parametrize("arguments", [["--requests", "0"], ["--context", "1000"], ["--layers", "0"]])
def test_bad_arguments_get_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench decode") and error.count("\n") == 1 and arguments[1] in error


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu_with_cuda_graphs_and_without(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["decode", "--requests=3", "--context=100", "--layers=2", "--json", str(file)]) == 0
    (timing,) = json.loads(file.read_text())["figures"]["timings"]
    assert timing["eager_s"] > 0 and timing["graphs_s"] > 0
