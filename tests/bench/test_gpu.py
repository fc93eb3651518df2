"""`python -m nanopaged.bench gpu`, which needs one; here its parts are small programs."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train_free_demo
from nanopaged.bench import gpu
from nanopaged.bench.__main__ import main
from nanopaged.bench.gpu import Part

WRITES = ("-c", "import json, sys; json.dump({'figures': sys.argv[1]}, open(sys.argv[-1], 'w'))", "left: {seconds}")


@pytest.fixture
def has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "triton", object())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_parts_that_fail_or_take_too_long_cost_no_other_part_its_figures(
        tmp_path: Path, has_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = tmp_path / "demo.py"
    demo.write_text("print('31/32 continuations match the document')\nraise SystemExit(1)\n")
    monkeypatch.setattr(gpu, "START_S", 0.1)
    monkeypatch.setattr(gpu, "PARTS", [
        Part("fails", ("-c", "raise SystemExit(3)"), 30), Part("answers", (str(demo),), 30),
        Part("hangs", ("-c", "import time; time.sleep(60)"), 0.2), Part("works", WRITES, 30.1),
        Part("late", WRITES, 0.05)])
    file = tmp_path / "figures.json"
    start = time.monotonic()
    assert main(["gpu", "--json", str(file)]) == 0
    assert time.monotonic() - start < 30, "the part that hangs was waited for"
    figures = json.loads(file.read_text())["figures"]
    assert figures["works"] == "left: 30"
    assert figures["answers"] == {"right": 31, "of": 32, "printed": ["31/32 continuations match the document"]}
    assert figures["problems"] == {"fails": "ended with status 3 and no figures", "hangs": "stopped after 0 s",
                                   "late": "left out: 0 s of 460 were left"}
    assert "without figures: fails, hangs, late" in capsys.readouterr().out


def test_figures_are_written_after_each_part(tmp_path: Path, has_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    kept = ("-c", f"import json, shutil, sys; shutil.copy({str(file)!r}, {str(tmp_path / 'before')!r})")
    monkeypatch.setattr(gpu, "PARTS", [Part("first", WRITES, 30.0), Part("second", kept, 30.0)])
    gpu.run(Namespace(json=str(file)))
    assert json.loads((tmp_path / "before").read_text())["figures"]["first"] == "left: 0"


def test_all_parts_are_commands_that_exist_and_end_in_8_minutes() -> None:
    assert [part.name for part in gpu.PARTS] == ["story", "storm", "kernel", "decode", "peers", "tune"]
    for part in gpu.PARTS:
        words = [word.replace("{seconds}", "60") for word in part.words]
        if part.is_demo:
            parser, words = train_free_demo.make_parser(), words[1:]
        else:
            module = importlib.import_module(f"nanopaged.bench.{words[2]}")
            parser, words = argparse.ArgumentParser(), words[3:]
            module.add_arguments(parser)
        parser.parse_args(words)  # ends the process, if an option is unknown
    *others, last = (part.at_most_s for part in gpu.PARTS)
    assert sum(others) + gpu.START_S + 30 <= gpu.LIMIT_S <= 470, "there is a minute for the last, and all are done in 8"
    assert last - gpu.START_S <= 300
