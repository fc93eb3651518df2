"""Where do weights come from, and can they be trusted?

A checkpoint is a dict of named tensors, in Hugging Face's layout of OpenAI's GPT-2. No code that a file
may carry is run (`weights_only=True`), and every name, shape and number is checked, so that a wrong file
says what is wrong. Weights are read into memory of their own: a file that changes while it is mapped
changes the model, or kills the process. (A pickle, .bin or .pt, can still make torch's reader fill memory
with bytes that are no tensor; a .safetensors file cannot.)
"""

from __future__ import annotations

import copy
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.copycat import build_copycat
from nanopaged.validation import require_int, require_number, shown

logger = logging.getLogger(__name__)

URL = "https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
GPT2_EOS = 50256
PUBLISHED = {name: GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, eos_token_id=GPT2_EOS)
             for name, n_layer, n_embd in (("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280),
                                           ("gpt2-xl", 48, 1600))}
SHA256 = {"gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pt")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out), the transpose of Linear's
# Fields of config.json that change the arithmetic, each with the one value that this GPT-2 computes.
FIXED_FIELDS = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or not GPT-2's; names the file and the tensor or field."""


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Makes a CheckpointError of whatever is raised inside: a damaged file makes the readers raise nearly anything."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(f"{path}: {what}: {reason}") from error


def load_model(model: str | os.PathLike | GPT2) -> GPT2:
    """A GPT-2 by name or path, in float32 on the CPU; or a copy of one.

    Args:
        model: "copycat"; "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", downloaded once into
            torch's cache folder; or a path: a .bin or .pt state dict, a .safetensors file, or a
            folder that holds one of these. A config.json beside the weights is read for what
            shapes cannot tell, the head count; without it a head is 64 wide, as in all of GPT-2.
            "openai-community/gpt2" and "GPT2" also mean "gpt2", unless a file or folder has that name.

    Raises CheckpointError: no such model, or a file that is not a GPT-2; TypeError for anything else.
    """
    if isinstance(model, GPT2):
        return copy.deepcopy(model).eval()
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str):
        raise TypeError(f"model must be a name, a path or a GPT2, got {shown(model)}")
    if name == "copycat":
        return build_copycat()
    published = name.lower().removeprefix("openai-community/")
    with reading(repr(name), "cannot be looked up"):
        if published in PUBLISHED and (name in PUBLISHED or not Path(name).exists()):
            path, config = download(published), PUBLISHED[published]
        else:
            path, config = find(name), None
    with reading(path, "no whole file of tensors (cut off, another kind of file, or too large for the memory)"):
        state = read_weights(path)
        return build(state, config or read_config(path, state), str(path))


def find(name: str) -> Path:
    """The file of weights that a path means: the file itself, or the first of `WEIGHT_FILES` in a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = next((path / file for file in WEIGHT_FILES if (path / file).is_file()), path)
        if path.is_dir():
            raise CheckpointError(f"{name!r}: the folder holds none of {', '.join(WEIGHT_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"unknown model {name!r}: not one of 'copycat', {', '.join(map(repr, PUBLISHED))}, "
                              "and no such file or folder")
    return path


def download(name: str, url: str | None = None) -> Path:
    """The path of a published model's weights in torch's cache folder, downloaded if not there yet.

    `name` is a key of `PUBLISHED`. Raises CheckpointError, and keeps nothing, without a connection, and
    for a file that is not whole or not the known one.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}-pytorch_model.bin"
    if not path.exists():
        url = url or URL.format(name=name)
        logger.info("downloading %s to %s", url, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        try:
            torch.hub.download_url_to_file(url, str(part), hash_prefix=SHA256.get(name), progress=True)
            read_weights(part)  # torch.hub does not notice a connection that breaks off
            part.replace(path)
        except Exception as error:  # no network, no such page; a wrong hash; half a file
            raise CheckpointError(f"could not download {name} from {url}: {error}. Its path will do as well") from error
        finally:
            part.unlink(missing_ok=True)
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file, by their names in `GPT2`; its ending says the format: .safetensors, or else torch's own.

    Raises CheckpointError for what is no dict of dense tensors, or claims more bytes than the file has; a
    damaged file makes the readers raise other errors too.
    """
    size = path.stat().st_size

    def require_bytes(claimed: int) -> None:  # a few bytes can describe gigabytes
        if claimed > size:
            raise CheckpointError(f"{path}: claims to hold {claimed} bytes, but the file has {size}: save it without "
                                  "compression, and tensors that share or repeat their data as clones")

    if path.suffix == ".safetensors":
        try:
            from safetensors import safe_open  # only where it is needed: an optional package

            opened = safe_open(path, framework="pt", backend="pread")  # read, not mapped
        except (ImportError, TypeError) as error:  # not installed, or too old to be told how to read
            raise CheckpointError(f"{path}: reading it needs the safetensors package, 0.8 or later "
                                  "(pip install -U safetensors)") from error
        with opened as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    else:
        if zipfile.is_zipfile(path):  # files from before torch 1.6, as OpenAI's conversions are, are none
            with zipfile.ZipFile(path) as file:
                require_bytes(sum(entry.file_size for entry in file.infolist()))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: holds no state dict (names and tensors), but a {type(state).__name__}")
    state = named_as_in_gpt2(state, str(path))
    for name, tensor in state.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: tensor {name!r} must be dense, and hold data: not sparse, nested or meta")
    require_bytes(sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight"))  # may be wte's
    return state


def read_config(weights: Path, state: dict[str, torch.Tensor]) -> GPT2Config:
    """The model's shape, from the tensors' own shapes and, where there is one, the config.json beside them."""
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in state or state[name].dim() != 2:
            what = f"shape {tuple(state[name].shape)}" if name in state else "none"
            raise CheckpointError(f"{weights}: not a GPT-2: it must have a tensor {name!r} of 2 dimensions, got {what}")
    vocab_size, n_embd = state["wte.weight"].shape
    n_layer = len({name.split(".")[1] for name in state if name.startswith("h.")})
    shape = dict(vocab_size=vocab_size, n_embd=n_embd, n_positions=len(state["wpe.weight"]), n_layer=n_layer,
                 n_inner=state["h.0.mlp.c_fc.weight"].shape[1])
    path, fields = weights.parent / "config.json", {}
    if path.is_file():
        with reading(path, "not JSON"):
            fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path}: must hold one JSON object, got a {type(fields).__name__}")
    if fields.get("activation_function") == "gelu_pytorch_tanh":
        fields["activation_function"] = "gelu_new"  # two names of one function
    if "n_head" not in fields and n_embd % 64:
        raise CheckpointError(f"{weights}: the head count does not follow from n_embd={n_embd}, which is no multiple "
                              "of 64: put the model's config.json, with n_head, beside it")
    for field, value in {**FIXED_FIELDS, **shape}.items():
        if fields.get(field) not in (None, value):
            raise CheckpointError(f"{path}: {field} is {shown(fields[field])}, but this GPT-2, as the tensors and "
                                  f"the code have it, needs {value!r}")
    if len(state) < 12 * n_layer:  # even without weights a layer takes memory, so a name alone does not make one
        raise CheckpointError(f"{weights}: {n_layer} layers have 12 tensors each, but it holds {len(state)} in all")
    with reading(path, "a field is invalid"):
        eos_token_id = fields.get("eos_token_id", GPT2_EOS)
        if eos_token_id is not None and require_int("eos_token_id", eos_token_id) not in range(vocab_size):
            eos_token_id = None  # GPT-2's own, left in the file of a smaller vocabulary
        epsilon = require_number("layer_norm_epsilon", fields.get("layer_norm_epsilon", 1e-5), 0.0, 1.0)
        return GPT2Config(**shape, n_head=fields.get("n_head", n_embd // 64), n_kv_head=fields.get("n_kv_head"),
                          layer_norm_epsilon=epsilon, eos_token_id=eos_token_id)


def named_as_in_gpt2(state: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The same tensors, without the `transformer.` that some checkpoints say before each, and without causal masks."""
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name in weights:
            raise CheckpointError(f"{source}: tensor {name!r} appears with and without 'transformer.' before it")
        if not name.endswith((".attn.bias", ".masked_bias")):
            weights[name] = tensor
    return weights


def from_state_dict(state: dict[str, torch.Tensor], config: GPT2Config, source: str) -> GPT2:
    """A model that holds a checkpoint's tensors: shares them where they are float32 and not transposed.

    Args:
        state: names with or without `transformer.`; Conv1D weights (in, out). Causal masks
            (`attn.bias`, `attn.masked_bias`), which old checkpoints carry, are left out.
        config: the shape to check against.
        source: where the tensors are from, for errors.

    Raises CheckpointError, naming the first tensor that is missing, foreign, of another shape, or not finite.
    """
    return build(named_as_in_gpt2(state, source), config, source)


def build(state: dict[str, torch.Tensor], config: GPT2Config, source: str) -> GPT2:
    """`from_state_dict`, but empties `state` as it goes, so that no tensor is in memory twice once it is converted."""

    def converted(name: str, shape: torch.Size) -> torch.Tensor:
        tensor = state.pop(name).detach()
        tensor = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        if tensor.shape != shape or not tensor.is_floating_point():
            raise CheckpointError(f"{source}: tensor {name!r} must hold floats of shape {tuple(shape)} "
                                  f"(Conv1D weights transposed), got {tensor.dtype} {tuple(tensor.shape)}")
        tensor = tensor.contiguous().float()
        if not all(map(torch.isfinite, tensor.aminmax())):  # a NaN anywhere is both minimum and maximum
            raise CheckpointError(f"{source}: tensor {name!r} holds NaN or infinity, in float32")
        return tensor

    with torch.device("meta"):  # no memory: the checkpoint's tensors take the parameters' places
        model = GPT2(config)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in state:
            raise CheckpointError(f"{source}: tensor {name!r} is missing")
        weights[name] = converted(name, parameter.shape)
        if name == "wte.weight" and "lm_head.weight" in state:
            if not torch.equal(converted("lm_head.weight", parameter.shape), weights[name]):
                raise CheckpointError(f"{source}: tensor 'lm_head.weight' differs from {name!r}; in GPT-2 they are one")
    if state:
        raise CheckpointError(f"{source}: tensor {next(iter(state))!r} does not belong to a GPT-2 of {config}")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
