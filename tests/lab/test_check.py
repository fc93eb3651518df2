"""What a student is told of code in any state."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanopaged.lab import labs
from nanopaged.lab.bodies import Body, blanked
from nanopaged.lab.check import PartResult, check_part
from nanopaged.lab.isolation import Report
from nanopaged.lab.workspace import PACKAGE, copy_package, take_out

BLOCKS = labs.get("blocks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the first part written."""
    copy_package(tmp_path)
    take_out(tmp_path, [BLOCKS], given=1)
    return tmp_path.resolve()


def write(folder: Path, body: str) -> PartResult:
    """Checks part 1 with another body of `take`."""
    path = folder / "nanopaged" / "block_allocator.py"
    empty = blanked(path.read_text(), {"BlockAllocator.take": "lab blocks, part 1: x"})
    path.write_text(empty.replace('raise NotImplementedError("lab blocks, part 1: x")', body))
    return check_part(folder, BLOCKS, 1)


def first(result: PartResult) -> str:
    return next(verdict.message for verdict in result.verdicts if not verdict.holds)


def test_a_part_that_is_written_holds_though_later_ones_are_not(folder: Path) -> None:
    result = check_part(folder, BLOCKS, 1)
    assert result.holds and len(result.verdicts) >= 2 and not any(verdict.message for verdict in result.verdicts)


def test_a_part_that_is_not_written_says_so(folder: Path) -> None:
    result = check_part(folder, BLOCKS, 2)
    assert not result.holds and result.not_written
    assert "this is not written yet: lab blocks, part 2: write what " in first(result)


def test_what_is_wrong_is_told_with_what_was_done(folder: Path) -> None:
    result = write(folder, "return 0")
    assert not result.holds and not result.not_written
    assert "what was done:\n    pool = BlockAllocator(" in first(result) and "pool.take() -> 0" in first(result)


def test_a_syntax_error_is_named_with_its_line(folder: Path) -> None:
    result = write(folder, "return (")
    assert not any(verdict.holds for verdict in result.verdicts)
    assert "the package cannot be imported: nanopaged/block_allocator.py, line " in first(result)


def test_an_exception_is_named_with_its_place(folder: Path) -> None:
    assert "it raised ZeroDivisionError: " in first(result := write(folder, "return 1 // 0"))
    assert ", in take (nanopaged/block_allocator.py, line " in first(result)


@pytest.mark.parametrize("body, words", [
    ("import sys; sys.exit(0)", "it raised SystemExit"),
    ("import os; os._exit(0)", "the process ended with status 0 before this was checked"),
    ("raise KeyboardInterrupt", "it raised KeyboardInterrupt"),
])
def test_leaving_early_passes_nothing(folder: Path, body: str, words: str) -> None:
    result = write(folder, body)
    assert not any(verdict.holds for verdict in result.verdicts) and words in first(result)


def test_a_loop_without_end_is_told_with_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow = Report.allow
    monkeypatch.setattr(Report, "allow", lambda self, seconds: allow(self, min(seconds, 3.0)))
    result = write(folder, "while True: pass")
    assert "the code was still running after 10 s; it stood at nanopaged/block_allocator.py, line " in first(result)


def test_megabytes_of_printing_change_nothing(folder: Path) -> None:
    path, place = folder / "nanopaged" / "block_allocator.py", "        block = self._free.pop() if"
    assert place in path.read_text()
    path.write_text(path.read_text().replace(place, f"        print('x' * 10**6)\n{place}"))
    result = check_part(folder, BLOCKS, 1)
    assert result.holds and result.verdicts[0].printed.endswith("xxx")


def test_an_import_of_the_reference_is_not_possible(folder: Path) -> None:
    """A student who runs `check` from this checkout is graded by the workspace's package all the same."""
    result = write(folder, "import nanopaged.request; raise ValueError(nanopaged.request.__file__)")
    assert f"it raised ValueError: {folder}/nanopaged/request.py" in first(result)
    assert str(PACKAGE) not in first(result)


def test_a_check_is_repeated_with_its_seed(folder: Path) -> None:
    assert check_part(folder, BLOCKS, 1, seed=7).holds


def test_a_function_that_was_moved_away_matters_only_where_it_is_used(folder: Path) -> None:
    path = folder / "nanopaged" / "block_allocator.py"
    path.write_text(path.read_text().replace("def fork(", "def another_fork("))
    assert check_part(folder, BLOCKS, 1).holds


def test_what_other_labs_ask_for_is_lent_too(tmp_path: Path) -> None:
    copy_package(tmp_path)
    take_out(tmp_path, labs.every())
    source = (PACKAGE / "block_allocator.py").read_text()
    path = tmp_path / "nanopaged" / "block_allocator.py"
    functions = [name for lab in ("prefix", "copies") for name in map(Body.of, labs.get(lab).bodies())
                 if name.module == "block_allocator"]
    path.write_text(blanked(source, {body.function: "lab prefix, part 1: x" for body in functions}))
    assert all(check_part(tmp_path.resolve(), BLOCKS, number).holds for number in range(1, len(BLOCKS.parts) + 1))


@pytest.mark.parametrize("body", [
    "class Odd(Exception):\n            def __str__(self): raise KeyError\n        raise Odd",
    "raise ValueError('x' * 10**7)",
    "import sys; sys.stdout = None; raise ValueError('gone')",
])
def test_an_odd_exception_fails_its_check_and_no_other(folder: Path, body: str) -> None:
    result = write(folder, body)
    assert [verdict.message[:10] for verdict in result.verdicts] == ["it raised "] * len(result.verdicts)
    assert all(len(verdict.message) <= 4000 for verdict in result.verdicts)


def test_the_checks_after_one_that_does_not_end_are_not_blamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow = Report.allow
    monkeypatch.setattr(Report, "allow", lambda self, seconds: allow(self, min(seconds, 3.0)))
    messages = [verdict.message for verdict in write(folder, "while True: pass").verdicts]
    assert messages[0].startswith("the code was still running")
    assert set(messages[1:]) == {"not tried: the check before it did not end"}
