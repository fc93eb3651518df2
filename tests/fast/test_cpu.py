"""A model with the CPU's modules is the same function with the same parameters, and what a step frees is kept."""

from __future__ import annotations

import copy
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopaged.fast.cpu import FEW_ROWS, CpuLinear, CpuMLP, gelu, pad_rows, project, use_cpu_kernels
from nanopaged.gpt2 import GPT2, GPT2Config
from tests.test_gpt2 import Pool, random_model

ROOT = Path(__file__).parents[2]
CONFIG = GPT2Config(vocab_size=61, n_positions=260, n_embd=32, n_layer=2, n_head=2)
ROWS = [1, 5, 6, 8, 9, 31, 256, 257]  # padded or not, and past the last for which W x^T is computed
TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.01, torch.bfloat16: 0.07}  # of logits up to 10: one rounding, or so


def plain_and_swapped(dtype: torch.dtype = torch.float32) -> tuple[GPT2, GPT2]:
    """The same weights twice, in plain modules and in the CPU's."""
    plain = random_model(CONFIG, seed=0).to(dtype)
    swapped = copy.deepcopy(plain)
    use_cpu_kernels(swapped)
    return plain, swapped


def paged_logits(model: GPT2, tokens: torch.Tensor) -> torch.Tensor:
    """Of all rows of one step."""
    pool = Pool(model, 40, random.Random(0))
    request = pool.request(tokens.tolist())
    return pool.all_rows([request], [len(tokens)])[request]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_logits_stay_the_same_for_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    plain, swapped = plain_and_swapped(dtype)
    tokens = torch.arange(rows) * 7 % CONFIG.vocab_size
    for logits_of in (GPT2.dense, paged_logits):
        got, wanted = logits_of(swapped, tokens), logits_of(plain, tokens)
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=0,
                                   msg=lambda m: f"{logits_of.__name__}: {m}")


def test_all_products_and_the_gelu_are_swapped_and_the_parameters_stay() -> None:
    plain, swapped = plain_and_swapped()
    assert list(swapped.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(swapped.state_dict()[name], tensor), name
    assert not any(isinstance(module, torch.nn.Linear) for module in swapped.modules())
    for block in swapped.h:
        assert isinstance(block.mlp, CpuMLP) and isinstance(block.attn.c_attn, CpuLinear)
    assert swapped.head.func is project and swapped.head.keywords["weight"] is swapped.wte.weight


def test_swapping_copies_no_parameter() -> None:
    model = random_model(CONFIG, seed=0)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    use_cpu_kernels(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_a_model_whose_modules_are_swapped_already_stays_as_it_is() -> None:
    plain, swapped = plain_and_swapped()
    use_cpu_kernels(swapped)
    tokens = torch.arange(9)
    assert list(swapped.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(swapped.dense(tokens), plain.dense(tokens), atol=TOLERANCE[torch.float32], rtol=0)


def test_a_copy_of_a_swapped_model_computes_with_its_own_parameters() -> None:
    _, swapped = plain_and_swapped()
    tokens = torch.arange(9)
    before = swapped.dense(tokens)
    twin = copy.deepcopy(swapped)
    for parameter in swapped.parameters():
        parameter.zero_()
    torch.testing.assert_close(twin.dense(tokens), before, atol=0, rtol=0)


@pytest.mark.parametrize("rows", [1, 5, 6, 8, 9, 16, 31, 64, FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1])
def test_a_projection_is_the_same_product_for_any_number_of_rows_in_any_layout(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 12), (7, 12), (7,)))
    for layout in (x, x.t().contiguous().t(), torch.randn(rows, 24)[:, ::2].copy_(x)):
        torch.testing.assert_close(project(layout, weight, bias), x @ weight.t() + bias)
        torch.testing.assert_close(project(layout, weight), x @ weight.t())


@pytest.mark.parametrize("rows, padded", [(1, 1), (5, 5), (6, 8), (8, 8), (9, 16), (31, 32), (255, 256), (256, 256),
                                          (257, 257)])
def test_rows_are_padded_with_zeros_to_a_multiple_of_eight_where_that_is_faster(rows: int, padded: int) -> None:
    x = torch.randn(rows, 3)
    result = pad_rows(x)
    assert result.shape == (padded, 3)
    assert torch.equal(result[:rows], x) and not result[rows:].any()


def test_gelu_is_torchs_own_by_tanh_for_any_size_layout_and_dtype() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e20, -1e20, 3e38, -3e38])])
    for values in (x, x[::3], x.bfloat16(), x.double()):
        before = values.clone()
        torch.testing.assert_close(gelu(values), torch.nn.functional.gelu(values, approximate="tanh"))
        assert torch.equal(values, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_what_a_step_on_a_cpu_frees_is_kept_for_the_next() -> None:
    code = """if True:
        import ctypes, resource
        from nanopaged import LLM
        from nanopaged.gpt2 import GPT2, GPT2Config
        if {engine}:
            LLM(GPT2(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)), device="cpu", num_blocks=4)
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        size = 8 << 20
        for i in range(12):
            if i == 2:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            hidden = [ctypes.c_void_p(libc.malloc(size)) for _ in range(3)]
            for memory in hidden:
                libc.memset(memory, 1, size)
            for memory in hidden:
                libc.free(memory)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    pages = [int(subprocess.run([sys.executable, "-c", code.format(engine=engine)], cwd=ROOT, capture_output=True,
                                text=True, check=True).stdout) for engine in (True, False)]
    assert 10 * pages[0] < pages[1], f"{pages[0]} pages came from the system, and {pages[1]} without an engine"
