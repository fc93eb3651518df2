"""On which device, in which dtype and by which attention does it run? What "auto" means, and what cannot be."""

from __future__ import annotations

import torch

from nanopaged.compiled_attention import COMPILED
from nanopaged.paged_attention import INTERPRETED, TRITON, triton
from nanopaged.torch_attention import TORCH, AttentionBackend
from nanopaged.validation import require_choice


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal() or (kind == "cpu" and int(index or 0)):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA "
                         "devices: use device='cpu', or install a driver and a CUDA build of torch")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def keep_freed_memory() -> None:
    """Has the C library keep what a step on a CPU frees, for the next layer, and not return it to the system.

    Memory that comes back from the system is handed out page by page, at up to a tenth of a step's time.
    glibc keeps twice the size of the largest block that it has seen freed, 32 MiB at most (mallopt(3),
    M_MMAP_THRESHOLD): so one is shown to it. Elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")  # torch.float16 itself is welcome too
    if require_choice("dtype", name, ("auto", "float32", "float16", "bfloat16")) == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def resolve_attention(attention: str, device: torch.device, compile: bool) -> AttentionBackend:
    require_choice("attention", attention, ("auto", "triton", "torch"))
    if require_choice("compile", compile, (True, False)):
        if device.type != "cpu" or attention == "triton":
            raise ValueError("compile=True is for the torch attention on a CPU: leave it out, or set device='cpu' and "
                             "attention='torch'")
        return COMPILED
    if attention == "torch" or (attention == "auto" and (device.type == "cpu" or triton is None)):
        return TORCH
    if triton is None:
        raise ValueError("attention='triton' needs the triton package, which is not installed: use attention='torch'")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention='triton' on a CPU runs only in Triton's interpreter: set the environment variable "
                         "TRITON_INTERPRET=1 before starting Python, or use attention='torch'")
    return TRITON
