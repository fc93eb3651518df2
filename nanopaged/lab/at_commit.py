"""By which graders is a workspace checked? By those of the commit that it came from.

A course goes on while this repository changes. If it has changed since, that commit is taken out of the repository into
a folder of its own, and its own `check` is run.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from nanopaged.lab.isolation import CHECKOUT
from nanopaged.lab.workspace import Workspace

GRADED_BY = ("nanopaged", "docs/labs")  # what a check depends on


def check_elsewhere(workspace: Workspace, args: argparse.Namespace) -> int | None:
    """The exit status of the check by the workspace's own commit; None if this checkout is just like it.

    Raises ValueError if the repository does not have that commit.
    """
    commit = workspace.state.get("commit")
    if commit is None or _same(str(commit)):
        return None
    archive = _git("archive", "--format=tar", str(commit), "nanopaged")
    if archive.returncode:
        raise ValueError(f"{workspace.folder} was made from commit {commit}, which this repository does not have: "
                         "fetch it, or check with the checkout that the workspace was made from")
    print(f"Checking by commit {str(commit)[:9]}, from which the workspace was made.", flush=True)
    with TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(scratch)
        (Path(scratch) / ".is-at-commit").touch()
        options = ["--seed", str(args.seed)] + (["--lab", args.lab] if args.lab else [])
        options += ["--json", str(args.json.resolve())] if args.json else []
        part = [str(args.part)] if args.part is not None else []
        command = [sys.executable, "-m", "nanopaged.lab", "check", str(workspace.folder), *part, *options]
        return subprocess.run(command, cwd=scratch, check=False).returncode


def _same(commit: str) -> bool:
    """Whether this checkout is of that commit, as far as it matters; also where there is no repository to ask."""
    if (CHECKOUT / ".is-at-commit").exists() or not (CHECKOUT / ".git").exists():
        return True
    return _git("diff", "--quiet", commit, "--", *GRADED_BY).returncode == 0


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, check=False)
