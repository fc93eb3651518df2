"""How every measuring command shows its figures, keeps them, and reports mistakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes import HEED_SIGINT, ROOT, RUN
from tests.terminal import in_terminal

from nanopaged import report
from nanopaged.report import environment, table


def command(run: Callable[[argparse.Namespace], dict[str, object]], *arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="measure")
    parser.add_argument("--size", type=int, default=3)
    return report.main(parser, run, arguments)


def fail(args: argparse.Namespace) -> dict[str, object]:
    raise ValueError(f"size must be odd, got {args.size}")


def test_a_table_aligns_words_to_the_left_and_figures_to_the_right() -> None:
    assert table(["name", "n"], [["a", 1234], ["long", None]]) == (
        "| name |     n |\n"
        "|------|------:|\n"
        "| a    | 1,234 |\n"
        "| long |     - |")


@pytest.mark.parametrize("value, shown", [
    (None, "-"), ("50%", "50%"), (1234567, "1,234,567"), (12345.6, "12,346"), (100.4, "100"), (12.345, "12.3"),
    (0.0012345, "0.00123"), (-250.6, "-251")])
def test_floats_have_three_digits_or_all_before_the_point(value: object, shown: str) -> None:
    assert table(["x"], [[value]]).splitlines()[-1].strip("| ") == shown


def test_figures_are_written_with_arguments_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert command(lambda args: {"twice": 2 * args.size}, "--size", "4", "--json", str(path)) == 0
    written = json.loads(path.read_text())
    assert written["figures"] == {"twice": 8} and written["arguments"] == {"size": 4, "json": str(path)}
    assert written["environment"]["versions"]["python"] and written["environment"].keys() == environment().keys()


def test_without_json_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(lambda args: {}) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(fail) == 2
    assert capsys.readouterr() == ("", "measure: error: size must be odd, got 3\n")


@pytest.mark.parametrize("before", [None, "figures of another run"])
def test_a_run_that_fails_leaves_the_file_as_it_was(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    assert command(fail, "--json", str(path)) == 2
    assert (path.read_text() if path.exists() else None) == before


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_measured(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert command(lambda args: pytest.fail("it was measured"), "--json", "no/such/folder/file") == 2
    error = capsys.readouterr().err
    assert "no/such/folder/file" in error and error.count("\n") == 1


def test_an_interrupt_ends_with_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: argparse.Namespace) -> dict[str, object]:
        raise KeyboardInterrupt

    assert command(interrupted) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


BENCH = ("-m", "nanopaged.bench")
UNDER_WAY = {  # name: (command, what it writes once it is at work); `bench gpu` is `kernel` and `decode`
    "demo": (("train_free_demo.py",), "step 1: "), "simulate": (("-m", "nanopaged.simulate"), "% done"),
    "kernel": ((*BENCH, "kernel"), "0 of 6 shapes"), "codegen": ((*BENCH, "codegen"), "compiling for "),
    "decode": ((*BENCH, "decode", "--requests=8", "--layers=4"), "8 requests, "),
    "scheduler": ((*BENCH, "scheduler"), "round 1 of 9"), "cost": ((*BENCH, "cost", "--layers=2"), "round 1 of 3"),
    "engine": ((*BENCH, "engine", "--layers=2"), "one request at a time: 1 of ")}


@pytest.mark.parametrize("name", UNDER_WAY)
def test_ctrl_c_ends_every_command_with_one_line_and_a_clear_terminal(name: str,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "codegen":
        pytest.importorskip("triton", reason="there is no Triton on this system")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command, sign = UNDER_WAY[name]
    status, written = in_terminal(*command, ctrl_c_at=sign)
    assert status == 130 and written.endswith("\r\x1b[Kinterrupted\r\n") and "Traceback" not in written, written


SWALLOWS_CTRL_C = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
"""


@pytest.mark.parametrize("arguments", [["train_free_demo.py"], ["-m", "nanopaged.bench", "cost"]],
                         ids=lambda arguments: arguments[-1])
def test_an_interrupt_that_torch_would_swallow_while_it_is_imported_ends_the_command(arguments: list[str],
                                                                                     tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SWALLOWS_CTRL_C)
    paths = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", HEED_SIGINT + RUN, *arguments], cwd=ROOT, env=paths,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_bug_is_not_taken_for_a_mistake_of_the_user() -> None:
    def broken(args: argparse.Namespace) -> dict[str, object]:
        raise RuntimeError("kernels differ")

    with pytest.raises(RuntimeError, match="kernels differ"):
        command(broken)
