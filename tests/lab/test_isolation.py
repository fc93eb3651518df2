"""Whatever the code does, its process is ended, and only what it reported counts."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanopaged.lab import isolation
from nanopaged.lab.isolation import Outcome, Report, isolated


def run(folder: Path, task: object, seconds: float = 20.0) -> Outcome:
    return isolated(task, folder, seconds)


def test_what_is_reported_arrives_and_what_is_printed_is_kept_apart(tmp_path: Path) -> None:
    def task(report: Report) -> None:
        report(number=1)
        print("hello")
        sys.stdout.flush()
        report(number=2)

    outcome = run(tmp_path, task)
    assert outcome == Outcome([{"number": 1}, {"number": 2}], "hello", None, "ended with status 0")


def test_a_process_that_leaves_early_has_reported_only_what_it_did(tmp_path: Path) -> None:
    def task(report: Report) -> None:
        report(number=1)
        os._exit(0)

    assert run(tmp_path, task)[:1] == ([{"number": 1}],)


def test_an_exception_ends_the_process_with_another_status(tmp_path: Path) -> None:
    def task(report: Report) -> None:
        raise SystemExit

    outcome = run(tmp_path, task)
    assert (outcome.results, outcome.status) == ([], "ended with status 3")


def test_a_loop_without_end_is_ended_and_where_it_stands_is_told(tmp_path: Path) -> None:
    (tmp_path / "student.py").write_text("def spin():\n    while True:\n        pass\n", encoding="utf-8")

    def task(report: Report) -> None:
        report.allow(0.3)
        __import__("student").spin()

    outcome = run(tmp_path.resolve(), task)
    assert outcome.results == [] and outcome.stands in (f"student.py, line {line}, in spin" for line in (2, 3))


def test_a_process_that_ignores_its_watchdog_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "allow", lambda self, seconds: None)
    start = time.monotonic()
    outcome = run(tmp_path, lambda report: time.sleep(60), seconds=-4.5)
    assert outcome.status.startswith("was ended after") and time.monotonic() - start < 30


def test_a_process_that_a_signal_ends_says_so(tmp_path: Path) -> None:
    outcome = run(tmp_path, lambda report: os.kill(os.getpid(), signal.SIGKILL))
    assert outcome.status == "was ended by SIGKILL"


def test_megabytes_of_printing_do_no_harm_and_their_end_is_shown(tmp_path: Path) -> None:
    def task(report: Report) -> None:
        for _ in range(20):
            print("x" * 10**6)
        print("the end")
        report(done=True)

    outcome = run(tmp_path, task)
    assert outcome.results == [{"done": True}]
    assert outcome.printed.endswith("the end") and len(outcome.printed) <= isolation.SHOWN


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's data")
def test_memory_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "MEMORY", 2**31)

    def task(report: Report) -> None:
        try:
            bytearray(2**32)
        except MemoryError:
            report(refused=True)

    assert run(tmp_path, task).results == [{"refused": True}]


def test_the_package_is_that_of_the_folder_and_the_graders_are_this_checkouts(tmp_path: Path) -> None:
    (tmp_path / "nanopaged").mkdir()
    (tmp_path / "nanopaged" / "__init__.py").write_text("WHO = 'the student'\n", encoding="utf-8")

    def task(report: Report) -> None:
        package, labs = map(importlib.import_module, ("nanopaged", "nanopaged.lab.labs"))
        report(who=package.WHO, labs=labs.__file__,
               strangers=isolation.imported_from_elsewhere(tmp_path.resolve()))

    (result,) = run(tmp_path.resolve(), task).results
    assert result == {"who": "the student", "labs": str(isolation.LAB / "labs.py"), "strangers": []}


def test_this_process_keeps_its_own_package(tmp_path: Path) -> None:
    before = {name: module for name, module in sys.modules.items() if name.startswith("nanopaged")}
    run(tmp_path, lambda report: None)
    assert {name: module for name, module in sys.modules.items() if name.startswith("nanopaged")} == before


def test_ctrl_c_ends_the_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = []
    kill = isolation._kill
    monkeypatch.setattr(isolation, "_kill", lambda pid: (killed.append(pid), kill(pid)))

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation.time, "sleep", press)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, lambda report: signal.pause())
    assert len(killed) == 1


def test_what_the_code_has_started_ends_with_it(tmp_path: Path) -> None:
    def task(report: Report) -> None:
        report(child=subprocess.Popen(["sleep", "77"]).pid)

    ((child,),) = [list(result.values()) for result in run(tmp_path, task).results]
    for _ in range(100):
        if not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes():
            break  # gone, or nobody has asked for its status yet
        time.sleep(0.05)
    else:
        pytest.fail("the process is still there")
