"""How can tests run `python` in many processes, when each takes two seconds to import torch?

One server process imports torch once (the standard library's `forkserver`). Each program runs in a fork of it, with
its own folder, environment, input and output, and imports everything else itself, nanopaged included. Where Python
does not fork safely (Windows, macOS) a program is an ordinary process.

A test of what happens before torch is imported, or of memory, should use `subprocess` instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
FORKS = sys.platform == "linux"
# A shell starts background jobs with SIGINT ignored, and a child inherits that, but not a handler of Python's.
HEED_SIGINT = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "  # so that its Ctrl-C is a signal
RUN = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


def run_python(*words: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, given: str = "",
               timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """The status of `python WORDS` and what it prints. `given` is on its stdin; the environment is by default ours."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(given.encode())
        stdin.seek(0)
        process = start_python(*map(str, words), cwd=cwd, environment=environment,
                               streams=(stdin.fileno(), stdout.fileno(), stderr.fileno()))
        try:
            status = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess([sys.executable, *words], status, stdout.read().decode(),
                                           stderr.read().decode())


class Fork:
    """A program that runs in a fork, with the methods of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process
        process.start()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


def start_python(*words: str, streams: tuple[int, int, int], cwd: Path = ROOT,
                 environment: Mapping[str, str] | None = None) -> Fork | subprocess.Popen[bytes]:
    """Starts `python WORDS`. The streams are descriptors for its stdin, stdout and stderr; a terminal is its own."""
    environment = dict(os.environ if environment is None else environment)
    stdin, stdout, stderr = streams
    if FORKS:
        sent = [Connection(os.dup(stream)) for stream in streams]  # which multiprocessing knows how to send
        return Fork(_server().Process(target=_be_python, args=(words, str(cwd), environment, sent)))
    program = HEED_SIGINT + (OWN_TERMINAL if os.isatty(stdin) else "") + RUN
    return subprocess.Popen([sys.executable, "-c", program, *words], cwd=cwd, env=environment, stdin=stdin,
                            stdout=stdout, stderr=stderr, start_new_session=True)


@cache
def _server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _be_python(words: Sequence[str], cwd: str, environment: dict[str, str], sent: Sequence[Connection]) -> None:
    """In the fork: becomes what `python WORDS` is when it starts, and runs it."""
    os.setsid()
    for number, stream in enumerate(sent):
        os.dup2(stream.fileno(), number)
        stream.close()
    if os.isatty(0):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that its Ctrl-C is a signal
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["torch"].set_num_threads(1)  # as in the tests: it has already read OMP_NUM_THREADS
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
                   *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests")))]
    try:
        _run(*words)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _run(first: str, *others: str) -> None:
    if first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = list(others)
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *others[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")
