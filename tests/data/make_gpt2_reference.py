"""Makes gpt2_reference.pt: a tiny random GPT-2 as Hugging Face lays it out, and the logits that they compute.

Run it once, in an environment of its own (the tests need only the file):

    pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/data/make_gpt2_reference.py

The file in the repository was made with these versions. It holds `config` (config.json's fields),
`state` (the state dict of a GPT2LMHeadModel), `token_ids` and `logits`, the last computed in
float64 and rounded to float32, so that a test's tolerance is for its own rounding alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

SEED = 2019
PATH = Path(__file__).parent / "gpt2_reference.pt"


def main() -> None:
    # No two sizes alike, and an epsilon large enough to show: whatever is mixed up changes the logits.
    config = GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=2, n_head=4, layer_norm_epsilon=0.01,
                        attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if ".ln_" in name and name.endswith("weight") else 0.3 * noise)
        token_ids = torch.randint(config.vocab_size, (48,), generator=generator)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]  # tied: stored once
        logits = model.double()(token_ids[None]).logits[0].float()
    torch.save({"config": config.to_dict(), "state": state, "token_ids": token_ids, "logits": logits}, PATH)
    print(f"{PATH}: {PATH.stat().st_size} bytes, logits' standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
