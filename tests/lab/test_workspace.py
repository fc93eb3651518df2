"""A workspace has what a student needs, says where it came from, and lacks the bodies."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.processes import run_python

from nanopaged.lab import labs, workspace
from nanopaged.lab.workspace import CHECKOUT, Workspace

BODY = "block_allocator:BlockAllocator.take"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace.start("blocks", tmp_path_factory.mktemp("class") / "ada")


def test_a_workspace_is_a_repository_with_one_commit_and_nothing_left_over(made: Workspace) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(made.folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert git("log", "--format=%s") == "Lab blocks, as it was handed out\n" and git("status", "--porcelain") == ""


def test_a_workspace_has_the_handout_and_the_package_without_graders(made: Workspace) -> None:
    where, handout = (made.folder / "README.md").read_text().split("\n\n", 1)
    assert f"`cd {CHECKOUT}`" in where and str(made.folder) in where
    assert handout == (CHECKOUT / "docs/labs/blocks.md").read_text()
    names = {path.name for path in (made.folder / "nanopaged").iterdir()}
    assert "scheduler.py" in names and "lab" not in names
    assert all(made.is_blank(name) for name in labs.get("blocks").bodies())
    for path in workspace.PACKAGE.glob("*.py"):
        if path.name != "block_allocator.py":
            assert path.read_text() == (made.folder / "nanopaged" / path.name).read_text()


def test_a_workspace_that_was_made_is_found_again(made: Workspace) -> None:
    again = Workspace(made.folder)
    assert (again.name, [lab.name for lab in again.labs]) == ("blocks", ["blocks"])


def test_another_folder_is_not_taken_for_a_workspace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a lab's workspace: make one with `start LAB DIR`"):
        Workspace(tmp_path)
    (tmp_path / ".lab.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a lab's workspace"):
        Workspace(tmp_path)


def test_a_folder_that_exists_or_lies_in_this_checkout_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="exists already: choose another folder"):
        Workspace.start("blocks", tmp_path)
    with pytest.raises(ValueError, match="lies inside this checkout"):
        Workspace.start("blocks", CHECKOUT / "docs" / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not (CHECKOUT / "docs" / "work").exists()


def test_an_unknown_lab_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no lab 'brocks': choose one of blocks, "):
        Workspace.start("brocks", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_everything_can_be_taken_out_at_once(tmp_path: Path) -> None:
    everything = Workspace.start("all", tmp_path / "all")
    assert [lab.name for lab in everything.labs] == list(labs.NAMES)
    for lab in everything.labs:
        assert all(map(everything.is_blank, lab.bodies())), lab.name


def test_a_workspace_of_the_hunt_has_the_whole_source_and_an_example(tmp_path: Path) -> None:
    hunting = Workspace.start("hunt", tmp_path / "hunt")
    assert not hunting.is_blank(BODY)
    example = run_python("-m", "pytest", "-q", "hunt", cwd=hunting.folder)
    assert example.returncode == 0, example.stdout


def test_hints_come_one_at_a_time_and_leave_no_change_to_be_committed(made: Workspace) -> None:
    lab = labs.get("blocks")
    hints = lab.parts[1].hints
    for number, expected in enumerate([*hints, hints[-1]], 1):
        number = min(number, len(hints))
        last = "; this is the last" if number == len(hints) else ""
        text = f"blocks, part 2, hint {number} of {len(hints)}{last}: {expected}"
        assert Workspace(made.folder).next_hint(lab, 2) == text
    assert Workspace(made.folder).next_hint(lab, 1).startswith("blocks, part 1, hint 1 of ")
    assert workspace.git(made.folder, "status", "--porcelain") == ""


def test_a_folder_whose_parent_is_missing_is_taken_for_a_slip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/none does not exist: make it first, or choose another folder"):
        Workspace.start("blocks", tmp_path / "none" / "ada")
    assert not (tmp_path / "none").exists()


def test_the_difference_is_that_of_the_bodies_alone(tmp_path: Path) -> None:
    made = Workspace.start("blocks", tmp_path / "ada")
    source = (workspace.PACKAGE / "block_allocator.py").read_text()
    allocator = made.folder / "nanopaged" / "block_allocator.py"
    allocator.write_text(source + "\n# Something else.\n")
    assert made.diff() == ""
    allocator.write_text(source.replace("self._ref_counts[block] = 1\n", "self._ref_counts[block] = 0 + 1\n"))
    assert "-    self._ref_counts[block] = 0 + 1\n+    self._ref_counts[block] = 1\n" in made.diff()


def test_the_commit_is_known_only_where_the_package_is_the_commits(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return workspace.git(tmp_path, *arguments)

    monkeypatch.setattr(workspace, "CHECKOUT", tmp_path)
    assert workspace.commit() is None
    (tmp_path / "nanopaged").mkdir()
    (tmp_path / "nanopaged" / "a.py").write_text("")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "-m", "first")
    assert workspace.commit() == git("rev-parse", "HEAD").strip()
    (tmp_path / "nanopaged" / "b.py").write_text("")
    assert workspace.commit() is None
    (tmp_path / "nanopaged" / "b.py").rename(tmp_path / "notes")
    assert workspace.commit() is not None


def test_neither_a_users_settings_nor_another_repository_matter(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[commit]\n\tgpgsign = true\n[user]\n\tsigningkey = none\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    made = Workspace.start("blocks", tmp_path / "ada")
    assert (made.folder / ".git").is_dir() and not (tmp_path / "elsewhere").exists()


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="git is not installed: install it"):
        Workspace.start("blocks", tmp_path / "ada")
    assert not (tmp_path / "ada").exists()
