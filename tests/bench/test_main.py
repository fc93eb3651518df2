"""`python -m nanopaged.bench`: its list of commands, unknown commands, and commands that need a deleted folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.processes import run_python

from nanopaged.bench import __main__ as bench

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> int:
    """The status; argparse exits instead of returning it."""
    try:
        return bench.main(arguments)
    except SystemExit as end:
        return int(end.code)


def copy_without(folder: Path, *names: str) -> None:
    """Copies the package into `folder`, without some of its folders."""
    shutil.copytree(ROOT / "nanopaged", folder / "nanopaged", ignore=shutil.ignore_patterns("__pycache__", *names))


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(*arguments, cwd=folder)


def test_without_a_command_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    streams = capsys.readouterr()
    assert all(f"\n    {command} " in streams.out for command in bench.COMMANDS) and streams.err == ""
    assert run("--help") == 0
    assert capsys.readouterr() == streams


def test_the_list_is_what_a_user_gets_who_names_no_command() -> None:
    done = python(ROOT, "-m", "nanopaged.bench")
    assert (done.returncode, done.stderr) == (0, "") and "\n    kernel " in done.stdout


@pytest.mark.parametrize("arguments", [["no such command"], ["--no-such-flag"], ["scheduler", "--no-such-flag"],
                                       ["scheduler", "--rounds", "x"]])
def test_an_unknown_command_or_flag_ends_with_status_2(arguments: list[str],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "usage: python -m nanopaged.bench" in capsys.readouterr().err


def test_every_command_has_a_module_of_its_name() -> None:
    assert set(bench.COMMANDS) <= {path.stem for path in Path(bench.__file__).parent.glob("*.py")}


@pytest.mark.parametrize("command, folder, empty_folder_is_left", [
    ("scheduler", "pressure", False), ("scheduler", "pressure", True), ("engine", "fast", False)])
def test_a_command_that_needs_a_deleted_folder_says_so_in_one_line(command: str, folder: str, tmp_path: Path,
                                                                   empty_folder_is_left: bool) -> None:
    copy_without(tmp_path, folder)
    if empty_folder_is_left:
        (tmp_path / "nanopaged" / folder).mkdir()
    done = python(tmp_path, "-m", "nanopaged.bench", command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"python -m nanopaged.bench {command}: error: this needs the folder nanopaged/{folder}/, "
                           "which is missing: restore it, or choose another command\n")


def test_the_other_commands_need_no_optional_folder(tmp_path: Path) -> None:
    copy_without(tmp_path, "fast", "pressure", "simulate")
    code = ("from nanopaged.bench import codegen, cost, decode, gpu, kernel\n"
            "from nanopaged.bench.__main__ import main\n"
            "decode.NUM_STEPS, decode.copy_bandwidth = 1, lambda device: 1e9\n"
            "exit(main(['decode', '--requests=1', '--context=64', '--layers=1']))")
    done = python(tmp_path, "-c", code)
    assert (done.returncode, done.stderr) == (0, "") and "eager tokens/s" in done.stdout


def test_a_broken_module_in_an_optional_folder_is_not_taken_for_a_deleted_folder(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nanopaged.bench.scheduler", raising=False)
    monkeypatch.setitem(sys.modules, "nanopaged.pressure.admission", None)  # cannot be imported
    with pytest.raises(ModuleNotFoundError, match="nanopaged.pressure.admission"):
        bench.main(["scheduler"])
