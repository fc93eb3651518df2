"""`python -m nanopaged.bench gpu`, which needs one."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from nanopaged.bench import decode, gpu, kernel
from nanopaged.bench.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_both_commands_run_with_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (kernel, decode):
        monkeypatch.setattr(module, "run", vars)
    figures = gpu.run(Namespace())
    assert figures["kernel"] == {"block_size": 16, "shape": None}
    assert figures["decode"] == {"requests": None, "context": None, "layers": 12, "dtype": None}
