"""A student's tests are scored by the bugs that they kill, once they are fair to every right solution."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged.lab import bugs, hunt
from nanopaged.lab.bugs import Bug
from nanopaged.lab.workspace import EXAMPLE

BUGS = [
    ("blocks", Bug("one", 1, "", "", ((
        "block_allocator.py", "return len(self._free) + len(self._cached)", "return 7"),))),
    ("blocks", Bug("two", 1, "", "", (("block_allocator.py", "self._ref_counts[block] = 1\n", "while True: pass\n"),))),
    ("blocks", Bug("three", 1, "", "", (("sampling_params.py", "n: int = 1", "n: int = 2"),))),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bugs, "every_bug", lambda: BUGS)
    (tmp_path / "hunt").mkdir()
    (tmp_path / "hunt" / "test_example.py").write_text(EXAMPLE)
    return tmp_path.resolve()


def test_a_bug_is_killed_if_a_test_fails_on_it_or_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(folder / "hunt" / "test_example.py", "a") as file:
        file.write("\n\ndef test_all_blocks_can_be_taken() -> None:\n"
                   "    assert BlockAllocator(2, 4).num_available == 2\n")
    monkeypatch.setattr(hunt, "SHORTEST", 8.0)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2")  # of those who run this very test, perhaps
    said: list[str] = []
    found = hunt.hunt(folder, said.append)
    assert found.is_fair and found.killed == {"blocks": [True, True, False]} and found.score == (2, 3)
    assert "bug 3 of 3: 2 killed" in said


def test_tests_that_fail_on_the_source_score_nothing_and_see_why(folder: Path) -> None:
    (folder / "hunt" / "test_wrong.py").write_text("def test_wrong() -> None:\n    assert 1 + 1 == 3\n")
    found = hunt.hunt(folder)
    assert not found.is_fair and found.score == (0, 3)
    assert "assert (1 + 1) == 3" in found.right["the source"]


def test_tests_that_look_into_the_source_fail_on_another_right_solution(folder: Path) -> None:
    (folder / "hunt" / "test_inside.py").write_text(
        "from nanopaged.block_allocator import BlockAllocator\n\n\n"
        "def test_inside() -> None:\n    assert BlockAllocator(2, 4)._free == [1, 0]\n")
    found = hunt.hunt(folder)
    assert found.right["the source"] == "" and found.right["another right solution of blocks"] != ""
    assert not found.is_fair and found.score == (0, 3)


def test_no_tests_at_all_pass_nothing(folder: Path) -> None:
    skipped = "import pytest\n\n\n@pytest.mark.skip\ndef test_a() -> None: ...\n"
    (folder / "hunt" / "test_example.py").write_text(skipped)
    nothing = "no test ran: there should be files hunt/test_*.py with functions test_*"
    assert hunt.hunt(folder).right == {"the source": nothing}, "one that is skipped says nothing"
    (folder / "hunt" / "test_example.py").unlink()
    assert hunt.hunt(folder).right == {"the source": nothing}
    (folder / "hunt").rmdir()
    assert not hunt.hunt(folder).is_fair


def test_tests_that_compare_texts_or_ask_the_graders_are_not_fair(folder: Path) -> None:
    (folder / "hunt" / "test_text.py").write_text(
        "from pathlib import Path\n\n\ndef test_text() -> None:\n"
        "    assert '# ' in Path('nanopaged/block_allocator.py').read_text()\n")
    assert hunt.hunt(folder).right["the source, written in another way"] != ""
    (folder / "hunt" / "test_text.py").write_text("import nanopaged.lab.bugs\n\n\ndef test_x() -> None:\n    pass\n")
    assert hunt.hunt(folder).right["the source"] != ""


def test_a_test_that_fails_now_and_then_kills_nothing(folder: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("")
    (folder / "hunt" / "test_flaky.py").write_text(
        f"from pathlib import Path\n\n\ndef test_flaky() -> None:\n    file = Path({str(count)!r})\n"
        "    file.write_text(file.read_text() + 'x')\n    assert len(file.read_text()) < 8\n")
    found = hunt.hunt(folder)
    assert not found.is_fair and found.score == (0, 3) and found.right["the source, once more"] != ""


def test_tests_that_do_not_end_are_told_once_with_their_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunt, "SECONDS", 6.0)
    (folder / "hunt" / "test_long.py").write_text("def test_long() -> None:\n    while True:\n        pass\n")
    (complaint,) = hunt.hunt(folder).right.values()
    assert complaint.startswith("they had not ended after 6 s, at hunt/test_long.py, line ")


def test_the_bugs_of_one_lab_can_be_tried_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "every_bug", lambda: [*BUGS[:1], ("prefix", BUGS[2][1])])
    monkeypatch.setattr(bugs, "has_alternative", lambda lab: False)
    assert hunt.hunt(folder, lab="prefix").killed == {"prefix": [False]}
