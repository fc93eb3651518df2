"""How do these run as one loop?

    add_request ─> Scheduler.schedule ─> Batch ─> GPT2.forward ─> sample ─> Scheduler.update ─> RequestOutput
                          ^                                                        │
                          └────────────────── until all have finished ─────────────┘

A step computes first and records last: whatever raises on the way (model, sampler, tokenizer), no
token was recorded, so the step can be repeated, or its requests aborted.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from nanopaged.admission import Policy, policy
from nanopaged.batch import Batch
from nanopaged.block_allocator import BlockAllocator
from nanopaged.checkpoint import load_model
from nanopaged.compiled_attention import COMPILED, compile_now
from nanopaged.cuda_graphs import DecodeGraphs, is_decode, logits_bytes
from nanopaged.device import keep_freed_memory, resolve_attention, resolve_device, resolve_dtype
from nanopaged.gpt2 import GPT2
from nanopaged.interrupts import uninterrupted
from nanopaged.kv_cache import KVCache, block_bytes, free_bytes
from nanopaged.outputs import CompletionOutput, RequestOutput
from nanopaged.paged_attention import TRITON, check_kernel_sizes
from nanopaged.report import show_progress
from nanopaged.request import Request, RequestMetrics, RequestStatus
from nanopaged.sampling import sample
from nanopaged.sampling_params import SamplingParams, continuation_seed, derive_seed
from nanopaged.scheduler import Scheduler
from nanopaged.stats import EngineStats
from nanopaged.tokenizer import Tokenizer, tokenizer_for
from nanopaged.validation import require_choice, require_int, require_number, require_seed, shown


class LLM:
    """A GPT-2 that serves many requests from one paged KV cache.

    Args:
        model: "copycat", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a checkpoint's path (see
            `checkpoint.load_model`), or a GPT2, which is copied.
        device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float16 on CUDA, float32 on a CPU), "float32", "float16" or "bfloat16".
        attention: "auto" (Triton on CUDA, torch on a CPU), "triton" or "torch". Triton runs on a
            CPU only in its interpreter, which the environment variable TRITON_INTERPRET=1 turns on.
        compile: compile the torch attention of decoding requests, on a CPU; see `compiled_attention`.
        block_size, num_blocks: tokens in a block, a power of two from 8 to 256, and blocks in the
            pool; None: from the memory that is free once the model is loaded.
        gpu_memory_utilization: share of a GPU's memory to use in all, in (0, 1]. On a CPU, which
            other programs share, the pool takes a quarter of this share of what is free.
        max_model_len: longest prompt plus output, in tokens; None: the model's context.
        max_num_seqs: requests in one step at most.
        max_num_batched_tokens: tokens in one step at most; None: 2048 on a GPU, and 512 on a CPU, where
            what a layer passes to the next operation then stays in the processor's cache.
        enable_prefix_caching: let requests with an equal beginning share its blocks.
        admission: whom to let in: "watermark" (who fits while this share of the pool stays free),
            "reserve" (who fits at full length: nobody is ever preempted), "greedy" (who fits this
            instant), or a function of one's own, see `admission.Situation`.
        watermark: share of the pool, from 0 to 1, that the policy of this name leaves free.
        max_waiting: requests that may wait; None: any number. `generate` then sends its prompts in
            as there is room; `add_request` raises TooManyWaiting.
        preemption: what happens to the KV of a request that gives way: "recompute" it later, or
            "swap" it to `swap_blocks` blocks of CPU memory, and recompute what does not fit there.
        seed: seeds the requests that bring no seed of their own.
        tokenizer: for a GPT2 given as `model`. None: bytes if its vocabulary is 257, else prompts
            must be token ids and outputs have no text.
        enforce_eager: launch every kernel of a decode step from Python, instead of replaying CUDA
            graphs. Elsewhere than on CUDA with Triton nothing else is possible.

    Raises TypeError or ValueError for an argument that cannot be.
    """

    def __init__(self, model: str | os.PathLike | GPT2 = "copycat", device: str = "auto", dtype: str = "auto",
                 attention: str = "auto", block_size: int = 16, num_blocks: int | None = None,
                 gpu_memory_utilization: float = 0.9, max_model_len: int | None = None, max_num_seqs: int = 256,
                 max_num_batched_tokens: int | None = None, enable_prefix_caching: bool = True, watermark: float = 0.01,
                 admission: str | Policy = "watermark", max_waiting: int | None = None, preemption: str = "recompute",
                 swap_blocks: int = 1024, seed: int = 0, tokenizer: Tokenizer | None = None, compile: bool = False,
                 enforce_eager: bool = False) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.attention = resolve_attention(attention, self.device, compile)
        self.block_size = require_int("block_size", block_size, 8, 256)
        if block_size & (block_size - 1):
            raise ValueError(f"block_size must be a power of two from 8 to 256, got {block_size}")
        if require_number("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0) == 0.0:
            raise ValueError("gpu_memory_utilization must be in (0, 1], got 0")
        require_choice("preemption", preemption, ("recompute", "swap"))
        require_int("swap_blocks", swap_blocks, 1)
        policy(admission, watermark)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a Tokenizer, got {shown(tokenizer)}")
        for name, value in (("num_blocks", num_blocks), ("max_waiting", max_waiting), ("max_model_len", max_model_len)):
            if value is not None:
                require_int(name, value, 1)
        require_choice("enable_prefix_caching", enable_prefix_caching, (True, False))
        require_choice("enforce_eager", enforce_eager, (True, False))
        require_int("max_num_seqs", max_num_seqs, 1)
        if max_num_batched_tokens is None:
            max_num_batched_tokens = 2048 if self.device.type == "cuda" else 512
        require_int("max_num_batched_tokens", max_num_batched_tokens, 1)
        self.seed = require_seed("seed", seed)
        if not isinstance(model, (str, os.PathLike, GPT2)):
            raise TypeError(f"model must be a name, a path or a GPT2, got {shown(model)}")

        self.model = copy.deepcopy(model).eval() if isinstance(model, GPT2) else load_model(os.fspath(model))
        config = self.config = self.model.config
        if self.attention is TRITON:
            check_kernel_sizes(block_size, config.head_dim)
        max_model_len = config.n_positions if max_model_len is None else max_model_len
        require_int("max_model_len", max_model_len, 2, config.n_positions)
        self.tokenizer = tokenizer or tokenizer_for(config.vocab_size, download=not isinstance(model, GPT2))
        if self.tokenizer is not None and self.tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"the tokenizer has {self.tokenizer.vocab_size} ids, the model {config.vocab_size}: "
                             "they do not belong together")
        self.model.to(self.device, self.dtype)
        if self.device.type == "cpu":
            keep_freed_memory()
        use_graphs = self.device.type == "cuda" and self.attention is TRITON and not enforce_eager

        if num_blocks is None:
            room = free_bytes(config, self.device, self.dtype, gpu_memory_utilization, max_num_seqs,
                              max_num_batched_tokens)
            room -= logits_bytes(config, self.dtype, max_num_seqs) if use_graphs else 0
            useful = max_num_seqs * -(-max_model_len // block_size)  # all seats taken, at full length
            num_blocks = min(useful, room // block_bytes(config, block_size, self.dtype))
            if num_blocks < 1:
                raise ValueError(f"{self.device} has no memory left for a single block: free some, raise "
                                 "gpu_memory_utilization, or set num_blocks")
        swap_blocks = swap_blocks if preemption == "swap" else 0
        self.kv_cache = KVCache(config, block_size, require_int("num_blocks", num_blocks, 1), swap_blocks, self.device,
                                self.dtype)
        self.graphs = None
        if use_graphs:
            self.graphs = DecodeGraphs(self.model, self.kv_cache.blocks, block_size, max_model_len, max_num_seqs)
        if self.attention is COMPILED:
            compile_now(self.kv_cache.blocks, config.n_head // config.num_kv_heads)
        allocator = BlockAllocator(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(allocator, max_num_seqs, max_num_batched_tokens, max_model_len,
                                   policy(admission, watermark), swap_blocks, max_waiting)
        self._num_added = 0
        self._groups: dict[str, list[Request]] = {}  # the continuations of each unfinished request
        self._news: dict[str, list[Request]] = {}  # of requests that gained tokens which no output has reported yet

    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None) -> str:
        """Queues a prompt, text or token ids, beside whatever runs; `step` does the work.

        Returns the request's id. Raises TypeError or ValueError for what cannot be, and TooManyWaiting
        where the queue is full; then nothing is changed.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model came with no tokenizer: give prompts as token ids, or LLM(tokenizer=...)")
            prompt = self.tokenizer.encode(prompt)
        elif not isinstance(prompt, (list, tuple)):
            raise TypeError(f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}")
        for token_id in prompt:
            require_int("a prompt's token id", token_id, 0, self.config.vocab_size - 1)
        for token_id in params.stop_token_ids:
            require_int("stop_token_ids", token_id, 0, self.config.vocab_size - 1)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model came with none: use stop_token_ids")
        seed = derive_seed(self.seed, "request", self._num_added) if params.seed is None else params.seed
        request_id = str(self._num_added)
        members = [Request(f"{request_id}.{i}", prompt, params, self.config.eos_token_id, continuation_seed(seed, i))
                   for i in range(params.n)]
        members[0].followers = members[1:]
        for member in members:
            member.group_id, member.has_siblings = request_id, params.n > 1
        self.scheduler.add(members[0])
        self._num_added += 1
        self._groups[request_id] = members
        return request_id

    def step(self) -> list[RequestOutput]:
        """Runs one step; returns every request that gained tokens, in it or while `generate` ran for others."""
        if self.scheduler.has_unfinished():
            self._advance()
        outputs = [self._output(request_id, members) for request_id, members in self._news.items()]
        self._news.clear()
        return outputs

    def _advance(self) -> None:
        with uninterrupted():
            step = self.scheduler.schedule()
        self.kv_cache.carry_out(self.scheduler.moves)
        if self.graphs is not None and is_decode(step):
            logits = self.graphs.forward(step)  # (num_sampled, vocab_size)
        else:
            batch = Batch.from_step(step, self.block_size, self.device)
            logits = self.model(batch, self.kv_cache.blocks, self.attention)  # (num_sampled, vocab_size)
        sampled = step.sampled()
        token_ids = sample(logits, sampled)
        texts = [self._extended_text(request, token) for request, token in zip(sampled, token_ids)]
        stopped = {request.request_id for request, (_, _, stop) in zip(sampled, texts) if stop}
        with uninterrupted():  # from here on the step has happened
            self.scheduler.update(step, token_ids, stopped)
            for request, (text, pending, _) in zip(sampled, texts):
                request.text, request.pending = text, pending
                self._news[request.group_id] = self._groups[request.group_id]
            for group_id in {request.group_id for request in sampled if request.status is RequestStatus.FINISHED}:
                if all(member.status is RequestStatus.FINISHED for member in self._groups[group_id]):
                    del self._groups[group_id]

    def _extended_text(self, request: Request, token_id: int) -> tuple[str, bytes, bool]:
        """(text, pending bytes, whether a stop string is reached) with one more token."""
        if self.tokenizer is None or token_id in request.stop_token_ids:
            return request.text, request.pending, False
        piece, pending = self.tokenizer.stream(request.pending, token_id)
        text = request.text + piece
        ends = [text.find(stop, max(0, len(request.text) - len(stop) + 1)) for stop in request.params.stop]
        ends = [end for end in ends if end >= 0]
        return (text[: min(ends)], b"", True) if ends else (text, pending, False)

    def _output(self, request_id: str, members: list[Request]) -> RequestOutput:
        completions = []
        for i, member in enumerate(members):
            finished, text = member.status is RequestStatus.FINISHED, member.text
            if finished and member.pending:
                text += self.tokenizer.end_stream(member.pending)
            elif not finished and member.params.stop:
                # What may turn out to begin a stop string is held back: shown text is never taken back.
                text = text[: max(0, len(text) - max(map(len, member.params.stop)) + 1)]
            completions.append(CompletionOutput(i, text, member.output_token_ids, member.finish_reason,
                                                RequestMetrics(**vars(member.metrics))))
        finished = all(member.status is RequestStatus.FINISHED for member in members)
        prompt = members[0].token_ids[: members[0].num_prompt_tokens]
        return RequestOutput(request_id, prompt, completions, finished, completions[0].metrics)

    def generate(self, prompts: str | Sequence[str | list[int]],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[RequestOutput]:
        """Continues prompts until all have finished; shows progress on a terminal.

        Args:
            prompts: one text, or a list of texts and lists of token ids.
            sampling_params: for all prompts, or one for each.

        Returns one output for each prompt, in order. Raises TypeError or ValueError for what cannot
        be; after these, an interrupt, or a fault in the model, none of the prompts is left behind.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or any(isinstance(prompt, int) for prompt in prompts):
            raise TypeError("prompts must be a str, or a list of str and of lists of token ids ([[1, 2, 3]] is one "
                            f"prompt of three tokens), got {prompts!r:.80}")
        if not isinstance(sampling_params, (list, tuple)):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(f"got {len(sampling_params)} sampling_params for {len(prompts)} prompts: "
                             "give one for all, or one for each")
        mine: dict[str, list[Request]] = {}
        start, before = time.monotonic(), replace(self.scheduler.stats)
        wanted = sum(params.n if isinstance(params, SamplingParams) else 1 for params in sampling_params)

        def advance() -> None:
            self._advance()
            done = self.scheduler.stats.num_finished - before.num_finished
            tokens = self.scheduler.stats.output_tokens - before.output_tokens
            show_progress(f"{done} of {wanted} continuations, {tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")

        try:
            for prompt, params in zip(prompts, sampling_params):
                while self.scheduler.queue_is_full():
                    advance()
                with uninterrupted():
                    request_id = self.add_request(prompt, params)
                    mine[request_id] = self._groups[request_id]
            for request_id in mine:
                while request_id in self._groups:
                    advance()
        except BaseException:
            with uninterrupted():
                for request_id in mine.keys() & self._groups.keys():
                    self._abort(request_id)
            raise
        finally:
            with uninterrupted():
                for request_id in mine:
                    self._news.pop(request_id, None)
            show_progress("")
        return [self._output(request_id, members) for request_id, members in mine.items()]

    def abort_request(self, request_id: str) -> RequestOutput:
        """Ends an unfinished request, all its continuations; its blocks go back.

        Returns what it came to; what had not finished has the finish_reason "abort".
        """
        if not isinstance(request_id, str) or request_id not in self._groups:
            raise ValueError(f"no unfinished request has the id {request_id!r}")
        with uninterrupted():
            members = self._abort(request_id)
        return self._output(request_id, members)

    def _abort(self, request_id: str) -> list[Request]:
        members = self._groups.pop(request_id)
        self._news.pop(request_id, None)
        for member in members:
            if member.status is not RequestStatus.FINISHED:
                self.scheduler.abort(member)
        return members

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do, or to report."""
        return bool(self._groups or self._news)

    def stats(self) -> EngineStats:
        """Plain numbers: at this moment, over the last steps, and since the start."""
        scheduler, swap = self.scheduler, self.scheduler.swap.allocator
        steps, window = max(1, len(scheduler.storm_watch.steps)), scheduler.storm_watch.window
        return EngineStats(
            num_waiting=len(scheduler.waiting), num_running=len(scheduler.running), goodput=window.goodput,
            preemptions_per_step=window.preemptions / steps,
            pool_occupancy=window.referenced_blocks / steps / scheduler.allocator.num_blocks,
            swap_blocks=swap.num_blocks if swap else 0, swap_blocks_used=swap.stats().referenced_blocks if swap else 0,
            **asdict(scheduler.allocator.stats()), **asdict(scheduler.stats))
