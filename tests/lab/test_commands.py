"""The commands, as a student and as an instructor call them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from nanopaged.lab import bugs, commands, hunt, labs
from nanopaged.lab.__main__ import main
from nanopaged.lab.bugs import Bug
from nanopaged.lab.labs import Scenario
from nanopaged.lab.workspace import PACKAGE, Workspace

PARTS = len(labs.get("blocks").parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Workspace.start("blocks", tmp_path / "ada").folder


def solve(folder: Path) -> None:
    shutil.copy(PACKAGE / "block_allocator.py", folder / "nanopaged")


def test_the_overview_names_every_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for lab in labs.every():
        assert f"{lab.name:<10} {lab.title} ({lab.hours} hours, an estimate; {len(lab.parts)} parts)" in printed
    assert "hunt " in printed and "start LAB DIR" in printed


def test_a_workspace_fails_is_solved_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ada"
    assert main(["start", "blocks", str(folder)]) == 0
    assert f"check {folder}" in capsys.readouterr().out
    assert main(["check", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.count(": not written yet: BlockAllocator.") == PARTS
    assert printed.endswith(f"0 of {PARTS} parts hold.\n")
    assert main(["diff", str(folder)]) == 2
    assert "part 1 does not hold yet" in capsys.readouterr().err
    solve(folder)
    assert main(["check", str(folder), "1"]) == 0
    assert "diff" not in capsys.readouterr().out
    assert main(["check", str(folder)]) == 0
    assert f"{PARTS} of {PARTS} parts hold.\npython -m nanopaged.lab diff {folder}" in capsys.readouterr().out
    assert main(["diff", str(folder)]) == 0
    assert "The functions are the source's, to the letter." in capsys.readouterr().out


def test_only_the_first_thing_that_fails_in_a_part_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "nanopaged" / "block_allocator.py"
    solve(folder)
    path.write_text(path.read_text().replace("self._ref_counts[block] = 1", "print('so it is'); return 0"))
    assert main(["check", str(folder), "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("does not hold: ") == 1 and "what was done:" in printed and "so it is" in printed


def test_the_source_is_not_shown_before_the_lab_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "nanopaged" / "block_allocator.py"
    solve(folder)
    path.write_text(path.read_text().replace("self._ref_counts[block] = 1\n", "self._ref_counts[block] = 2\n"))
    assert main(["diff", str(folder)]) == 2
    printed = capsys.readouterr()
    assert "does not hold yet: the source is shown when the lab passes" in printed.err and printed.out == ""


def test_results_are_written_as_gradescope_reads_them(folder: Path, tmp_path: Path) -> None:
    assert main(["check", str(folder), "--json", str(tmp_path / "none.json")]) == 1
    solve(folder)
    assert main(["check", str(folder), "--json", str(tmp_path / "all.json")]) == 0
    none, everything = (json.loads((tmp_path / name).read_text()) for name in ("none.json", "all.json"))
    assert none["score"] == 0 and everything["score"] == pytest.approx(100)
    assert sum(test["max_score"] for test in none["tests"]) == pytest.approx(100)
    assert {test["status"] for test in none["tests"]} == {"failed"}
    assert {(test["status"], test["output"]) for test in everything["tests"]} == {("passed", "")}


def test_a_scenario_is_played_on_the_students_code_and_becomes_a_movie(
        folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["see", str(folder)]) == 1
    assert "blocks: it did not get to its end: NotImplementedError: lab blocks, part " in capsys.readouterr().out
    assert not (folder / "see.html").exists()
    solve(folder)
    allocator = folder / "nanopaged" / "block_allocator.py"
    allocator.write_text(allocator.read_text().replace("self._ref_counts[block] = 1\n",
                                                       "print('took', block); self._ref_counts[block] = 1\n"))
    assert main(["see", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "see.html: open it in a browser" in printed and "blocks, request 0: '" in printed and "    took " in printed
    assert "<title>Lab blocks</title>" in (folder / "see.html").read_text()


def test_hints_are_of_the_first_part_that_does_not_hold_or_of_the_one_that_is_asked_for(
        folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = labs.get("blocks").parts[0].hints
    for number, expected in ((1, first), (2, second)):
        assert main(["hint", str(folder)]) == 0
        assert f"part 1, hint {number} of " in (printed := capsys.readouterr().out) and expected in printed
    assert main(["hint", str(folder), "3"]) == 0
    assert "part 3, hint 1 of " in capsys.readouterr().out
    solve(folder)
    assert main(["hint", str(folder)]) == 0
    assert capsys.readouterr().out == "Every part holds: no hint is needed.\n"


def test_a_package_that_cannot_be_imported_is_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nanopaged" / "block_allocator.py").write_text("def broken(:\n")
    assert main(["check", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert printed.count("the package cannot be imported: nanopaged/block_allocator.py, line 1: ") == 1
    assert printed.count(": the same\n") == PARTS - 1


def test_a_class_is_graded_folder_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "class").mkdir()
    for name in ("ada", "bob"):
        Workspace.start("blocks", tmp_path / "class" / name)
    (tmp_path / "class" / "cy").mkdir()
    Workspace.start("hunt", tmp_path / "class" / "dee")
    shutil.rmtree(tmp_path / "class" / "dee" / "hunt")
    solve(tmp_path / "class" / "ada")
    shutil.move(tmp_path / "class" / "ada", tmp_path / "work")  # handed in one level down
    (tmp_path / "class" / "ada").mkdir()
    shutil.move(tmp_path / "work", tmp_path / "class" / "ada" / "work")
    assert main(["grade", str(tmp_path / "class"), "--csv", str(tmp_path / "marks.csv")]) == 0
    with open(tmp_path / "marks.csv", newline="") as file:
        ada, bob, cy, dee = csv.DictReader(file)
    assert (ada["folder"], ada["lab"], ada["score"], ada["parts that hold"]) == ("ada", "blocks", "100.0", str(PARTS))
    assert (bob["folder"], bob["score"], bob["parts that hold"]) == ("bob", "0.0", "0")
    assert "part 1: " in bob["first failure"]
    assert cy["score"] == "0" and cy["first failure"] == "there is no workspace in it"
    assert dee["score"] == "0.0" and "no test ran" in dee["first failure"]


SHORT = Scenario(requests=((0, "abcabcabcabcabcabcabc", {"max_tokens": 2}),), options={"num_blocks": 8}, watch="")
FORGETFUL = Bug("forgetful", 2, "Somebody forgot.", "Blocks are gone.", (
    ("block_allocator.py", "self._free.append(block)", "pass"),), SHORT)


def test_a_bug_is_shown_beside_the_source_with_what_caught_it(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "every_bug", lambda: [("blocks", FORGETFUL)])
    assert main(["bug", "forgetful"]) == 0
    printed = capsys.readouterr().out
    assert "forgetful (lab blocks, part 2). Somebody forgot." in printed and "Symptom: Blocks are gone." in printed
    assert "-self._free.append(block)\n+pass" in printed and "Caught by part 2: " in printed
    rows = {line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
            for line in printed.splitlines() if line.startswith("|")}
    assert rows["steps"] == ["2", "2"] and rows["blocks held at the end"] == ["0", "1"]
    assert rows["text of request 0"] == ["'ab'", "'ab'"]


def test_a_bug_that_nothing_catches_is_told_so(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Bug("harmless", 1, "", "", (("block_allocator.py", "self._ref_counts[block] = 1\n",
                                            "self._ref_counts[block] = 0 + 1\n"),), SHORT)
    monkeypatch.setattr(bugs, "every_bug", lambda: [("blocks", harmless)])
    assert main(["bug", "harmless"]) == 1
    assert "Not caught: part 1 holds." in capsys.readouterr().out


def test_the_bugs_are_listed_with_their_symptoms(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "every_bug", lambda: [("blocks", FORGETFUL)])
    assert main(["bug"]) == 0
    assert capsys.readouterr().out == "forgetful (blocks, part 2)\n    Blocks are gone.\n"
    assert main(["bug", "--lab", "kernel"]) == 0
    assert capsys.readouterr().out == ""


def test_the_hunt_prints_a_score_and_which_bugs_are_alive(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Workspace.start("hunt", tmp_path / "ada").folder
    found = hunt.Hunt({"the source": ""}, {"blocks": [True, False, True]})
    monkeypatch.setattr(commands.hunting, "hunt", lambda *_: found)
    monkeypatch.setattr(bugs, "every_bug", lambda: [("blocks", FORGETFUL)] * 3)
    assert main(["check", str(folder), "--json", str(tmp_path / "score.json")]) == 1
    assert capsys.readouterr().out.endswith("killed: 2 of 3 bugs\n    blocks      2 of 3; alive: 2\n")
    assert json.loads((tmp_path / "score.json").read_text())["score"] == 66.67


@pytest.mark.parametrize("command", ["see", "hint", "diff"])
def test_the_hunt_has_nothing_but_check(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Workspace.start("hunt", tmp_path / "ada").folder
    assert main([command, str(folder)]) == 2
    assert "the hunt has nothing but `check`" in capsys.readouterr().err
