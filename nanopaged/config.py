"""Which options does `LLM` have, and which part does each select?

`EngineConfig` holds all options of `LLM`, checked when it is made. The functions below it turn them
into parts of an engine. They alone reach into the optional folders `pressure/` and `fast/`: a default
from there is attached if its folder exists; one that was asked for and is missing is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from nanopaged.attention_kernels import INTERPRETED, triton
from nanopaged.block_allocator import BlockAllocator
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.tokenizer import Tokenizer
from nanopaged.outputs import EngineStats
from nanopaged.paged_attention import TRITON, check_kernel_sizes
from nanopaged.sampling import sampling_bytes
from nanopaged.scheduler import Scheduler
from nanopaged.step import Step
from nanopaged.torch_attention import TORCH, AttentionBackend
from nanopaged.validation import has_folder, require_choice, require_int, require_number, require_seed, shown
from nanopaged.waiting import AdmissionPolicy, OrderPolicy, fcfs, watermark

if TYPE_CHECKING:
    from nanopaged.pressure.storm import StormWatch

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of `LLM`, checked here as far as they do not depend on the machine and the model.

    Attributes:
        device: "auto" (CUDA if there is a CUDA device, else the CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float16 on CUDA, float32 on a CPU), "float32", "float16" or "bfloat16".
        attention: "auto" (Triton on CUDA, torch on a CPU), "triton" or "torch". Triton runs on a
            CPU only in its interpreter, which the environment variable TRITON_INTERPRET=1 turns on.
        compile: compile the torch attention of decoding requests, on a CPU; see `compiled_attention`.
        enforce_eager: launch every kernel of a decode step from Python, instead of replaying CUDA
            graphs. Without CUDA and Triton this is always so.
        block_size: tokens in a block, a power of two from 8 to 256.
        num_blocks: blocks in the pool; None: as many as fit the memory that is free once the model is loaded.
        gpu_memory_utilization: share of a GPU's memory to use in all, in (0, 1]. On a CPU, which
            other programs share, the pool takes a quarter of this share of what is free.
        max_model_len: longest prompt plus output, in tokens; None: the model's context.
        max_num_seqs: requests in one step at most.
        max_num_batched_tokens: tokens in one step at most; None: 2048 on a GPU, and 512 on a CPU, where
            what a layer passes to the next operation then stays in the processor's cache.
        enable_prefix_caching: let requests with a common prefix share its blocks.
        admission: which request is admitted beside running ones: "watermark" (if it fits while this share of
            the pool stays free), "reserve" (if it fits at full length: none is ever preempted), "greedy" (if it
            fits this instant), or a function of one's own, see `waiting.AdmissionContext`.
        watermark: share of the pool, from 0 to 1, that the policy of this name leaves free.
        order: which request is served first: "fcfs" (in order of arrival), "priority" (the lowest `priority` of
            `add_request`), "shortest" (the smallest `max_tokens`), or a function of one's own from a
            `request.Request` to a number, lower first; see `pressure/order.py` for which of them starve whom.
        max_waiting: requests that may wait; None: any number. `generate` then sends its prompts in
            as there is room; `add_request` raises TooManyWaiting.
        preemption: what happens to the KV of a request that gives way: "recompute" it later, or
            "swap" it to `swap_blocks` blocks of CPU memory, and recompute what does not fit there.
        seed: seeds the requests that bring no seed of their own.
        tokenizer: for a GPT2 given as `model`. None: bytes if its vocabulary is 257, else prompts
            must be token ids and outputs have no text.

    Raises TypeError or ValueError for an invalid option, with what was given and what is allowed.
    """

    device: str = "auto"
    dtype: str | torch.dtype = "auto"
    attention: str = "auto"
    compile: bool = False
    enforce_eager: bool = False
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    admission: str | AdmissionPolicy = "watermark"
    watermark: float = 0.01
    order: str | OrderPolicy = "fcfs"
    max_waiting: int | None = None
    preemption: str = "recompute"
    swap_blocks: int = 1024
    seed: int = 0
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        require_choice("dtype", str(self.dtype).removeprefix("torch."), DTYPES)  # torch.float16 itself is welcome too
        require_choice("attention", self.attention, ("auto", "triton", "torch"))
        for name in ("compile", "enforce_eager", "enable_prefix_caching"):
            require_choice(name, getattr(self, name), (True, False))
        require_int("block_size", self.block_size, 8, 256)
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two from 8 to 256, got {self.block_size}")
        for name, least in (("num_blocks", 1), ("max_model_len", 2), ("max_num_batched_tokens", 1), ("max_waiting", 1)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least)
        if require_number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0) == 0.0:
            raise ValueError("gpu_memory_utilization must be in (0, 1], got 0")
        require_int("max_num_seqs", self.max_num_seqs, 1)
        require_number("watermark", self.watermark, 0.0, 1.0)
        # Of each, the first needs no optional folder.
        for name, choices in (("admission", ("watermark", "reserve", "greedy")),
                              ("order", ("fcfs", "priority", "shortest")), ("preemption", ("recompute", "swap"))):
            value = getattr(self, name)
            if name != "preemption" and callable(value):
                continue
            if require_choice(name, value, choices) != choices[0]:
                require_folder("pressure", f"{name}={value!r}")
        if self.compile:
            require_folder("fast", "compile=True")
        require_int("swap_blocks", self.swap_blocks, 1)
        require_seed("seed", self.seed)
        if self.tokenizer is not None and not isinstance(self.tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a Tokenizer, got {shown(self.tokenizer)}")

    @property
    def host_blocks(self) -> int:
        """Blocks in CPU memory."""
        return self.swap_blocks if self.preemption == "swap" else 0

    def settled(self, model: GPT2Config, device: torch.device, attention: AttentionBackend) -> EngineConfig:
        """The same options with the defaults that model and device decide; checks that they fit the model."""
        if attention is TRITON:
            check_kernel_sizes(self.block_size, model.head_dim)
        max_model_len = model.n_positions if self.max_model_len is None else self.max_model_len
        require_int("max_model_len", max_model_len, 2, model.n_positions)
        budget = self.max_num_batched_tokens or (2048 if device.type == "cuda" else 512)
        return replace(self, max_model_len=max_model_len, max_num_batched_tokens=budget)


def require_folder(name: str, option: str) -> None:
    """Raises ValueError, naming option and folder, if an optional folder is missing."""
    if not has_folder(name):
        raise ValueError(f"{option} needs the folder nanopaged/{name}/, which is missing: restore it, or do without")


def resolve_device(device: str) -> torch.device:
    """Raises ValueError if the device is unknown, or not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(device).partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal() or (kind == "cpu" and int(index or 0)):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA "
                         "devices: use device='cpu', or install a driver and a CUDA build of torch")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def resolve_attention(config: EngineConfig, device: torch.device) -> AttentionBackend:
    """Raises ValueError if the attention that was asked for cannot run on the device."""
    attention = config.attention
    if config.compile:
        if device.type != "cpu" or attention == "triton":
            raise ValueError("compile=True is for the torch attention on a CPU: leave it out, or set device='cpu' and "
                             "attention='torch'")
        from nanopaged.fast.compiled_attention import COMPILED

        return COMPILED
    if attention == "torch" or (attention == "auto" and (device.type == "cpu" or triton is None)):
        return TORCH
    if triton is None:
        raise ValueError("attention='triton' needs the triton package, which is not installed: use attention='torch'")
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("attention='triton' on a CPU runs only in Triton's interpreter: set the environment variable "
                         "TRITON_INTERPRET=1 before starting Python, or use attention='torch'")
    return TRITON


def admission_policy(config: EngineConfig) -> AdmissionPolicy:
    if callable(config.admission):
        return config.admission
    if config.admission == "watermark":
        return watermark(config.watermark)
    from nanopaged.pressure.admission import by_name

    return by_name(config.admission, config.watermark)


def order_policy(config: EngineConfig) -> OrderPolicy:
    if callable(config.order):
        return config.order
    if config.order == "fcfs":
        return fcfs
    from nanopaged.pressure.order import by_name

    return by_name(config.order)


def make_scheduler(config: EngineConfig, num_blocks: int) -> Scheduler:
    """From a settled config, over a pool of `num_blocks`; one that swaps, if that was asked for."""
    allocator = BlockAllocator(num_blocks, config.block_size, config.enable_prefix_caching)
    arguments = (allocator, config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len,
                 admission_policy(config), order_policy(config), config.max_waiting)
    if config.preemption == "swap":
        from nanopaged.pressure.swap_space import SwappingScheduler

        return SwappingScheduler(*arguments, swap_blocks=config.swap_blocks)
    return Scheduler(*arguments)


def attach_storm_watch(scheduler: Scheduler) -> StormWatch | None:
    """A listener that warns of eviction storms, unless its folder is missing."""
    if not has_folder("pressure"):
        return None
    from nanopaged.pressure.storm import StormWatch

    watch = StormWatch(scheduler.allocator.num_blocks)
    scheduler.listeners.append(watch)
    return watch


def prepare_model(model: GPT2, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a model to its device; on a CPU it gets the modules that are fast there."""
    model.to(device, dtype)
    if device.type == "cpu" and has_folder("fast"):
        from nanopaged.fast.cpu import keep_freed_memory, use_cpu_kernels

        use_cpu_kernels(model)
        keep_freed_memory()


def uses_graphs(config: EngineConfig, device: torch.device, attention: AttentionBackend) -> bool:
    return device.type == "cuda" and attention is TRITON and not config.enforce_eager and has_folder("fast")


def reserved_bytes(config: EngineConfig, model: GPT2, device: torch.device, attention: AttentionBackend) -> int:
    """Memory on a GPU that is not for the pool: what a step needs for a moment, and what CUDA graphs hold on to."""
    if device.type == "cpu":
        return 0
    shape, dtype = model.config, model.wte.weight.dtype
    rows = 16 * config.max_num_batched_tokens * shape.n_embd * dtype.itemsize  # some 16 of n_embd for each token
    needs = rows + sampling_bytes(config.max_num_seqs, shape.vocab_size, dtype.itemsize, device.type)
    if not uses_graphs(config, device, attention):
        return needs
    from nanopaged.fast.cuda_graphs import logits_bytes

    return needs + logits_bytes(shape, dtype, config.max_num_seqs)


LogitsOf = Callable[[Step], torch.Tensor]  # (num_logits, vocab_size)


def choose_logits(eager: LogitsOf, config: EngineConfig, model: GPT2, kv_cache: torch.Tensor,
                  attention: AttentionBackend) -> LogitsOf:
    """What computes the logits of a step as `eager` does, but sooner, if config and device allow it; else `eager`."""
    if config.compile:
        from nanopaged.fast.compiled_attention import compile_now

        compile_now(kv_cache, model.config.n_head // model.config.num_kv_heads)
    if not uses_graphs(config, kv_cache.device, attention):
        return eager
    from nanopaged.fast.cuda_graphs import DecodeGraphs

    return DecodeGraphs(model, kv_cache, config.block_size, config.max_model_len, config.max_num_seqs, eager)


def engine_stats(scheduler: Scheduler, watch: StormWatch | None) -> EngineStats:
    pool, swap = scheduler.allocator, getattr(scheduler, "swap_space", None)  # of a scheduler that swaps
    recent = watch.recent() if watch else scheduler.stats.average(pool.num_blocks)
    return EngineStats(num_waiting=len(scheduler.waiting), num_running=len(scheduler.running),
                       num_storms=watch.num_storms if watch else 0, swap_blocks=swap.num_blocks if swap else 0,
                       swap_blocks_used=swap.stats().referenced_blocks if swap else 0,
                       **asdict(recent), **asdict(pool.stats()), **asdict(scheduler.stats))
