"""A workspace is checked by the graders of the commit that it came from."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from nanopaged.lab import at_commit
from nanopaged.lab.at_commit import check_elsewhere
from nanopaged.lab.workspace import Workspace

OPTIONS = argparse.Namespace(part=2, lab=None, seed=5, json=None)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose lab command says which version it is, and what it was asked."""
    folder = tmp_path / "checkout"
    (folder / "nanopaged" / "lab").mkdir(parents=True)
    git(folder, "init", "--quiet")
    write(folder, "first")
    monkeypatch.setattr(at_commit, "CHECKOUT", folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                          check=True, capture_output=True, text=True).stdout


def write(folder: Path, version: str) -> None:
    (folder / "nanopaged" / "lab" / "__main__.py").write_text(
        f"import sys\nsys.exit('{version} ' + ' '.join(sys.argv[1:]))\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "-m", version)


def workspace(tmp_path: Path, commit: str | None) -> Workspace:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / ".lab.json").write_text(json.dumps({"lab": "blocks", "commit": commit}))
    return Workspace(folder)


def test_a_checkout_like_the_workspaces_commit_checks_it_itself(repository: Path, tmp_path: Path) -> None:
    work = workspace(tmp_path, git(repository, "rev-parse", "HEAD").strip())
    assert check_elsewhere(work, OPTIONS) is None
    (repository / "README.md").write_text("other words")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "a change that no check depends on")
    assert check_elsewhere(work, OPTIONS) is None


def test_after_a_change_the_workspaces_own_commit_checks_it(
        repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work = workspace(tmp_path, git(repository, "rev-parse", "HEAD").strip())
    write(repository, "second")
    assert check_elsewhere(work, OPTIONS) == 1
    printed = capfd.readouterr()
    assert printed.err == f"first check {work.folder} 2 --seed 5\n"
    assert printed.out == f"Checking by commit {work.state['commit'][:9]}, from which the workspace was made.\n"


def test_a_commit_that_the_repository_does_not_have_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was made from commit 0{40}, which this repository does not have: fetch it"):
        check_elsewhere(workspace(tmp_path, "0" * 40), OPTIONS)


def test_without_a_commit_or_a_repository_the_checkout_checks_as_it_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_commit, "CHECKOUT", tmp_path)
    work = workspace(tmp_path, None)
    assert check_elsewhere(work, OPTIONS) is None
    work.state["commit"] = "0" * 40
    assert check_elsewhere(work, OPTIONS) is None
