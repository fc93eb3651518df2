"""The house: which folder may import which, what can be deleted, and how long an evening is.

The core is every file that lies flat in `nanopaged/`. `config.py` and `engine.py` stand above it: they alone
reach into `models/`, `pressure/` and `fast/`.
"""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tests.processes import run_python

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanopaged"
EVENING = ("block_allocator", "request", "scheduler", "batch", "torch_attention", "gpt2", "sampling", "engine")
EVENING_LINES = 1250
OPTIONAL = ("pressure", "fast", "simulate", "bench", "show", "lab")

# Floors from the ground up: what each may import besides itself.
MAY_IMPORT = {
    "core": set(),
    "models": {"core"},
    "pressure": {"core"},
    "fast": {"core"},
    "config": {"core", "models", "pressure", "fast"},
    "engine": {"core", "models", "config"},
    "show": {"core", "models", "engine"},
    "simulate": {"core", "pressure", "show"},
    "bench": {"core", "models", "pressure", "fast", "config", "engine"},
    "lab": {"core", "models", "config", "engine", "show"},
}
PUBLIC = {"LLM": "engine", "SamplingParams": "sampling_params", "RequestOutput": "outputs"}  # from `nanopaged` itself


def modules() -> dict[str, Path]:
    """Every module of the package by its name without "nanopaged."; a folder's `__init__` by the folder's name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = path
    del names["__init__"]
    return names


MODULES = modules()


def floor(module: str) -> str:
    folder, _, rest = module.partition(".")
    return folder if rest or module in MAY_IMPORT else "core"


def imports(module: str) -> set[str]:
    """What a module of the package imports from the package, in functions too, but not for annotations alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("nanopaged.") for alias in node.names
                         if alias.name.startswith("nanopaged."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "nanopaged":
                found.update(PUBLIC.get(alias.name, alias.name) for alias in node.names)
            elif (node.module or "").startswith("nanopaged."):
                source = node.module.removeprefix("nanopaged.")
                found.update(f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source
                             for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_arrow_between_folders_stands_in_the_table(module: str) -> None:
    here = floor(module)
    for target in imports(module):
        assert target in MODULES, f"{module} imports nanopaged.{target}, which is not there"
        allowed = MAY_IMPORT[here] | {here}
        assert floor(target) in allowed, f"{module} ({here}) must not import {target} ({floor(target)})"


def test_arrows_between_folders_go_down_and_no_module_imports_itself_through_others() -> None:
    order = list(MAY_IMPORT)
    for here, targets in MAY_IMPORT.items():
        assert all(order.index(target) < order.index(here) for target in targets), f"{here} imports from a higher floor"
    try:
        TopologicalSorter({module: imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"an import cycle: {' -> '.join(error.args[1])}")


def test_scheduling_its_policies_and_its_pictures_need_no_numerical_library() -> None:
    names = ["scheduler", "block_allocator", *(name for name in MODULES if name != "show.tour" and name.startswith(
        ("pressure.", "simulate.", "show.")))]  # a tour runs a model
    program = (f"import importlib, sys\nfor name in {names}:\n    importlib.import_module('nanopaged.' + name)\n"
               "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def comment_lines(source: str) -> int:
    """Lines that hold a comment, or part of a docstring."""
    lines = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_evening_is_short_and_a_quarter_of_it_explains() -> None:
    sources = [MODULES[name].read_text(encoding="utf-8") for name in EVENING]
    lines = sum(source.count("\n") for source in sources)
    assert lines <= EVENING_LINES, f"the evening's files have {lines} lines together"
    assert sum(map(comment_lines, sources)) >= lines / 4


def test_no_line_is_longer_than_120_characters() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "train_free_demo.py"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{path.relative_to(ROOT)}, line {number} has {len(line)} characters"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests_in_the_file_of_its_name(module: str) -> None:
    path = MODULES[module].relative_to(PACKAGE)
    of_a_lab = path.parts[0] == "lab" and len(path.parts) == 3  # tests/lab/test_prove.py tests all of these
    if path.name != "__init__.py" and not of_a_lab:
        test = ROOT / "tests" / path.parent / f"test_{path.stem.strip('_')}.py"
        assert test.is_file(), f"nanopaged/{path} has no tests/{path.parent}/{test.name}"


# What can be deleted.

USE = """\
import torch
import train_free_demo
from nanopaged import LLM, SamplingParams
from nanopaged.config import has_folder
from nanopaged.gpt2 import GPT2, GPT2Config

torch.manual_seed(0)
model = GPT2(GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
for parameter in model.parameters():
    parameter.requires_grad_(False).normal_(std=0.4)
llm = LLM(model, device="cpu", block_size=8, num_blocks=9)
prompts, params = [[i] * 12 for i in range(4)], SamplingParams(temperature=0.0, max_tokens=20)
for prompt, output in zip(prompts, llm.generate(prompts, params)):
    tokens = list(prompt)
    for _ in range(20):
        tokens.append(int(model.dense(torch.tensor(tokens))[-1].argmax()))
    assert output.outputs[0].token_ids == tokens[12:], (output, tokens)
llm.scheduler.check_invariants()
stats = llm.stats()
assert stats.num_preemptions > 0, "the pool was meant to be too small"
assert (stats.num_storms, stats.swap_blocks, stats.swap_blocks_used) == (0, 0, 0)
assert stats.goodput == 1 - stats.recomputed_tokens / stats.computed_tokens < 1
assert 0 < stats.pool_occupancy <= 1 and stats.preemptions_per_step == stats.num_preemptions / stats.num_steps
assert (llm.storm_watch is not None) == has_folder("pressure")
refused = {"pressure": [{"admission": "greedy"}, {"order": "priority"}, {"preemption": "swap"}],
           "fast": [{"compile": True}]}
for folder, options in refused.items():
    for option in options if not has_folder(folder) else ():
        try:
            LLM(model, device="cpu", num_blocks=9, **option)
        except ValueError as error:
            assert f"needs the folder nanopaged/{folder}/" in str(error), error
        else:
            raise AssertionError(f"{option} was accepted without {folder}/")
assert train_free_demo.main(["--workload", "storm", "--requests", "3", "--max-tokens", "8"]) == 0
"""
# Commands of optional folders that build on a deleted one: that one, and the command.
NEEDS = [("pressure", ("-m", "nanopaged.simulate", "--requests", "20")),
         ("pressure", ("-m", "nanopaged.bench", "scheduler", "--rounds", "1", "--steps", "10")),
         ("fast", ("-m", "nanopaged.bench", "engine", "--requests", "1", "--layers", "1")),
         ("show", ("-m", "nanopaged.simulate", "--requests", "20", "--record", "run.jsonl")),
         ("show", ("train_free_demo.py", "--movie", "pool.html", "--device", "cpu")),
         ("show", ("-m", "nanopaged.lab", "see", "workspace"))]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # what runs here is too small for more
    return run_python(*arguments, cwd=folder, environment=environment)


def copy_without(folder: str, target: Path) -> Path:
    shutil.copytree(PACKAGE, target / "nanopaged", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_free_demo.py", target)
    shutil.rmtree(target / "nanopaged" / folder)
    (target / "nanopaged" / folder).mkdir()  # the folder itself may stay, as where it had files that git ignores
    return target


@pytest.mark.parametrize("folder", OPTIONAL)
def test_core_models_and_demo_work_without(folder: str, tmp_path: Path) -> None:
    checkout = copy_without(folder, tmp_path)
    used = run(checkout, "-c", USE)
    assert (used.returncode, used.stderr) == (0, "")
    assert "3/3 continuations match the document" in used.stdout


@pytest.mark.parametrize("folder, command", NEEDS, ids=lambda value: value if isinstance(value, str) else value[1])
def test_a_command_that_builds_on_a_deleted_folder_says_so_in_one_line(
        folder: str, command: tuple[str, ...], tmp_path: Path) -> None:
    done = run(copy_without(folder, tmp_path), *command)
    *usage, error = done.stderr.splitlines()
    assert done.returncode == 2 and all(line.startswith(("usage: ", " ")) for line in usage), done.stderr
    assert f"nanopaged/{folder}/" in error


def test_a_default_whose_folder_is_there_but_broken_raises(tmp_path: Path) -> None:
    checkout = copy_without("bench", tmp_path)
    (checkout / "nanopaged" / "pressure" / "storm.py").write_text("raise RuntimeError('this file is broken')\n")
    done = run(checkout, "-c", USE)
    assert done.returncode == 1 and "this file is broken" in done.stderr
