"""Does the model compute GPT-2, and is a paged step the same function as no cache at all?

The judge from outside is tests/data/gpt2_reference.pt: a random GPT-2 and its logits as Hugging
Face's transformers computes them. Inside, `dense` judges the paged `forward`.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanopaged.batch import Batch
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.models.checkpoint import from_state_dict
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.step import Step
from nanopaged.torch_attention import TORCH

CPU = torch.device("cpu")
BLOCK_SIZE = 8
TOLERANCE = {"atol": 3e-5, "rtol": 0.0}  # the reference's logits go up to 7.4
REFERENCE = torch.load(Path(__file__).parent / "data" / "gpt2_reference.pt", weights_only=True)
TOKENS, LOGITS = REFERENCE["token_ids"], REFERENCE["logits"]
TINY = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=80)


@pytest.fixture(scope="module")
def reference_model() -> GPT2:
    fields = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")
    config = GPT2Config(**{field: REFERENCE["config"][field] for field in fields})
    return from_state_dict(REFERENCE["state"], config, "the reference")


def random_model(config: GPT2Config, seed: int) -> GPT2:
    generator = torch.Generator().manual_seed(seed)
    model = GPT2(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + noise if "ln_" in name and name.endswith("weight") else noise)
    return model


class Pool:
    """A model with a cache. What no step has written is NaN, and makes the logits NaN if it is read."""

    def __init__(self, model: GPT2, num_blocks: int, rng: random.Random) -> None:
        config = model.config
        self.model = model
        self.cache = torch.full((config.n_layer, 2, num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim),
                                torch.nan, dtype=model.wte.weight.dtype)
        self.free = rng.sample(range(num_blocks), num_blocks)  # in no order: a block's id says nothing

    def request(self, token_ids: list[int]) -> Request:
        request = Request("any", token_ids, SamplingParams())
        request.block_table = array("i", [self.free.pop() for _ in range(-(-len(token_ids) // BLOCK_SIZE))])
        return request

    def _compute(self, requests: list[Request], num_tokens: list[int],
                 rows: Callable[[Batch], torch.Tensor]) -> tuple[Step, torch.Tensor]:
        step = Step(0, requests, [request.num_computed_tokens for request in requests], num_tokens)
        step.arrange()
        batch = Batch.from_step(step, BLOCK_SIZE, CPU)
        batch.logits_rows, batch.num_cut = rows(batch), batch.num_cut if rows(batch) is batch.logits_rows else 0
        logits = self.model(batch, self.cache, TORCH)
        for request, n in zip(step.requests, step.num_tokens):
            request.num_computed_tokens += n
        return step, logits

    def sampled(self, requests: list[Request], num_tokens: list[int]) -> torch.Tensor:
        """The logits from which tokens are drawn, in the step's order."""
        return self._compute(requests, num_tokens, lambda batch: batch.logits_rows)[1]

    def all_rows(self, requests: list[Request], num_tokens: list[int]) -> dict[Request, torch.Tensor]:
        """The logits of every row, by request."""
        step, logits = self._compute(requests, num_tokens, lambda batch: torch.arange(len(batch.token_ids)))
        return dict(zip(step.requests, logits.split(step.num_tokens)))


def chunks_of(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def test_dense_gives_the_logits_of_hugging_face(reference_model: GPT2) -> None:
    torch.testing.assert_close(reference_model.dense(TOKENS), LOGITS, **TOLERANCE)


@pytest.mark.parametrize("chunk", [48, 1, 5, 8, 17])
def test_paged_forward_gives_the_logits_of_hugging_face_in_chunks_of(reference_model: GPT2, chunk: int) -> None:
    pool = Pool(reference_model, 10, random.Random(chunk))
    request = pool.request(TOKENS.tolist())
    logits = [pool.all_rows([request], [n])[request] for n in chunks_of(len(TOKENS), chunk)]
    torch.testing.assert_close(torch.cat(logits), LOGITS, **TOLERANCE)


def test_a_prompt_and_then_one_token_at_a_time_gives_the_logits_of_hugging_face(reference_model: GPT2) -> None:
    pool = Pool(reference_model, 6, random.Random(0))
    request = pool.request(TOKENS.tolist())
    request.token_ids = request.token_ids[:13]
    logits = [pool.sampled([request], [13])]
    for token_id in TOKENS.tolist()[13:]:
        request.token_ids.append(token_id)
        logits.append(pool.sampled([request], [1]))
    torch.testing.assert_close(torch.cat(logits), LOGITS[12:], **TOLERANCE)


@pytest.mark.parametrize("n_kv_head", [None, 1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_each_request_of_a_ragged_batch_gets_its_dense_logits(n_kv_head: int | None, seed: int) -> None:
    rng = random.Random(seed)
    pool = Pool(random_model(replace(TINY, n_kv_head=n_kv_head), seed), 48, rng)
    requests = [pool.request([rng.randrange(TINY.vocab_size) for _ in range(rng.randint(1, TINY.n_positions))])
                for _ in range(5)]
    got: dict[Request, list[torch.Tensor]] = {request: [] for request in requests}
    while unfinished := [r for r in requests if r.num_computed_tokens < len(r.token_ids)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        num_tokens = [rng.choice((1, rng.randint(1, len(r.token_ids) - r.num_computed_tokens))) for r in chosen]
        for request, logits in pool.all_rows(chosen, num_tokens).items():
            got[request].append(logits)
    for i, request in enumerate(requests):
        dense = pool.model.dense(torch.tensor(request.token_ids))
        torch.testing.assert_close(torch.cat(got[request]), dense, **TOLERANCE,
                                   msg=lambda m, i=i: f"seed {seed}, n_kv_head {n_kv_head}, request {i}: {m}")


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_a_grouped_model_is_the_full_one_with_each_key_and_value_head_repeated(n_kv_head: int) -> None:
    grouped = random_model(replace(TINY, n_kv_head=n_kv_head), seed=0)
    full = GPT2(TINY).requires_grad_(False)
    state = grouped.state_dict()
    for name in [name for name in state if ".c_attn." in name]:
        q, k, v = state[name].split([64, 16 * n_kv_head, 16 * n_kv_head])
        k, v = (heads.unflatten(0, (n_kv_head, 16)).repeat_interleave(4 // n_kv_head, 0).flatten(0, 1)
                for heads in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    tokens = torch.arange(40) * 7 % TINY.vocab_size
    torch.testing.assert_close(grouped.dense(tokens), full.dense(tokens), **TOLERANCE)


def test_the_logits_of_requests_that_get_a_token_come_first_and_then_a_finite_row_for_each_other() -> None:
    pool = Pool(random_model(TINY, seed=1), 20, random.Random(1))
    first, cut_off, last = (pool.request([(i + 1) * k % TINY.vocab_size for k in range(20)]) for i in range(3))
    logits = pool.sampled([first, cut_off, last], [20, 19, 20])
    assert logits.shape == (3, TINY.vocab_size) and logits[2].isfinite().all()
    for row, request in zip(logits, (first, last)):
        torch.testing.assert_close(row, pool.model.dense(torch.tensor(request.token_ids))[-1], **TOLERANCE)
    assert pool.sampled([cut_off], [1]).shape == (1, TINY.vocab_size)


def test_a_row_that_is_not_finite_spoils_the_logits_of_its_request_and_of_no_other() -> None:
    pool = Pool(random_model(TINY, seed=2), 20, random.Random(2))
    lengths, num_tokens = [1, 5, 20, 9], [1, 5, 19, 9]
    owners = [0] + [1] * 5 + [3] * 19 + [2] * 9  # of the rows, by row of the logits: the third request is cut off
    for row, owner in enumerate(owners):
        requests = [pool.request(list(range(length))) for length in lengths]

        def spoil(_: object, __: object, output: torch.Tensor) -> None:
            output[row] = torch.inf

        with pool.model.h[-1].register_forward_hook(spoil):
            logits = pool.sampled(requests, num_tokens)
        assert logits.isfinite().all(dim=1).tolist() == [i != owner for i in range(4)], f"row {row}"
        pool.free += [block for request in requests for block in request.block_table]


def test_the_logits_of_each_of_many_followers_are_spoiled_too() -> None:
    pool = Pool(random_model(TINY, seed=2), 20, random.Random(2))
    leader = pool.request([1, 2, 3])
    leader.followers = [pool.request([1, 2, 3]) for _ in range(4)]

    def spoil(_: object, __: object, output: torch.Tensor) -> None:
        output[0] = torch.nan

    with pool.model.h[-1].register_forward_hook(spoil):
        assert pool.sampled([leader], [3]).isfinite().any(dim=1).tolist() == [False] * 5


def test_a_step_writes_nothing_but_its_own_slots() -> None:
    pool = Pool(random_model(TINY, seed=3), 8, random.Random(3))
    request = pool.request(list(range(20)))
    pool.sampled([request], [19])
    before = pool.cache.clone()
    pool.sampled([request], [1])
    changed = (pool.cache.nan_to_num() != before.nan_to_num()).any(dim=(0, 1, 3, 5)).nonzero()  # (block, place)
    assert changed.tolist() == [[request.block_table[2], 3]]


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        *[(field, 0, ValueError, "at least 1") for field in
          ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "n_inner")],
        *[(field, "12", TypeError, "must be an int") for field in ("vocab_size", "n_head", "n_kv_head", "n_inner")],
        ("n_layer", True, TypeError, "must be an int"),
        ("n_embd", 768.0, TypeError, "must be an int"),
        ("n_head", None, TypeError, "must be an int"),
        ("n_head", 7, ValueError, "n_head must divide n_embd, got n_head=7, n_embd=768"),
        ("n_kv_head", 5, ValueError, "n_kv_head must divide n_head, got n_kv_head=5, n_head=12"),
        ("n_kv_head", 24, ValueError, "n_kv_head must divide n_head"),
        ("layer_norm_epsilon", -1e-5, ValueError, "at least 0.0, got -1e-05"),
        ("layer_norm_epsilon", float("nan"), ValueError, "must be finite"),
        ("layer_norm_epsilon", "tiny", TypeError, "must be a number, got 'tiny'"),
    ],
)
def test_an_invalid_config_names_its_field(field: str, value: object, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        GPT2Config(**{field: value})
    assert field in str(caught.value)


def test_the_mlp_has_the_width_n_inner_or_four_times_that_of_the_model() -> None:
    for n_inner, width in ((80, 80), (None, 256)):
        mlp = GPT2(replace(TINY, n_inner=n_inner)).h[1].mlp
        assert (mlp.c_fc.out_features, mlp.c_proj.in_features) == (width, width)


def test_the_default_config_is_gpt2_small() -> None:
    config = GPT2Config()
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in GPT2(config).parameters())
    assert num_parameters == 124_439_808
    assert (config.head_dim, config.num_kv_heads) == (64, 12)
