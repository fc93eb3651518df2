"""Who has computed it? Kernels whose launches are written down, and a torch that does no arithmetic meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from nanopaged import paged_attention
from nanopaged.lab.grading import Failed, expect

OVERWRITTEN = {"prompt_kernel": ("out",), "decode_kernel": ("out", "log_sums"), "merge_kernel": ("out",)}
WITHOUT_ARITHMETIC = {  # what a launcher may do with tensors
    "__get__", "__len__", "__getitem__", "__repr__", "__format__", "dim", "size", "stride", "numel", "element_size",
    "is_contiguous", "storage_offset", "data_ptr", "untyped_storage", "get_device", "empty", "empty_like", "new_empty",
    "empty_strided", "zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full", "fill_", "zero_", "view",
    "view_as", "reshape", "flatten", "unflatten", "expand", "narrow", "select", "as_strided", "unsqueeze", "squeeze",
    "transpose", "permute", "t", "split", "chunk", "unbind", "detach", "clone", "contiguous", "copy_", "to", "float",
    "half", "bfloat16",
}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Watched(TorchFunctionMode):
    """While it is entered, launches are written down, and torch's arithmetic is refused.

    What a kernel must overwrite is NaN before it starts. So a place that it leaves out shows, and one that is read
    without having been written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.in_kernel = False
        self.spoiled: set[int] = set()

    def __enter__(self) -> Watched:
        self.patches = [mock.patch.object(paged_attention, name, _Standing(self, name, getattr(paged_attention, name)))
                        for name in ("write_kv_kernel", *OVERWRITTEN)]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if not self.in_kernel and name not in WITHOUT_ARITHMETIC:
            raise Failed(f"what launches the kernels should leave the computing to them, and calls torch's {name}")
        return function(*args, **(kwargs or {}))

    def spoil(self, launch: Launch) -> None:
        for name in OVERWRITTEN.get(launch.kernel, ()):
            tensor = launch.arguments.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.spoiled:
                self.spoiled.add(tensor.untyped_storage().data_ptr())
                tensor.fill_(torch.nan)


class _Standing:
    """In place of a kernel."""

    def __init__(self, watched: Watched, name: str, kernel: Any) -> None:
        self.watched, self.name, self.kernel = watched, name, kernel
        self.parameters = list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.watched.launches.append(Launch(self.name, grid, dict(zip(self.parameters, arguments)) | options))
            self.watched.in_kernel = True
            try:
                self.watched.spoil(self.watched.launches[-1])
                self.kernel[grid](*arguments, **options)
            finally:
                self.watched.in_kernel = False

        return launch


def expect_launched(watched: Watched, *kernels: str) -> None:
    launched = [launch.kernel for launch in watched.launches]
    expect(launched == list(kernels), f"this should launch {', '.join(kernels) or 'nothing'}, and launched "
           f"{', '.join(launched) or 'nothing'}")
