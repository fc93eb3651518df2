"""How long does one engine take for the requests? `peers` runs this file in a process for each engine.

All are used alike: load the checkpoint, take the engine's own defaults, serve the same lengths once with
other tokens and two of output (whatever is compiled or allocated at first use is then there), and time
the requests. An engine is a function that loads it, and returns a function that serves requests.

    python -m nanopaged.bench.peer_process ENGINE FOLDER

FOLDER holds the checkpoint and requests.json; result.json is written beside them. Standard output belongs
to the engines, which log there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Serve = Callable[[list[list[int]], list[int]], list[list[int]]]  # prompts, output lengths -> output tokens


def paged(folder: str, device: str, dtype: str, compile: bool = False) -> Serve:
    from nanopaged import LLM, SamplingParams
    from nanopaged.models.checkpoint import load_model

    # By its path it would get GPT-2's tokenizer, which is downloaded.
    llm = LLM(load_model(folder), device=device, dtype=dtype, compile=compile)

    def serve(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    return serve


def compiled(folder: str, device: str, dtype: str) -> Serve:
    return paged(folder, device, dtype, compile=True)


def continuous(folder: str, device: str, dtype: str) -> Serve:
    from transformers import GenerationConfig, GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()

    def serve(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        added = [manager.add_request(prompt, max_new_tokens=length) for prompt, length in zip(prompts, lengths)]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(prompts):
            result = manager.get_result(timeout=1)
            if (result and result.error) or not manager.is_running():
                raise RuntimeError(f"continuous batching stopped: {result and result.error}")
            if result and result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
        return [outputs[request_id] for request_id in added]

    return serve


def static(folder: str, device: str, dtype: str) -> Serve:
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device)

    def serve(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """All prompts in one batch, padded on the left; each continues until the longest output is complete."""
        padding = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * count + prompt for count, prompt in zip(padding, prompts)], device=device)
        mask = torch.tensor([[0] * count + [1] * len(prompt) for count, prompt in zip(padding, prompts)], device=device)
        longest = max(lengths)
        tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=longest, pad_token_id=0)
        return [row[:length] for row, length in zip(tokens[:, ids.shape[1]:].tolist(), lengths)]

    return serve


def vllm(folder: str, device: str, dtype: str) -> Serve:
    from vllm import LLM, SamplingParams  # the device is the one that vLLM was built for

    # On a CPU its share of the memory, 0.92, is more than other programs leave.
    share = {"gpu_memory_utilization": 0.3} if device == "cpu" else {}
    llm = LLM(folder, dtype=dtype, skip_tokenizer_init=True, **share)

    def serve(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
                  for length in lengths]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return serve


ENGINES: dict[str, Callable[[str, str, str], Serve]] = {
    "compiled": compiled, "paged": paged, "continuous": continuous, "static": static, "vllm": vllm}
PACKAGES = {"compiled": "nanopaged", "paged": "nanopaged", "continuous": "transformers", "static": "transformers",
            "vllm": "vllm"}


def measure(engine: str, folder: Path) -> dict[str, object]:
    """Seconds, output tokens and versions; or just "missing": the package that is not installed."""
    package = PACKAGES[engine]
    if importlib.util.find_spec(package) is None:
        return {"missing": package}
    given = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
    prompts, lengths = given["prompts"], given["output_lens"]
    serve = ENGINES[engine](str(folder), given["device"], given["dtype"])
    others = [[(token + 1) % given["vocab_size"] for token in prompt] for prompt in prompts]  # no prefix to find later
    serve(others, [min(length, 2) for length in lengths])
    start = time.perf_counter()
    outputs = serve(prompts, lengths)
    seconds = time.perf_counter() - start
    if (counts := [len(output) for output in outputs]) != lengths:
        raise RuntimeError(f"gave {sum(counts)} output tokens in {len(outputs)} requests, not the {sum(lengths)} in "
                           f"{len(lengths)} that were asked for")
    modules = {name: importlib.import_module(name) for name in (package, "torch")}
    versions = {name: module.__version__ for name, module in modules.items() if hasattr(module, "__version__")}
    return {"seconds": seconds, "outputs": outputs, "versions": versions}


def main(engine: str, folder: str) -> None:
    try:
        result = measure(engine, Path(folder))
    except Exception as error:
        message = (str(error).strip() or "no message").splitlines()[0][:300]
        result = {"error": f"{type(error).__name__}: {message}"}
    Path(folder, "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # an engine's threads may still run, and would be waited for
