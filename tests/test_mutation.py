"""Mutation testing: what no test notices is named, what a test notices is killed, what is listed counts apart."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation

MODULE = '''\
"""Tickets cost 5 or 10."""


def price(age: int, member: bool) -> int:
    if age < 18:
        return 5
    total = 10
    if member:
        total -= 2
    return max(0, total)
'''
TESTS = '''\
from nanopaged.tickets import price


def test_adults_pay_more_than_children_and_members_less() -> None:
    assert (price(3, False), price(40, False), price(40, True)) == (5, 10, 8)
'''


def repository(folder: Path, tests: str = TESTS) -> Path:
    """A repository of one module, its tests and `mutation.py`."""
    for name, text in {"nanopaged/tickets.py": MODULE, "tests/test_tickets.py": tests}.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    shutil.copy(mutation.__file__, folder / "tests")
    return folder


def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A program that uses that repository's `mutation.py`."""
    return subprocess.run([sys.executable, "-c", f"import sys, mutation\n{program}"], cwd=folder / "tests",
                          capture_output=True, text=True, timeout=120)


def test_survivors_are_named_by_file_and_line_and_listed_mutants_count_apart(tmp_path: Path) -> None:
    done = run(repository(tmp_path), """
from mutation import Listed
file = "nanopaged/tickets.py"
mutation.EQUIVALENT = [Listed(file, "price", "max(0, total)", "max(-1, total)", "no price is below 8"),
                       Listed("nanopaged/other.py", "price", "age < 18", "age <= 18", "of another file")]
mutation.NEEDS_GPU = [Listed(file, "price", "max(0, total)", "max(1, total)", "an example")]
sys.exit(mutation.main(["../nanopaged/tickets.py", "--survivors"]))""")
    assert done.stdout.splitlines() == [
        "nanopaged/tickets.py:5  age < 18  ->  age <= 18",
        "nanopaged/tickets.py:5  age < 18  ->  age < 19",
        "nanopaged/tickets.py:5  age < 18  ->  age < 17",
        "nanopaged/tickets.py: 14/17 killed, 82.4% (of 19 mutants, seed 0; equivalent: 1, needs a GPU: 1)"]
    assert (done.returncode, done.stderr) == (1, "")
    assert (tmp_path / "nanopaged/tickets.py").read_text() == MODULE, "mutants are written to a copy"


def test_tests_that_fail_without_a_mutant_are_refused_and_shown(tmp_path: Path) -> None:
    done = run(repository(tmp_path, "def test_fails() -> None:\n    assert 'this' == 'that'\n"),
               "sys.exit(mutation.main(['../nanopaged/tickets.py']))")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the tests fail without a mutant" in done.stderr and "'this' == 'that'" in done.stderr


@pytest.mark.parametrize("way", ["pass", "del os.fork"])
def test_tests_pass_if_none_fails_and_all_end_also_where_there_is_no_fork(way: str, tmp_path: Path) -> None:
    for name, body in {"passes": "pass", "fails": "assert False", "does_not_end": "while True: pass"}.items():
        repository(tmp_path / name, f"def test_{name}() -> None:\n    {body}\n")
    done = run(tmp_path / "passes", f"""
import os
from pathlib import Path
{way}
for name, timeout_s in ("passes", 60), ("fails", 60), ("does_not_end", 0.5):
    folder = Path("../..", name).resolve()
    print(name, mutation.run_tests(folder, ["tests/test_tickets.py"], Path("log"), timeout_s))""")
    assert (done.stdout, done.stderr) == ("passes True\nfails False\ndoes_not_end False\n", "")


@pytest.mark.parametrize("statement, changed", [
    ("a < b", ["a <= b"]), ("a <= b", ["a < b"]), ("a > b", ["a >= b"]), ("a >= b", ["a > b"]),
    ("a == b", ["a != b"]), ("a != b", ["a == b"]), ("a is b", ["a is not b"]), ("a is  not b", ["a is b"]),
    ("a in b", ["a not in b"]), ("a not in b", ["a in b"]), ("a < b is c", ["a <= b is c", "a < b is not c"]),
    ("a + b", ["a - b"]), ("a - b", ["a + b"]), ("a * b", ["a // b"]), ("a // b", ["a * b"]), ("a / b", ["a * b"]),
    ("a % b", ["a // b"]), ("a ** b", ["a * b"]), ("(a + b) * c", ["(a + b) // c", "a - b"]),
    ("a and b and c", ["(a or b or c)"]), ("(a or b) and c", ["((a or b) or c)", "(a and b)"]),
    ("not a", ["a"]), ("f(a)", ["pass"]), ("a[b:c]", ["a[:c]", "a[b:]"]), ("a[:]", []),
    ("x = 7", ["x = 8", "x = 6"]), ("x = True", ["x = False"]), ("x = min(a, b)", ["max(a, b)"]),
    ("x = b if a else c", ["b if (not (a)) else c"]), ("x = [a for a in b if a]", ["(not (a))"]),
    ("a += b", ["a -= b", "pass"]), ("a.b = c", ["pass"]), ("a.b, c[d] = e", ["pass"]), ("a.b: int = c", ["pass"]),
    ("a = b", []), ("del a[b]", ["pass"]), ("raise f(7)", ["pass"]),
    ("if a: b", ["if (not (a))", "if a: pass"]), ("if not a: b", ["a", "if not a: pass"]),
    ("if a == b: c", ["a != b", "if a == b: pass"]), ("if a: f(b)", ["if (not (a))", "if a: pass"]),
    ("while a: break", ["while (not (a))", "continue"]), ("while a: continue", ["while (not (a))", "break"]),
    ("def f(a: int = 7 * 3) -> int[7]: return a", ["7 // 3", "8 * 3", "6 * 3", "7 * 4", "7 * 2", "return None"]),
    ("def f(): return None", []), ("def f(): return", []),
    ("'7'", []), ("f'{a + 7}'", []), ("x: int[7]", []), ("logger.info('%d', 7)", []), ("import a", []),
    ("if TYPE_CHECKING: import a", []),
])
def test_each_statement_is_mutated_in_these_ways_and_no_others(statement: str, changed: list[str]) -> None:
    mutants = mutation.mutants_of(f"# Ein Kästchen: ┌┐\n{statement}\n", "nanopaged/any.py")
    assert sorted(mutant.new for mutant in mutants) == sorted(changed)
    assert all(mutant.line == 2 and mutant.source.count("\n") == 2 for mutant in mutants)


def test_a_statement_of_several_lines_is_shown_on_one_and_cut_where_it_is_long() -> None:
    source = "a.b = f(c,  # why\n        d)\ne.f = g(" + ", ".join(["argument"] * 12) + ")\n"
    short, long = mutation.mutants_of(source, "nanopaged/any.py")
    assert str(short) == "nanopaged/any.py:1  a.b = f(c, d)  ->  pass"
    assert str(long) == f"nanopaged/any.py:3  {source.splitlines()[2][:90]}...  ->  pass"


def test_a_seed_chooses_the_same_mutants_every_time_and_another_seed_chooses_others() -> None:
    mutants = mutation.mutants_of(MODULE, "nanopaged/tickets.py")
    first, again, other = (mutation.sample(mutants, 6, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == len(set(first)) == 6
    assert mutation.sample(mutants, 1000, 0) == mutants, "there are not more than all"


@pytest.mark.parametrize("old", ["age < 19", "total"])
def test_an_entry_of_the_lists_that_names_no_mutant_is_refused(old: str) -> None:
    file = "nanopaged/tickets.py"
    entry = mutation.Listed(file, "price", old, "0", "the code has changed")
    with pytest.raises(SystemExit, match="must name one mutant, and names 0"):
        mutation.listed(mutation.mutants_of(MODULE, file), [entry], file)
