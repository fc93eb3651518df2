"""Copycat's answers are known: it must give them, or every test that relies on it means nothing."""

from __future__ import annotations

import random

import pytest
import torch
from train_free_demo import DOCUMENT

from nanopaged import LLM, SamplingParams
from nanopaged.batch import Batch
from nanopaged.gpt2 import GPT2
from nanopaged.models.copycat import CONFIG, build_copycat

TEXT = list(DOCUMENT.encode())
CONTINUATION = 40


def cues(count: int, seed: int) -> list[tuple[int, int]]:
    """(start, end) of ranges of 12 to 32 bytes, each of which stands in the text only once."""
    rng = random.Random(seed)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        start = rng.randrange(len(TEXT) - 32 - CONTINUATION)
        end = start + rng.randint(12, 32)
        if bytes(TEXT).count(bytes(TEXT[start:end])) == 1:
            found.append((start, end))
    return found


def count_right(places: list[tuple[int, int]], dtype: str) -> int:
    """How many cues copycat continues with the text's own bytes, all 40 of them.

    A greedy continuation is right if, and only if, after the cue and each beginning of the right
    continuation the likeliest byte is the right one; so one pass over both tells.
    """
    llm = LLM("copycat", device="cpu", dtype=dtype, num_blocks=200, max_num_seqs=1)
    llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=1))  # the text is in the cache from here on
    right = 0
    for start, end in places:
        request_id = llm.add_request(TEXT + TEXT[start : end + CONTINUATION])
        batch = Batch.from_step(llm.scheduler.schedule(), llm.config.block_size, llm.device)
        batch.logits_rows = torch.arange(len(batch.token_ids))[-CONTINUATION - 1 : -1]
        predicted = llm.model(batch, llm.kv_cache.blocks, llm.attention).argmax(dim=-1)
        llm.abort_request(request_id)
        right += predicted.tolist() == TEXT[end : end + CONTINUATION]
    return right


def test_it_continues_at_least_99_of_100_cues_as_the_text_does() -> None:
    places = cues(101, seed=0)
    right = count_right(places, "float32")
    assert len(TEXT) >= 1500 and right >= 0.99 * len(places), f"{right} of {len(places)}, seed 0"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_changes_no_answer(dtype: str) -> None:
    right = count_right(cues(6, seed=1), dtype)
    assert right == 6, f"{right} of 6, seed 1"


def test_it_reaches_back_through_a_context_of_at_least_2048_tokens() -> None:
    rng = random.Random(2)
    assert CONFIG.n_positions >= 2048
    noise = [rng.randrange(256) for _ in range(CONFIG.n_positions - 100)]
    logits = build_copycat().dense(torch.tensor(noise + noise[5:60]))  # the cue repeats the very beginning
    assert logits[len(noise) + 20 :].argmax(dim=-1).tolist() == noise[26:61]


def test_it_is_sure_enough_to_be_right_when_sampled_at_temperature_one() -> None:
    (start, end), = cues(1, seed=3)
    logits = build_copycat().dense(torch.tensor(TEXT + TEXT[start : end + CONTINUATION]))
    probs = logits[len(TEXT) + end - start - 1 : -1].softmax(dim=-1)
    assert probs.gather(1, torch.tensor(TEXT[end : end + CONTINUATION])[:, None]).min() > 0.999


def test_it_is_an_ordinary_gpt2_with_nothing_trained() -> None:
    model = build_copycat()
    assert type(model) is GPT2
    assert torch.equal(build_copycat().h[3].attn.c_attn.weight, model.h[3].attn.c_attn.weight)
