"""The measuring commands of attention and of decode steps, on shapes so small that their figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanopaged.bench import decode, kernel
from nanopaged.bench.__main__ import main


def test_the_kernel_command_times_the_given_shapes_beside_contiguous_attention_and_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanopaged.bench.timing.CACHE_BYTES", 1)
    monkeypatch.setattr(kernel, "copy_bandwidth", lambda device: 1e9)
    file = tmp_path / "figures.json"
    shapes = ["3,1,20,2,1,16,float32", "2,7,20,2,2,16,float32", "1,9,9,2,1,16,float32"]
    assert main(["kernel", "--json", str(file), *(f"--shape={shape}" for shape in shapes)]) == 0
    figures = json.loads(file.read_text())["figures"]
    timings = figures["timings"]
    assert [list(map(str, timing["shape"].values())) for timing in timings] == [shape.split(",") for shape in shapes]
    assert timings[0]["share"] == pytest.approx(2 * 3 * 20 * 16 * 4 / timings[0]["paged_s"] / 1e9)
    printed = capsys.readouterr().out
    assert "paged / contiguous" in printed and ("no CUDA device" in printed) == (not torch.cuda.is_available())


def test_a_kernel_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanopaged.bench.timing.CACHE_BYTES", 1)
    wrong = kernel.TORCH._replace(paged_attention=lambda q, *rest: q * 0)
    with pytest.raises(RuntimeError, match="paged and contiguous attention differ by"):
        kernel.measure(kernel.Shape(2, 1, 20, 2, 2, 16, "float32"), 16, wrong, torch.device("cpu"), 1e9)


@pytest.mark.parametrize("arguments", [
    ["kernel", "--shape", "8,1,1024"], ["kernel", "--shape", "8,1,1024,12,12,64,int8"],
    ["kernel", "--shape", "8,1,1024,12,5,64,float32"], ["kernel", "--shape", "8,9,8,12,12,64,float32"],
    ["kernel", "--block-size", "4"], ["decode", "--requests", "0"], ["decode", "--context", "1000"],
    ["decode", "--layers", "0"], ["kernel", "--json", "no/such/folder"],
])
def test_what_cannot_be_measured_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench") and error.count("\n") == 1 and arguments[2] in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_command_says_that_there_is_none(capsys: pytest.CaptureFixture) -> None:
    assert main(["gpu"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_decode_command_times_steps_beside_their_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "NUM_STEPS", 1)
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e9)
    file = tmp_path / "figures.json"
    assert main(["decode", "--requests=2", "--context=64", "--layers=1", "--dtype=float32", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    (timing,) = figures["timings"]
    weights = 4 * (50257 * 768 + 12 * 768 * 768 + 13 * 768 + 2 * 768)
    assert timing["floor_s"] == pytest.approx((weights + 2 * timing["context"] * 2 * 768 * 4) / 1e9)
    assert 60 < timing["context"] < 68 and timing["eager_s"] > 0


@pytest.mark.gpu
def test_both_commands_run_on_a_gpu() -> None:
    assert main(["kernel", "--shape=8,1,300,12,4,64,float16", "--shape=1,1,5000,12,12,64,float16"]) == 0
    assert main(["decode", "--requests=3", "--context=100", "--layers=2"]) == 0
