"""A sampled token depends on nothing but its request, also where 50,257 tokens lie close together.

The suite compares 100 requests. Any number more, and another dtype:

    python tests/test_sampled_tokens.py 2000 --dtype float16
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the command above

import torch  # noqa: E402
from tests.crowds import whatever_fits  # noqa: E402
from tests.oracle import rounding_explains  # noqa: E402

from nanopaged import LLM, SamplingParams  # noqa: E402
from nanopaged.gpt2 import GPT2, GPT2Config  # noqa: E402
from nanopaged.request import Request  # noqa: E402

CONFIG = GPT2Config(vocab_size=50257, n_positions=64, n_embd=64, n_layer=2, n_head=2)
SETTINGS = {
    "alone": {"max_num_seqs": 1},
    "in a batch": {},
    "in a small pool": {"num_blocks": 14, "admission": whatever_fits},
    "with a small budget": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
}
Work = list[tuple[list[int], SamplingParams]]


def model_of_gpt2s_vocabulary() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.4)
    return model


def random_work(seed: int, number: int) -> Work:
    """Prompts of different lengths, every other one with a common beginning; parameters of all kinds."""
    rng = random.Random(seed)
    stem = [rng.randrange(CONFIG.vocab_size) for _ in range(20)]
    return [(stem[: rng.choice([0, 17])] + [rng.randrange(CONFIG.vocab_size) for _ in range(rng.randint(1, 12))],
             SamplingParams(max_tokens=8, seed=rng.getrandbits(64), temperature=rng.uniform(0.2, 1.5),
                            top_k=rng.choice([0, 0, 40, 1000]), top_p=rng.choice([1.0, 1.0, 0.9, 0.5])))
            for _ in range(number)]


def compare(model: GPT2, work: Work, dtype: str = "float32") -> Counter[str]:
    """Runs the work in each setting: how many results equal those of the first, and do not, with the reason."""
    counts: Counter[str] = Counter()
    alone: list[list[int]] = []
    for name, options in SETTINGS.items():
        llm = LLM(model, **{"device": "cpu", "dtype": dtype, "block_size": 8, "num_blocks": 600, **options})
        results = [output.outputs[0].token_ids for output in llm.generate(*map(list, zip(*work)))]
        counts["preemptions"] += llm.stats().num_preemptions
        alone = alone or results
        for (prompt, params), wanted, got in zip(work, alone, results, strict=True):
            if got == wanted:
                counts["equal"] += 1
            else:
                counts["rounding" if rounding_explains_both(model, prompt, params, wanted, got) else name] += 1
    return counts


def rounding_explains_both(model: GPT2, prompt: list[int], params: SamplingParams, first: list[int],
                           second: list[int]) -> bool:
    """Whether the first token in which two results differ is drawn from logits so close to each other."""
    place = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    request = Request("any", prompt + first[:place], params, seed=params.seed)
    request.num_prompt_tokens = len(prompt)
    logits = model.dense(torch.tensor(request.token_ids))[-1]
    return all(rounding_explains(logits, request, tokens[place]) for tokens in (first, second))


def test_seeded_requests_get_the_same_tokens_alone_in_batches_in_small_pools_and_with_small_budgets() -> None:
    counts = compare(model_of_gpt2s_vocabulary(), random_work(seed=0, number=100))
    assert counts["preemptions"] > 20, "the pool was meant to be too small"
    assert counts["equal"] + counts["rounding"] == 100 * len(SETTINGS) and counts["rounding"] <= 1, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = compare(model_of_gpt2s_vocabulary(), random_work(arguments.seed, arguments.count), arguments.dtype)
    print(f"{arguments.count} requests in {len(SETTINGS)} settings, {arguments.dtype}: {dict(counts)}")


if __name__ == "__main__":
    main()
