"""Is the next token drawn as the parameters say, and by the request's own seed alone?

The judge is `expected`, which writes the rules down one token at a time, in Python's doubles.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch

from nanopaged import sampling
from nanopaged.request import Request
from nanopaged.random_numbers import exponentials
from nanopaged.sampling import NOT_FINITE, sample, sampling_bytes
from nanopaged.sampling_params import SamplingParams, hashed


def request(seed: int = 0, num_output_tokens: int = 0, **params: object) -> Request:
    made = Request("any", [0], SamplingParams(**params), seed=seed)
    made.token_ids += [0] * num_output_tokens
    return made


def bits_of(seed: int, index: int) -> torch.Tensor:
    """The random bits of a request's `index`-th token, (2, 1) int32."""
    bits = hashed(seed, index)
    return torch.tensor([[(bits & 0xFFFFFFFF) - 2**31], [(bits >> 32) - 2**31]], dtype=torch.int32)


def requests(number: int, **params: object) -> list[Request]:
    """Requests with the same parameters, each with a seed of its own."""
    shared = SamplingParams(**params)
    return [Request("any", [0], shared, seed=seed) for seed in range(number)]


def expected(logits: Sequence[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The probability of each token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    nucleus, mass = 0, 0.0
    while nucleus < len(order) and mass < top_p:
        mass += weights[nucleus] / sum(weights)
        nucleus += 1
    probs = [0.0] * len(logits)
    for i, weight in zip(order[:nucleus], weights):
        probs[i] = weight / sum(weights[:nucleus])
    return probs


def assert_distributed(draws: Sequence[int], probs: Sequence[float], seed: int) -> None:
    """A chi-square test, in which all rare tokens are counted as one."""
    counts = Counter(draws)
    assert all(probs[token] > 0 for token in counts), f"seed {seed}: drew a token that is filtered out: {counts}"
    pairs = [(counts[token], prob * len(draws)) for token, prob in enumerate(probs)]
    rare = [pair for pair in pairs if pair[1] < 10]
    bins = [pair for pair in pairs if pair[1] >= 10] + [(sum(c for c, _ in rare), sum(e for _, e in rare))]
    chi_square = sum((count - mean) ** 2 / max(mean, 1) for count, mean in bins)
    # The mean of a chi-square is its degrees of freedom, its variance twice that; seeds are fixed, so it never flakes.
    assert chi_square < len(bins) + 5 * math.sqrt(2 * len(bins)), f"seed {seed}: {bins}"


def random_params(rng: random.Random) -> dict[str, float | int]:
    return {"temperature": rng.choice((0, 0.3, 1, 2.5)), "top_k": rng.choice((-1, 0, 1, 3, 40, 10**30)),
            "top_p": rng.choice((1.0, 0.95, 0.5, 0.01))}


@pytest.mark.parametrize("seed", range(5))
def test_temperature_zero_takes_the_likeliest_token_with_any_filters(seed: int) -> None:
    rng = random.Random(seed)
    logits = torch.randn(20, 101, generator=torch.Generator().manual_seed(seed))
    batch = [request(i, **{**random_params(rng), "temperature": 0}) for i in range(20)]
    assert sample(logits, batch) == logits.argmax(dim=1).tolist(), f"seed {seed}"


def test_temperature_zero_takes_the_lowest_id_of_equals_whatever_the_seed() -> None:
    assert sample(torch.zeros(50, 7), requests(50, temperature=0)) == [0] * 50


def test_a_step_that_samples_nothing_gives_no_tokens() -> None:
    assert sample(torch.empty(0, 101), []) == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"temperature": 1e6},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 13},
        {"top_k": 10**30},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.95},
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_probable(params: dict[str, float | int], seed: int) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 1.5
    draws = sample(logits.expand(2000, 12), requests(2000, **params))
    assert_distributed(draws, expected(logits.tolist(), **params), seed)


@pytest.mark.parametrize("seed", range(2))
def test_the_tokens_of_one_request_are_independent_draws(seed: int) -> None:
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
    probs = expected(logits[0].tolist())
    one, draws = request(seed), []
    for _ in range(800):
        draws += sample(logits, [one])
        one.token_ids.append(draws[-1])
    # A token says nothing about the next: pairs are as frequent as if each were drawn on its own.
    pairs = [4 * first + second for first, second in zip(draws[::2], draws[1::2])]
    assert_distributed(pairs, [p * q for p in probs for q in probs], seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_token_depends_neither_on_other_rows_nor_on_its_own_place(seed: int) -> None:
    rng = random.Random(seed)
    logits = 3 * torch.randn(32, 501, generator=torch.Generator().manual_seed(seed))
    batch = [request(rng.getrandbits(64), rng.randrange(5), **random_params(rng)) for _ in range(32)]
    together = sample(logits, batch)
    assert [sample(logits[i : i + 1], [batch[i]])[0] for i in range(32)] == together, f"seed {seed}"
    for _ in range(6):
        rows = rng.sample(range(32), rng.randint(1, 32))
        assert sample(logits[rows], [batch[i] for i in rows]) == [together[i] for i in rows], f"seed {seed}"


def test_a_repeated_step_draws_the_same_tokens_and_leaves_its_logits_alone() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    batch = requests(8, top_p=0.9)
    assert sample(logits, batch) == sample(logits, batch)
    assert torch.equal(logits, before)


def test_another_seed_draws_other_tokens() -> None:
    logits = torch.zeros(20, 1000)
    assert len(set(sample(logits, [request(seed=i) for i in range(20)]))) > 15
    assert len(set(sample(logits, [request(seed=7)] * 20))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}, {"temperature": 1e-6}], ids=str
)
def test_the_narrowest_filter_is_greedy(params: dict[str, float | int], dtype: torch.dtype) -> None:
    logits = torch.randn(200, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
    if "temperature" in params:
        logits[:, 17] = 5  # a cold draw is greedy only where one token leads: half precision makes ties
    draws = sample(logits, requests(200, **params))
    assert draws == sample(logits, [request(temperature=0)] * 200)


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"),
    [(0.25, 0, {0}), (0.26, 0, {0, 1}), (0.5, 0, {0, 1}), (0.51, 0, {0, 1, 2}), (0.75, 0, {0, 1, 2}),
     (0.5, 2, {0}), (0.51, 2, {0, 1}), (1.0, 0, {0, 1, 2, 3}), (1.0, 3, {0, 1, 2})],
)
def test_a_nucleus_ends_with_the_token_that_reaches_top_p(top_p: float, top_k: int, allowed: set[int]) -> None:
    logits = torch.zeros(300, 4)  # a quarter each, exactly; equals are taken in the order of their ids
    assert set(sample(logits, requests(300, top_p=top_p, top_k=top_k))) == allowed


@pytest.mark.parametrize("params", [{}, {"top_k": 300}, {"top_p": 0.9}, {"top_k": 400, "top_p": 0.8}], ids=str)
def test_a_filtered_draw_is_the_first_arrival_among_the_kept_tokens(params: dict[str, float | int]) -> None:
    logits = 2 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor(expected(logits[0].tolist(), **params)) > 0
    for seed in range(100):
        arrivals = torch.exp(-logits) * exponentials(bits_of(seed, 0), 1000)
        first = int(arrivals.masked_fill(~kept, math.inf).argmin())
        assert sample(logits, [request(seed, **params)]) == [first], f"seed {seed}"


def test_no_draw_sorts_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    for name in ("sort", "argsort", "msort", "cumsum"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
        monkeypatch.setattr(torch, name, refuse)
    logits = torch.randn(8, 50257, generator=torch.Generator().manual_seed(0))
    assert len(sample(logits, [*requests(4, top_p=0.9), *requests(4, top_k=50, top_p=0.9)])) == 8


def test_rows_with_any_filters_are_drawn_in_chunks_as_each_would_be_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    logits = 3 * torch.randn(40, 101, generator=torch.Generator().manual_seed(0))
    batch = [request(rng.getrandbits(64), **random_params(rng)) for _ in range(40)]
    drawn = sample(logits, batch)
    for at_once in (1, 101, 303, 1000):
        monkeypatch.setitem(sampling.AT_ONCE, "cpu", at_once)
        assert sample(logits, batch) == drawn, f"{at_once} at once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e35])
def test_a_token_that_is_ruled_out_is_never_drawn(scale: float, temperature: float, dtype: torch.dtype) -> None:
    logits = scale * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    logits = logits.clamp(torch.finfo(dtype).min / 2, torch.finfo(dtype).max / 2).to(dtype)
    logits[:, [0, 3, 5]] = -torch.inf
    draws = sample(logits, requests(500, temperature=temperature))
    assert set(draws) == {1, 2, 4}


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e6])
def test_a_single_token_that_is_not_ruled_out_is_drawn(temperature: float) -> None:
    logits = torch.full((50, 6), -torch.inf)
    logits[:, 4] = -1e30
    assert sample(logits, requests(50, temperature=temperature, top_k=3, top_p=0.9)) == [4] * 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits_give_the_same_draws_as_the_same_values_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = requests(200, temperature=0.8, top_p=0.9)
    assert sample(logits, batch) == sample(logits.float(), batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}],
                         ids=str)
def test_a_row_that_is_not_finite_has_no_token_and_the_others_have_theirs(
    params: dict[str, float | int], value: float
) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    batch = requests(4, **params)
    drawn = sample(logits, batch)
    broken = logits.clone()
    broken[1] = value
    if value != -math.inf:  # one token that is ruled out is no fault, a row of them is
        broken[2, 3] = value
        drawn[2] = NOT_FINITE
    drawn[1] = NOT_FINITE
    assert sample(broken, batch) == drawn
    assert sample(torch.full((2, 5), value), batch[:2]) == [NOT_FINITE] * 2


def test_rows_that_belong_to_no_request_are_only_looked_at_for_faults() -> None:
    logits = torch.zeros(4, 5)
    logits[2, 3] = math.nan
    logits[3, 1] = 7.0
    assert sample(logits, [request(temperature=0)]) == [0, 0, NOT_FINITE, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("params", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 4000, "top_p": 0.9}], ids=str)
def test_a_draw_needs_no_more_memory_than_is_reserved_for_it(
    params: dict[str, float | int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sampling.AT_ONCE, "cpu", 2**24)
    logits = torch.randn(32, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        sample(logits, requests(32, **params))
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert logits.nbytes < most + logits.nbytes <= sampling_bytes(32, 5000, dtype.itemsize, "cpu")


def test_memory_is_reserved_for_all_logits_and_for_the_rows_that_are_drawn_at_once() -> None:
    assert sampling_bytes(4, 100, 2, "cuda") == 100 * (4 * 2 + 4 * sampling.BYTES_AT_ONCE)
    assert sampling_bytes(3, 2**25, 2, "cuda") == 2**25 * (3 * 2 + sampling.BYTES_AT_ONCE), "one row at least"
    at_once = sampling_bytes(4096, 50257, 2, "cuda") - 2 * 4096 * 50257
    assert 2**28 < at_once < 2**29, "a GPU is kept busy, and its memory is left to the pool"


def test_no_token_id_stands_for_a_row_that_is_not_finite() -> None:
    assert NOT_FINITE < 0
