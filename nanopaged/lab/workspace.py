"""What does a student get? A folder with a copy of the package that lacks what the lab asks for.

    DIR/README.md       the handout
    DIR/nanopaged/      the package, without `lab/`: graders are not a part of it
    DIR/.lab.json       which lab, and which commit of nanopaged

It is a git repository of its own, so that what was done to it can be seen, and handed in.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
from pathlib import Path

from nanopaged.lab import labs
from nanopaged.lab.bodies import Body, blanked, is_blank, launches_blanked, text_of, users_of
from nanopaged.lab.isolation import CHECKOUT
from nanopaged.lab.labs import Lab

PACKAGE = CHECKOUT / "nanopaged"
HANDOUTS = CHECKOUT / "docs" / "labs"
LEFT_OUT = ("lab", "__pycache__")
HUNT = "hunt"  # the folder of a student's tests
EXAMPLE = '''"""Tests that hunt bugs: they pass on every right solution, and fail on as many wrong ones as they can."""

from nanopaged.block_allocator import BlockAllocator


def test_two_calls_of_take_give_two_blocks() -> None:
    pool = BlockAllocator(num_blocks=2, block_size=4)
    assert {pool.take(), pool.take()} == {0, 1}
'''
WHERE = """> This is DIR, {folder}. Commands belong to the checkout of nanopaged from which it was made,
> and so does the folder `docs/`: first `cd {checkout}`, and use the Python of that checkout's
> environment. {task}
"""
TASK = "What you write is in DIR/nanopaged. When it is done, `train_free_demo.py` here runs the engine on it."
HUNTING = "What you write is in DIR/hunt. To run your tests by hand: `cd DIR`, then `python -m pytest hunt`."
HINTS = ".hints.json"  # how many were given
BESIDE = ("requirements.txt", "train_free_demo.py")  # what makes a workspace run on its own


def message(lab: Lab, body: str) -> str:
    part = lab.part_of(body)
    return f"lab {lab.name}, part {part}: write what {lab.parts[part - 1].asks}"


def copy_package(folder: Path) -> None:
    """The source's package, into a folder."""
    shutil.copytree(PACKAGE, folder / "nanopaged", ignore=shutil.ignore_patterns(*LEFT_OUT))


def take_out(folder: Path, chosen: list[Lab], given: int = 0) -> None:
    """Takes the bodies of labs out of the package in `folder`, but for those of their first `given` parts."""
    messages: dict[str, dict[str, str]] = {}
    launches: list[tuple[str, dict[str, str]]] = []  # in the order of parts, in which the lines will stand
    for lab in chosen:
        for name in [name for name in lab.bodies() if name not in lab.bodies(1, given)]:
            body = Body.of(name)
            messages.setdefault(body.file, {})[body.function] = message(lab, name)
            for launcher in lab.launchers:
                kernels = users_of((folder / "nanopaged" / body.file).read_text(encoding="utf-8"), body.function)
                line = f"{message(lab, name)}; then delete this line"
                launches.append((Body(launcher, "").file, dict.fromkeys(kernels, line)))
    for file, functions in messages.items():
        path = folder / "nanopaged" / file
        path.write_text(blanked(path.read_text(encoding="utf-8"), functions), encoding="utf-8")
    for file, kernels in launches:
        path = folder / "nanopaged" / file
        path.write_text(launches_blanked(path.read_text(encoding="utf-8"), kernels), encoding="utf-8")


def is_blank_in(folder: Path, name: str) -> bool:
    """Whether a body is still to be written. One that cannot be found or parsed is not blank, but wrong."""
    body = Body.of(name)
    try:
        text = (folder / "nanopaged" / body.file).read_text(encoding="utf-8")
        return "raise NotImplementedError(" in text and is_blank(text, body.function)  # the first is fast
    except (OSError, ValueError, SyntaxError):
        return False


class Workspace:
    def __init__(self, folder: Path) -> None:
        """An existing one. Raises ValueError if `folder` is none."""
        self.folder = folder.resolve()
        self.file = self.folder / ".lab.json"
        try:
            self.state: dict[str, object] = json.loads(self.file.read_text(encoding="utf-8"))
            self.name = str(self.state["lab"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} is not a lab's workspace: make one with `start LAB DIR`") from None
        self.labs = labs.every() if self.name == "all" else [labs.get(self.name)] if self.name != "hunt" else []

    @classmethod
    def start(cls, name: str, folder: Path) -> Workspace:
        """Makes one. Raises ValueError for an unknown lab, and for a folder that exists or lies in this checkout."""
        chosen = labs.every() if name == "all" else [] if name == "hunt" else [labs.get(name)]
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another folder")
        if not folder.absolute().parent.is_dir():
            raise ValueError(f"{folder.absolute().parent} does not exist: make it first, or choose another folder")
        if folder.resolve().is_relative_to(CHECKOUT):
            raise ValueError(f"{folder} lies inside this checkout: a workspace is a repository of its own, so choose a "
                             "folder outside")
        try:
            cls._make(name, folder, chosen)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half of one would be in the way
            raise
        return cls(folder)

    @staticmethod
    def _make(name: str, folder: Path, chosen: list[Lab]) -> None:
        git(CHECKOUT, "--version")  # before the work
        copy_package(folder)
        take_out(folder, chosen)
        for file in BESIDE:
            if (CHECKOUT / file).exists():
                shutil.copy(CHECKOUT / file, folder)
        if name == "hunt":
            (folder / HUNT).mkdir()
            (folder / HUNT / "test_example.py").write_text(EXAMPLE, encoding="utf-8")
        handouts = [HANDOUTS / f"{each}.md" for each in ([name] if name != "all" else labs.NAMES)]
        texts = [handout.read_text(encoding="utf-8") for handout in handouts if handout.exists()]
        task = HUNTING if name == "hunt" else TASK
        where = WHERE.format(checkout=CHECKOUT, folder=folder.resolve(), task=task)
        (folder / "README.md").write_text("\n".join([where, *texts]), encoding="utf-8")
        (folder / ".gitignore").write_text(f"__pycache__/\n.venv/\nsee.html\n{HINTS}\n", encoding="utf-8")
        (folder / ".lab.json").write_text(json.dumps({"lab": name, "commit": commit()}), encoding="utf-8")
        git(folder, "init", "--quiet")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "-m", f"Lab {name}, as it was handed out")

    def source(self, file: str) -> str:
        return (self.folder / "nanopaged" / file).read_text(encoding="utf-8")

    def is_blank(self, name: str) -> bool:
        return is_blank_in(self.folder, name)

    def next_hint(self, lab: Lab, number: int) -> str:
        """Of a part of a lab; one more each time."""
        file, key, hints = self.folder / HINTS, f"{lab.name} {number}", lab.parts[number - 1].hints
        given = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        given[key] = min(len(hints), given.get(key, 0) + 1)
        file.write_text(json.dumps(given), encoding="utf-8")
        last = "; this is the last" if given[key] == len(hints) else ""
        return f"{lab.name}, part {number}, hint {given[key]} of {len(hints)}{last}: {hints[given[key] - 1]}"

    def diff(self) -> str:
        """The student's functions beside the source's, as a unified diff."""
        lines: list[str] = []
        for lab in self.labs:
            for name in lab.bodies():
                body = Body.of(name)
                try:
                    theirs = text_of(self.source(body.file), body.function).splitlines()
                except ValueError as error:  # no longer a function: written in another way
                    lines.append(f"yours/{body.file}: {error}")
                    continue
                ours = text_of((PACKAGE / body.file).read_text(encoding="utf-8"), body.function).splitlines()
                lines += difflib.unified_diff(theirs, ours, f"yours/{body.file}", f"source/{body.file} {body.function}",
                                              lineterm="", n=99)
        return "\n".join(lines)


def commit() -> str | None:
    """The commit of this checkout; None if it is not a repository, or its package differs from the commit's."""
    if not (CHECKOUT / ".git").exists() or git(CHECKOUT, "status", "--porcelain", "--", "nanopaged"):
        return None
    return git(CHECKOUT, "rev-parse", "HEAD").strip()


def git(folder: Path, *arguments: str) -> str:
    """What a git command prints. Raises ValueError if it fails, with what git says."""
    # Neither another repository that a hook works on, nor the folder's owner, nor the user's settings matter here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    settings = {"safe.directory": "*", "user.name": "nanopaged", "user.email": "lab@nanopaged",
                "commit.gpgsign": "false", "core.hooksPath": os.devnull}
    environment["GIT_CONFIG_COUNT"] = str(len(settings))
    for number, (key, value) in enumerate(settings.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, env=environment, check=False)
    except FileNotFoundError:
        raise ValueError("a workspace is a git repository, and git is not installed: install it") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]} in {folder}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace")
