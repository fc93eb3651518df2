"""Decode steps of fixed sizes: on a CPU with a recording that only repeats, on a GPU with real graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanopaged import LLM, SamplingParams
from nanopaged.batch import Batch
from nanopaged.config import EngineConfig, reserved_bytes
from nanopaged.fast import cuda_graphs
from nanopaged.fast.cuda_graphs import DecodeGraphs, batch_sizes, is_decode, logits_bytes, padded
from nanopaged.gpt2 import GPT2Config
from nanopaged.paged_attention import TRITON
from nanopaged.request import Request
from nanopaged.sampling import sampling_bytes
from nanopaged.sampling_params import continuation_seed
from nanopaged.step import Step
from nanopaged.torch_attention import TORCH
from tests.oracle import TINY, assert_dense_continuation, tiny_model

CPU = torch.device("cpu")
MODEL = tiny_model()


class Repeating:
    """Stands in for a CUDA graph: computes again, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, compute: cuda_graphs.Compute) -> cuda_graphs.Compute:
        self.recorded += 1
        compute()

        def replay() -> None:
            self.replayed += 1
            compute()

        return replay


def write_real_tokens(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
                      slots: torch.Tensor) -> None:
    """As the kernel does: a token whose slot is negative is written nowhere."""
    real = slots >= 0
    TORCH.write_kv(k[real], v[real], k_cache, v_cache, slots[real])


def engine_with_graphs(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[LLM, Repeating]:
    # In the interpreter the kernels would only be slower.
    monkeypatch.setattr(cuda_graphs, "TRITON", TORCH._replace(write_kv=write_real_tokens))
    llm = LLM(MODEL, device="cpu", **{"block_size": 8, "num_blocks": 60, "max_num_seqs": 12} | options)
    capture = Repeating()
    llm.logits_of = DecodeGraphs(llm.model, llm.kv_cache.blocks, llm.config.block_size, llm.config.max_model_len,
                                 llm.config.max_num_seqs, llm.logits_of, capture)
    return llm, capture


def decode_batch(num_requests: int) -> Batch:
    """Requests of lengths 1, 6, 11, ... that compute their last token, in blocks of 4."""
    requests = []
    for i in range(num_requests):
        requests.append(Request(str(i), list(range(5 * i, 10 * i + 1)), SamplingParams()))
        requests[i].block_table.extend([20 * i + j for j in range(-(-(5 * i + 1) // 4))])
    step = Step(0, requests, [5 * i for i in range(num_requests)], [1] * num_requests)
    step.arrange()
    return Batch.from_step(step, 4, CPU)


def test_every_batch_finds_a_recorded_size_with_few_padded_rows() -> None:
    for max_num_seqs in (1, 2, 3, 7, 12, 64, 65, 256, 1000):
        sizes = batch_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
        for n in range(1, max_num_seqs + 1):
            padding = min(size for size in sizes if size >= n) - n
            assert padding <= max(7, n // 4), (n, padding)


@pytest.mark.parametrize("num_requests, size, table_width", [(1, 1, 1), (1, 4, 3), (3, 3, 3), (3, 4, 3), (3, 8, 24)])
def test_a_padded_batch_has_its_requests_and_then_rows_that_read_and_write_nothing(
    num_requests: int, size: int, table_width: int
) -> None:
    batch = decode_batch(num_requests)
    result = padded(batch, size, table_width)
    for name, filling in (("token_ids", 0), ("positions", 0), ("slots", -1), ("seq_lens", 0)):
        wanted = getattr(batch, name).tolist() + [filling] * (size - num_requests)
        assert getattr(result, name).tolist() == wanted, name
    assert result.query_start.tolist() == list(range(size + 1)) and result.logits_rows.tolist() == list(range(size))
    width = batch.block_tables.shape[1]
    assert result.block_tables.shape == (size, table_width) and not result.block_tables[:, width:].any()
    assert torch.equal(result.block_tables[:num_requests, :width], batch.block_tables)
    assert not result.block_tables[num_requests:].any()
    assert result.num_decodes == size and result.num_cut == 0 and result.flat.dtype == torch.int32


def test_all_batches_of_one_size_have_the_same_shapes() -> None:
    batches = [padded(decode_batch(n), 8, 12) for n in (1, 3, 8)]
    assert len({(len(batch.seq_lens), len(batch.logits_rows), batch.flat.shape) for batch in batches}) == 1


@pytest.mark.parametrize("num_tokens, known, num_followers, expected", [
    ([1, 1], [4, 5], 0, True),
    ([1, 2], [4, 5], 0, False),  # a chunk of a prompt
    ([1, 1], [4, 6], 0, False),  # one token of a prompt, which is not its last: nothing is drawn
    ([1, 1], [4, 5], 1, False),  # two continuations are drawn from one row
], ids=["decodes", "chunk", "one token of a prompt", "followers"])
def test_a_step_is_replayed_only_if_each_request_computes_and_draws_one_token(
    num_tokens: list[int], known: list[int], num_followers: int, expected: bool
) -> None:
    requests = [Request(str(i), [0] * length, SamplingParams()) for i, length in enumerate(known)]
    requests[0].followers = [Request("follower", [0], SamplingParams())] * num_followers
    step = Step(0, requests, [4 - num_tokens[0], 5 - num_tokens[1]], num_tokens)
    step.arrange()
    assert is_decode(step) == expected


@pytest.mark.parametrize("seed", range(4))
def test_replayed_steps_give_the_dense_models_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch)
    rng = random.Random(seed)
    requests = {}
    for _ in range(16):
        prompt = [rng.randrange(TINY.vocab_size) for _ in range(rng.randint(1, 40))]
        params = SamplingParams(max_tokens=rng.randint(2, 24), temperature=rng.choice([0.0, 1.0]),
                                seed=rng.randrange(99))
        requests[llm.add_request(prompt, params)] = prompt, params
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished:
                prompt, params = requests.pop(output.request_id)
                assert_dense_continuation(MODEL, prompt, params, continuation_seed(params.seed, 0),
                                          output.outputs[0].token_ids, True, f"seed {seed}")
        llm.scheduler.check_invariants()
    assert not requests
    assert capture.recorded == len(llm.logits_of.recorded) > 1, f"seed {seed}"
    assert capture.replayed > capture.recorded, f"seed {seed}"


def test_a_padded_row_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch, max_num_seqs=8)
    for start in range(5):
        llm.add_request([start, 1, 2], SamplingParams(max_tokens=4))
    llm.step()
    held = {request.block_table[0] * 8 + 3 for request in llm.scheduler.running}
    llm.kv_cache.blocks[:, :, :, :, 3:] = torch.nan  # all that no step has written yet
    llm.step()
    # (n_layer, 2, num_blocks, heads, block_size, head_dim) -> (num_blocks, block_size)
    written = llm.kv_cache.blocks.isfinite().permute(2, 4, 0, 1, 3, 5).flatten(2).all(dim=2)
    places = {int(block) * 8 + int(offset) for block, offset in written.nonzero() if offset >= 3}
    assert places == held and capture.recorded == 1


def test_a_replay_gives_the_logits_of_the_step_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch)
    for start in range(3):
        llm.add_request([start, 1, 2], SamplingParams(max_tokens=9))
    llm.step()
    for _ in range(3):  # recorded, then replayed twice
        step = llm.scheduler.schedule()
        torch.testing.assert_close(llm.logits_of(step), llm.logits_of.eager(step), atol=1e-5, rtol=0)
        llm.step()
    assert (capture.recorded, list(llm.logits_of.recorded)) == (1, [4])


def test_all_sizes_write_their_logits_to_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch)
    places = set()
    for start in range(6):
        llm.add_request([start, 1, 2], SamplingParams(max_tokens=9))
        llm.step()
        for _ in range(2):
            step = llm.scheduler.schedule()
            if len(step.requests) in llm.logits_of.recorded:
                places.add(llm.logits_of(step).data_ptr())
            llm.step()
    assert capture.recorded > 2 and places == {llm.logits_of.logits.data_ptr()}


def test_a_size_that_cannot_be_recorded_is_computed_eagerly_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm, repeating = engine_with_graphs(monkeypatch)
    tried = []

    def capture(compute: cuda_graphs.Compute) -> cuda_graphs.Compute:
        tried.append(len(llm.scheduler.running))
        if tried[-1] == 3:
            raise torch.OutOfMemoryError("no memory for a graph")
        return repeating(compute)

    llm.logits_of.capture = capture
    params = [SamplingParams(max_tokens=9, temperature=0), *[SamplingParams(max_tokens=5, temperature=0)] * 2]
    prompts = [[start, 1, 2] for start in range(3)]
    for output, prompt, own in zip(llm.generate(prompts, params), prompts, params):
        assert_dense_continuation(MODEL, prompt, own, 0, output.outputs[0].token_ids, True, str(prompt))
    assert tried == [3, 1] and list(llm.logits_of.recorded) == [4, 1] and llm.logits_of.recorded[4] is None
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "decode steps of 4 requests" in record.getMessage() and "no memory for a graph" in record.getMessage()


def test_other_threads_may_use_the_gpu_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch's graphs."""
    given: dict[str, object] = {}

    class Graph:
        replay = "replay"

    def graph(made: Graph, **options: object) -> AbstractContextManager:
        given.update(options, graph=made)
        return nullcontext()

    stream = SimpleNamespace(device=torch.device("cuda"))
    for name, stand_in in (("graph_pool_handle", lambda: "pool"), ("Stream", lambda device: stream),
                           ("CUDAGraph", Graph), ("graph", graph), ("current_stream", lambda device: "before"),
                           ("set_stream", lambda stream: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    computed = []
    assert cuda_graphs._CudaCapture(torch.device("cuda"))(lambda: computed.append(1)) == "replay" and computed == [1]
    assert given.pop("graph").__class__ is Graph
    assert given == {"pool": "pool", "stream": stream, "capture_error_mode": "thread_local"}


def test_a_recording_that_fails_at_its_end_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: torch's graph puts the stream back only if the recording ends well."""
    streams = ["the user's"]

    @contextmanager
    def graph(made: object, stream: object, **_: object) -> Iterator[None]:
        streams.append(stream)
        yield
        raise RuntimeError("the recording was invalidated")

    for name, stand_in in (("graph_pool_handle", lambda: "pool"), ("CUDAGraph", object), ("graph", graph),
                           ("Stream", lambda device: SimpleNamespace(device=device)),
                           ("current_stream", lambda device: streams[-1]), ("set_stream", streams.append)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with pytest.raises(RuntimeError, match="invalidated"):
        cuda_graphs._CudaCapture(torch.device("cuda"))(lambda: None)
    assert streams[-1] == "the user's" and len(streams) == 3


def test_steps_with_prompts_in_them_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch, max_num_batched_tokens=4)
    llm.add_request([1, 2, 3, 4, 5], SamplingParams(max_tokens=1))  # 4 tokens, then 1 beside the next prompt
    llm.add_request([1, 2, 3], SamplingParams(max_tokens=2, n=2, temperature=1.0))
    llm.step()
    llm.step()
    assert capture.recorded == 0
    while llm.has_unfinished_requests():
        llm.step()
    assert capture.recorded == 1, "the two continuations' decode"


def test_a_recording_made_in_inference_mode_can_be_replayed_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, capture = engine_with_graphs(monkeypatch)
    llm.add_request([1, 2, 3], SamplingParams(max_tokens=9))
    with torch.inference_mode():
        llm.step()
        llm.step()
    llm.step()
    assert (capture.recorded, capture.replayed) == (1, 1)


@pytest.mark.parametrize("attention, options, recordings", [
    (TRITON, {}, 2 * 8 * 61 * 4), (TRITON, {"enforce_eager": True}, 0), (TORCH, {}, 0),
], ids=["graphs", "eager", "torch attention"])
def test_memory_is_reserved_for_a_step_and_for_the_recordings_where_steps_are_recorded(
    attention: object, options: dict[str, object], recordings: int
) -> None:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=5, **options)  # with n=8, one row is sampled 8 times
    reserved = reserved_bytes(config, MODEL, torch.device("cuda"), attention)
    assert reserved == 16 * 5 * TINY.n_embd * 4 + sampling_bytes(8, 61, 4, "cuda") + recordings
    assert reserved_bytes(config, MODEL, CPU, attention) == 0


def test_what_the_recordings_hold_on_to_grows_with_the_number_of_seats_alone() -> None:
    gpt2 = GPT2Config(vocab_size=50257)
    assert logits_bytes(gpt2, torch.float16, 4096) == 4096 * logits_bytes(gpt2, torch.float16, 1) < 2**30


@pytest.mark.gpu
def test_a_gpu_replays_contexts_that_are_split_over_programs() -> None:
    config = replace(TINY, n_positions=600)
    model, rng = tiny_model(config), random.Random(0)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(length)] for length in (3, 127, 128, 300, 520)]
    llm = LLM(model, device="cuda", dtype="float32", num_blocks=200, max_num_seqs=8)
    params = SamplingParams(max_tokens=40, temperature=0.0)
    for output, prompt in zip(llm.generate(prompts, params), prompts):
        assert_dense_continuation(model, prompt, params, 0, output.outputs[0].token_ids, True, f"{len(prompt)} tokens")
    assert llm.logits_of.recorded


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gpu_gives_the_same_tokens_with_graphs_and_without(dtype: str) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(TINY.vocab_size) for _ in range(rng.randint(1, 40))] for _ in range(40)]
    params = [SamplingParams(max_tokens=rng.randint(1, 40), temperature=rng.choice([0.0, 0.7]), seed=i)
              for i in range(40)]
    tokens = []
    for enforce_eager in (False, True):
        llm = LLM(MODEL, device="cuda", dtype=dtype, num_blocks=60, max_num_seqs=24, enforce_eager=enforce_eager)
        outputs = llm.generate(prompts, params)
        assert isinstance(llm.logits_of, DecodeGraphs) != enforce_eager and (enforce_eager or llm.logits_of.recorded)
        assert llm.stats().num_preemptions > 0
        tokens.append([output.outputs[0].token_ids for output in outputs])
    # For another size the library may choose another matrix product, which rounds differently. In float32 the oracle
    # explains each such token; in half precision the logits differ by a thousandth, which changes a few.
    if dtype == "float32":
        for results in tokens:
            for prompt, own, got in zip(prompts, params, results):
                assert_dense_continuation(MODEL, prompt, own, own.seed, got, True, f"seed {own.seed}")
    same = sum(with_graphs == without for with_graphs, without in zip(*tokens))
    assert same >= (38 if dtype == "float32" else 30), f"{same} of 40 are the same"


@pytest.mark.gpu
def test_decoding_on_a_gpu_waits_for_it_only_where_the_tokens_are_read() -> None:
    llm = LLM(MODEL, device="cuda", num_blocks=60, max_num_seqs=8)
    for i in range(6):
        llm.add_request([i, 1, 2], SamplingParams(max_tokens=30, temperature=float(i % 2)))
    llm.add_request([7, 1, 2], SamplingParams(max_tokens=30, n=2))
    for _ in range(4):  # the prompts, and what is compiled and recorded at first
        llm.step()
    waits = []
    tolist = torch.Tensor.tolist

    def counting(tensor: torch.Tensor) -> list:
        waits.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", counting)
        torch.cuda.set_sync_debug_mode("error")  # any other synchronisation raises
        try:
            for _ in range(8):
                llm.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert waits == [(8,)] * 8
