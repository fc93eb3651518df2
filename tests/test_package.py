"""What `import nanopaged` does: public names when they are used, and a setting for torch's threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanopaged

ROOT = Path(__file__).parents[1]
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize("own, expected", [
    ({}, ["1000", None]), ({"GOMP_SPINCOUNT": "7"}, ["7", None]), ({"OMP_WAIT_POLICY": "active"}, [None, "active"])])
def test_threads_sleep_after_a_while_unless_the_user_has_said_how_they_wait(
    own: dict[str, str], expected: list[str | None]
) -> None:
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    program = f"import os, sys, nanopaged; print([os.environ.get(name) for name in {SETTINGS}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=others | own, capture_output=True, text=True)
    assert done.stdout == f"{expected} False\n", done.stderr


def test_every_public_name_is_there_and_no_other() -> None:
    for name in nanopaged.__all__:
        assert getattr(nanopaged, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'nanopaged' has no attribute 'nonsense'"):
        nanopaged.nonsense  # noqa: B018
