"""How do these run as one loop?

    add_request ─> Scheduler.schedule ─> Batch ─> GPT2.forward ─> sample ─> Scheduler.update ─> RequestOutput
                          ^                                                        │
                          └────────────────── until all have finished ─────────────┘

A step reads and computes first and records last: whatever raises on the way (the model, the sampler,
the tokenizer), nothing has changed but a few blocks that were taken early, so the step can be
repeated, or its requests aborted.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from nanopaged.batch import Batch
from nanopaged.block_allocator import AllocatorStats, BlockAllocator
from nanopaged.checkpoint import load_model
from nanopaged.gpt2 import GPT2
from nanopaged.paged_attention import TORCH, TRITON, triton
from nanopaged.request import Request, RequestMetrics, RequestStatus
from nanopaged.sampling import sample
from nanopaged.sampling_params import SamplingParams
from nanopaged.scheduler import Scheduler, SchedulerStats
from nanopaged.tokenizer import Tokenizer, byte_encoding, gpt2_encoding
from nanopaged.validation import require_bool, require_choice, require_int, require_number

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class CompletionOutput:
    """A continuation, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length" or "abort"; None while it runs


@dataclass
class RequestOutput:
    """A request, as far as it has come."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics


@dataclass(kw_only=True)
class EngineStats(AllocatorStats, SchedulerStats):
    """The pool's and the scheduler's figures, and how many requests there are."""

    num_waiting: int
    num_running: int


class LLM:
    """A GPT-2 that serves many requests from one paged KV cache.

    Args:
        model: "copycat", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a checkpoint's path (see
            `checkpoint.load_model`), or a GPT2, which is left as it is.
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float16 on CUDA, float32 on a CPU), "float32", "float16" or "bfloat16".
        attention: "auto" (Triton on CUDA, torch on a CPU), "triton" or "torch". Triton runs on a
            CPU only in its interpreter, which the environment variable TRITON_INTERPRET=1 turns on.
        block_size: tokens in a block; a power of two from 8 to 256.
        num_blocks: blocks in the pool; None: from the memory that is free once the model is loaded.
        gpu_memory_utilization: share of a GPU's memory to use in all, in (0, 1]. On a CPU, which
            other programs share, the pool takes a quarter of this share of what is free.
        max_model_len: longest prompt plus output, in tokens; None: the model's context.
        max_num_seqs: requests that run together at most.
        max_num_batched_tokens: tokens computed in one step at most.
        enable_prefix_caching: let requests with an equal beginning share its blocks.
        watermark: share of the pool that admission leaves free, from 0 to 1.
        seed: seeds the requests that bring no seed of their own.
        tokenizer: for a GPT2 given as `model`; None: bytes for a vocabulary of 257, else prompts
            must be token ids and outputs have no text.

    Raises:
        TypeError, ValueError: an argument that cannot be; before anything large is loaded where
            that is possible.
    """

    def __init__(
        self,
        model: str | GPT2 = "copycat",
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        enable_prefix_caching: bool = True,
        watermark: float = 0.01,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if not isinstance(model, (str, os.PathLike, GPT2)):
            raise TypeError(f"model must be a name, a path or a GPT2, got {type(model).__name__}")
        self.device = _resolve_device(device)
        self.dtype = _resolve_dtype(dtype, self.device)
        self.attention = _resolve_attention(attention, self.device)
        self.block_size = require_int("block_size", block_size, 8, 256)
        if block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two from 8 to 256, got {block_size}")
        if num_blocks is not None:
            require_int("num_blocks", num_blocks, 1)
        if require_number("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0) == 0.0:
            raise ValueError("gpu_memory_utilization must be in (0, 1], got 0")
        require_int("max_num_seqs", max_num_seqs, 1)
        require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        require_number("watermark", watermark, 0.0, 1.0)
        require_bool("enable_prefix_caching", enable_prefix_caching)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r} ({type(seed).__name__})")

        if isinstance(model, GPT2):
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
        else:
            self.model = load_model(os.fspath(model))
        config = self.config = self.model.config
        if max_model_len is None:
            max_model_len = config.n_positions
        require_int("max_model_len", max_model_len, 2, config.n_positions)
        if tokenizer is None and config.vocab_size == 257:
            tokenizer = Tokenizer(byte_encoding())
        elif tokenizer is None and config.vocab_size == 50257 and not isinstance(model, GPT2):
            tokenizer = Tokenizer(gpt2_encoding())
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: "
                             "they do not belong together")
        self.tokenizer = tokenizer
        self.model.to(self.device, self.dtype)

        if num_blocks is None:
            num_blocks = self._blocks_that_fit(gpu_memory_utilization, max_num_seqs, max_num_batched_tokens,
                                               max_model_len)
        logger.info("KV cache: %d blocks of %d tokens, %.1f MiB", num_blocks, block_size,
                    num_blocks * self._block_bytes() / 2**20)
        # One tensor for all layers: (n_layer, K and V, num_blocks, num_kv_heads, block_size, head_dim)
        shape = (config.n_layer, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        try:
            self.kv_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ValueError(f"a pool of {num_blocks} blocks needs {num_blocks * self._block_bytes() / 2**30:.1f} GiB, "
                             f"which {self.device} does not have: lower num_blocks") from error
        allocator = BlockAllocator(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(allocator, max_num_seqs, max_num_batched_tokens, max_model_len, watermark)
        self._random = random.Random(seed)
        self._num_added = 0
        self._requests: dict[str, Request] = {}  # unfinished ones
        self._news: dict[str, Request] = {}  # gained tokens that no output has reported yet

    # Work comes in.

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None) -> str:
        """Queues a prompt, beside whatever runs; `step` does the work.

        Args:
            prompt: text, or token ids.
            sampling_params: None: the defaults.

        Returns:
            The request's id.

        Raises:
            TypeError, ValueError: a prompt that cannot be; nothing is changed.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model came with none: use stop_token_ids")
        token_ids = self._token_ids(prompt)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        request = Request(str(self._num_added), token_ids, params, self.config.eos_token_id, seed)
        self.scheduler.add(request)
        self._num_added += 1
        self._requests[request.request_id] = request
        return request.request_id

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model came with no tokenizer: give prompts as token ids, or LLM(tokenizer=...)")
            prompt = self.tokenizer.encode(prompt)
        elif not isinstance(prompt, (list, tuple)):
            raise TypeError(f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}")
        for token_id in prompt:
            require_int("a prompt's token id", token_id, 0, self.config.vocab_size - 1)
        return list(prompt)

    # Work is done.

    def step(self) -> list[RequestOutput]:
        """Runs one step.

        Returns:
            Every request that gained tokens, in this step or while `generate` ran for others.
        """
        if self.scheduler.has_unfinished():
            self._advance()
        outputs = [self._output(request) for request in self._news.values()]
        self._news.clear()
        return outputs

    def _advance(self) -> None:
        step = self.scheduler.schedule()
        batch = Batch.from_step(step, self.block_size, self.device)
        logits = self.model(batch, self.kv_cache, self.attention)  # (num_sampled, vocab_size)
        sampled = step.sampled()
        token_ids = sample(logits, sampled)
        texts = [self._extended_text(request, token) for request, token in zip(sampled, token_ids)]
        stopped = {request.request_id for request, (_, _, stop) in zip(sampled, texts) if stop}
        # Nothing below can raise: from here on the step has happened.
        self.scheduler.update(step, token_ids, stopped)
        for request, (request.text, request.pending, _) in zip(sampled, texts):
            self._news[request.request_id] = request
            if request.status is RequestStatus.FINISHED:
                del self._requests[request.request_id]

    def _extended_text(self, request: Request, token_id: int) -> tuple[str, bytes, bool]:
        """(text, pending bytes, whether a stop string is reached) with one more token."""
        if self.tokenizer is None or token_id in request.stop_token_ids:
            return request.text, request.pending, False
        piece, pending = self.tokenizer.stream(request.pending, token_id)
        text = request.text + piece
        ends = [text.find(stop, max(0, len(request.text) - len(stop) + 1)) for stop in request.params.stop]
        ends = [end for end in ends if end >= 0]
        return (text[: min(ends)], b"", True) if ends else (text, pending, False)

    def _output(self, request: Request) -> RequestOutput:
        finished = request.status is RequestStatus.FINISHED
        text = request.text
        if finished and request.pending:
            text += self.tokenizer.end_stream(request.pending)
        elif not finished and request.params.stop:
            # What may turn out to begin a stop string is held back: shown text is never taken back.
            text = text[: max(0, len(text) - max(map(len, request.params.stop)) + 1)]
        completion = CompletionOutput(0, text, request.output_token_ids, request.finish_reason)
        return RequestOutput(request.request_id, request.token_ids[: request.num_prompt_tokens], [completion],
                             finished, replace(request.metrics))

    def generate(
        self,
        prompts: str | Sequence[str | list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts until all have finished; shows progress on a terminal.

        Args:
            prompts: one text, or a list of texts and lists of token ids.
            sampling_params: for all prompts, or one for each.

        Returns:
            One output for each prompt, in the prompts' order.

        Raises:
            TypeError, ValueError: something that cannot be; then, as after an interrupt or a fault
                in the model, none of these prompts is left in the engine.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a str or a list, got {type(prompts).__name__}")
        if any(isinstance(prompt, int) for prompt in prompts):
            raise TypeError("prompts holds a bare int: a prompt of token ids is a list within the list, [[1, 2, 3]]")
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"got {len(sampling_params)} sampling_params for {len(prompts)} prompts: "
                             "give one for all, or one for each")
        mine: dict[str, Request] = {}
        progress = _Progress(len(prompts))
        try:
            for prompt, params in zip(prompts, sampling_params):
                request_id = self.add_request(prompt, params)
                mine[request_id] = self._requests[request_id]
            while not mine.keys().isdisjoint(self._requests):
                self._advance()
                progress.show(len(mine.keys() - self._requests.keys()), sum(r.num_output_tokens for r in mine.values()))
        except BaseException:
            for request_id in mine.keys() & self._requests.keys():
                self.abort_request(request_id)
            raise
        finally:
            progress.close()
            for request_id in mine:
                self._news.pop(request_id, None)
        return [self._output(request) for request in mine.values()]

    def abort_request(self, request_id: str) -> RequestOutput:
        """Ends an unfinished request; its blocks go back.

        Returns:
            What it had come to, with finish_reason "abort".

        Raises:
            ValueError: there is no unfinished request of this id.
        """
        if request_id not in self._requests:
            raise ValueError(f"no unfinished request has the id {request_id!r}")
        request = self._requests.pop(request_id)
        self._news.pop(request_id, None)
        self.scheduler.abort(request)
        return self._output(request)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do, or to report."""
        return bool(self._requests or self._news)

    def stats(self) -> EngineStats:
        """Plain numbers, at this moment and since the start."""
        scheduler = self.scheduler
        return EngineStats(num_waiting=len(scheduler.waiting), num_running=len(scheduler.running),
                           **asdict(scheduler.allocator.stats()), **asdict(scheduler.stats))

    # How large is the pool?

    def _block_bytes(self) -> int:
        config = self.config
        return config.n_layer * 2 * config.num_kv_heads * self.block_size * config.head_dim * self.dtype.itemsize

    def _blocks_that_fit(self, utilization: float, max_num_seqs: int, max_num_batched_tokens: int,
                         max_model_len: int) -> int:
        """Blocks that fit the free memory, but no more than all seats at full length could fill."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            # A step's own needs: about 16 rows of n_embd for each token; six float32 copies of the logits to sample.
            step = (16 * max_num_batched_tokens * self.config.n_embd * self.dtype.itemsize
                    + 24 * min(max_num_seqs, max_num_batched_tokens) * self.config.vocab_size)
            room = free - (1 - utilization) * total - step
        else:
            room = _free_cpu_bytes() * utilization / 4
        num_blocks = min(int(room // self._block_bytes()), max_num_seqs * -(-max_model_len // self.block_size))
        if num_blocks < 1:
            raise ValueError(f"{self.device} has no memory left for a single block of {self._block_bytes()} bytes: "
                             "free some, raise gpu_memory_utilization, or set num_blocks")
        return num_blocks


class _Progress:
    """One line on stderr, rewritten a few times a second; silent where that is no terminal."""

    def __init__(self, total: int) -> None:
        self.enabled = sys.stderr.isatty()
        self.total, self.start, self.shown = total, time.monotonic(), 0.0

    def show(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if self.enabled and now - self.shown > 0.2:
            self.shown = now
            sys.stderr.write(f"\r{done}/{self.total} requests, {tokens} tokens, {tokens / (now - self.start):.0f} tokens/s ")
            sys.stderr.flush()

    def close(self) -> None:
        if self.enabled and self.shown:
            sys.stderr.write("\r\x1b[K")  # clears the line
            sys.stderr.flush()


def _free_cpu_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows; macOS
        return 4 * 2**30


def _resolve_device(device: str) -> torch.device:
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a str, got {device!r} ({type(device).__name__})")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {str(device)!r}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices: "
                         "use device='cpu', or install a CUDA build of torch and a driver")
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    return DTYPES[require_choice("dtype", dtype, ("auto", *DTYPES))]


def _resolve_attention(attention: str, device: torch.device):
    require_choice("attention", attention, ("auto", "triton", "torch"))
    if attention == "torch" or (attention == "auto" and (device.type == "cpu" or triton is None)):
        return TORCH
    if triton is None:
        raise ValueError("attention='triton' needs the triton package, which is not installed: use attention='torch'")
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("attention='triton' on a CPU runs only in Triton's interpreter: set the environment variable "
                         "TRITON_INTERPRET=1 before starting Python, or use attention='torch'")
    return TRITON
