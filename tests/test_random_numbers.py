"""Are the random numbers exponentially distributed, independent, finite, and the same on every machine?"""

from __future__ import annotations

import math

import pytest
import torch

from nanopaged.random_numbers import exponential, exponentials

pytestmark = pytest.mark.gpu_too
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keys(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int32, device=DEVICE).T  # (2, rows)


def random_keys(rows: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-2**31, 2**31 - 1, (2, rows), generator=rng).to(DEVICE, torch.int32)


def assert_uniform(places: torch.Tensor, num_bins: int) -> None:
    """A chi-square test of integers in [0, num_bins)."""
    counts = torch.bincount(places.flatten(), minlength=num_bins)
    mean = places.numel() / num_bins
    chi_square = float(((counts - mean) ** 2 / mean).sum())
    assert len(counts) == num_bins and chi_square < num_bins + 5 * math.sqrt(2 * num_bins), chi_square


def test_every_bit_pattern_gives_a_positive_finite_number() -> None:
    powers = [2**i + delta for i in range(32) for delta in (-1, 0, 1)]
    edges = torch.cat([torch.arange(-(2**31), -(2**31) + 2**20), torch.arange(2**31 - 2**20, 2**31),
                       torch.arange(-(2**20), 2**20), torch.tensor([p if p < 2**31 else p - 2**32 for p in powers])])
    numbers = exponential(edges.to(DEVICE, torch.int32))
    assert numbers.isfinite().all() and (numbers > 0).all()
    # The number grows with the lower 31 bits, so what lies between the edges is finite too.
    ends = exponential(torch.tensor([0, 2**20 - 1, 2**31 - 2**20, 2**31 - 1], dtype=torch.int32, device=DEVICE))
    assert ends.tolist() == sorted(ends.tolist()) and ends[0] == 2.0**-32 and 16 < ends[3] < 17


def test_the_bits_are_the_same_on_every_machine_and_in_every_version() -> None:
    numbers = exponentials(keys((0, 0), (1, -1), (-(2**31), 2**31 - 1)), 3).cpu()
    wanted = torch.tensor([[2.3283064e-10, 2.49849349, 0.306768308], [0.191533498, 0.919959661, 1.56146334],
                           [5.15673998, 1.02949623, 0.798027673]])  # once computed with Python's ints
    torch.testing.assert_close(numbers, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_exponentially_distributed_and_their_bits_uniform(seed: int) -> None:
    numbers = exponentials(random_keys(64, seed), 5000)
    fractions = -torch.expm1(-numbers.double())  # uniform in (0, 1)
    assert_uniform((fractions * 256).long(), 256)
    assert_uniform((fractions * 2.0**10 % 1 * 64).long(), 64)  # the bits behind the first 10
    assert abs(numbers.double().mean() - 1) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_independent_in_a_row_and_between_rows(seed: int) -> None:
    first, second = random_keys(1, seed), random_keys(1, seed + 100)
    close = torch.cat([first, first + 1, torch.stack([first[0], second[1]]), torch.stack([second[0], first[1]])], dim=1)
    places = (-torch.expm1(-exponentials(close, 200_000).double()) * 16).long()  # (4, 200000), in [0, 16)
    for step in (1, 2, 64, 1024):
        assert_uniform(16 * places[:, :-step] + places[:, step:], 256)
    for i in range(4):
        for j in range(i):
            assert_uniform(16 * places[i] + places[j], 256)


def test_a_row_depends_on_its_own_key_alone_and_on_all_of_its_bits() -> None:
    rows = exponentials(random_keys(5, 0), 300)
    assert torch.equal(rows[3:4], exponentials(random_keys(5, 0)[:, 3:4], 300))
    changed = [exponentials(keys((1 << i if i < 31 else -(2**31), 0)), 300) for i in range(32)]
    changed += [exponentials(keys((0, 1 << i if i < 31 else -(2**31))), 300) for i in range(32)]
    assert len({tuple(row.flatten().tolist()) for row in changed}) == 64
