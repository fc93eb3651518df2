"""Do the tests tell policy from contract? Another policy fails tests that are marked `policy`, and no others.

In a copy of the checkout a default is changed to another policy that is just as right; then the tests of what
schedules run there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.processes import run_python

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_block_allocator.py", "tests/test_scheduler.py", "tests/test_step.py",
         "tests/test_parallel_sampling.py", "tests/simulate/test_contiguous.py")
OTHER_POLICIES = {  # (file, what stands there, what takes its place)
    "cached blocks are reused before free ones": (
        "block_allocator.py", "if self._free else", "if self._free and not self._cached else"),
    "the shortest request is served first": (
        "waiting.py", "    return 0\n", "    return request.params.max_tokens\n"),
    "admission reserves the full length": (
        "waiting.py", "    return lambda context: context.available - context.prompt >= int(share * context.pool)\n",
        "    return lambda context: context.committed + context.full <= context.pool\n"),
}


# Runs these tests, random ones with four seeds: what another policy breaks, it breaks in most runs.
RUN = """
import sys
from collections import Counter
import pytest

class Few:
    def pytest_collection_modifyitems(self, items):
        runs = Counter()
        for item in items[:]:
            runs[item.function] += "seed" in getattr(item, "callspec", item).__dict__.get("params", ())
            if runs[item.function] > 4 or item.name == "test_the_random_mixtures_meet_every_pressure_often":
                items.remove(item)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            print("\\nfailed:", "policy" if "policy" in report.keywords else "contract", report.nodeid)

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Few()]))
"""


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
    done = run_python("-c", RUN, *TESTS, cwd=tmp_path, environment={**os.environ, "PYTEST_ADDOPTS": ""})
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr
    assert "contract" not in failed, f"tests of the contract fail when {change}:\n{done.stdout[-3000:]}"
    assert "policy" in failed, f"no test of a policy notices that {change}:\n{done.stdout[-3000:]}"
