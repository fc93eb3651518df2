"""How every measuring command shows its figures, keeps them, and reports mistakes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_taken_for_a_mistake_of_the_user() -> None:
    def broken(args: argparse.Namespace) -> dict[str, object]:
        raise RuntimeError("kernels differ")

    with pytest.raises(RuntimeError, match="kernels differ"):
        command(broken)
