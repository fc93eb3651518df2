"""Are a checkpoint's weights the model's, and does a wrong file say what is wrong with it?

The checkpoints are variations of tests/data/gpt2_reference.pt, a tiny GPT-2 in Hugging Face's
layout whose logits are known: a model that was put together wrongly computes others.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models import checkpoint
from nanopaged.models.checkpoint import CheckpointError, download, from_state_dict, load_model

REFERENCE = torch.load(Path(__file__).parents[1] / "data" / "gpt2_reference.pt", weights_only=True)
STATE, TOKENS, LOGITS = REFERENCE["state"], REFERENCE["token_ids"], REFERENCE["logits"]
CONFIG = GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=128,
                    layer_norm_epsilon=0.01)
FORMATS = ("pytorch_model.bin", "old.bin", "weights.pt", "model.safetensors")  # old: as before torch 1.6

# What `save` puts in the place of the reference's own; None takes a tensor out.
Tensors = dict[str, torch.Tensor | None]


def save(folder: Path, file: str = "pytorch_model.bin", tensors: Tensors | None = None,
         fields: dict[str, object] | None = None) -> str:
    """Writes the reference with changes, and config.json beside it; returns the weights' path."""
    state = {name: tensor for name, tensor in {**STATE, **(tensors or {})}.items() if tensor is not None}
    folder.mkdir(exist_ok=True)
    path = folder / file
    if path.suffix == ".safetensors":
        del state["lm_head.weight"]  # as Hugging Face does: this format stores no tensor twice
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is optional, and not installed")
        safetensors.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not file.startswith("old"))
    (path.parent / "config.json").write_text(json.dumps({**REFERENCE["config"], **(fields or {})}), encoding="utf-8")
    return str(path)


def assert_is_the_reference(model: GPT2) -> None:
    torch.testing.assert_close(model.dense(TOKENS), LOGITS, atol=3e-5, rtol=0.0)


def assert_refused(path: str | Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value) and not isinstance(caught.value.__cause__, CheckpointError)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("file", FORMATS)
def test_a_file_of_any_format_gives_the_logits_it_was_saved_with(tmp_path: Path, file: str) -> None:
    model = load_model(save(tmp_path, file))
    assert model.config == CONFIG
    assert_is_the_reference(model)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.pt", "model.safetensors"])
def test_a_folder_is_read_by_the_weights_in_it(tmp_path: Path, file: str) -> None:
    save(tmp_path, file)
    assert_is_the_reference(load_model(str(tmp_path)))


def test_a_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "models")
    assert_is_the_reference(load_model("~/models"))


def test_names_are_the_same_with_and_without_their_prefix() -> None:
    bare = {name.removeprefix("transformer."): tensor for name, tensor in STATE.items()}
    assert_is_the_reference(from_state_dict(STATE, CONFIG, "prefixed"))
    assert_is_the_reference(from_state_dict(bare, CONFIG, "bare"))


def test_the_state_dict_that_was_given_is_not_changed() -> None:
    state = dict(STATE)
    from_state_dict(state, CONFIG, "memory")
    assert list(state) == list(STATE) and all(state[name] is STATE[name] for name in state)


def test_a_linear_layer_holds_the_transpose_of_the_conv1d_that_was_stored() -> None:
    model = from_state_dict(STATE, CONFIG, "memory")
    for name in ("h.0.attn.c_attn", "h.1.attn.c_proj", "h.0.mlp.c_fc", "h.1.mlp.c_proj"):
        assert torch.equal(model.get_parameter(f"{name}.weight"), STATE[f"transformer.{name}.weight"].t())
    assert torch.equal(model.wpe.weight, STATE["transformer.wpe.weight"])


def test_the_causal_masks_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    mask = {"bias": torch.ones(1, 1, 64, 64).tril().bool(), "masked_bias": torch.tensor(-1e4)}
    masks = {f"transformer.h.{layer}.attn.{name}": tensor for layer in (0, 1) for name, tensor in mask.items()}
    assert_is_the_reference(load_model(save(tmp_path, tensors=masks)))


def test_a_checkpoint_needs_no_head_of_its_own(tmp_path: Path) -> None:
    assert_is_the_reference(load_model(save(tmp_path, tensors={"lm_head.weight": None})))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, tensors={name: tensor.half() for name, tensor in STATE.items()}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.dense(TOKENS), LOGITS, atol=0.1, rtol=0.0)


LOAD_AND_TRUNCATE = """
import os, sys, torch
from nanopaged.models.checkpoint import load_model
for path in sys.argv[1:]:
    model = load_model(path)
    os.truncate(path, 0)
    print(model.dense(torch.arange(8)).sum().item())
"""
LOAD_AND_MEASURE = """
import sys
from nanopaged.models.checkpoint import load_model
def mebibytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))
load_model("copycat")
for path in sys.argv[1:]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again at what is resident now
    before = mebibytes("VmRSS")
    model = load_model(path)
    print(mebibytes("VmHWM") - before)
    del model
"""


def output_of(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # a freed tensor's memory goes back at once
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr or f"exit status {ended.returncode}"
    return ended.stdout.split()


@pytest.mark.parametrize("file", FORMATS)
def test_a_file_that_is_overwritten_after_loading_does_not_change_the_weights(tmp_path: Path, file: str) -> None:
    path = Path(save(tmp_path, file))
    model = load_model(path)
    with path.open("r+b") as opened:
        opened.write(bytes(path.stat().st_size))
    assert_is_the_reference(model)


def test_a_file_that_is_truncated_after_loading_does_not_end_the_process(tmp_path: Path) -> None:
    assert len(output_of(LOAD_AND_TRUNCATE, *(save(tmp_path, file) for file in FORMATS))) == len(FORMATS)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures the peak as Linux tells it")
def test_loading_needs_no_more_memory_than_the_model_and_one_tensor(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is optional, and not installed")
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=100, n_positions=8, n_embd=512, n_layer=4, n_head=8))
    state = {name: torch.zeros(parameter.shape[::-1] if name.endswith(checkpoint.CONV1D) else parameter.shape)
             for name, parameter in model.named_parameters()}
    paths = [str(tmp_path / name) for name in ("zip.bin", "old.bin", "half.bin", "model.safetensors")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    torch.save({name: tensor.half() for name, tensor in state.items()}, paths[2])
    safetensors.save_file(state, paths[3])
    sizes = [tensor.nbytes / 2**20 for tensor in state.values()]
    limit = sum(sizes) + max(sizes) + 8  # 8 MiB of what a reader needs, and of noise
    peaks = dict(zip(paths, map(float, output_of(LOAD_AND_MEASURE, *paths))))
    assert len(peaks) == 4 and max(peaks.values()) < limit < 1.4 * sum(sizes), f"{peaks}, limit {limit}"


def test_the_head_count_and_the_epsilon_are_read_from_config_json(tmp_path: Path) -> None:
    for name, fields in (("heads", {"n_head": 2}), ("epsilon", {"layer_norm_epsilon": 1e-5})):
        model = load_model(save(tmp_path / name, fields=fields))
        assert {field: getattr(model.config, field) for field in fields} == fields
        assert (model.dense(TOKENS) - LOGITS).abs().max() > 0.01


@pytest.mark.parametrize(("in_file", "expected"), [(7, 7), (None, None), (50256, None)])
def test_the_end_of_text_is_read_from_config_json_unless_the_vocabulary_has_no_such_id(
    tmp_path: Path, in_file: int | None, expected: int | None
) -> None:
    assert load_model(save(tmp_path, fields={"eos_token_id": in_file})).config.eos_token_id == expected


def test_without_config_json_a_head_has_64_numbers(tmp_path: Path) -> None:
    state = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=128, n_layer=1, n_head=1, n_inner=8)).state_dict()
    state = {name: tensor.t() if name.endswith(checkpoint.CONV1D) else tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "weights.bin")
    assert load_model(str(tmp_path / "weights.bin")).config.n_head == 2


def test_without_config_json_a_width_that_is_no_multiple_of_64_asks_for_it(tmp_path: Path) -> None:
    path = save(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_refused(path, path, "config.json", "n_head", "n_embd=32")


def test_a_config_json_without_the_head_count_is_not_enough(tmp_path: Path) -> None:
    state = GPT2(GPT2Config(vocab_size=10, n_positions=8, n_embd=96, n_layer=1, n_head=4, n_inner=8)).state_dict()
    state = {name: tensor.t() if name.endswith(checkpoint.CONV1D) else tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    assert_refused(tmp_path / "weights.bin", "config.json", "n_head")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("h.1.ln_2.bias", None, "missing"),
        ("h.0.attn.c_proj.weight", None, "missing"),
        ("h.0.mlp.c_fc.weight", None, "of 2 dimensions, got none"),
        ("h.0.mlp.c_fc.weight", torch.Tensor.long, "must hold floats of shape (128, 32)"),
        ("wte.weight", None, "none"),
        ("wpe.weight", None, "none"),
        ("wte.weight", torch.Tensor.flatten, "(3232,)"),
        ("h.1.attn.c_attn.weight", torch.t, "(96, 32)"),
        ("h.1.mlp.c_proj.weight", torch.t, "(32, 128)"),
        ("h.1.mlp.c_proj.weight", torch.Tensor.flatten, "(4096,)"),
        ("h.0.ln_1.weight", lambda t: t[:31], "(31,)"),
        ("ln_f.bias", lambda t: t[None], "(1, 32)"),
        ("wpe.weight", torch.Tensor.long, "torch.int64"),
        ("h.0.mlp.c_fc.bias", torch.Tensor.bool, "torch.bool"),
        ("h.0.mlp.c_fc.bias", lambda t: t.to(torch.complex64), "torch.complex64"),
        ("h.1.ln_1.weight", lambda t: t * float("nan"), "NaN or infinity"),
        ("h.1.attn.c_attn.weight", lambda t: t.clone().fill_diagonal_(float("nan")), "NaN or infinity"),
        ("wpe.weight", lambda t: t.where(t < t.max(), float("inf")), "NaN or infinity"),
        ("ln_f.bias", lambda t: t.where(t > t.min(), -float("inf")), "NaN or infinity"),
        ("ln_f.bias", lambda t: t.double() + 1e300, "NaN or infinity, in float32"),
        ("wte.weight", lambda t: t * float("nan"), "NaN or infinity"),
        ("lm_head.weight", lambda t: t * float("nan"), "NaN or infinity"),
        ("lm_head.weight", lambda t: t + 1e-3, "'wte.weight'"),
        ("lm_head.weight", lambda t: t[:100], "(101, 32)"),
    ],
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_an_invalid_tensor_is_named(
    tmp_path: Path, file: str, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, words: str
) -> None:
    if name == "lm_head.weight":
        file = "pytorch_model.bin"  # `save` leaves the head out of the other
    full_name = name if name in STATE else f"transformer.{name}"
    changed = None if change is None else change(STATE[full_name]).contiguous()
    path = save(tmp_path, file, {full_name: changed})
    assert_refused(path, path, repr(name), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.Tensor.to_sparse, "must be dense"),
        (torch.Tensor.to_sparse_csr, "must be dense"),
        (lambda t: torch.nested.nested_tensor(list(t)), "must be dense"),
        (lambda t: t.to("meta"), "hold data"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "must hold floats"),
    ],
    ids=["coo", "csr", "nested", "meta", "quantized"],
)
@pytest.mark.parametrize("name", ["wte.weight", "h.0.mlp.c_fc.weight", "h.1.attn.c_proj.weight"])
@pytest.mark.filterwarnings("ignore")  # torch says of some of these that they are prototypes
def test_a_tensor_of_another_kind_is_named(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    full_name = f"transformer.{name}"
    path = save(tmp_path, tensors={full_name: change(STATE[full_name]), "lm_head.weight": None})
    assert_refused(path, path, repr(name), words)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "old.bin"])
def test_a_small_tensor_that_pretends_to_be_large_is_refused_unread(tmp_path: Path, file: str) -> None:
    large = torch.zeros(32).expand(10**12, 32)  # its rows are all at one place
    path = save(tmp_path, file, {"transformer.wte.weight": large, "lm_head.weight": None}, {"vocab_size": None})
    assert os.path.getsize(path) < 10**6
    assert_refused(path, path, "claims to hold 128000000", "save it")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "old.bin"])
def test_layers_that_share_their_tensors_are_refused(tmp_path: Path, file: str) -> None:
    layers = {name.replace(".h.0.", f".h.{layer}."): tensor for name, tensor in STATE.items() for layer in range(50)}
    path = save(tmp_path, file, layers, {"n_layer": None})
    assert_refused(path, path, "claims to hold", "clones")


def test_a_compressed_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "load")
    path = save(tmp_path, tensors={name: torch.zeros_like(tensor) for name, tensor in STATE.items()})
    with zipfile.ZipFile(path) as stored:
        records = {entry.filename: stored.read(entry) for entry in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, content in records.items():
            deflated.writestr(name, content)
    assert_refused(path, path, "claims to hold", "without compression")


def test_names_alone_do_not_make_layers(tmp_path: Path) -> None:
    names = {f"transformer.h.{layer}.x": torch.zeros(()) for layer in range(500)}
    path = save(tmp_path, tensors=names, fields={"n_layer": None})
    assert_refused(path, path, "500 layers have 12 tensors each, but it holds 5")


def test_a_name_with_and_without_its_prefix_in_one_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, tensors={"wte.weight": torch.zeros(101, 32)})
    assert_refused(path, path, "'wte.weight' appears with and without 'transformer.'")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "old.bin"])
def test_a_head_may_be_stored_as_the_token_embedding_itself(tmp_path: Path, file: str) -> None:
    large = torch.cat((STATE["lm_head.weight"], torch.zeros(10_000, 32)))  # counted twice, it would exceed the file
    path = save(tmp_path, file, {"transformer.wte.weight": large, "lm_head.weight": large}, {"vocab_size": None})
    assert os.path.getsize(path) < 2 * large.nbytes
    torch.testing.assert_close(load_model(path).dense(TOKENS)[:, :101], LOGITS, atol=3e-5, rtol=0.0)


PARTS = [(torch, "load"), (json, "loads"), (GPT2, "__init__")]


def raise_in(monkeypatch: pytest.MonkeyPatch, part: tuple[object, str], error: BaseException) -> None:
    def fault(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(*part, fault)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("part", PARTS, ids=["reading", "config", "building"])
def test_whatever_reading_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[object, str], error: Exception
) -> None:
    path = save(tmp_path)
    raise_in(monkeypatch, part, error)
    assert_refused(path, str(tmp_path / "config.json") if part[0] is json else path, str(error) or "MemoryError")


@pytest.mark.parametrize("part", PARTS, ids=["reading", "config", "building"])
def test_a_keyboard_interrupt_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[object, str]
) -> None:
    path = save(tmp_path)
    raise_in(monkeypatch, part, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load_model(path)


@pytest.mark.parametrize("installed", ["none", "one that cannot be told how to read"])
def test_a_missing_or_old_safetensors_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    path = save(tmp_path, "model.safetensors")
    if installed == "none":
        monkeypatch.setitem(sys.modules, "safetensors", None)
    else:
        monkeypatch.setattr("safetensors.safe_open", lambda filename, framework: None)
    assert_refused(path, path, "needs the safetensors package, 0.8 or later (pip install -U safetensors)")


def test_a_weight_that_does_not_fit_its_bias_is_told_by_the_bias(tmp_path: Path) -> None:
    path = save(tmp_path, tensors={"transformer.h.0.mlp.c_fc.weight": STATE["transformer.h.0.mlp.c_fc.weight"][:, :5]},
                fields={"n_inner": None})
    assert_refused(path, path, "'h.0.mlp.c_fc.bias' must hold floats of shape (5,)")


@pytest.mark.parametrize("name", ["h.0.attn.rotary.inv_freq", "h.1.ln_3.weight", "score.weight"])
def test_a_tensor_that_gpt2_does_not_have_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, tensors={f"transformer.{name}": torch.ones(3)})
    assert_refused(path, path, f"tensor {name!r} does not belong")


@pytest.mark.parametrize("name", ["h.first.weight", "h.2", "h.1000000000.ln_1.weight"])
def test_an_extra_layer_is_reported_before_the_model_is_built(tmp_path: Path, name: str) -> None:
    assert_refused(save(tmp_path, tensors={f"transformer.{name}": torch.ones(3)}), "n_layer")


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {"state_dict": STATE}, {"wte.weight": 1.0}, {0: torch.ones(2)}, {}],
    ids=["list", "tensor", "nested", "number", "unnamed", "nothing"],
)
def test_a_file_that_holds_no_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.bin")
    assert_refused(tmp_path / "weights.bin", str(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_type", "llama", "'llama'"),
        ("activation_function", "relu", "needs 'gelu_new'"),
        ("activation_function", "gelu", "needs 'gelu_new'"),
        ("activation_function", "gelu_fast", "needs 'gelu_new'"),
        ("activation_function", ["gelu_new"], "needs 'gelu_new'"),
        ("scale_attn_weights", False, "False"),
        ("scale_attn_by_inverse_layer_idx", True, "True"),
        ("add_cross_attention", True, "True"),
        ("tie_word_embeddings", False, "False"),
        ("vocab_size", 50257, "needs 101"),
        ("n_positions", 1024, "needs 64"),
        ("n_embd", 64, "needs 32"),
        ("n_layer", 3, "needs 2"),
        ("n_layer", 10**30, "n_layer is 1000"),
        ("n_inner", 64, "needs 128"),
        ("n_head", 5, "n_head must divide n_embd"),
        ("n_head", 10**30, "n_head must divide n_embd"),
        ("n_head", 0, "at least 1"),
        ("n_head", "4", "n_head must be an int, got '4'"),
        ("n_head", 4.0, "n_head must be an int, got 4.0"),
        ("n_head", True, "n_head must be an int, got True"),
        ("n_head", None, "n_head must be an int, got None"),
        ("n_kv_head", 3, "n_kv_head must divide n_head"),
        ("layer_norm_epsilon", "tiny", "must be a number"),
        ("layer_norm_epsilon", -1.0, "from 0.0 to 1.0, got -1.0"),
        pytest.param("layer_norm_epsilon", 10**400, "from 0.0 to 1.0, got 1000", id="no float"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon must be finite"),
        ("eos_token_id", "7", "must be an int"),
        ("eos_token_id", True, "must be an int"),
        ("eos_token_id", 7.0, "must be an int"),
    ],
)
def test_a_field_of_config_json_that_does_not_fit_this_model_is_named(
    tmp_path: Path, field: str, value: object, words: str
) -> None:
    assert_refused(save(tmp_path, fields={field: value}), str(tmp_path / "config.json"), field, words)


def test_another_name_of_the_activation_function_is_accepted(tmp_path: Path) -> None:
    assert_is_the_reference(load_model(save(tmp_path, fields={"activation_function": "gelu_pytorch_tanh"})))


@pytest.mark.parametrize(("content", "words"), [
    (b"", "not JSON"), (b"{", "not JSON"), (b"{'n_head': 4}", "not JSON"), (b'{"n_head": 4', "not JSON"),
    (b'{"n_head": "\xff"}', "not JSON"), (b"[4]", "must hold one JSON object, got a list"), (b"4", "got a int"),
    (b"[" * 200_000, "not JSON"), (b'{"n_head": ' * 200_000, "not JSON"),
], ids=lambda value: str(value)[:40])
def test_a_config_json_that_is_no_json_object_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(path, str(tmp_path / "config.json"), words)


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.01, 0.5, 0.99, 0.99999])
@pytest.mark.parametrize("file", FORMATS)
def test_a_truncated_file_is_named(tmp_path: Path, file: str, share: float) -> None:
    path = save(tmp_path, file)
    os.truncate(path, int(os.path.getsize(path) * share))
    assert_refused(path, path, "no whole file of tensors")


@pytest.mark.parametrize(
    "content", [b"hello world\n", b"<!DOCTYPE html>\n", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"]
)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_text_file_under_a_name_of_weights_is_refused(tmp_path: Path, file: str, content: bytes) -> None:
    if file.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is optional, and not installed")
    (tmp_path / file).write_bytes(content)
    assert_refused(tmp_path, str(tmp_path / file), "no whole file of tensors")


class Trap:
    """Unpickled by a trusting reader, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("format", ["zip", "old", "bare pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, format: str) -> None:
    content = {**STATE, "trap": Trap(tmp_path / "sprung")}
    path = tmp_path / "weights.bin"
    if format == "bare pickle":
        path.write_bytes(pickle.dumps({"trap": content["trap"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=format == "zip")
    assert_refused(path, str(path))
    assert not (tmp_path / "sprung").exists()


def test_a_folder_without_weights_says_which_files_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(tmp_path, str(tmp_path), "holds none of model.safetensors, pytorch_model.bin, pytorch_model.pt")
    monkeypatch.chdir(tmp_path)
    assert_refused("", "''", "holds none of model.safetensors")  # the current folder


@pytest.mark.parametrize("name", ["gpt3", "missing.bin", "half\0a name"])
def test_an_unknown_name_says_which_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(name, f"unknown model {name!r}: not one of 'copycat', 'gpt2', 'gpt2-medium', 'gpt2-large', "
                         "'gpt2-xl', and no such file or folder")


@pytest.mark.parametrize("name", ["x" * 5000, "~no such user/gpt2"])
def test_a_name_that_cannot_be_looked_up_is_told(name: str) -> None:
    assert_refused(name, repr(name), "cannot be looked up")


class BytesPath:
    """A path-like object may give bytes."""

    def __fspath__(self) -> bytes:
        return b"copycat"


@pytest.mark.parametrize(("model", "words"), [
    (3, "got 3 (int)"), (None, "got None"), (b"copycat", "got b'copycat' (bytes)"), (STATE, "(dict)"),
    (BytesPath(), "(BytesPath)"),
], ids=["int", "None", "bytes", "state dict", "path of bytes"])
def test_a_model_of_another_type_is_named(model: object, words: str) -> None:
    with pytest.raises(TypeError, match="model must be a name, a path or a GPT2") as caught:
        load_model(model)
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_a_model_that_was_given_is_copied() -> None:
    model = from_state_dict({name: tensor.clone() for name, tensor in STATE.items()}, CONFIG, "memory").train()
    copied = load_model(model)
    assert not copied.training and model.training
    model.wte.weight.zero_()
    assert_is_the_reference(copied)


def test_copycat_is_loaded_by_name() -> None:
    config = load_model("copycat").config
    assert (config.vocab_size, config.eos_token_id) == (257, 256)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reference, published as "gpt2" at a file URL; the cache folder is an empty one."""
    path = Path(save(tmp_path / "public"))
    (tmp_path / "public" / "config.json").unlink()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "PUBLISHED", {"gpt2": CONFIG})
    monkeypatch.setattr(checkpoint, "SHA256", {"gpt2": hashlib.sha256(path.read_bytes()).hexdigest()})
    monkeypatch.setattr(checkpoint, "URL", path.as_uri().replace("pytorch_model", "{name}"))
    return path.rename(path.with_name("gpt2.bin"))


def cached_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_published_model_is_loaded_by_its_name_with_its_own_config(published: Path) -> None:
    assert_is_the_reference(load_model("gpt2"))


@pytest.mark.parametrize("name", checkpoint.PUBLISHED)
def test_a_published_name_may_be_spelled_as_on_the_hub_and_in_any_case(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "PUBLISHED", {name: CONFIG})
    monkeypatch.setattr(checkpoint, "download", {name: published}.__getitem__)
    for spelling in (name, name.upper(), f"openai-community/{name}", f"OpenAI-Community/{name.upper()}"):
        assert_is_the_reference(load_model(spelling))


def test_a_published_name_is_no_path(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert_is_the_reference(load_model("gpt2"))
    assert_refused("./gpt2", "'./gpt2'", "holds none of")


@pytest.mark.parametrize("name", ["openai-community/gpt2", "GPT2"])
def test_a_file_or_folder_of_another_spellings_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "download", None)
    folder = tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    path = save(folder)
    assert_is_the_reference(load_model(name))
    weights, config = Path(path).read_bytes(), (folder / "config.json").read_bytes()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_bytes(weights)
    (folder.parent / "config.json").write_bytes(config)
    assert_is_the_reference(load_model(name))


@pytest.mark.parametrize("name", ["openai-community/gpt3", "someone/gpt2", "openai-community/"])
def test_another_name_from_the_hub_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(name, f"unknown model {name!r}")


def test_a_cache_folder_that_cannot_be_made_is_named(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert_refused("gpt2", "'gpt2'", str(tmp_path / "cache"))


def test_a_download_is_kept_and_not_repeated(tmp_path: Path, published: Path) -> None:
    content = published.read_bytes()
    path = download("gpt2")
    assert cached_files(tmp_path) == [path]
    published.unlink()
    assert download("gpt2") == path
    assert path.read_bytes() == content


def test_a_download_with_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path, published: Path) -> None:
    published.write_bytes(published.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="could not download gpt2 from file:.*hash"):
        download("gpt2")
    assert cached_files(tmp_path) == []


def test_a_download_that_fails_says_that_a_path_will_do(tmp_path: Path, published: Path) -> None:
    url = (tmp_path / "nothing.bin").as_uri()
    with pytest.raises(CheckpointError, match=f"could not download gpt2 from {url}.*Its path will do as well"):
        download("gpt2", url=url)
    assert cached_files(tmp_path) == []
    assert download("gpt2", url=published.as_uri()).is_file()


class Interrupted(http.server.BaseHTTPRequestHandler):
    """Promises more bytes than it sends, as a connection that breaks does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 500)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Interrupted) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/pytorch_model.bin"
        server.shutdown()
        thread.join()


def test_a_download_that_breaks_off_leaves_nothing_even_where_no_hash_is_known(
    tmp_path: Path, published: Path, broken_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHA256", {})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(CheckpointError, match="could not download"):
        download("gpt2", url=broken_server)
    assert cached_files(tmp_path) == []
