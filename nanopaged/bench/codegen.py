"""What machine code do the kernels become? Needs no GPU.

Triton is given a driver with no GPU behind it. The functions that the engine calls run as they are, on
tensors of its shapes and dtypes, up to the launch: so the code compiled here is the code that a GPU
would run. The figures are read from it: registers and spills (`cuobjdump -res-usage`), the width of the
loads from global memory, and whether matrix products use the tensor cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch

from nanopaged import attention_kernels, paged_attention
from nanopaged.attention_kernels import INTERPRETED, triton
from nanopaged.bench.inputs import uniform_batch
from nanopaged.paged_attention import paged_attention_triton, write_kv_triton
from nanopaged.progress import show_progress
from nanopaged.report import table

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # A100, H100, B200, MI300: kind, architecture, threads in a warp
DTYPES = ("float16", "bfloat16", "float32")
# In the machine code of NVIDIA from Ampere to Blackwell, and of AMD.
WIDE_LOAD = re.compile(r"LDG(STS)?\.E\.\S*128|(global|buffer)_load_dwordx4")
NARROW_LOAD = re.compile(r"LDG(STS)?\.E(?!\S*128)|(global|buffer)_load_(dword|short|ushort|ubyte)\w*")
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)|v_mfma")


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one target. Registers are per thread, memory in bytes per program or thread."""

    target: str
    dtype: str
    kernel: str
    threads: int
    registers: int
    spills_bytes: int
    shared_bytes: int
    wide_loads: int  # instructions that load 16 bytes a thread from global memory
    narrow_loads: int  # instructions that load less: lengths, block tables, sums of splits
    tensor_core: int  # instructions

    @property
    def programs(self) -> int | None:
        """Programs that fit the register file of an NVIDIA multiprocessor, 65,536 registers of 32 bits."""
        return 65536 // (-(-self.registers // 8) * 8 * self.threads) if self.target.startswith("sm_") else None


class NoDevice:
    """A driver that knows what to compile for, and has no GPU to run it on."""

    def __init__(self, target: str) -> None:
        self.target = triton.backends.compiler.GPUTarget(*TARGETS[target])

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def instead_of_launching(target: str) -> Iterator[list[tuple[str, object]]]:
    """Inside, kernels are compiled for `target` and not launched.

    Yields a list to which each launch adds (name, kernel): the same kernel, if Triton did not have to
    compile it again.
    """
    if INTERPRETED or triton is None:
        raise ValueError("compiling needs the triton package, and TRITON_INTERPRET unset")
    launches: list[tuple[str, object]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: object, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        launches.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only),
          mock.patch.object(paged_attention, "check_launch"),
          mock.patch.object(paged_attention, "ON_AMD", TARGETS[target][0] == "hip"),
          _driver(NoDevice(target))):
        yield launches


@contextmanager
def _driver(driver: NoDevice) -> Iterator[None]:
    kernels = [value for value in vars(attention_kernels).values() if isinstance(value, triton.runtime.jit.JITFunction)]
    before = triton.runtime.driver._active

    def forget() -> None:  # Triton caches kernels by device number, and each target here is number 0
        for kernel in kernels:
            kernel.device_caches.clear()

    forget()
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver._active = before
        forget()


def engine_calls(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int,
                 block_size: int) -> dict[str, Callable[[], object]]:
    """The attention calls that an engine makes, as functions: writing, a prompt, a decode of many and of few."""
    cache = torch.zeros(8, num_kv_heads, block_size, head_dim, dtype=dtype)

    def attend(num_requests: int, queries: int) -> None:
        qkv = torch.zeros(num_requests * queries, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
        tables = torch.zeros(num_requests, 1024 // block_size, dtype=torch.int32)
        paged_attention_triton(qkv[:, :num_heads], cache, cache, uniform_batch(tables, queries, 1024), head_dim**-0.5)

    def write() -> None:
        rows = torch.zeros(4, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)[:, num_heads:]
        write_kv_triton(rows[:, :num_kv_heads], rows[:, num_kv_heads:], cache, cache, torch.zeros(4, dtype=torch.int32))

    return {"write": write, "prompt": lambda: attend(2, 80), "decode of many": lambda: attend(256, 1),
            "decode of few": lambda: attend(1, 1)}


def compiled(targets: list[str], dtypes: list[str], num_heads: int = 12, num_kv_heads: int = 12, head_dim: int = 64,
             block_size: int = 16) -> list[Compiled]:
    """Every kernel variant that an engine with a model of these shapes launches, compiled for each target."""
    found = []
    for target in targets:
        with instead_of_launching(target) as launches:
            for dtype in dtypes:
                show_progress(f"compiling for {target}, {dtype}")
                for call in engine_calls(getattr(torch, dtype), num_heads, num_kv_heads, head_dim, block_size).values():
                    call()
                found += [_examine(target, dtype, name, kernel) for name, kernel in dict.fromkeys(launches)]
                launches.clear()
    return found


def _examine(target: str, dtype: str, name: str, kernel: object) -> Compiled:
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    name = name.strip("_").removesuffix("_kernel") + (", split" if constants.get("SPLIT") else "")
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage, code = (_tool("cuobjdump", option, file.name) for option in ("-res-usage", "-sass"))
        registers, local = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "LOCAL"))
        spills = local + int(re.search(r"STACK:(\d+)", usage).group(1))
    else:
        code = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{what}:\s*(\d+)", code).group(1))
                             for what in ("vgpr_count", "private_segment_fixed_size"))
    return Compiled(target, dtype, name, kernel.metadata.num_warps * TARGETS[target][2], registers, spills,
                    kernel.metadata.shared, *(len(re.findall(what, code)) for what in
                                              (WIDE_LOAD, NARROW_LOAD, TENSOR_CORE)))


def _tool(name: str, *arguments: str) -> str:
    """Runs one of the tools in Triton's package, and returns what it prints."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", action="append", choices=TARGETS, help="a GPU to compile for; may be repeated "
                        "(default: all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated (default: all)")
    for name, default in (("heads", 12), ("kv-heads", 12), ("head-dim", 64), ("block-size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    kernels = compiled(args.target or list(TARGETS), args.dtype or list(DTYPES), args.heads, args.kv_heads,
                       args.head_dim, args.block_size)
    show_progress("")
    print(table(
        ["target", "dtype", "kernel", "registers", "programs", "spilled B", "shared B", "16 B loads", "other loads",
         "tensor core"],
        [[k.target, k.dtype, k.kernel, k.registers, k.programs, k.spills_bytes, k.shared_bytes, k.wide_loads,
          k.narrow_loads, k.tensor_core] for k in kernels]))
    print("\nregisters: per thread. programs: how many fit the register file of a multiprocessor. spilled: bytes that"
          "\nfit no register, per thread; should be 0. shared: per program. loads: instructions that read global"
          "\nmemory, 16 bytes a thread (as K, V and Q should be) or less (lengths and block tables).")
    return {"kernels": [asdict(kernel) for kernel in kernels]}
