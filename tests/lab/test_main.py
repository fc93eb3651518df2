"""A mistake in a command is told in one line, with the status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged.lab import labs
from nanopaged.lab.__main__ import main
from nanopaged.lab.workspace import Workspace

PARTS = len(labs.get("blocks").parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Workspace.start("blocks", tmp_path_factory.mktemp("class") / "ada").folder


@pytest.mark.parametrize("arguments, words", [
    (["check", "DIR", "9"], f"PART must be from 1 to {PARTS}, got 9"),
    (["check", "DIR", "--lab", "prefix"], "this workspace is of the lab blocks, not of prefix"),
    (["check", "nowhere"], "nowhere is not a lab's workspace: make one with `start LAB DIR`"),
    (["start", "blocks", "DIR"], "exists already: choose another folder"),
    (["bug", "none-such"], "there is no bug 'none-such': `bug` alone lists them"),
    (["grade", "nowhere", "--csv", "x.csv"], "nowhere"),
])
def test_a_mistake_is_told_in_one_line(arguments: list[str], words: str, folder: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("DIR", str(folder)) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and words in printed


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for command in ("start LAB DIR", "check DIR [PART]", "see DIR", "hint DIR [PART]", "diff DIR",
                    "grade FOLDER --csv FILE", "bug [NAME]", "prove [LAB] [--seeds N]"):
        assert command in printed
