"""How can a student's code run without harm, whatever it does?

In a process of its own, with limits on time and memory. Results go through a file that is opened before the code is
imported, a line of JSON for each; whatever the code prints goes to another. A part counts by the results that have
arrived, not by how the process ended: `os._exit(0)` passes nothing.

The process is a fork of this one, so torch is imported once, and not for each part. (So the labs run on Linux, macOS
and WSL.) In it `nanopaged` is the student's, but `nanopaged.lab` stays this one: no workspace has graders of its own.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple

LAB = Path(__file__).parent
CHECKOUT = LAB.parents[1]
MEMORY = 6 * 2**30  # bytes that the process may hold
PRINTED = 2**26  # bytes that it may print
SHOWN = 1500  # characters of them that are shown


class Report:
    """How the isolated code reports: a line for each result; and how long it may take from here on."""

    def __init__(self, results: IO[str], stands: IO[str]) -> None:
        self.results, self.stands = results, stands

    def __call__(self, **result: object) -> None:
        self.results.write(json.dumps(result) + "\n")
        self.results.flush()

    def allow(self, seconds: float) -> None:
        """After so many seconds the process ends, and its stack is written down."""
        self.stands.seek(0)
        self.stands.truncate()
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.stands)


class Printed(io.TextIOBase):
    """What is printed goes to a file that is emptied when it is full: only its end is shown."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.written = descriptor, 0
        self.tail = ""  # since it was last emptied

    def write(self, text: str) -> int:
        self.tail = (self.tail + text)[-SHOWN:]
        data = text[-SHOWN:].encode(errors="replace")
        if self.written + len(data) > PRINTED // 2:
            os.ftruncate(self.descriptor, 0)
            self.written = 0
        self.written += os.write(self.descriptor, data)
        return len(text)

    def fileno(self) -> int:
        return self.descriptor


class Outcome(NamedTuple):
    results: list[dict[str, object]]
    printed: str  # the end of what the code printed
    stands: str | None  # where it stood when its time was over
    status: str  # how the process ended, in words


def isolated(task: Callable[[Report], object], folder: Path, seconds: float) -> Outcome:
    """Runs `task` in a process in which `nanopaged` is that of `folder`. It reports by calling its argument."""
    if not hasattr(os, "fork"):
        raise ValueError("the labs need a system with fork: on Windows, use WSL")
    sys.stdout.flush()
    sys.stderr.flush()
    with TemporaryDirectory(prefix="nanopaged-lab-") as scratch:
        files = {name: Path(scratch) / name for name in ("results", "printed", "stands")}
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()  # so that what the code starts can be ended with it
                _child(task, folder, seconds, files)
            finally:
                os._exit(3)
        try:
            status = _waited(pid, seconds + 5)  # the process's own watchdog comes first, and knows where it stands
        finally:
            _end_group(pid)
        return Outcome(_results(files["results"]), _end(files["printed"]), _place(files["stands"], folder), status)


def _waited(pid: int, seconds: float) -> str:
    """Waits for a child; ends it when its time is over, or when this process is interrupted."""
    end, pause = time.monotonic() + seconds, 0.001
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            time.sleep(pause)
            pause = min(0.02, pause * 1.2)
    except BaseException:
        _kill(pid)
        raise
    _kill(pid)
    return f"was ended after {seconds:.0f} s"


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _end_group(pid: int) -> None:
    """Ends what a child that has ended has left running."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nothing
        pass


def _child(task: Callable[[Report], object], folder: Path, seconds: float, files: dict[str, Path]) -> None:
    results = open(files["results"], "w", encoding="utf-8")
    stands = open(files["stands"], "w", encoding="utf-8")
    printed = os.open(files["printed"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(descriptor, target)
    sys.stdout = sys.stderr = Printed(printed)
    _limit()
    report = Report(results, stands)
    report.allow(seconds)
    _become(folder)
    try:
        task(report)
    except BaseException:
        traceback.print_exc()
        raise
    os._exit(0)


def _limit() -> None:
    import resource

    for kind, limit in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, PRINTED), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
        except (ValueError, OSError):  # not on every system, and not above a limit that is there
            pass


def _become(folder: Path) -> None:
    """`nanopaged` is that of `folder` from here on; this checkout's is forgotten, except for `nanopaged.lab`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanopaged"]:
        del sys.modules[name]
    here = {str(CHECKOUT), str(Path.cwd()), ""}
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in here)]
    sys.dont_write_bytecode = True
    os.chdir(folder)
    lab = types.ModuleType("nanopaged.lab")
    lab.__path__ = [str(LAB)]
    sys.modules["nanopaged.lab"] = lab


def imported_from_elsewhere(folder: Path) -> list[str]:
    """Modules of the package that are loaded, and not those of `folder`."""
    return [name for name, module in sys.modules.items()
            if name.partition(".")[0] == "nanopaged" and not f"{name}.".startswith("nanopaged.lab.")
            and getattr(module, "__file__", None) and not Path(module.__file__).is_relative_to(folder)]


def _results(file: Path) -> list[dict[str, object]]:
    results = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            results.append(json.loads(line))
        except ValueError:  # the last one, cut off in the middle
            break
    return results


def _end(file: Path) -> str:
    if not file.exists():
        return ""
    with open(file, "rb") as printed:
        printed.seek(max(0, file.stat().st_size - SHOWN))
        return printed.read().decode(errors="replace").strip()


def _place(file: Path, folder: Path) -> str | None:
    """The innermost line of the student's code in a stack that the watchdog has written."""
    stack = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', stack)
    if not frames:
        return None
    own = [frame for frame in frames if Path(frame[0]).is_relative_to(folder)]
    path, line, function = (own or frames)[0]
    return f"{os.path.relpath(path, folder) if own else path}, line {line}, in {function}"
