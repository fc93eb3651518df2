"""How does a GPU decode without waiting for Python?

A decode step of GPT-2 launches some 150 kernels. Launching each from Python takes longer than it runs,
as long as the batch is small. A CUDA graph is the recording of such a sequence, launched at once; but
it is a recording, of the same kernels at the same addresses with the same shapes. So:

    shapes      the step is padded to the next of a few batch sizes, and its block tables to the longest
    addresses   inputs are copied into the tensor that was recorded, logits come out where they did then
    kernels     every choice between them depends on those shapes alone (see `paged_attention.parts_of_contexts`)

A size is recorded when a step needs it for the first time, and computed eagerly if that fails. Steps with
prompts in them have any shape, and are long enough to hide their launches: they always run eagerly.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanopaged.batch import Batch, upload
from nanopaged.block_allocator import blocks_for
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.paged_attention import TRITON, device_of
from nanopaged.step import Step

logger = logging.getLogger(__name__)

Compute = Callable[[], object]


def batch_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that are recorded: finer where a padded row is a larger share; the last is `max_num_seqs`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def is_decode(step: Step) -> bool:
    """Whether each request of a step computes one token, and draws one."""
    return step.num_decodes == len(step.requests) and [request for _, request in step.sampled] == step.requests


def logits_bytes(config: GPT2Config, dtype: torch.dtype, max_num_seqs: int) -> int:
    """Memory that the recordings of all sizes hold on to: the logits, once inside the graphs and once outside."""
    return 2 * max_num_seqs * config.vocab_size * dtype.itemsize


def padded(batch: Batch, size: int, table_width: int) -> Batch:
    """A decode step's batch of `size` requests, with block tables that are `table_width` wide.

    The requests that are not there have an empty context, so attention reads nothing for them, and a negative slot, so
    nothing is written for them.
    """
    missing = size - len(batch.seq_lens)

    def filled_up(values: torch.Tensor, value: int = 0) -> torch.Tensor:
        return F.pad(values, (0, missing), value=value)

    tables = F.pad(batch.block_tables, (0, table_width - batch.block_tables.shape[1], 0, missing))
    rows = torch.arange(size + 1, dtype=torch.int32)
    flat = torch.cat([filled_up(batch.token_ids), filled_up(batch.positions), filled_up(batch.slots, -1), rows,
                      filled_up(batch.seq_lens), rows[:-1], tables.flatten()])
    return Batch(flat, size, size, size, size)


class DecodeGraphs:
    """Computes the logits of a step: a decode step by replaying a recording, any other by `eager`.

    Args:
        model, kv_cache: on a CUDA device; neither may move, or be replaced, afterwards.
        block_size, max_model_len: tokens in a block, and in the longest request.
        max_num_seqs: most requests in a step.
        eager: computes the logits (num_logits, vocab_size) of any step.
        capture: records what a function does and returns what repeats it; None: a CUDA graph.
    """

    def __init__(self, model: GPT2, kv_cache: torch.Tensor, block_size: int, max_model_len: int, max_num_seqs: int,
                 eager: Callable[[Step], torch.Tensor], capture: Callable[[Compute], Compute] | None = None) -> None:
        self.model, self.kv_cache, self.block_size, self.eager = model, kv_cache, block_size, eager
        self.table_width = blocks_for(max_model_len, block_size)
        self.sizes = batch_sizes(max_num_seqs)
        self.capture = capture or _CudaCapture(kv_cache.device)
        self.logits: torch.Tensor | None = None  # of all sizes: one graph overwrites what another has left inside
        # Batch size -> its inputs, and what computes their logits; None where a recording failed.
        self.recorded: dict[int, tuple[Batch, Compute] | None] = {}

    @torch.inference_mode()
    def __call__(self, step: Step) -> torch.Tensor:
        """Logits (num_logits, vocab_size); valid until the next call."""
        num_requests = len(step.requests)
        size = self.sizes[bisect_left(self.sizes, num_requests)]
        if not is_decode(step) or self.recorded.get(size, ()) is None:
            return self.eager(step)
        batch = padded(Batch.from_step(step, self.block_size, torch.device("cpu")), size, self.table_width)
        with device_of(self.kv_cache):  # a graph is recorded, and replayed, on the current device
            if size in self.recorded:
                inputs, replay = self.recorded[size]
                inputs.flat.copy_(batch.flat.pin_memory() if inputs.flat.is_cuda else batch.flat, non_blocking=True)
                replay()
                return self.logits[:num_requests]
            inputs = Batch(upload(batch.flat, self.kv_cache.device), size, size, size, size)
            # This step runs eagerly: Triton compiles and cuBLAS starts up, which may not happen in a recording.
            logits = self.model(inputs, self.kv_cache, TRITON)  # (size, vocab_size)
            self.recorded[size] = self._record(size, inputs)
        return logits[:num_requests]

    def _record(self, size: int, inputs: Batch) -> tuple[Batch, Compute] | None:
        try:
            if self.logits is None:
                self.logits = self.kv_cache.new_empty(self.sizes[-1], self.model.config.vocab_size)
            return inputs, self.capture(lambda: self.logits[:size].copy_(self.model(inputs, self.kv_cache, TRITON)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            logger.warning("decode steps of %d requests will be launched from Python, since recording a CUDA graph "
                           "failed (lower max_num_seqs or gpu_memory_utilization, or set enforce_eager=True): %s", size,
                           error)
            return None


class _CudaCapture:
    """Records CUDA graphs that share the memory for what lies between their inputs and outputs."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # torch's own is one for all devices

    def __call__(self, compute: Compute) -> Compute:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        try:
            # Other threads of the user's program may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                compute()
        finally:
            torch.cuda.set_stream(before)  # torch leaves its own set if a recording fails at its end
        return graph.replay
