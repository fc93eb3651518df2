"""Do the tests tell policy from contract? Another policy fails tests that are marked `policy`, and no others.

In a copy of the checkout a default is changed to another policy that is just as right; then the tests of what
schedules run there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_block_allocator.py", "tests/test_scheduler.py", "tests/test_step.py",
         "tests/test_parallel_sampling.py", "tests/simulate/test_contiguous.py")
OTHER_POLICIES = {  # (file, what stands there, what takes its place)
    "cached blocks are reused before free ones": (
        "block_allocator.py", "        if self._free:\n", "        if self._free and not self._cached:\n"),
    "the shortest request is served first": (
        "waiting.py", "    return 0\n", "    return request.params.max_tokens\n"),
    "admission reserves the full length": (
        "waiting.py", "    return lambda context: context.available - context.prompt >= int(share * context.pool)\n",
        "    return lambda context: context.committed + context.full <= context.pool\n"),
}


def run_tests(checkout: Path, marks: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, *TESTS],
                          cwd=checkout, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""})
    return done.returncode, done.stdout


@pytest.mark.parametrize("change", OTHER_POLICIES)
def test_another_policy_fails_its_own_tests_and_no_others(change: str, tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("nanopaged", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    name, before, after = OTHER_POLICIES[change]
    path = tmp_path / "nanopaged" / name
    source = path.read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{name} has changed: {before!r} stands there {source.count(before)} times"
    path.write_text(source.replace(before, after), encoding="utf-8")
    contract, output = run_tests(tmp_path, "not policy")
    assert contract == 0, f"tests of the contract fail when {change}:\n{output[-3000:]}"
    policy, output = run_tests(tmp_path, "policy")
    assert policy == 1, f"no test of a policy notices that {change}:\n{output[-3000:]}"
