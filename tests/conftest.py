"""What all tests share: Triton's interpreter where there is no GPU, and the marker for tests that need one."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)  # the tensors of most tests are so small that a second thread only costs
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before nanopaged is imported


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "policy: holds for one policy (of order, admission or eviction) only")
    config.addinivalue_line("markers", "gpu_too: runs anywhere, and on a CUDA device where there is one")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
        if "gpu_too" in item.keywords and HAS_GPU:
            item.add_marker(pytest.mark.gpu)
