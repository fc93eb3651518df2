"""Windows and macOS have no Triton: all but the kernels works there too, and what needs it says so in one line."""

from __future__ import annotations

import os
import subprocess

import pytest
from tests.processes import run_python

HIDE = "import sys; sys.modules['triton'] = None; "  # importing it raises ImportError, as if it were not installed


def without_triton(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_python("-c", HIDE + program, *arguments, environment=environment)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python MODULE_OR_FILE ARGUMENTS`."""
    run = "run_path" if arguments[0].endswith(".py") else "run_module"
    return without_triton(f"import runpy; del sys.argv[0]; runpy.{run}(sys.argv[0], run_name='__main__')", *arguments)


def test_every_module_can_be_imported() -> None:
    done = without_triton("import importlib, pkgutil, nanopaged\n"
                          "for module in pkgutil.walk_packages(nanopaged.__path__, 'nanopaged.'):\n"
                          "    importlib.import_module(module.name); print(module.name)")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"nanopaged.paged_attention", "nanopaged.engine"} <= set(done.stdout.split())


def test_a_text_is_continued_and_only_attention_by_triton_is_refused() -> None:
    done = without_triton("""
from nanopaged import LLM, SamplingParams
text = "a cat sat on a mat, and " * 3
print(LLM().generate(text, SamplingParams(temperature=0.0, max_tokens=9))[0].outputs[0].text)
try:
    LLM(attention="triton")
except ValueError as error:
    print(error)
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["a cat sat", "attention='triton' needs the triton package, which is not "
                                        "installed: use attention='torch'"]


@pytest.mark.parametrize("arguments, shown", [
    (["nanopaged.simulate", "--requests", "20"], "| paged "), (["nanopaged.bench"], "\n    codegen "),
    (["nanopaged.bench", "scheduler", "--rounds", "1", "--steps", "2"], "| cached, "),
    (["nanopaged.bench", "kernel", "--shape", "4,1,1024,12,12,64,float32"], "paged / contiguous"),
    (["nanopaged.bench", "decode", "--requests", "1", "--context", "64", "--layers", "1"], "eager tokens/s"),
    (["train_free_demo.py", "--requests", "2", "--max-tokens", "4"], "2/2 continuations match the document"),
], ids=["simulate", "bench", "scheduler", "kernel", "decode", "demo"])
def test_the_commands_run(arguments: list[str], shown: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "") and shown in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["nanopaged.bench", "codegen"], "python -m nanopaged.bench codegen: error: compiling needs the triton package"),
    (["train_free_demo.py", "--attention", "triton"], "error: attention='triton' needs the triton package")],
    ids=["codegen", "demo"])
def test_a_command_that_needs_triton_says_so_in_its_last_line(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_measuring_a_gpu_needs_triton_and_says_so() -> None:
    done = without_triton("import torch; torch.cuda.is_available = lambda: True\n"
                          "from nanopaged.bench.__main__ import main; sys.exit(main(['gpu']))")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "needs the triton package, which is not installed: run `decode` instead" in done.stderr
