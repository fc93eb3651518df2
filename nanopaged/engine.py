"""How do these run as one loop?

    add_request ─> Scheduler.schedule ─> Batch ─> GPT2.forward ─> sample ─> Scheduler.update ─> RequestOutput
                          ^                                                        │
                          └────────────────── until all have finished ─────────────┘

A step computes first and records last: whatever raises on the way (model, sampler, tokenizer), no
token was recorded, so the step can be repeated, or its requests aborted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial

import torch

from nanopaged.attention_arguments import AttentionBackend
from nanopaged.batch import Batch
from nanopaged.config import (EngineConfig, attach_storm_watch, choose_logits, engine_stats, make_scheduler,
                              prepare_model, reserved_bytes, resolve_attention, resolve_device, resolve_dtype)
from nanopaged.exclusive import Exclusive, alone
from nanopaged.gpt2 import GPT2
from nanopaged.interrupts import uninterrupted
from nanopaged.kv_cache import KVCache
from nanopaged.models.checkpoint import load_model
from nanopaged.models.tokenizer import TextStream, tokenizer_for
from nanopaged.outputs import EngineStats, RequestOutput
from nanopaged.progress import Progress, show_progress
from nanopaged.request import Request, RequestStatus
from nanopaged.sampling import NOT_FINITE, sample
from nanopaged.sampling_params import SamplingParams, continuation_seed, hashed, one_for_each
from nanopaged.step import Step
from nanopaged.validation import require_int, require_number
from nanopaged.waiting import refuse_long_prompt

logger = logging.getLogger(__name__)
Group = dict[Request, TextStream]  # the n continuations of one request, in order, each with its text


def compute_logits(model: GPT2, kv_cache: torch.Tensor, attention: AttentionBackend, block_size: int,
                   step: Step) -> torch.Tensor:
    return model(Batch.from_step(step, block_size, kv_cache.device), kv_cache, attention)  # (num_logits, vocab_size)


class LLM(Exclusive):
    """A GPT-2 that serves many requests from one paged KV cache.

    It belongs to one thread at a time: while `add_request`, `step`, `generate` or `abort_request` runs, another call of
    these, from a second thread or a callback, raises RuntimeError and changes nothing. `stats` may be read at any time.

    Args:
        model: "copycat", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", a checkpoint's path (see
            `checkpoint.load_model`), or a GPT2, which is copied.
        options: the fields of `config.EngineConfig`. TypeError or ValueError if one is invalid.
    """

    def __init__(self, model: str | os.PathLike | GPT2 = "copycat", **options: object) -> None:
        super().__init__()
        config = EngineConfig(**options)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.attention = resolve_attention(config, self.device)
        self.model = load_model(model)
        shape = self.model.config
        self.config = config = config.settled(shape, self.device, self.attention)
        self.tokenizer = tokenizer_for(shape.vocab_size, config.tokenizer, download=not isinstance(model, GPT2))
        prepare_model(self.model, self.device, self.dtype)

        reserved = reserved_bytes(config, self.model, self.device, self.attention)
        self.kv_cache = KVCache.of(shape, config, self.device, self.dtype, reserved)
        eager = partial(compute_logits, self.model, self.kv_cache.blocks, self.attention, config.block_size)
        self.logits_of = choose_logits(eager, config, self.model, self.kv_cache.blocks, self.attention)

        self.scheduler = make_scheduler(config, self.kv_cache.num_blocks)
        self.storm_watch = attach_storm_watch(self.scheduler)
        self._num_added = 0
        self._has_warned = False  # of logits that are not finite
        self._groups: dict[str, Group] = {}  # unfinished requests
        self._unreported: dict[str, Group] = {}  # requests that gained tokens which no output has reported yet

    @alone
    def add_request(self, prompt: str | list[int], sampling_params: SamplingParams | None = None,
                    priority: float = 0) -> str:
        """Queues a prompt, text or token ids, and returns the request's id; `step` does the work.

        With order="priority" the lowest `priority` is served first. Raises TypeError or ValueError for an
        invalid argument, and TooManyWaiting if the queue is full; then nothing is changed.
        """
        return self._add(prompt, sampling_params, priority)

    def _add(self, prompt: str | list[int], sampling_params: SamplingParams | None, priority: float = 0) -> str:
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
        require_number("priority", priority, -float("inf"))
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ValueError("this model came with no tokenizer: give prompts as token ids and stop_token_ids instead "
                             "of text, or LLM(tokenizer=...)")
        limit = self.config.max_model_len
        if isinstance(prompt, str):
            refuse_long_prompt(-(-len(prompt) // self.tokenizer.longest_token), limit, "at least ")  # before the work
            prompt = self.tokenizer.encode(prompt)
        elif not isinstance(prompt, (list, tuple)):
            raise TypeError(f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}")
        refuse_long_prompt(len(prompt), limit)
        shape = self.model.config
        for name, token_ids in (("a prompt's token id", prompt), ("stop_token_ids", params.stop_token_ids)):
            for token_id in token_ids:
                require_int(name, token_id, 0, shape.vocab_size - 1)
        seed = hashed(self.config.seed, "request", self._num_added) if params.seed is None else params.seed
        request_id = str(self._num_added)
        members = [Request(f"{request_id}.{i}", prompt, params, shape.eos_token_id, continuation_seed(seed, i),
                           priority, group_id=request_id) for i in range(params.n)]
        members[0].followers = members[1:]
        group = {member: TextStream(self.tokenizer, params.stop) for member in members}
        with uninterrupted():
            self.scheduler.add(members[0])
            self._num_added += 1
            self._groups[request_id] = group
        return request_id

    @alone
    def step(self) -> list[RequestOutput]:
        """Runs one step; returns every request that gained tokens, in it or while `generate` ran for others."""
        if self.scheduler.has_unfinished():
            self._advance()
        outputs = [RequestOutput(request_id, group) for request_id, group in self._unreported.items()]
        self._unreported.clear()
        return outputs

    def _advance(self) -> None:
        with uninterrupted():
            step = self.scheduler.schedule()
        self.kv_cache.carry_out(self.scheduler.moves)
        logits = self.logits_of(step)  # (num_logits, vocab_size)
        drawn = sample(logits, [request for _, request in step.sampled])
        failed = self._failures(step, drawn) if NOT_FINITE in drawn else {}
        token_ids = {request: token_id for (_, request), token_id in zip(step.sampled, drawn) if token_id != NOT_FINITE}
        searched = {request: self._groups[request.group_id][request].extended(token_id)
                    for request, token_id in token_ids.items()
                    if request.params.stop and token_id not in request.stop_token_ids}
        stopped = {request for request, token_id in token_ids.items()
                   if token_id in request.stop_token_ids or request in searched and searched[request].stopped}
        with uninterrupted():  # from here on the step has happened
            self.scheduler.update(step, token_ids, stopped, failed)
            self._unreported |= {request.group_id: self._groups[request.group_id] for request in (*token_ids, *failed)}
            for request, stream in searched.items():
                self._groups[request.group_id][request] = stream
            for group_id in {request.group_id for request in step.ended}:
                if all(member.status is RequestStatus.FINISHED for member in self._groups[group_id]):
                    del self._groups[group_id]

    def _failures(self, step: Step, drawn: list[int]) -> dict[Request, str]:
        """The requests of a step whose logits are not finite, each with a message for its user."""
        numbers = [i for i, _ in step.sampled] + step.cut
        failed = {step.requests[i]: f"the model's output is not finite (tokens: {step.num_tokens[i]}, from position "
                  f"{step.starts[i]}): a weight is not, or {self.dtype} overflows; compare with GPT2.dense in float32"
                  for i, token_id in zip(numbers, drawn) if token_id == NOT_FINITE}
        if not self._has_warned:
            self._has_warned = True
            request, reason = next(iter(failed.items()))
            logger.warning("request %s ends with an error, and others may: %s", request.group_id, reason)
        return failed

    @alone
    def generate(self, prompts: str | Sequence[str | list[int]],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[RequestOutput]:
        """Continues prompts until all have finished; shows progress on a terminal.

        Args:
            prompts: one text, or a list of texts and lists of token ids.
            sampling_params: for all prompts, or one for each.

        Returns one output for each prompt, in order. Raises TypeError or ValueError for an invalid
        argument; after these, an interrupt, or a fault in the model, none of the prompts is left behind.
        """
        requests = one_for_each(prompts, sampling_params)
        mine: dict[str, Group] = {}
        progress = Progress(self.scheduler.stats, sum(getattr(params, "n", 1) for _, params in requests))

        def advance() -> None:
            self._advance()
            progress.show()

        try:
            for prompt, params in requests:
                while self.scheduler.queue_is_full():
                    advance()
                with uninterrupted():
                    request_id = self._add(prompt, params)
                    mine[request_id] = self._groups[request_id]
            for request_id in mine:
                while request_id in self._groups:
                    advance()
        finally:
            with uninterrupted():
                for request_id in mine.keys() & self._groups.keys():  # after a fault or an interrupt
                    self._abort(request_id)
                for request_id in mine:
                    self._unreported.pop(request_id, None)
            show_progress("")
        return [RequestOutput(request_id, group) for request_id, group in mine.items()]

    @alone
    def abort_request(self, request_id: str) -> RequestOutput:
        """Ends all continuations of a request that have not finished, with the finish_reason "abort"."""
        if not isinstance(request_id, str) or request_id not in self._groups:
            raise ValueError(f"no unfinished request has the id {request_id!r}")
        with uninterrupted():
            group = self._abort(request_id)
        return RequestOutput(request_id, group)

    def _abort(self, request_id: str) -> Group:
        group = self._groups.pop(request_id)
        self._unreported.pop(request_id, None)
        for member in group:
            if member.status is not RequestStatus.FINISHED:
                self.scheduler.abort(member)
        return group

    def has_unfinished_requests(self) -> bool:  # whether `step` has anything left to do, or to report
        return bool(self._groups or self._unreported)

    def stats(self) -> EngineStats:
        """Plain numbers: at this moment, over the last steps, and since the start."""
        return engine_stats(self.scheduler, self.storm_watch)
