"""Whatever is wrong with a call, the error says so at once, and the engine goes on as if it had not been made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import train_free_demo
from tests.oracle import TINY, continue_densely, tiny_model
from test_checkpoint import STATE, save

from nanopaged import LLM, SamplingParams
from nanopaged.models.checkpoint import CheckpointError
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.tokenizer import Tokenizer, byte_encoding

BYTES = GPT2Config(vocab_size=257, n_positions=96, n_embd=32, n_layer=2, n_head=2, eos_token_id=256)
MODEL, NO_TOKENIZER = tiny_model(BYTES), tiny_model(TINY)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
HUGE, NAN, INFINITY = 10**30, float("nan"), float("inf")
UNPRINTABLE = 10**5000  # Python refuses to write an int of so many digits, even as the name of a test


def build(model: GPT2 = MODEL, **options: object) -> LLM:
    return LLM(**{"model": model, "device": "cpu", "block_size": 8, "num_blocks": 40, "max_num_seqs": 8} | options)


@pytest.fixture(scope="module")
def shared() -> LLM:
    return build()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must be as good after the test as before it."""
    yield shared
    left = [shared.abort_request(request_id) for request_id in list(shared._groups)]  # so that only one test fails
    assert not left and not shared.has_unfinished_requests()
    shared.scheduler.check_invariants()
    stats = shared.stats()
    assert stats.referenced_blocks == 0 and stats.cached_blocks + stats.free_blocks == stats.num_blocks
    (output,) = shared.generate("ab", GREEDY)
    assert output.outputs[0].token_ids == continue_densely(MODEL, [97, 98], GREEDY)


def assert_refused(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, f"no short line: {message[:1000]}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(("option", "value", "error", "words"), [
    ("model", 3, TypeError, "must be a name, a path or a GPT2, got 3 (int)"),
    ("model", None, TypeError, "must be a name, a path or a GPT2, got None"),
    ("model", b"copycat", TypeError, "got b'copycat' (bytes)"),
    ("model", "gpt5", CheckpointError, "unknown model 'gpt5': not one of 'copycat', 'gpt2'"),
    ("model", "half\0a name", CheckpointError, "unknown model 'half\\x00a name'"),
    ("model", "a" * 5000, CheckpointError, "neither a name nor a path"),
    ("model", "", CheckpointError, "''"),
    ("model", MODEL.state_dict(), TypeError, "(OrderedDict)"),
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
    ("block_size", 12, ValueError, "must be a power of two from 8 to 256, got 12"),
    ("block_size", 4, ValueError, "from 8 to 256, got 4"),
    ("block_size", HUGE, ValueError, "from 8 to 256"),
    ("block_size", 16.0, TypeError, "must be an int, got 16.0 (float)"),
    ("block_size", True, TypeError, "got True (bool)"),
    ("block_size", None, TypeError, "got None"),
    ("block_size", np.int64(8), TypeError, "(int64)"),
    ("num_blocks", 0, ValueError, "must be at least 1, got 0"),
    ("num_blocks", -1, ValueError, "must be at least 1, got -1"),
    ("num_blocks", "many", TypeError, "must be an int, got 'many' (str)"),
    ("num_blocks", 4.0, TypeError, "got 4.0"),
    ("num_blocks", HUGE, ValueError, f"268435456, got {HUGE}"),
    ("num_blocks", 2**28 + 1, ValueError, "268435456, got 268435457"),
    pytest.param("num_blocks", UNPRINTABLE, ValueError, "num_blocks must be", id="unprintable"),
    ("gpu_memory_utilization", 0, ValueError, "must be in (0, 1], got 0"),
    ("gpu_memory_utilization", 1.5, ValueError, "from 0.0 to 1.0, got 1.5"),
    ("gpu_memory_utilization", NAN, ValueError, "finite"),
    ("gpu_memory_utilization", INFINITY, ValueError, "finite"),
    ("gpu_memory_utilization", None, TypeError, "must be a number, got None"),
    ("gpu_memory_utilization", True, TypeError, "got True"),
    ("max_model_len", 97, ValueError, "from 2 to 96, got 97"),
    ("max_model_len", 1, ValueError, "from 2 to 96, got 1"),
    ("max_model_len", HUGE, ValueError, "from 2 to 96"),
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
    ("max_waiting", 0, ValueError, "must be at least 1, got 0"),
    ("max_waiting", 1.5, TypeError, "must be an int"),
    ("max_waiting", True, TypeError, "must be an int"),
    ("preemption", "drop", ValueError, "must be one of 'recompute', 'swap', got 'drop'"),
    ("preemption", None, TypeError, "must be a str"),
    ("preemption", b"swap", TypeError, "got b'swap'"),
    ("swap_blocks", 0, ValueError, "must be at least 1"),
    ("swap_blocks", None, TypeError, "must be an int"),
    ("swap_blocks", 1.0, TypeError, "must be an int"),
    ("seed", None, TypeError, "must be an int"),
    ("seed", 1.5, TypeError, "must be an int"),
    ("seed", True, TypeError, "must be an int"),
    ("tokenizer", "gpt2", TypeError, "must be a Tokenizer, got 'gpt2' (str)"),
    ("tokenizer", byte_encoding(), TypeError, "must be a Tokenizer"),
    ("tokenizer", Tokenizer, TypeError, "must be a Tokenizer"),
    ("tokenizer", 0, TypeError, "must be a Tokenizer, got 0"),
    ("nonsense", 1, TypeError, "unexpected keyword argument 'nonsense'"),
])
def test_an_engine_that_cannot_be_built_names_the_argument(
    llm: LLM, option: str, value: object, error: type, words: str
) -> None:
    assert_refused(lambda: build(**{option: value}), error, words, "" if error is CheckpointError else option)


@pytest.mark.parametrize(("options", "words"), [
    ({"num_blocks": 2**27}, "there is no memory for a KV cache of 134217728 blocks"),
    ({"model": NO_TOKENIZER, "tokenizer": Tokenizer(byte_encoding())}, "the tokenizer has 257 ids, the model 61"),
    ({"preemption": "swap", "swap_blocks": HUGE}, "swap_blocks must be"),
    ({"preemption": "swap", "swap_blocks": 2**27}, "swap"),
    ({"admission": lambda now: True, "watermark": "1%"}, "watermark must be a number"),
    pytest.param({"seed": UNPRINTABLE}, "seed must be", id="unprintable"),
])
def test_arguments_that_do_not_go_together_say_which(llm: LLM, options: dict[str, object], words: str) -> None:
    assert_refused(lambda: build(**options).generate([[1]], GREEDY), (TypeError, ValueError), words)


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("nanopaged.device.INTERPRETED", False)
    assert_refused(lambda: build(attention="triton"), ValueError, "TRITON_INTERPRET=1")


@pytest.mark.parametrize(("field", "value", "error", "words"), [  # beside those of tests/test_sampling.py
    ("n", HUGE, ValueError, "from 1 to 1024"),
    ("n", np.int64(2), TypeError, "must be an int"),
    ("n", 2.0, TypeError, "must be an int"),
    ("temperature", [1.0], TypeError, "must be a number"),
    ("temperature", HUGE, ValueError, "from 0.0 to 1000000.0"),
    ("temperature", object(), TypeError, "must be a number"),
    ("top_k", True, TypeError, "must be an int"),
    ("top_k", np.int32(2), TypeError, "must be an int"),
    ("top_p", INFINITY, ValueError, "finite"),
    ("top_p", HUGE, ValueError, "from 0.0 to 1.0"),
    ("max_tokens", True, TypeError, "must be an int"),
    ("max_tokens", {}, TypeError, "must be an int"),
    ("max_tokens", -HUGE, ValueError, "at least 1"),
    ("stop", [""], ValueError, "empty string"),
    ("stop", [b"x"], TypeError, "a str or a list of str"),
    ("stop", {"x": 1}, TypeError, "a str or a list of str"),
    ("stop", object(), TypeError, "a str or a list of str"),
    ("stop", "\ud83d", ValueError, "lone surrogate"),
    ("stop_token_ids", [1.0], TypeError, "must be an int"),
    ("stop_token_ids", [np.int64(1)], TypeError, "must be an int"),
    ("stop_token_ids", np.array([1]), TypeError, "a list of int"),
    ("stop_token_ids", b"ab", TypeError, "a list of int"),
    ("ignore_eos", "no", TypeError, "must be a bool"),
    ("seed", NAN, TypeError, "must be an int"),
    ("seed", b"1", TypeError, "must be an int"),
    pytest.param("seed", UNPRINTABLE, ValueError, "seed must be", id="unprintable"),
    ("nonsense", 1, TypeError, "unexpected keyword argument"),
])
def test_a_wish_that_cannot_be_names_its_field(llm: LLM, field: str, value: object, error: type, words: str) -> None:
    assert_refused(lambda: llm.generate([[1]], SamplingParams(**{field: value})), error, words, field)


@pytest.mark.parametrize("params", [
    {"max_tokens": HUGE}, {"seed": HUGE}, {"seed": -HUGE}, {"top_k": HUGE}, {"temperature": 5e-324},
    {"temperature": 10**6}, {"stop": ["x" * 1000] * 100}, {"top_p": 5e-324}, {"top_p": 1e-46, "temperature": 0.5},
], ids=repr)
def test_what_is_extreme_but_allowed_is_served(llm: LLM, params: dict[str, object]) -> None:
    (output,) = llm.generate([[1, 2]], SamplingParams(**{"max_tokens": 4} | params))
    assert output.finished and all(0 <= token_id < 257 for token_id in output.outputs[0].token_ids)


PROMPT_WORDS = "a prompt must be a str or a list of token ids"
CALL_WORDS = "prompts must be a str, or a list of str and of lists of token ids"


@pytest.mark.parametrize(("prompt", "error", "words"), [
    ("", ValueError, "the prompt is empty"),
    ([], ValueError, "the prompt is empty"),
    ((), ValueError, "the prompt is empty"),
    ("x" * 96, ValueError, "the prompt has 96 tokens; with max_model_len=96 at most 95"),
    ("x" * 10**5, ValueError, "the prompt has 100000 tokens"),
    ([7] * 96, ValueError, "the prompt has 96 tokens"),
    ([257], ValueError, "token id must be from 0 to 256, got 257"),
    ([1, -1], ValueError, "token id must be from 0 to 256, got -1"),
    ([HUGE], ValueError, "token id must be from 0 to 256"),
    ([1.0], TypeError, "token id must be an int, got 1.0"),
    ([NAN], TypeError, "token id must be an int, got nan"),
    ([True], TypeError, "token id must be an int, got True"),
    ([None], TypeError, "token id must be an int, got None"),
    (["a"], TypeError, "token id must be an int, got 'a'"),
    ([[1]], TypeError, "token id must be an int, got [1]"),
    ([np.int64(1)], TypeError, "token id must be an int, got np.int64(1)"),
    (b"bytes", TypeError, f"{PROMPT_WORDS}, got bytes"),
    (None, TypeError, f"{PROMPT_WORDS}, got NoneType"),
    ({"prompt": "x"}, TypeError, f"{PROMPT_WORDS}, got dict"),
    ({1, 2}, TypeError, f"{PROMPT_WORDS}, got set"),
    (np.array([1, 2]), TypeError, f"{PROMPT_WORDS}, got ndarray"),
    (torch.tensor([1, 2]), TypeError, f"{PROMPT_WORDS}, got Tensor"),
    (range(3), TypeError, f"{PROMPT_WORDS}, got range"),
    (object(), TypeError, f"{PROMPT_WORDS}, got object"),
    (1.5, TypeError, f"{PROMPT_WORDS}, got float"),
    ("half a \ud83d character", ValueError, "lone surrogate"),
])
def test_a_prompt_that_cannot_be_says_why_and_takes_its_company_with_it(
    llm: LLM, prompt: object, error: type, words: str
) -> None:
    assert_refused(lambda: llm.add_request(prompt), error, words)
    assert not llm.has_unfinished_requests()
    assert_refused(lambda: llm.generate([[1, 2], prompt, "ab"], GREEDY), error, words)


@pytest.mark.parametrize("prompts", [[1, 2, 3], (1, 2, 3), [[1], 2], [True], 7, 1.5, None, b"x", {"a": 1}, {1, 2},
                                     object(), np.array([[1]]), torch.tensor([[1]])], ids=repr)
def test_prompts_of_the_wrong_shape_say_what_is_right(llm: LLM, prompts: object) -> None:
    assert_refused(lambda: llm.generate(prompts, GREEDY), TypeError, CALL_WORDS, "[[1, 2, 3]] is one prompt")


@pytest.mark.parametrize(("params", "error", "words"), [
    ({"temperature": 0}, TypeError, "sampling_params must be a SamplingParams, got dict"),
    ("greedy", TypeError, "got str"),
    (5, TypeError, "got int"),
    (SamplingParams, TypeError, "got type"),
    ([GREEDY, {}], TypeError, "got dict"),
    ([GREEDY], ValueError, "got 1 sampling_params for 2 prompts"),
    ([], ValueError, "got 0 sampling_params for 2 prompts"),
    ((GREEDY,) * 3, ValueError, "got 3 sampling_params for 2 prompts"),
    (SamplingParams(n=9), ValueError, "n=9 continuations need as many seats, max_num_seqs is 8"),
    ([GREEDY, SamplingParams(n=1024)], ValueError, "n=1024 continuations need as many seats"),
    (SamplingParams(stop_token_ids=[257]), ValueError, "from 0 to 256"),
    (SamplingParams(stop_token_ids=[HUGE]), ValueError, "from 0 to 256"),
])
def test_sampling_params_that_do_not_fit_the_call_say_why(llm: LLM, params: object, error: type, words: str) -> None:
    assert_refused(lambda: llm.generate(["ab", [1, 2]], params), error, words)


@pytest.mark.parametrize(("options", "prompt", "params", "words"), [
    ({"model": NO_TOKENIZER}, "text", GREEDY, "this model came with no tokenizer: give prompts as token ids"),
    ({"model": NO_TOKENIZER}, [1], SamplingParams(stop="x"), "stop strings need a tokenizer"),
    ({"num_blocks": 5}, [1] * 90, SamplingParams(max_tokens=5),
     "can never fit: its 90 prompt tokens and up to 5 output tokens need 12 blocks of 8, and the "
     "whole pool has 5"),
    ({"num_blocks": 5, "admission": "reserve"}, [1] * 16, SamplingParams(n=2, max_tokens=9),
     "the admission policy refuses it even in an empty pool"),
    ({"admission": lambda now: False}, [1], GREEDY, "can never fit"),
])
def test_a_request_that_this_engine_can_never_serve_says_what_it_would_take(
    options: dict[str, object], prompt: object, params: SamplingParams, words: str
) -> None:
    engine = build(**options)
    assert_refused(lambda: engine.generate([prompt], params), ValueError, words)
    assert not engine.has_unfinished_requests()


@pytest.mark.parametrize("request_id", [
    "0", "99", "", "0.0", 0, -1, HUGE, None, b"0", NAN, ("0",), ["0"], {"id": "0"}, {"0"},
], ids=repr)
def test_an_id_that_no_unfinished_request_has_is_named(llm: LLM, request_id: object) -> None:
    llm.generate("x", GREEDY)  # request 0, at the latest, has finished
    assert_refused(lambda: llm.abort_request(request_id), (TypeError, ValueError), f"id {request_id!r}")


def write_text(folder: Path) -> str:
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    return str(folder / "pytorch_model.bin")


def cut_in_half(folder: Path) -> str:
    path = save(folder)
    os.truncate(path, os.path.getsize(path) // 2)
    return path


def write_config(text: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        path = save(folder)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return path

    return damage


HEAD = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(("damage", "words"), [
    (str, "the folder holds none of model.safetensors"),
    (lambda folder: str(folder / "missing.bin"), "no such file or folder"),
    (write_text, "no whole file of tensors"),
    (cut_in_half, "no whole file of tensors"),
    (lambda folder: save(folder, tensors={HEAD: None}), "a tensor 'h.0.mlp.c_fc.weight' of 2 dimensions, got none"),
    (lambda folder: save(folder, tensors={HEAD: STATE[HEAD][:, :5]}), "'h.0.mlp.c_fc.bias' must hold floats of shape"),
    (lambda folder: save(folder, tensors={HEAD: STATE[HEAD].long()}), "must hold floats of shape (128, 32)"),
    (lambda folder: save(folder, tensors={"extra": torch.ones(2)}), "tensor 'extra' does not belong"),
    (lambda folder: save(folder, fields={"n_head": True}), "n_head must be an int, got True"),
    (lambda folder: save(folder, fields={"n_head": 4.0}), "n_head must be an int, got 4.0"),
    (lambda folder: save(folder, fields={"n_head": HUGE}), "n_head must divide n_embd"),
    (lambda folder: save(folder, fields={"layer_norm_epsilon": NAN}), "layer_norm_epsilon must be finite"),
    (lambda folder: save(folder, fields={"n_layer": HUGE}), "n_layer is"),
    (write_config("{"), "not JSON"),
    (write_config("[]"), "must hold one JSON object, got a list"),
    (lambda folder: save(folder, fields={"eos_token_id": "7"}), "eos_token_id"),
    (lambda folder: save(folder, fields={"eos_token_id": True}), "eos_token_id"),
    (lambda folder: save(folder, fields={"eos_token_id": 7.0}), "eos_token_id"),
])
def test_a_damaged_checkpoint_names_its_file_and_what_is_wrong(
    llm: LLM, tmp_path: Path, damage: Callable[[Path], str], words: str
) -> None:
    folder = tmp_path / "it"  # a short name, so that the length of the message is its own
    folder.mkdir()
    with pytest.raises(CheckpointError) as caught:
        build(model=damage(folder))
    assert words in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "words"), [  # beside those of tests/test_demo.py
    (["--max-tokens", str(HUGE)], "--max-tokens must be at most"),
    (["--max-tokens", "-1"], "max_tokens must be at least 1, got -1"),
    (["--max-tokens", "1.5"], "argument --max-tokens: invalid int value: '1.5'"),
    (["--num-blocks", "0"], "num_blocks must be at least 1, got 0"),
    (["--num-blocks", str(HUGE)], "num_blocks must be from"),
    (["--num-blocks", str(2**27)], "there is no memory for a KV cache"),
    (["--block-size", "0"], "block_size must be from 8 to 256, got 0"),
    (["--block-size", "-16"], "block_size must be from 8 to 256, got -16"),
    (["--block-size", str(HUGE)], "block_size must be from 8 to 256"),
    (["--seed", "x"], "argument --seed: invalid int value"),
    (["--temperature", "inf"], "temperature must be finite"),
    (["--temperature", "-1"], "temperature must be from 0.0"),
    (["--temperature", ""], "argument --temperature: invalid float value"),
    (["--device", ""], "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got ''"),
    (["--prompt", "\ud83d"], "lone surrogate"),
    (["--prompt", "a", "--num-blocks", "4", "--max-tokens", str(HUGE)], "can never fit"),
    (["--prompt"], "expected one argument"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["stray"], "unrecognized arguments: stray"),
])
def test_a_wrong_command_line_gets_one_clear_last_line_and_status_2(
    capsys: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train_free_demo.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
