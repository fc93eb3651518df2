"""Is a program in a fork the same as in a process of its own? Both run it, and must print the same and end alike."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests import processes
from tests.processes import run_python

STATE = ("import os, sys; print(__name__, sys.argv, sys.path[0], 'tests' in sys.modules, 'nanopaged' in sys.modules, "
         "os.getcwd(), dict(os.environ), sys.stdin.read(), [stream.isatty() for stream in (sys.stdin, sys.stdout)])")
ENDS = ["", "print('é')", "sys.exit()", "sys.exit(3)", "sys.exit('a message')", "os._exit(4)", "os.abort()",
        "class Here: pass\nprint(Here, Here.__module__ in sys.modules)", "import mine; print(mine.NUMBER)"]


@pytest.mark.parametrize("first", [["-c", STATE], ["program.py"], ["-m", "program"], ["../program.py"],
                                   *(["-c", f"import os, sys\n{end}"] for end in ENDS)], ids=str)
def test_a_fork_runs_a_program_as_a_new_process_does(first: list[str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "program.py").write_text(STATE)
    (folder / "mine.py").write_text("NUMBER = 7")
    environment = {"PATH": os.environ["PATH"], "WORD": "ü", "PYTHONPATH": "x", "LC_CTYPE": "C.UTF-8"}
    given = {"cwd": folder, "environment": environment, "given": "line\nlast ß"}
    forked = run_python(*first, "--flag", "a word", **given)
    monkeypatch.setattr(processes, "FORKS", False)
    alone = run_python(*first, "--flag", "a word", **given)
    assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_an_exception_ends_it_with_status_1_and_is_the_last_line() -> None:
    done = run_python("-c", "1 / 0")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("forks", [processes.FORKS, False])
def test_a_program_that_does_not_end_in_time_is_killed(forks: bool, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FORKS", forks)
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", program, cwd=tmp_path, timeout_s=2)
    state = run_python("-c", "import os; os.kill(int(open('pid').read()), 0)", cwd=tmp_path)
    assert "ProcessLookupError" in state.stderr


@pytest.mark.skipif(not processes.FORKS, reason="programs do not run in forks here")
def test_in_a_fork_torch_is_there_before_a_program_imports_it_and_has_one_thread() -> None:
    done = run_python("-c", "import sys; print(sys.modules['torch'].get_num_threads())")
    assert done.stdout == "1\n", done.stderr
