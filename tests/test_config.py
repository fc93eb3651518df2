"""Each option is checked where it is given, and becomes the part of the engine that it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import nanopaged
from nanopaged import LLM, SamplingParams, config
from nanopaged.block_allocator import BlockAllocator
from nanopaged.config import (
    EngineConfig,
    admission_policy,
    attach_storm_watch,
    has_folder,
    make_scheduler,
    order_policy,
    prepare_model,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from nanopaged.gpt2 import GPT2Config
from nanopaged.models.tokenizer import Tokenizer, byte_encoding
from nanopaged.paged_attention import TRITON
from nanopaged.request import Request
from nanopaged.scheduler import Scheduler
from nanopaged.torch_attention import TORCH
from nanopaged.waiting import AdmissionContext, fcfs
from tests.oracle import TINY, continue_densely, tiny_model

needs_pressure = pytest.mark.skipif(not has_folder("pressure"), reason="pressure/ is not there")
needs_fast = pytest.mark.skipif(not has_folder("fast"), reason="fast/ is not there")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HUGE, NAN, INFINITY = 10**30, math.nan, math.inf
MODEL = tiny_model()  # of 61 tokens, without a tokenizer
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)


def build(**options: object) -> LLM:
    return LLM(MODEL, **{"device": "cpu", "block_size": 8, "num_blocks": 4} | options)


def assert_refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, f"no short line: {message[:1000]}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(("option", "value", "error", "words"), [
    ("block_size", 12, ValueError, "must be a power of two from 8 to 256, got 12"),
    ("block_size", 4, ValueError, "from 8 to 256, got 4"),
    ("block_size", 512, ValueError, "from 8 to 256, got 512"),
    ("block_size", HUGE, ValueError, "from 8 to 256"),
    ("block_size", 16.0, TypeError, "must be an int, got 16.0 (float)"),
    ("block_size", True, TypeError, "got True (bool)"),
    ("block_size", None, TypeError, "got None"),
    ("block_size", np.int64(8), TypeError, "(int64)"),
    ("num_blocks", 0, ValueError, "must be at least 1, got 0"),
    ("num_blocks", -1, ValueError, "must be at least 1, got -1"),
    ("num_blocks", "many", TypeError, "must be an int, got 'many' (str)"),
    ("num_blocks", 4.0, TypeError, "got 4.0"),
    ("gpu_memory_utilization", 0, ValueError, "must be in (0, 1], got 0"),
    ("gpu_memory_utilization", 1.5, ValueError, "from 0.0 to 1.0, got 1.5"),
    ("gpu_memory_utilization", NAN, ValueError, "finite"),
    ("gpu_memory_utilization", INFINITY, ValueError, "finite"),
    ("gpu_memory_utilization", None, TypeError, "must be a number, got None"),
    ("gpu_memory_utilization", True, TypeError, "got True"),
    ("max_model_len", 0, ValueError, "must be at least 2, got 0"),
    ("max_model_len", 1, ValueError, "must be at least 2, got 1"),
    ("max_model_len", 50.0, TypeError, "must be an int"),
    ("max_num_seqs", 0, ValueError, "must be at least 1"),
    ("max_num_seqs", None, TypeError, "must be an int"),
    ("max_num_seqs", 2.0, TypeError, "must be an int"),
    ("max_num_batched_tokens", -1, ValueError, "must be at least 1, got -1"),
    ("max_num_batched_tokens", "8", TypeError, "must be an int"),
    ("enforce_eager", 1, TypeError, "must be a bool, got 1 (int)"),
    ("compile", "yes", TypeError, "must be a bool"),
    ("enable_prefix_caching", 1, TypeError, "must be a bool, got 1 (int)"),
    ("enable_prefix_caching", None, TypeError, "must be a bool"),
    ("watermark", NAN, ValueError, "must be finite, got nan"),
    ("watermark", 1.1, ValueError, "from 0.0 to 1.0"),
    ("watermark", -0.1, ValueError, "from 0.0 to 1.0"),
    ("watermark", "1%", TypeError, "must be a number"),
    ("admission", "eager", ValueError, "must be one of 'watermark', 'reserve', 'greedy', got 'eager'"),
    ("admission", None, TypeError, "must be a str"),
    ("order", "lifo", ValueError, "must be one of 'fcfs', 'priority', 'shortest', got 'lifo'"),
    ("order", 1, TypeError, "must be a str"),
    ("max_waiting", 0, ValueError, "must be at least 1, got 0"),
    ("max_waiting", 1.5, TypeError, "must be an int"),
    ("max_waiting", True, TypeError, "must be an int"),
    ("preemption", "drop", ValueError, "must be one of 'recompute', 'swap', got 'drop'"),
    ("preemption", None, TypeError, "must be a str"),
    ("preemption", b"swap", TypeError, "got b'swap'"),
    ("preemption", max, TypeError, "must be a str"),
    ("swap_blocks", 0, ValueError, "must be at least 1"),
    ("swap_blocks", None, TypeError, "must be an int"),
    ("swap_blocks", 1.0, TypeError, "must be an int"),
    ("seed", None, TypeError, "must be an int"),
    ("seed", 1.5, TypeError, "must be an int"),
    ("seed", True, TypeError, "must be an int"),
    ("seed", 2**128 + 1, ValueError, "seed must be from"),
    ("tokenizer", "gpt2", TypeError, "must be a Tokenizer, got 'gpt2' (str)"),
    ("tokenizer", byte_encoding(), TypeError, "must be a Tokenizer"),
    ("tokenizer", Tokenizer, TypeError, "must be a Tokenizer"),
    ("tokenizer", 0, TypeError, "must be a Tokenizer, got 0"),
    ("nonsense", 1, TypeError, "unexpected keyword argument 'nonsense'"),
])
def test_an_invalid_option_is_named_with_what_is_allowed(option: str, value: object, error: type, words: str) -> None:
    assert_refused(lambda: EngineConfig(**{option: value}), error, option, words)
    assert_refused(lambda: build(**{option: value}), error, option, words)


@pytest.mark.parametrize(("option", "value", "error", "words"), [
    ("device", "tpu", ValueError, "must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    ("device", None, ValueError, "got None"),
    ("device", 0, ValueError, "got 0"),
    ("device", "", ValueError, "got ''"),
    ("device", "cuda:-1", ValueError, "got 'cuda:-1'"),
    ("device", "cuda:99", ValueError, "CUDA devices"),
    ("device", f"cuda:{HUGE}", ValueError, "CUDA devices"),
    ("device", "cuda:²", ValueError, "got 'cuda:²'"),
    ("device", torch.device("meta"), ValueError, "must be 'auto'"),
    ("device", "cpu:99", ValueError, "'cpu:99'"),
    ("dtype", "int8", ValueError, "must be one of 'auto', 'float32', 'float16', 'bfloat16', got 'int8'"),
    ("dtype", torch.float64, ValueError, "got 'float64'"),
    ("dtype", None, ValueError, "got 'None'"),
    ("attention", "flash", ValueError, "must be one of 'auto', 'triton', 'torch', got 'flash'"),
    ("attention", None, TypeError, "must be a str, got None"),
    ("attention", ["torch"], TypeError, "must be a str"),
    ("max_model_len", 97, ValueError, "from 2 to 96, got 97"),
    ("max_model_len", HUGE, ValueError, "from 2 to 96"),
    ("num_blocks", HUGE, ValueError, f"268435456, got {HUGE}"),
    ("num_blocks", 2**28 + 1, ValueError, "268435456, got 268435457"),
    ("tokenizer", Tokenizer(byte_encoding()), ValueError, "the tokenizer has 257 ids, the model 61"),
])
def test_an_option_that_does_not_fit_the_device_or_the_model_is_named(
    option: str, value: object, error: type, words: str
) -> None:
    assert_refused(lambda: build(**{option: value}), error, option, words)


@pytest.mark.parametrize(("options", "words"), [
    pytest.param({"num_blocks": 2**28}, "there is no memory for a KV cache of 268435456 blocks", id="memory"),  # 1 TiB
    pytest.param({"preemption": "swap", "swap_blocks": HUGE}, "swap_blocks must be", id="swap slots",
                 marks=needs_pressure),
    pytest.param({"preemption": "swap", "swap_blocks": 2**28}, "lower swap_blocks", id="swap memory",
                 marks=needs_pressure),
    pytest.param({"admission": lambda context: True, "watermark": "1%"}, "watermark must be a number", id="watermark"),
])
def test_options_that_do_not_go_together_say_which(options: dict[str, object], words: str) -> None:
    assert_refused(lambda: build(**options), (TypeError, ValueError), words)


def test_options_cannot_change_and_must_be_named() -> None:
    options = EngineConfig(block_size=32)
    for field in fields(options):
        with pytest.raises(FrozenInstanceError):
            setattr(options, field.name, getattr(options, field.name))
    with pytest.raises(TypeError, match="positional"):
        EngineConfig("cpu")
    assert options == EngineConfig(block_size=32) != EngineConfig()


def test_every_option_is_documented() -> None:
    for field in fields(EngineConfig):
        documented = (f"        {field.name}: ", f"`{field.name}`")  # an entry of its own, or within another's
        assert any(words in EngineConfig.__doc__ for words in documented), field.name


def test_an_engine_has_the_options_it_was_given_with_the_defaults_settled() -> None:
    llm = build(max_num_seqs=7)
    assert llm.config == EngineConfig(device="cpu", block_size=8, num_blocks=4, max_num_seqs=7, max_model_len=96,
                                      max_num_batched_tokens=512)
    assert EngineConfig().max_model_len is None


@pytest.mark.parametrize("device, budget", [(CPU, 512), (CUDA, 2048)], ids=str)
def test_the_model_and_the_device_decide_what_is_not_given(device: torch.device, budget: int) -> None:
    settled = EngineConfig().settled(TINY, device, TORCH)
    assert (settled.max_model_len, settled.max_num_batched_tokens) == (96, budget)
    given = EngineConfig(max_model_len=50, max_num_batched_tokens=7, seed=3)
    assert given.settled(TINY, device, TORCH) == given


def test_sizes_that_the_kernels_do_not_take_are_refused_only_for_the_kernels() -> None:
    odd = GPT2Config(vocab_size=9, n_positions=96, n_embd=48, n_layer=1, n_head=2)  # a head_dim of 24
    EngineConfig().settled(odd, CPU, TORCH)
    assert_refused(lambda: EngineConfig().settled(odd, CPU, TRITON), ValueError, "head_dim", "got 16 and 24",
                   "use attention='torch'")


@pytest.mark.parametrize("given, resolved", [("cpu", CPU), ("cpu:0", torch.device("cpu:0")), (CPU, CPU)], ids=str)
def test_a_device_is_resolved_by_its_name(given: object, resolved: torch.device) -> None:
    assert resolve_device(given) == resolved


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_cuda_where_there_is_a_cuda_device(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * available)
    assert resolve_device("auto") == (CUDA if available else CPU)
    if available:
        assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("cuda") == CUDA
    assert_refused(lambda: resolve_device("cuda:2"), ValueError, "'cuda:2' was asked for, but torch sees",
                   f"{2 * available} CUDA devices", "use device='cpu'")


@pytest.mark.parametrize("given, device, resolved", [
    ("auto", CPU, torch.float32), ("auto", CUDA, torch.float16), ("bfloat16", CPU, torch.bfloat16),
    ("float32", CUDA, torch.float32), (torch.float16, CPU, torch.float16),
], ids=str)
def test_a_dtype_is_resolved_by_its_name_or_itself(given: object, device: torch.device, resolved: torch.dtype) -> None:
    assert resolve_dtype(given, device) == resolved


@pytest.mark.parametrize("attention, device", [("auto", CPU), ("torch", CPU), ("torch", CUDA)], ids=str)
def test_torch_attention_is_used_on_a_cpu_and_where_it_is_asked_for(attention: str, device: torch.device) -> None:
    assert resolve_attention(EngineConfig(attention=attention), device) is TORCH


def test_triton_is_used_on_cuda_and_in_its_interpreter() -> None:
    pytest.importorskip("triton", reason="there is no Triton on this system")
    assert resolve_attention(EngineConfig(), CUDA) is TRITON
    assert resolve_attention(EngineConfig(attention="triton"), CUDA) is TRITON
    if config.INTERPRETED:
        assert resolve_attention(EngineConfig(attention="triton"), CPU) is TRITON


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="there is no Triton on this system")
    monkeypatch.setattr(config, "INTERPRETED", False)
    assert_refused(lambda: build(attention="triton"), ValueError, "TRITON_INTERPRET=1", "use attention='torch'")


def test_without_the_triton_package_torch_is_used_unless_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "triton", None)
    assert resolve_attention(EngineConfig(), CUDA) is TORCH
    assert_refused(lambda: resolve_attention(EngineConfig(attention="triton"), CUDA), ValueError,
                   "attention='triton' needs the triton package", "use attention='torch'")


@needs_fast
@pytest.mark.parametrize("options, device", [({}, CUDA), ({"attention": "triton"}, CPU)], ids=str)
def test_compiling_is_refused_where_it_does_not_apply(options: dict[str, str], device: torch.device) -> None:
    assert_refused(lambda: resolve_attention(EngineConfig(compile=True, **options), device), ValueError,
                   "compile=True is for the torch attention on a CPU", "attention='torch'")


def test_a_policy_of_ones_own_is_used_as_it_is() -> None:
    def never(now: AdmissionContext) -> bool:
        return False

    def by_length(request: Request) -> float:
        return request.num_prompt_tokens

    options = EngineConfig(admission=never, order=by_length)
    assert admission_policy(options) is never and order_policy(options) is by_length


def test_policies_that_need_no_folder_are_resolved_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_folder", lambda name: False)
    options = EngineConfig(watermark=0.05)
    assert order_policy(options) is fcfs
    context = partial(AdmissionContext, pool=100, committed=90, chunk=1, prompt=5, full=20)
    admits = admission_policy(options)
    assert admits(context(available=10)) and not admits(context(available=9))


@needs_pressure
def test_policies_are_resolved_by_their_names() -> None:
    from nanopaged.pressure import admission, order

    assert admission_policy(EngineConfig(admission="reserve")) is admission.reserve
    assert admission_policy(EngineConfig(admission="greedy")) is admission.greedy
    assert order_policy(EngineConfig(order="priority")) is order.priority
    assert order_policy(EngineConfig(order="shortest")) is order.shortest


def test_the_scheduler_gets_its_options() -> None:
    options = EngineConfig(max_num_seqs=3, max_waiting=5).settled(TINY, CPU, TORCH)
    scheduler = make_scheduler(options, 7)
    assert type(scheduler) is Scheduler
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.max_model_len) == (3, 512, 96)
    assert scheduler.max_waiting == 5 and scheduler.allocator.num_blocks == 7 and scheduler.order is fcfs


@needs_pressure
def test_swapping_gets_a_scheduler_of_its_own() -> None:
    from nanopaged.pressure.swap_space import SwappingScheduler

    options = EngineConfig(preemption="swap", swap_blocks=9).settled(TINY, CPU, TORCH)
    scheduler = make_scheduler(options, 7)
    assert type(scheduler) is SwappingScheduler and scheduler.swap_space.num_blocks == 9


@pytest.mark.parametrize("options, folder", [
    ({"admission": "reserve"}, "pressure"), ({"admission": "greedy"}, "pressure"), ({"order": "priority"}, "pressure"),
    ({"order": "shortest"}, "pressure"), ({"preemption": "swap"}, "pressure"), ({"compile": True}, "fast"),
], ids=str)
def test_an_option_whose_folder_is_missing_says_so(
    options: dict[str, object], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "has_folder", lambda name: name != folder)
    (name, value), = options.items()
    assert_refused(lambda: EngineConfig(**options), ValueError,
                   f"{name}={value!r} needs the folder nanopaged/{folder}/", "missing: restore it")


def test_defaults_whose_folder_is_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_folder", lambda name: False)
    llm = build()
    assert llm.storm_watch is None and llm.scheduler.listeners == [llm.scheduler.stats]
    assert [type(module) for module in llm.model.modules()] == [type(module) for module in MODEL.modules()]
    (output,) = llm.generate([[1, 2, 3]], GREEDY)
    assert output.outputs[0].token_ids == continue_densely(MODEL, [1, 2, 3], GREEDY)
    stats = llm.stats()
    assert (stats.num_storms, stats.swap_blocks, stats.goodput) == (0, 0, 1.0)


@needs_pressure
def test_defaults_whose_folder_is_there_are_attached() -> None:
    from nanopaged.pressure.storm import StormWatch

    scheduler = Scheduler(BlockAllocator(7, 16), 3, 512, 96)
    watch = attach_storm_watch(scheduler)
    assert isinstance(watch, StormWatch) and watch.num_blocks == 7
    assert scheduler.listeners == [scheduler.stats, watch]


@needs_fast
def test_a_model_gets_the_modules_that_are_fast_on_its_device() -> None:
    from nanopaged.fast.cpu import CpuLinear, CpuMLP

    model = tiny_model()
    prepare_model(model, torch.device("meta"), torch.float16)
    assert model.wte.weight.is_meta and model.wte.weight.dtype == torch.float16
    assert not any(isinstance(module, CpuLinear) for module in model.modules())
    model = tiny_model()
    prepare_model(model, CPU, torch.bfloat16)
    assert model.wte.weight.dtype == torch.bfloat16
    assert all(isinstance(block.mlp, CpuMLP) for block in model.h)


def test_a_folder_is_there_if_it_is_a_package_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanopaged, "__path__", [*nanopaged.__path__, str(tmp_path)])
    (tmp_path / "left_over" / "__pycache__").mkdir(parents=True)  # what deleting the sources leaves
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "__init__.py").touch()
    assert has_folder("models") and has_folder("whole")
    assert not has_folder("left_over") and not has_folder("nonsense")
