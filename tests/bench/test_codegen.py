"""The kernels' machine code, checked on any machine: no GPU is needed to compile for one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no Triton on this system")
from nanopaged.bench.codegen import DTYPES, TARGETS  # noqa: E402, it imports Triton
from nanopaged.paged_attention import PROGRAMS_PER_MULTIPROCESSOR  # noqa: E402
from tests.processes import run_python  # noqa: E402

KERNELS = ["write_kv", "prompt", "decode", "decode, split", "merge"]
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # of a multiprocessor, for programs
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def compile_for(arguments: list[str], file: Path) -> list[dict]:
    done = run_python("-m", "nanopaged.bench", "codegen", *arguments, "--json", file, environment=COMPILING,
                      timeout_s=600)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["figures"]["kernels"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict]:
    """(target, dtype, kernel) -> figures. In another process: here the kernels are defined for the interpreter."""
    kernels = compile_for([], tmp_path_factory.mktemp("compiled") / "figures")
    return {(kernel["target"], kernel["dtype"], kernel["kernel"]): kernel for kernel in kernels}


def test_every_kernel_that_the_engine_launches_compiles_for_every_target(compiled: dict) -> None:
    assert set(compiled) == {(target, dtype, kernel) for target in TARGETS for dtype in DTYPES for kernel in KERNELS}


def test_no_kernel_spills_registers(compiled: dict) -> None:
    assert {key: kernel["spills_bytes"] for key, kernel in compiled.items() if kernel["spills_bytes"]} == {}


def test_as_many_programs_fit_a_multiprocessor_as_the_split_rule_assumes(compiled: dict) -> None:
    for (target, dtype, name), kernel in compiled.items():
        decodes = PROGRAMS_PER_MULTIPROCESSOR if dtype != "float32" else PROGRAMS_PER_MULTIPROCESSOR - 1
        wanted = {"decode": decodes, "decode, split": decodes, "prompt": 2}
        if target in SHARED_BYTES and name in wanted:
            by_registers = 65536 // (-(-kernel["registers"] // 8) * 8 * kernel["threads"])
            by_shared_memory = SHARED_BYTES[target] // kernel["shared_bytes"]
            assert min(by_registers, by_shared_memory) >= wanted[name], (target, dtype, name)


def test_keys_and_values_are_loaded_16_bytes_at_a_time(compiled: dict) -> None:
    for (target, dtype, name), kernel in compiled.items():
        if target in SHARED_BYTES and name in ("prompt", "decode", "decode, split"):
            # A thread's part of a tile is 64 bytes or more, of K and of V: 8 wide loads, or at least 32 narrow ones.
            assert kernel["wide_loads"] >= 8, (target, dtype, name)
            assert kernel["narrow_loads"] <= 24, (target, dtype, name)


# Large heads in float32 need the most registers; small ones in float16 have the fewest bytes to load at once.
@pytest.mark.parametrize("shape", [["--head-dim=128", "--kv-heads=3", "--dtype=float16"],
                                   ["--head-dim=256", "--dtype=float32"], ["--head-dim=32", "--dtype=float16"]])
def test_kernels_for_models_of_other_shapes_do_not_spill_either(shape: list[str], tmp_path: Path) -> None:
    for kernel in compile_for(["--target=sm_90", *shape], tmp_path / "figures"):
        assert kernel["spills_bytes"] == 0, kernel
        assert kernel["wide_loads"] > 0 or kernel["kernel"] == "write_kv", kernel


def test_prompts_in_half_precision_run_on_tensor_cores(compiled: dict) -> None:
    for target in TARGETS:
        for dtype in ("float16", "bfloat16"):
            assert compiled[target, dtype, "prompt"]["tensor_core"] > 0, (target, dtype)


VARIED_RUN = """
from types import SimpleNamespace
import torch
from nanopaged.bench.codegen import instead_of_launching
from nanopaged.paged_attention import paged_attention_triton, write_kv_triton

def int32(values, shift):  # at an address that is aligned, or is not
    buffer = torch.zeros(len(values) + shift, dtype=torch.int32)
    buffer[shift:] = torch.tensor(values)
    return buffer[shift:]

with instead_of_launching("sm_90") as launches:
    for num_blocks in (1, 16, 33):
        pool = torch.zeros(2, 2, num_blocks, 2, 16, 64, dtype=torch.float16)
        for k_cache, v_cache in pool:
            for query_lens in ([1], [1, 1], [1] * 16, [1] * 17, [16], [17], [1, 33], [80, 1, 1], [0, 1]):
                for width in (1, 2, 16, 17, 33, 64):
                    for shift in (0, 1):
                        rows = torch.zeros(sum(query_lens), 6, 64, dtype=torch.float16)
                        q, k, v = rows.split(2, dim=1)
                        slots = int32([0] * len(q), shift)
                        write_kv_triton(k, v, k_cache, v_cache, slots)
                        starts = int32([0, *torch.tensor(query_lens).cumsum(0).tolist()], shift)
                        tables = int32([0] * (len(query_lens) * width), shift).view(-1, width)
                        lengths = int32([max(1, n) for n in query_lens], shift)
                        batch = SimpleNamespace(block_tables=tables, query_start=starts, seq_lens=lengths, plan=None,
                                                num_decodes=query_lens.count(1) if query_lens[0] == 1 else 0)
                        paged_attention_triton(q, k_cache, v_cache, batch, 0.125)
print(len(launches), sorted(name for name, _ in dict.fromkeys(launches)))
"""


def test_nothing_is_compiled_again_when_batch_lengths_or_pool_change() -> None:
    run = run_python("-c", VARIED_RUN, environment=COMPILING)
    launches, kernels = run.stdout.split(maxsplit=1)
    assert int(launches) > 1000
    assert kernels == "['decode_kernel', 'decode_kernel', 'merge_kernel', 'prompt_kernel', 'write_kv_kernel']\n"
