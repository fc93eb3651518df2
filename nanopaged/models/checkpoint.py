"""Where do weights come from, and can they be trusted?

A checkpoint is a dict of named tensors, in Hugging Face's layout of OpenAI's GPT-2. It is read
without running any code that a file may carry (`weights_only=True`), mapped rather than copied where
the format allows, and every name and shape is checked, so that a wrong file says what is wrong.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import zipfile
from pathlib import Path

import torch

from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.copycat import build_copycat
from nanopaged.validation import require_int, shown

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


def load_model(model: str | os.PathLike | GPT2) -> GPT2:
    """A GPT-2 by name or path, in float32 on the CPU; or a copy of one.

    Args:
        model: "copycat"; "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", downloaded once into
            torch's cache folder; or a path: a .bin or .pt state dict, a .safetensors file, or a
            folder that holds one of these. A config.json beside the weights is read for what
            shapes cannot tell, the head count; without it a head is 64 wide, as in all of GPT-2.

    Raises CheckpointError: no such model, or a file that is not a GPT-2; TypeError for anything else.
    """
    if isinstance(model, GPT2):
        return copy.deepcopy(model).eval()
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a name, a path or a GPT2, got {shown(model)}")
    model = os.fspath(model)
    if model == "copycat":
        return build_copycat()
    if model in PUBLISHED:
        return from_state_dict(read_weights(download(model)), PUBLISHED[model], model)
    path = Path(model).expanduser()
    if path.is_dir():
        path = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path)
        if path.is_dir():
            raise CheckpointError(f"{model!r}: the folder holds none of {', '.join(WEIGHT_FILES)}")
    if not path.is_file():
        raise CheckpointError(f"unknown model {model!r}: not one of 'copycat', {', '.join(map(repr, PUBLISHED))}, "
                              "and no such file or folder")
    state = without_prefix(read_weights(path))
    return from_state_dict(state, read_config(path, state), str(path))


def download(name: str, url: str | None = None) -> Path:
    """The path of a published model's weights in torch's cache folder, downloaded if not there yet.

    `name` is a key of `PUBLISHED`. Raises CheckpointError, and keeps nothing, without a connection, and
    for a file that is not whole or not the known one.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}-pytorch_model.bin"
    if not path.exists():
        url = url or URL.format(name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info("downloading %s to %s", url, path)
        part = path.with_suffix(".part")
        try:
            torch.hub.download_url_to_file(url, str(part), hash_prefix=SHA256.get(name), progress=True)
            read_weights(part)  # torch.hub does not notice a connection that breaks off
            part.replace(path)
        except (OSError, RuntimeError, CheckpointError) as error:  # no network, no such page; a wrong hash; half a file
            raise CheckpointError(f"could not download {name} from {url}: {error}. Its path will do as well") from error
        finally:
            part.unlink(missing_ok=True)
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file, by its ending: .safetensors, or a torch state dict."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # only where it is needed: an optional package

            state = safetensors.torch.load_file(path)
        else:
            # Files from before torch 1.6, as OpenAI's conversions are, are no zip files and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it needs the safetensors package (pip install safetensors)") from error
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "no whole file of tensors (cut off, or another kind of file)"
        raise CheckpointError(f"{path}: {what}: {reason}") from error
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: holds no state dict (names and tensors), but a {type(state).__name__}")
    return state


def read_config(weights: Path, state: dict[str, torch.Tensor]) -> GPT2Config:
    """The model's shape, from the tensors' own shapes and, where there is one, the config.json beside them."""
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in state or state[name].dim() != 2:
            what = f"shape {tuple(state[name].shape)}" if name in state else "none"
            raise CheckpointError(f"{weights}: not a GPT-2: it must have a tensor {name!r} of 2 dimensions, got {what}")
    vocab_size, n_embd = state["wte.weight"].shape
    shape = dict(vocab_size=vocab_size, n_embd=n_embd, n_positions=len(state["wpe.weight"]),
                 n_layer=len({name.split(".")[1] for name in state if name.startswith("h.")}),
                 n_inner=state["h.0.mlp.c_fc.weight"].shape[1])
    path, fields = weights.parent / "config.json", {}
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path}: must hold one JSON object, got a {type(fields).__name__}")
    if "n_head" not in fields and n_embd % 64:
        raise CheckpointError(f"{weights}: the head count does not follow from n_embd={n_embd}, which is no multiple "
                              "of 64: put the model's config.json, with n_head, beside it")
    for field, value in {**FIXED_FIELDS, **shape}.items():
        if fields.get(field) not in (None, value):
            raise CheckpointError(f"{path}: {field} is {fields[field]!r}, but this GPT-2, as the tensors and "
                                  f"the code have it, needs {value!r}")
    try:
        eos_token_id = fields.get("eos_token_id", GPT2_EOS)
        if eos_token_id is not None and require_int("eos_token_id", eos_token_id) not in range(vocab_size):
            eos_token_id = None  # GPT-2's own, left in the file of a smaller vocabulary
        return GPT2Config(**shape, n_head=fields.get("n_head", n_embd // 64), n_kv_head=fields.get("n_kv_head"),
                          layer_norm_epsilon=fields.get("layer_norm_epsilon", 1e-5), eos_token_id=eos_token_id)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, named as in `GPT2`: some checkpoints say `transformer.` before each."""
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def from_state_dict(state: dict[str, torch.Tensor], config: GPT2Config, source: str) -> GPT2:
    """A model that holds a checkpoint's tensors.

    Args:
        state: names with or without `transformer.`; Conv1D weights (in, out). Causal masks
            (`attn.bias`, `attn.masked_bias`), which old checkpoints carry, are left out.
        config: the shape to check against.
        source: where the tensors are from, for errors.

    Raises CheckpointError, naming the first tensor that is missing, foreign, or of another shape.
    """
    state = {name: t for name, t in without_prefix(state).items() if not name.endswith((".attn.bias", ".masked_bias"))}
    with torch.device("meta"):  # no memory: the checkpoint's tensors take the parameters' places
        model = GPT2(config)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in state:
            raise CheckpointError(f"{source}: tensor {name!r} is missing")
        tensor = state.pop(name)
        tensor = tensor.t() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise CheckpointError(f"{source}: tensor {name!r} must hold floats of shape {tuple(parameter.shape)} "
                                  f"(Conv1D weights transposed), got {tensor.dtype} {tuple(tensor.shape)}")
        weights[name] = tensor.float().contiguous()
    head = state.pop("lm_head.weight", weights["wte.weight"])
    if head.shape != weights["wte.weight"].shape or not torch.equal(head.float(), weights["wte.weight"]):
        raise CheckpointError(f"{source}: tensor 'lm_head.weight' differs from 'wte.weight'; in GPT-2 they are one")
    if state:
        raise CheckpointError(f"{source}: tensor {next(iter(state))!r} does not belong to a GPT-2 of {config}")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
