"""Would the tests notice? Breaks a module in many small ways, one at a time, and runs its own tests on each.

    python tests/mutation.py nanopaged/block_allocator.py
    python tests/mutation.py nanopaged/scheduler.py --mutants 200 --seed 1 --tests tests/test_scenarios.py

A *mutant* is the module with one change: a comparison, an operator, a constant, a condition, a call that is
left out. It is *killed* if a test fails, and *survives* if none does: then the tests say nothing about that
code. A mutant that runs into an endless loop is killed too.

A module's own tests are in the file of its name: tests/pressure/test_storm.py for nanopaged/pressure/storm.py.
Strings (docstrings, error texts, log messages) and type annotations are not mutated. `EQUIVALENT` and
`NEEDS_GPU` list mutants that no test can kill here; they are not run, and counted apart.

The tests run in a copy of the repository. One process imports torch and what else the tests need from outside,
and forks for each mutant; where there is no fork, each mutant is a process of its own.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nanopaged", "tests", "docs")  # copied, with the files beside them
MEMORY = 8 * 2**30  # bytes that a mutant may take: some loops that do not end fill a list


class Listed(NamedTuple):
    """A mutant that is not run: `old` becomes `new` in this function of this file, and in one place only."""

    file: str
    function: str
    old: str
    new: str
    why: str


SAMPLING, SCHEDULER = "nanopaged/sampling.py", "nanopaged/scheduler.py"

# The behaviour is the same.
EQUIVALENT: list[Listed] = [
    Listed("nanopaged/block_allocator.py", "BlockAllocator.__init__", "ROOT_IDENTITY + 1", "ROOT_IDENTITY + 2",
           "any number but the root's is an identity"),
    Listed("nanopaged/pressure/swap_space.py", "SwappingScheduler.__init__",
           'BlockAllocator(require_int("swap_blocks", swap_blocks, 1), self.block_size, False)',
           'BlockAllocator(require_int("swap_blocks", swap_blocks, 1), self.block_size, True)',
           "no block of the swap space is published"),
    Listed(SAMPLING, "", "NOT_FINITE = -1", "NOT_FINITE = -2", "no negative number is a token id"),
    Listed(SAMPLING, "", "BYTES_AT_ONCE = 32", "BYTES_AT_ONCE = 31", "a reserve, above the 25 that are needed"),
    Listed(SAMPLING, "", "BYTES_AT_ONCE = 32", "BYTES_AT_ONCE = 33", "a reserve, above the 25 that are needed"),
    Listed(SAMPLING, "", "2**19", "2*19", "fewer rows at once"),
    Listed(SAMPLING, "", '{"cpu": 2**19, "cuda": 2**24}', '{"cpu": 3**19, "cuda": 2**24}', "more rows at once"),
    Listed(SAMPLING, "sample.filters", "0 < params.top_k < vocab_size", "0 < params.top_k <= vocab_size",
           "keeps all tokens too"),
    Listed(SAMPLING, "sample.filters", "params.top_p < 1", "params.top_p <= 1", "keeps all tokens too, slower"),
    Listed(SAMPLING, "sample.filters", "params.top_p < 1", "params.top_p < 2", "keeps all tokens too, slower"),
    Listed(SAMPLING, "sample", "p.top_p < 1", "p.top_p <= 1", "keeps all tokens too"),
    Listed(SAMPLING, "sample", "AT_ONCE[logits.device.type] // vocab_size", "AT_ONCE[logits.device.type] * vocab_size",
           "more rows at once"),
    Listed(SAMPLING, "sample", "top_k < vocab_size", "top_k <= vocab_size", "keeps all tokens too, slower"),
    Listed(SAMPLING, "sample", "p.top_p if p.top_p < 1 else torch.inf", "p.top_p if p.top_p < 2 else torch.inf",
           "keeps all tokens too"),
    Listed(SAMPLING, "sample", "max(1, AT_ONCE[logits.device.type] // vocab_size)",
           "max(2, AT_ONCE[logits.device.type] // vocab_size)", "two rows at once instead of one"),
    Listed(SAMPLING, "sample", "min(i + size, end)", "max(i + size, end)", "rows are drawn again by the next group"),
    Listed(SAMPLING, "sample", "token_ids.index_copy_(0, place, drawn)", "token_ids.index_copy_(-1, place, drawn)",
           "it has one dimension"),
    Listed(SAMPLING, "_first_kept", "top_k < probs.shape[1]", "top_k <= probs.shape[1]",
           "keeps all tokens too, slower"),
    Listed(SAMPLING, "_first_kept", "probs.topk(top_k, dim=-1, sorted=False)", "probs.topk(top_k, dim=-1, sorted=True)",
           "slower"),
    Listed(SAMPLING, "_first_kept", "speed.masked_fill_(probs < largest.amin(dim=-1, keepdim=True), 0.0)", "pass",
           "slower"),
    Listed(SCHEDULER, "Scheduler.schedule", "if step.budget == 0 or not self._plan(request, step): ...",
           "if step.budget == 0 or not self._plan(request, step): pass",
           "the others get no budget either, or there are none: only the last gives way itself"),
    Listed(SCHEDULER, "Scheduler.schedule", "break", "continue", "as above"),
    Listed(SCHEDULER, "Scheduler._plan", "return False", "return True", "as above"),
    Listed(SCHEDULER, "Scheduler._plan", "return False", "return None", "None is false too"),
    Listed(SCHEDULER, "Scheduler._make_room", "return False", "return None", "None is false too"),
    Listed(SCHEDULER, "Scheduler._plan", "num_tokens > step.budget", "num_tokens >= step.budget",
           "sets it to what it is"),
    Listed(SCHEDULER, "Scheduler._plan", "start + num_tokens > len(request.block_table) * self.block_size",
           "start + num_tokens >= len(request.block_table) * self.block_size", "asks for room that is there"),
    Listed(SCHEDULER, "Scheduler._plan", "len(request.block_table) * self.block_size",
           "len(request.block_table) // self.block_size", "asks for room that is there"),
    Listed(SCHEDULER, "Scheduler._make_room", "max(0, blocks_for(end, self.block_size) - len(table))",
           "max(-1, blocks_for(end, self.block_size) - len(table))", "it is called when the table is too short"),
    Listed(SCHEDULER, "Scheduler._make_room", "request.may_share_tail = False", "pass",
           "says only that there is nothing to look for"),
    Listed(SCHEDULER, "Scheduler._make_room", "request.may_share_tail = False", "request.may_share_tail = True",
           "as above"),
    Listed(SCHEDULER, "Scheduler.update", "start < request.most_computed_tokens",
           "start <= request.most_computed_tokens", "adds 0"),
    Listed(SCHEDULER, "Scheduler.update", "num_tokens > filled", "num_tokens >= filled", "loops over no block"),
]

# Only a test that runs on a GPU sees a difference.
NEEDS_GPU: list[Listed] = [
    Listed("nanopaged/batch.py", "upload", "values.pin_memory().to(device, non_blocking=True)",
           "values.pin_memory().to(device, non_blocking=False)", "the host waits"),
    Listed("nanopaged/kv_cache.py", "KVCache.carry_out",
           "self.host_blocks[target].copy_(self.blocks[:, :, source], non_blocking=True)",
           "self.host_blocks[target].copy_(self.blocks[:, :, source], non_blocking=False)", "the host waits"),
    Listed("nanopaged/kv_cache.py", "KVCache.carry_out",
           "self.blocks[:, :, target].copy_(self.host_blocks[source], non_blocking=True)",
           "self.blocks[:, :, target].copy_(self.host_blocks[source], non_blocking=False)", "the host waits"),
]


# What is changed.

SWAPS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
         ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"),
         ast.NotIn: (r"not\s+in", "in"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"),
         ast.FloorDiv: ("//", "*"), ast.Div: ("/", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
         ast.And: ("and", "or"), ast.Or: ("or", "and")}
OPPOSITE = {"min": "max", "max": "min", "break": "continue", "continue": "break", "True": "False", "False": "True"}


class Mutant(NamedTuple):
    file: str
    line: int
    function: str
    old: str  # what is shown of the change: an expression or a statement around it
    new: str
    source: str  # of the whole module

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.old}  ->  {self.new}"


def mutants_of(source: str, file: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    found, seen = [], {ast.dump(ast.parse(source))}
    for mutant in Mutator(source, file).walk(ast.parse(source)):
        tree = ast.dump(ast.parse(mutant.source))
        if tree not in seen:  # skipping a body of one call, for example, deletes the call
            seen.add(tree)
            found.append(mutant)
    return sorted(found, key=lambda mutant: mutant.line)


class Mutator:
    """Walks over a syntax tree, and yields the mutants of each node. Positions are in bytes, as in `ast`."""

    def __init__(self, source: str, file: str) -> None:
        self.text, self.file = source.encode(), file
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.path: list[ast.AST] = []  # the nodes around the one that is visited

    def span(self, node: ast.AST, last: ast.AST | None = None) -> tuple[int, int]:
        last = last or node
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[last.end_lineno - 1] + last.end_col_offset)

    def replace(self, start: int, end: int, by: bytes, shown: tuple[int, int] | None = None) -> Mutant:
        """The module with `by` in place of a range; `shown` is the range around it that a reader should see."""
        first, last = shown or (start, end)
        old = on_one_line(self.text[first:last])
        new = on_one_line(self.text[first:start] + by + self.text[end:last])
        if old[:90] != new[:90]:
            old, new = (text if len(text) <= 90 else text[:90] + "..." for text in (old, new))
        source = (self.text[:start] + by + self.text[end:]).decode()
        named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        function = ".".join(node.name for node in self.path if isinstance(node, named))
        return Mutant(self.file, self.text.count(b"\n", 0, first) + 1, function, old, new, source)

    def swap(self, operator: ast.AST, left: ast.AST, right: ast.AST, shown: ast.AST) -> Mutant:
        """Another operator between two operands; what stands between these is the operator and parentheses."""
        old, new = SWAPS[type(operator)]
        start, end = self.span(left)[1], self.span(right)[0]
        match = re.search((old if "\\" in old else re.escape(old)).encode(), self.text[start:end])
        return self.replace(start + match.start(), start + match.end(), new.encode(), self.span(shown))

    def walk(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)) or is_log(node):
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self.path.append(node)
        yield from self.mutants(node)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "bases", "exc", "cause"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self.walk(child)
        self.path.pop()

    def mutants(self, node: ast.AST) -> Iterator[Mutant]:
        """Of this node alone."""
        match node:
            case ast.Compare(left=left, ops=operators, comparators=operands):
                for operator, before, after in zip(operators, [left, *operands], operands):
                    yield self.swap(operator, before, after, node)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in SWAPS:
                yield self.swap(operator, left, right, node)
            case ast.AugAssign(target=target, op=operator, value=value) if type(operator) in SWAPS:
                yield self.swap(operator, target, value, node)
            case ast.BoolOp(op=operator, values=values):
                old, new = SWAPS[type(operator)]
                parts = [self.text[slice(*self.span(values[0]))]]
                for before, after in zip(values, values[1:]):
                    between = self.text[self.span(before)[1] : self.span(after)[0]]
                    parts += [re.sub(rf"\b{old}\b".encode(), new.encode(), between),
                              self.text[slice(*self.span(after))]]
                start, end = self.span(values[0])[0], self.span(values[-1])[1]
                head, tail = self.text[self.span(node)[0] : start], self.text[end : self.span(node)[1]]
                yield self.replace(*self.span(node), b"(" + head + b"".join(parts) + tail + b")")
            case ast.UnaryOp(op=ast.Not()):
                start, end = self.span(node)
                yield self.replace(start, end, re.sub(rb"^not\s*", b"", self.text[start:end]))
            case ast.Constant(value=bool()):
                yield self.opposite(node, self.around(node))
            case ast.Constant(value=int(value)):
                for other in (value + 1, value - 1):
                    yield self.replace(*self.span(node), f"{other}".encode(), self.around(node))
            case ast.Call(func=ast.Name(id="min" | "max") as function):
                yield self.opposite(function, self.span(node))
            case ast.Break() | ast.Continue():
                yield self.opposite(node)
            case ast.Subscript(slice=ast.Slice(lower=lower, upper=upper)):
                for bound in (lower, upper):
                    if bound is not None:
                        yield self.replace(*self.span(bound), b"", self.span(node))
            case ast.Return(value=ast.AST() as value) if not is_none(value):
                yield self.replace(*self.span(value), b"None", self.span(node))
        match node:
            case ast.If(test=test) | ast.While(test=test):
                yield from self.negated(test, (self.span(node)[0], self.span(test)[1]))
            case ast.IfExp(test=test):
                yield from self.negated(test, self.span(node))
            case ast.comprehension(ifs=tests):
                for test in tests:
                    yield from self.negated(test, self.span(test))
        if isinstance(node, ast.If):
            start, end = self.span(node.body[0], node.body[-1])
            head = on_one_line(self.text[self.span(node)[0] : self.span(node.test)[1]])
            skipped = self.replace(start, end, b"pass", (self.span(node)[0], end))
            yield skipped._replace(old=f"{head}: ...", new=f"{head}: pass")
        if is_effect(node):
            yield self.replace(*self.span(node), b"pass")

    def opposite(self, node: ast.AST, shown: tuple[int, int] | None = None) -> Mutant:
        start, end = self.span(node)
        return self.replace(start, end, OPPOSITE[self.text[start:end].decode()].encode(), shown)

    def negated(self, test: ast.expr, shown: tuple[int, int]) -> Iterator[Mutant]:
        swapped = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # the operator's mutant is the same
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], swapped)):
            start, end = self.span(test)
            yield self.replace(start, end, b"(not (" + self.text[start:end] + b"))", shown)

    def around(self, node: ast.AST) -> tuple[int, int]:
        """A constant alone says little: shows an expression around it, or its line."""
        shown = node
        for outer in self.path[-2::-1]:
            start, end = self.span(shown)
            if end - start > 12 and not isinstance(shown, ast.keyword):
                break
            if not hasattr(outer, "lineno") or isinstance(getattr(outer, "body", None), list):
                break
            shown = outer
        return self.span(shown) if shown is not node else tuple(self.starts[node.lineno - 1 : node.lineno + 1])


def on_one_line(text: bytes) -> str:
    return " ".join(re.sub(r"  #.*", "", text.decode()).split())


def is_log(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="logger" | "logging")))):
            return True
    return False


def is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def is_effect(node: ast.AST) -> bool:
    """Whether a statement can be left out and the names after it still exist."""
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():
            return True
        case ast.Assign(targets=targets):
            places = [place for target in targets for place in getattr(target, "elts", [target])]
            return all(isinstance(place, (ast.Attribute, ast.Subscript)) for place in places)
        case ast.AnnAssign(target=ast.Attribute(), value=ast.AST()):
            return True
    return False


def sample(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    chosen = random.Random(seed).sample(range(len(mutants)), min(number, len(mutants)))
    return [mutants[i] for i in sorted(chosen)]


def listed(mutants: list[Mutant], entries: list[Listed], file: str) -> set[Mutant]:
    """The mutants of a file that a list names. Exits if an entry does not name exactly one."""
    found = set()
    for entry in entries:
        if entry.file == file:
            named = [mutant for mutant in mutants
                     if (mutant.function, mutant.old, mutant.new) == (entry.function, entry.old, entry.new)]
            if len(named) != 1:
                sys.exit(f"an entry of tests/mutation.py must name one mutant, and names {len(named)}: {entry}")
            found.update(named)
    return found


# How the tests are run.


def copy_repository(target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
        elif path.name in FOLDERS:
            shutil.copytree(path, target / path.name, ignore=ignore)


def import_what_tests_import(copy: Path, tests: list[str]) -> None:
    """Imports here, once, what the tests import and a mutant cannot change: torch takes longer than most tests."""
    ours = {path.name for path in copy.iterdir()}
    for file in ["tests/conftest.py", *tests]:
        path = copy / file
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.partition(".")[0] not in ours:
                    importlib.import_module(name)


def pytest_arguments(tests: list[str]) -> list[str]:
    return ["-x", "-q", "-p", "no:cacheprovider", *tests]


def limit_memory() -> None:
    import resource  # which exists where `fork` does

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))


def run_tests(copy: Path, tests: list[str], log: Path, timeout_s: float) -> bool:
    """Whether all pass in time. `log` takes what pytest prints."""
    if not hasattr(os, "fork"):
        with log.open("wb") as output:
            try:
                return subprocess.run([sys.executable, "-m", "pytest", *pytest_arguments(tests)], cwd=copy,
                                      stdout=output, stderr=output, timeout=timeout_s).returncode == 0
            except subprocess.TimeoutExpired:
                return False
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()  # so that the processes that tests start end with it
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            limit_memory()
            os.chdir(copy)
            code = int(pytest.main(pytest_arguments(tests)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline, status = time.monotonic() + timeout_s, None
    try:
        while status is None and time.monotonic() < deadline:
            done, result = os.waitpid(child, os.WNOHANG)
            status = result if done else time.sleep(0.005)
    finally:
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return status == 0


def mirrored(module: Path) -> str:
    """Where a module's own tests are."""
    return str(Path("tests", *module.parts[1:-1], f"test_{module.stem.strip('_')}.py"))


def main(arguments: list[str] | None = None) -> int:
    """0 if no mutant survives, 1 if some do, 2 if the tests fail without any."""
    parser = argparse.ArgumentParser(description="Breaks a module in small ways and says what its tests do not notice.")
    parser.add_argument("module", type=Path, help="such as nanopaged/block_allocator.py")
    parser.add_argument("--mutants", type=int, default=80, help="how many, of all that there are")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="test files to run besides")
    parser.add_argument("--survivors", action="store_true", help="print the result alone, no progress")
    options = parser.parse_args(arguments)
    if not options.module.is_file() or ROOT not in options.module.resolve().parents:
        parser.error(f"{options.module} is not a file of this repository: give one such as nanopaged/scheduler.py")
    module = options.module.resolve().relative_to(ROOT)
    file, tests = module.as_posix(), [mirrored(module), *options.tests]
    everything = mutants_of((ROOT / module).read_text(encoding="utf-8"), file)
    equivalent, needs_gpu = (listed(everything, entries, file) for entries in (EQUIVALENT, NEEDS_GPU))
    mutants = sample(everything, options.mutants, options.seed)

    os.environ.pop("PYTEST_ADDOPTS", None)
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder, "copy"), Path(folder, "log")
        copy.mkdir()
        copy_repository(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests")))]
        import_what_tests_import(copy, tests)
        start = time.monotonic()
        if not run_tests(copy, tests, log, 3600):
            print(f"the tests fail without a mutant:\n{log.read_text(errors='replace')}", file=sys.stderr)
            return 2
        timeout_s = 5 + 3 * (time.monotonic() - start)

        run = [mutant for mutant in mutants if mutant not in equivalent | needs_gpu]
        killed = 0
        for number, mutant in enumerate(run, 1):
            path = copy / module
            path.write_text(mutant.source, encoding="utf-8")
            os.utime(path, (number, number))  # a .pyc is stale if its source has another size or time, in seconds
            if run_tests(copy, tests, log, timeout_s):
                print(mutant, flush=True)
            else:
                killed += 1
            if not options.survivors:
                print(f"\r{number}/{len(run)}", end="", file=sys.stderr, flush=True)
        if not options.survivors:
            print(file=sys.stderr)
    percent = f"{100 * killed / len(run):.1f}%" if run else "nothing to kill"
    print(f"{file}: {killed}/{len(run)} killed, {percent} (of {len(everything)} mutants, seed {options.seed}; "
          f"equivalent: {len(equivalent & set(mutants))}, needs a GPU: {len(needs_gpu & set(mutants))})")
    return int(killed < len(run))


if __name__ == "__main__":
    sys.exit(main())
