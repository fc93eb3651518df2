"""By which graders is a workspace checked? By those of the commit that it came from.

A course goes on while this repository changes. If it has changed since, that commit is taken out of the repository into
a folder of its own, and its own `check` is run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from nanopaged.lab.isolation import CHECKOUT
from nanopaged.lab.workspace import Workspace, git


def check_elsewhere(workspace: Workspace, args: argparse.Namespace) -> int | None:
    """The exit status of the check by the workspace's own commit; None if this checkout is just like it.

    Raises ValueError if the repository does not have that commit.
    """
    commit = workspace.state.get("commit")
    if commit is None or _same(str(commit)):
        return None
    with TemporaryDirectory() as scratch:
        tar = Path(scratch) / "checkout.tar"
        try:
            git(CHECKOUT, "archive", "--format=tar", f"--output={tar}", str(commit), "nanopaged")
        except ValueError as error:
            raise ValueError(f"{workspace.folder} was made from commit {commit}, which this repository does not have: "
                             f"fetch it, or check with the checkout that made the workspace ({error})") from None
        with tarfile.open(tar) as files:
            files.extractall(scratch)
        print(f"Checking by commit {str(commit)[:9]}, from which the workspace was made.", flush=True)
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
    try:
        return git(CHECKOUT, "diff", "--name-only", commit, "--", "nanopaged") == ""
    except ValueError:  # a commit that is not there
        return False
