"""`python -m nanopaged.bench kernel`, on shapes so small that its times mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanopaged.bench import kernel
from nanopaged.bench.__main__ import main
from nanopaged.paged_attention import choice_for


def test_the_given_shapes_are_timed_and_compared_with_contiguous_attention_and_a_copy(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_kernel_with_wrong_results_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanopaged.bench.timing.CACHE_BYTES", 1)
    wrong = kernel.TORCH._replace(paged_attention=lambda q, *rest: q * 0)
    with pytest.raises(RuntimeError, match="paged and contiguous attention differ by"):
        kernel.measure(kernel.Shape(2, 1, 20, 2, 2, 16, "float32"), 16, wrong, torch.device("cpu"), 1e9)


def test_each_shape_is_tuned_and_what_was_found_is_printed_and_kept(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanopaged.bench.timing.CACHE_BYTES", 1)
    monkeypatch.setattr("nanopaged.bench.tune.ALTERNATIVES", {"tile_kv": (32,), "programs": (8,)})
    monkeypatch.setattr("nanopaged.bench.tune.seconds", lambda calls, device: float(calls[1]().isfinite().all()))
    file = tmp_path / "figures.json"
    decodes, prompt = "3,1,20,2,1,16,float32", "1,3,20,2,2,16,float16"
    assert main(["kernel", "--tune", f"--shape={decodes}", f"--shape={prompt}", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert [list(map(str, tuned["shape"].values())) for tuned in figures["tuned"]] == [decodes.split(","),
                                                                                      prompt.split(",")]
    assert [len(tuned["trials"]) for tuned in figures["tuned"]] == [3, 2]  # a prompt's context is not split
    for tuned, kernel_name, element_bytes in zip(figures["tuned"], ("decode", "prompt"), (4, 2)):
        assert tuned["present"]["choice"] == choice_for(kernel_name, 16, element_bytes)._asdict()
        assert tuned["best"] == tuned["present"] == tuned["trials"][0] and tuned["complete"]
        assert not any(trial["problem"] for trial in tuned["trials"])
    assert "best / present" in capsys.readouterr().out


def test_shapes_for_which_no_time_is_left_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", "--tune", "0", "--shape=3,1,20,2,1,16,float32"]) == 0
    assert "Left out, after 0 s: Shape(requests=3," in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu_or_the_interpreter_and_a_shape(capsys: pytest.CaptureFixture[str],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["kernel", "--tune"]) == 2
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    assert main(["kernel", "--tune", "--shape=3,1,20,2,1,16,float32"]) == 2
    assert capsys.readouterr().err.count("--tune times the Triton kernels, and torch sees no CUDA device") == 2


@pytest.mark.parametrize("arguments", [
    ["--shape", "8,1,1024"], ["--shape", "8,1,1024,12,12,64,int8"], ["--shape", "8,1,1024,12,5,64,float32"],
    ["--shape", "8,9,8,12,12,64,float32"], ["--tune", "-1"], ["--block-size", "4"], ["--json", "no/such/folder"]])
def test_bad_arguments_get_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernel", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m nanopaged.bench kernel") and error.count("\n") == 1 and arguments[1] in error


@pytest.mark.gpu
def test_a_gpu_is_tuned(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main(["kernel", "--tune", "20", "--shape=8,1,1024,12,12,64,float16", "--json", str(file)]) == 0
    (tuned,) = json.loads(file.read_text())["figures"]["tuned"]
    assert len(tuned["trials"]) > 5 and not tuned["trials"][1]["problem"]


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    shapes = ["--shape=8,1,300,12,4,64,float16", "--shape=1,1,5000,12,12,64,float16"]
    assert main(["kernel", *shapes, "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["figures"]["timings"]) == 2, "one that fails is left out"
