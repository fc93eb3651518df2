"""`python -m nanopaged.bench peers`: one checkpoint for all engines, a process for each, and what the command says."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopaged.bench import peers
from nanopaged.bench.__main__ import main
from nanopaged.bench.engine import Workload
from nanopaged.bench.inputs import random_gpt2
from nanopaged.models.checkpoint import load_model

TINY = ["peers", "--requests", "2", "--layers", "1", "--width", "64", "--max-prompt", "16", "--max-output", "4"]
WORK = Workload.mixed(2, 16, 4, seed=0)
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
print("noise")
turns = pathlib.Path(sys.argv[0] + ".turns")
turns.write_text((turns.read_text() if turns.exists() else "") + sys.argv[3] + " ")
given = json.load(open("requests.json"))
if sys.argv[3] == "static":
    sys.exit("no room left")
result = {{"seconds": 100.0 * len(turns.read_text().split()), "versions": {{"transformers": "9"}},
          "outputs": [[-1] * length for length in given["output_lens"]]}}
json.dump({{"missing": "vllm"}} if sys.argv[3] == "vllm" else result, open("result.json", "w"))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that serves nothing: transformers takes 100 s times its turn, its static batch fails."""
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def run_peer(folder: Path, script: str, limit_s: float = 60.0) -> dict[str, object]:
    return peers.run_peer([sys.executable, "-c", script], folder, limit_s, "an engine")


def test_the_checkpoint_holds_the_same_model(tmp_path: Path) -> None:
    model = random_gpt2(layers=1, width=64, seed=0)
    peers.write_checkpoint(model, tmp_path)
    loaded = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert loaded.config.n_head == 1 and loaded.config.eos_token_id is None


@pytest.mark.parametrize("package", ["transformers", "vllm"])
def test_a_package_that_is_not_installed_is_named_and_how_to_get_it(package: str, tmp_path: Path) -> None:
    with pytest.raises(peers.NotInstalled, match=f"^not installed: pip install {package}"):
        run_peer(tmp_path, f"open('result.json', 'w').write('{{\"missing\": \"{package}\"}}')")


def test_the_command_compares_the_engines_that_run_and_says_why_the_others_do_not(
        stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*TINY, "--only", "vllm", "static", "continuous", "paged", "--json", str(file),
                 "--python", f"transformers={stand_in}", "--python", f"vllm={stand_in}"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(file.read_text())["figures"]
    paged, continuous = figures["engines"].values()
    assert list(figures["engines"]) == ["paged", "continuous"]  # ours first
    assert continuous["tokens_per_s"] == WORK.output_tokens / 100
    assert continuous["times"] == 100 / paged["seconds"] and continuous["same_tokens"] == 0
    assert paged["times"] == paged["same_tokens"] == 1
    assert figures["problems"]["static"] == "transformers, static batch: ended with status 1: no room left"
    assert figures["problems"]["vllm"].startswith("vllm: not installed: pip install vllm")
    assert all(line in printed for line in (*figures["problems"].values(), "tokens/s", "transformers 9"))
    assert "noise" not in printed


def test_the_engines_run_in_turn_and_the_median_counts(stand_in: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main([*TINY, "--rounds", "3", "--only", "paged", "static", "continuous", "--json", str(file),
                 "--python", f"transformers={stand_in}", "--python", f"nanopaged={stand_in}"]) == 0
    turns = (tmp_path / "python.turns").read_text().split()
    assert turns == ["paged", "continuous", "static", "paged", "continuous", "paged", "continuous"]
    figures = json.loads(file.read_text())["figures"]["engines"]
    assert figures["continuous"]["round_seconds"] == [200, 500, 700] and figures["continuous"]["seconds"] == 500
    assert figures["continuous"]["times"] == 500 / 400


def test_an_engine_that_fails_gives_its_error(tmp_path: Path) -> None:
    with pytest.raises(peers.PeerError, match="^failed: ValueError: too small$"):
        run_peer(tmp_path, "open('result.json', 'w').write('{\"error\": \"ValueError: too small\"}')")
    with pytest.raises(peers.PeerError, match="^ended with status 3: no output$"):  # the old result does not count
        run_peer(tmp_path, "raise SystemExit(3)")


def test_an_engine_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    kill = peers._kill
    monkeypatch.setattr(peers, "_kill", lambda process: (started.append(process), kill(process)))
    with pytest.raises(peers.PeerError, match="not done after 0.1 s: see --limit"):
        run_peer(tmp_path, "import time; time.sleep(30)", limit_s=0.1)
    assert started[0].returncode < 0  # by a signal


def test_an_interrupt_ends_the_engine_and_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)  # at its end once no writer is left

    def interrupt(line: str) -> None:
        if select.select([reader], [], [], 0)[0] and os.read(reader, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(peers, "show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        peers.run_peer(["sh", "-c", "(echo x; exec sleep 60) > alive & wait"], tmp_path, 60, "an engine")
    os.read(reader, 1)  # the end of the line
    assert select.select([reader], [], [], 10)[0] and os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("arguments, message", [
    (["--requests", "0"], "--requests must be at least 1"),
    (["--max-output", "0"], "--max-output must be at least 1"),
    (["--max-prompt", "1021"], "1024 tokens together, got 1025"),
    (["--width", "100"], "multiple of 64, got 100"),
    (["--limit", "-1"], "--limit must be at least 0"),
    (["--python", "vlm=python3"], "one of nanopaged, transformers, vllm, then = and an interpreter that is there"),
    (["--python", "vllm=no/such/python"], "got 'vllm=no/such/python'"),
])
def test_bad_arguments_get_one_line_and_status_2(arguments: list[str], message: str,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
