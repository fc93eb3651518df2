"""README.md and docs/ are true: snippets run and print what stands below them, commands work, what is named exists.

The word after ``` says what a fence is, further words what it needs:

 - python: runs as it stands, on the CPU, after the file's fences before it. A text fence directly below it, or below
   one line that ends in ":", is exactly what it prints; a line "..." in it stands for any lines.
 - sh: commands, one a line: `python` or `.venv/bin/python`, with environment variables before it if need be. Each ends
   with status 0, run with small sizes (`SMALL`). One that runs pytest is not run: it finds tests. For the commands
   below, `cat > FILE <<'END'` and lines up to END make a file.
 - python or sh, with gpu or network: not run. Python is compiled; a command's options are in its --help.
 - bash: in README.md alone, the two commands that continuous integration runs.
 - text, or no word: a picture, or output.

A command in backticks is checked as one that needs a GPU; for other code and file names see `name_problems`.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.processes import run_python

ROOT = Path(__file__).parents[1]

# What makes a command small, by the first of these that it begins with. None: only its options are checked, since it
# takes long and other tests run it.
SMALL: dict[str, str | None] = {
    "train_free_demo.py --movie": None,
    "train_free_demo.py": "--requests 1 --max-tokens 2",
    "-m nanopaged.simulate": "--requests 20",
    "-m nanopaged.bench scheduler": "--rounds 1 --steps 10",
    "-m nanopaged.bench host": "--requests 2 --steps 3",
    "-m nanopaged.bench cost": "--rounds 1 --layers 1",
    "-m nanopaged.bench engine": "--requests 1 --max-prompt 16 --max-output 16 --layers 1 --width 64 --no-compile",
    "-m nanopaged.bench codegen": None,
    "tests/mutation.py": None,
    "tests/model_check.py": None,
}
FOREIGN = {"--help": "argparse"}  # in backticks, but not in our source, and whose it is
PYTHON = ("python", ".venv/bin/python")


# Reading Markdown. A place is "file:line".

class Fence(NamedTuple):
    place: str
    language: str
    needs: list[str]
    code: str
    printed: str | None  # the text fence below it


class Command(NamedTuple):
    place: str
    words: list[str]
    is_run: bool
    files: dict[str, str]  # that it may read: text by name


class Document:
    """A Markdown file: its fences, and its prose, where the lines of fences are empty."""

    FENCE = re.compile(r"^( *)```([^`\n]*)\n(.*?)^ *``` *$", re.MULTILINE | re.DOTALL)
    SH = re.compile(r"^(?:cat > (\S+) <<'(\w+)'\n([\s\S]*?)^\2|((?:\\\n|.)*))\n", re.MULTILINE)  # a file, or a command

    def __init__(self, file: str, text: str) -> None:
        self.file, self.fences, end = file, [], 0
        self.prose = self.FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
        for found in self.FENCE.finditer(text):
            language, *needs = found[2].split() or [""]
            code = re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
            between = [line.rstrip() for line in text[end:found.start()].splitlines() if line.strip()]
            if language == "text" and self.fences and (not between or len(between) == 1 and between[0].endswith(":")):
                self.fences[-1] = self.fences[-1]._replace(printed=code)
            self.fences.append(Fence(self.place(text, found.start()), language, needs, code, None))
            end = found.end()

    def place(self, text: str, index: int, first: int = 1) -> str:
        return f"{self.file}:{first + text.count(chr(10), 0, index)}"

    def spans(self) -> Iterator[tuple[str, str]]:
        """(place, what stands in backticks there)."""
        for found in re.finditer(r"(`+)((?:[^`\n]|\n(?!\s*\n))+)\1", self.prose):
            yield self.place(self.prose, found.start()), " ".join(found[2].split())

    def commands(self) -> Iterator[Command]:
        files = {}
        for fence in self.fences:
            for found in self.SH.finditer(fence.code) if fence.language == "sh" else ():
                place = self.place(fence.code, found.start(), int(fence.place.rpartition(":")[2]) + 1)
                if found[1]:
                    files[found[1]] = found[3]
                elif words := shlex.split(found[4].replace("\\\n", ""), comments=True):
                    yield Command(place, words, not fence.needs, dict(files))
        for place, text in self.spans():
            if text.split(" ")[0] in PYTHON and " " in text:
                yield Command(place, shlex.split(text), False, {})

    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        headings = re.findall(r"^#+ +(.*?) *$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FILES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
DOCUMENTS = {file: Document(file, (ROOT / file).read_text(encoding="utf-8")) for file in FILES}
COMMANDS = [command for document in DOCUMENTS.values() for command in document.commands()]


# Checks: each returns what is wrong, and where.

def fence_problems(document: Document) -> list[str]:
    """Fences that no other check would look at."""
    allowed = {"python": {"gpu", "network"}, "sh": {"gpu", "network"}, "bash": set(), "text": set(), "": set()}
    code_line = re.compile(r"^(?:\S*/)?python3? .*|^import .*|^from \S+ import .*", re.MULTILINE)
    problems = []
    for place, language, needs, code, _ in document.fences:
        if language not in allowed or not allowed[language].issuperset(needs):
            problems.append(f"{place}: there is no such kind of fence: {' '.join([language, *needs])}")
        elif language in ("", "text") and (found := code_line.search(code)):
            problems.append(f"{place}: {found[0]!r} belongs in a fence of sh or python")
    if (number := sum(fence.language == "bash" for fence in document.fences)) != 2 * (document.file == "README.md"):
        problems.append(f"{document.file}: {number} bash fences: README.md has two, other files none")
    return problems


RUN = """\
import contextlib, io, json, sys, traceback
namespace, results = {"__name__": "__main__"}, []
for place, needs, code in json.load(sys.stdin):
    (file, line), printed, error = place.rsplit(":", 1), io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            compiled = compile("\\n" * int(line) + code, file, "exec")
            if not needs:
                exec(compiled, namespace)
        except BaseException:
            error = traceback.format_exc(limit=-3)
    results.append((printed.getvalue(), error))
    if error:
        break
print(json.dumps(results))
"""
COLLECT = """\
import json, os, pytest, sys
os.chdir(sys.argv[1])
options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--assert=plain"]
print(json.dumps([pytest.main([*options, *words]) for words in json.load(sys.stdin)]))
"""


def python(words: Sequence[str], given: object = None, files: Mapping[str, str] | None = None,
           **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter of these tests, with no GPU, in a folder of these files. What is given is on its stdin."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "",
                   "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (files or {}).items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return run_python(*words, cwd=Path(folder), environment={**environment, **variables}, given=json.dumps(given))


def python_problems(document: Document) -> list[str]:
    """Runs the python fences in one process, up to the first that raises."""
    snippets = [fence for fence in document.fences if fence.language == "python"]
    done = python(["-c", RUN], given=[(fence.place, fence.needs, fence.code) for fence in snippets])
    if done.returncode:
        return [f"{document.file}: a snippet ended Python with status {done.returncode}\n{done.stderr[-2000:]}"]
    problems = []
    for fence, (printed, error) in zip(snippets, json.loads(done.stdout.splitlines()[-1])):
        if error:
            problems.append(f"{fence.place}: {error}")
        elif fence.printed is not None and not fence.needs and not same_lines(printed, fence.printed):
            problems.append(f"{fence.place} prints\n{printed}and below it stands\n{fence.printed}")
    return problems


def same_lines(printed: str, expected: str) -> bool:
    pattern = "".join(r"(?:.*\n)*" if line.strip() == "..." else f"{re.escape(line.rstrip())}\n"
                      for line in expected.splitlines())
    return re.fullmatch(pattern, "".join(f"{line.rstrip()}\n" for line in printed.splitlines())) is not None


def command_problems(command: Command) -> list[str]:
    """Runs a command, made small, or looks its options up in its help."""
    start = next((i for i, word in enumerate(command.words) if "=" not in word), 0)
    variables = dict(word.split("=", 1) for word in command.words[:start])
    program, *words = command.words[start:]
    if program not in PYTHON:
        return [f"{command.place}: a command starts with python or .venv/bin/python, not with {program}"]
    small = next((SMALL[prefix] for prefix in SMALL if f"{' '.join(words)} ".startswith(f"{prefix} ")), "")
    is_run = command.is_run and small is not None
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]  # it runs in another folder
    done = python([*words, *(small.split() if is_run else ["--help"])], files=command.files, **variables)
    if done.returncode:
        return [f"{command.place}: {shlex.join(done.args)} ends with {done.returncode}:\n{done.stderr[-2000:]}"]
    options = [] if is_run else [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{command.place}: there is no {option}" for option in options
            if not re.search(rf"{option}(?![\w-])", done.stdout)]


def pytest_problems(commands: Sequence[Command]) -> list[str]:
    """Commands that find no tests. One process collects for all, so that it imports each file once."""
    words = [tuple(command.words[command.words.index("pytest") + 1:]) for command in commands]
    different = list(dict.fromkeys(words))
    done = python(["-c", COLLECT, str(ROOT)], given=different)
    statuses = dict(zip(different, json.loads(done.stdout.splitlines()[-1])))
    return [f"{command.place}: {shlex.join(command.words)} finds no tests: status {statuses[given]}"
            for command, given in zip(commands, words) if statuses[given]]


@cache
def source() -> dict[str, list[ast.AST]]:
    """The modules and classes of a name; of "", all modules. Not this file: it names what does not exist."""
    found = defaultdict(list)
    for path in [*(ROOT / "nanopaged").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "train_free_demo.py"]:
        if path != Path(__file__):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[path.stem].append(tree)
            found[""].append(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(node)
    return found


@cache
def names(owner: str) -> set[str]:
    """Names, and strings that could be one, in a module, or in a class and its base classes; of "", all."""
    found = set()
    for tree in source()[owner]:
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name", "asname", "module", "value"):
                word = getattr(node, field, None)
                if isinstance(word, str) and re.fullmatch(r"[\w.-]+", word):  # "--block-size" is block_size too
                    found |= {word, *word.split("."), word.lstrip("-").replace("-", "_")}
        for base in getattr(tree, "bases", []):
            found |= names(base.id) if getattr(base, "id", None) in source() else set()
    return found


def names_in(code: str) -> Iterator[tuple[str, str]]:
    """(what it is a member of, or "", name) of names that are not just a word; none if it is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(f"self{code}" if code.startswith(".") else code)))
    except SyntaxError:
        return
    for node in nodes:
        if isinstance(node, ast.Attribute):
            yield getattr(node.value, "attr", getattr(node.value, "id", "")), node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield "", node.arg
        elif isinstance(node, ast.Name) and ("_" in node.id or isinstance(node.ctx, ast.Store)):
            yield "", node.id
        head = node.value if isinstance(node, ast.Attribute) else getattr(node, "func", None)
        if isinstance(head, ast.Name):
            yield "", head.id


@cache
def paths() -> list[str]:
    files = [path for folder in (".ci", "docs", "nanopaged", "tests") for path in (ROOT / folder).rglob("*")]
    return [f"/{path.relative_to(ROOT).as_posix()}" for path in [*files, *ROOT.glob("*")] if path.is_file()]


def name_problems(document: Document) -> list[str]:
    """What stands in backticks and is not there: files and folders, options of commands, and names in code.

    A file may be named by the end of its path. A member of one of our modules or classes must be a name in it.
    """
    defined = re.findall(r"(?:\bdef|\bclass|\bcat >) ([\w.]+)", "".join(fence.code for fence in document.fences))
    problems, known = [], {*FOREIGN, *dir(builtins), *defined}
    for place, span in document.spans():
        if span.split(" ")[0] in PYTHON:
            continue
        if re.fullmatch(r"(?:[\w.-]+/)*(?:[\w-]+\.(?:py|md|txt|pt)|[\w.-]+/)", span):
            there = any(path.endswith(f"/{span}") or span.endswith("/") and f"/{span}" in path for path in paths())
            missing = [] if there else [span]
        elif options := re.findall(r"(?<!\S)--[a-z][\w-]*", span):
            missing = [option for option in options if option not in names("")]
        else:
            missing = [name for owner, name in names_in(span) if name not in names(owner if owner in source() else "")]
        problems += [f"{place}: there is no {name}, in `{span}`" for name in sorted({*missing} - known)]
    return problems


def link_problems(document: Document) -> list[str]:
    """Links to files and headings that are not there."""
    problems = []
    for found in re.finditer(r"\]\(([^)\s]+)\)", document.prose):
        path, _, anchor = found[1].partition("#")
        file, target = (ROOT / document.file).parent / path, document
        if path.endswith(".md") and file.exists():
            target = Document(path, file.read_text(encoding="utf-8"))
        if "://" not in path and (path and not file.exists() or anchor and anchor not in target.anchors()):
            problems.append(f"{document.place(document.prose, found.start())}: {found[1]} leads nowhere")
    return problems


CHECKS = [fence_problems, python_problems, name_problems, link_problems]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("check", CHECKS)
def test_snippets_names_and_links_are_right(check: Callable[[Document], list[str]], file: str) -> None:
    problems = check(DOCUMENTS[file])
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "pytest" not in command.words],
                         ids=lambda command: command.place)
def test_a_command_ends_with_status_0_or_has_its_options(command: Command) -> None:
    problems = command_problems(command)
    assert not problems, "\n".join(problems)


def test_commands_that_run_tests_find_some() -> None:
    none = Command("x.md:1", ["python", "-m", "pytest", "tests/no_such.py"], False, {})
    problems = pytest_problems([none, *(command for command in COMMANDS if "pytest" in command.words)])
    assert problems == ["x.md:1: python -m pytest tests/no_such.py finds no tests: status 4"], "\n".join(problems)


MINE = "```sh\ncat > mine.py <<'END'\nimport os\n\nraise SystemExit(os.environ['STATUS'] != '0')\nEND\n"
WRONG = {  # a text, and what is found in it
    "a snippet raises": ("```python\nx = 1\n```\n\n```python\n\ny = x / 0\n```\n```python\ny\n```",
                        ["x.md:5: .*line 7, .*ZeroDivisionError"]),
    "a snippet ends Python": ("```python\nimport os\nos._exit(3)\n```", ["x.md: .* status 3"]),
    "a snippet that is not run is no Python": ("```python gpu\nx = = 1\n```", ["x.md:1: .*SyntaxError"]),
    "a snippet that is not run raises": ("```python network\nno_such_name\n```\n```text\n1\n```", []),
    "another line is printed": ("```python\nprint(1)\n```\n\n```text\n2\n```", ["x.md:1 prints\n1\n.*stands\n2\n"]),
    "a line more is printed": ("```python\nprint(1)\n```\nSo:\n```text\n```", ["x.md:1 prints\n1\n.*stands\n"]),
    "lines left out": ("```python\nprint('1 \\n2\\n\\n3')\n```\n```text\n1\n...\n3\n```", []),
    "nothing is interpreted": ("```python\nimport os\nassert 'TRITON_INTERPRET' not in os.environ\n```", []),
    "a picture follows": ("```python\nprint(1)\n```\nThat was one.\n\nA picture:\n```text\n2\n```", []),
    "a command fails": ("```sh\n# x\npython -m nanopaged.simulate \\\n --no-such\n```", ["x.md:3: .* ends with 2"]),
    "an unknown option": ("```sh gpu\npython -m nanopaged.simulate --no-such\n```", ["x.md:2: there is no --no-such"]),
    "an unknown choice": ("```sh gpu\npython -m nanopaged.simulate --sweep x\n```", ["x.md:2: .* ends with 2"]),
    "a command in backticks": ("\n`python -m nanopaged.simulate --no-such`", ["x.md:2: there is no --no-such$"]),
    "another program": ("```sh\npip install torch\n```", ["x.md:2: .* not with pip"]),
    "a file and a variable": (f"{MINE}STATUS=0 .venv/bin/python mine.py  # ends well\n```", []),
    "another variable": (f"{MINE}STATUS=1 python mine.py\n```", ["x.md:7: .* ends with 1"]),
    "unknown names": ("`no_such(1)` `LLM(no_such=1)` `llm.no_such` `.nosuch` `no_such=1` `no_such[0]`",
                      ["x.md:1: there is no no_?such, in "] * 6),
    "a member of another class": ("`SwappingScheduler.schedule`\n`BlockAllocator.schedule`", ["x.md:2: .* schedule, "]),
    "known names": (
        "`max_num_seqs` `LLM(model='copycat')` `breakpoint()` `two words` `nosuch` `nosuch * 2` `outputs[0].text`", []),
    "unknown words": ("`nosuch.stats()` `nosuch()` `nosuch=1`", ["x.md:1: there is no nosuch, in "] * 3),
    "names of a snippet": ("`no_such_name`\n```python\ndef no_such_name(): ...\n```", []),
    "unknown files": ("`bench/no_such.py` `no_such.md` `no_such/` `step.py` `pressure/storm.py` `fast/`",
                      [".* no bench/no_such.py, ", ".* no no_such.md, ", ".* no no_such/, "]),
    "unknown options": ("`--max-num-seqs 8 --no-such`", ["x.md:1: there is no --no-such, in"]),
    "dead links": ("# A `b`: it's\n[](#a-b-its) [](https://a.b#c) [](README.md#nanopaged)\n[](#b) [](b.md) [](docs/#b)",
                   ["x.md:3: #b leads nowhere", "x.md:3: b.md leads nowhere", "x.md:3: docs/#b leads nowhere"]),
    "unknown fences": ("```pyton\n```\n```sh slow\n```", ["x.md:1: .* fence: pyton", "x.md:3: .* fence: sh slow"]),
    "a command as output": ("\n```\n.venv/bin/python x.py\n```", ["x.md:2: '.venv/bin/python x.py' belongs in"]),
    "a bash fence": ("```bash\nx\n```", ["x.md: 1 bash fences: "]),
}


@pytest.mark.parametrize("text, expected", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found_and_nothing_else(text: str, expected: list[str]) -> None:
    document = Document("x.md", text)
    problems = [problem for check in CHECKS for problem in check(document)]
    for command in document.commands():
        problems += command_problems(command)
    assert len(problems) == len(expected), problems
    for problem, pattern in zip(problems, expected):
        assert re.match(pattern, problem, re.DOTALL), problem
