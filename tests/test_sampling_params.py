"""The knobs of one request: what is allowed, what an error says, and seeds that are the same on every machine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanopaged.sampling_params import SamplingParams, continuation_seed, hashed, one_for_each

HUGE = 10**30


@pytest.mark.parametrize(
    ("field", "value", "error", "words"),
    [
        ("n", 1025, ValueError, "from 1 to 1024, got 1025"),
        ("n", 0, ValueError, "from 1 to 1024"),
        ("n", HUGE, ValueError, "from 1 to 1024"),
        ("n", True, TypeError, "must be an int, got True (bool)"),
        ("n", 2.0, TypeError, "must be an int, got 2.0 (float)"),
        ("n", np.int64(2), TypeError, "must be an int"),
        ("temperature", -0.1, ValueError, "from 0.0 to 1000000.0, got -0.1"),
        ("temperature", 1.1e6, ValueError, "from 0.0"),
        ("temperature", HUGE, ValueError, "from 0.0 to 1000000.0"),
        ("temperature", 10**400, ValueError, "from 0.0"),
        ("temperature", math.nan, ValueError, "finite"),
        ("temperature", math.inf, ValueError, "finite"),
        ("temperature", "1", TypeError, "must be a number, got '1' (str)"),
        ("temperature", None, TypeError, "must be a number"),
        ("temperature", True, TypeError, "must be a number"),
        ("temperature", [1.0], TypeError, "must be a number"),
        ("temperature", object, TypeError, "must be a number"),
        ("top_k", -2, ValueError, "at least -1, got -2"),
        ("top_k", 5.0, TypeError, "must be an int"),
        ("top_k", None, TypeError, "must be an int"),
        ("top_k", True, TypeError, "must be an int"),
        ("top_k", np.int32(2), TypeError, "must be an int"),
        ("top_p", 0, ValueError, "must be in (0, 1], got 0: for the likeliest token alone set temperature=0"),
        ("top_p", -0.5, ValueError, "from 0.0 to 1.0"),
        ("top_p", 1.01, ValueError, "from 0.0 to 1.0"),
        ("top_p", HUGE, ValueError, "from 0.0 to 1.0"),
        ("top_p", math.nan, ValueError, "finite"),
        ("top_p", math.inf, ValueError, "finite"),
        ("top_p", "0.9", TypeError, "must be a number"),
        ("max_tokens", 0, ValueError, "at least 1"),
        ("max_tokens", -HUGE, ValueError, "at least 1"),
        ("max_tokens", None, TypeError, "must be an int"),
        ("max_tokens", 1.5, TypeError, "must be an int"),
        ("max_tokens", True, TypeError, "must be an int"),
        ("max_tokens", {}, TypeError, "must be an int"),
        ("stop", "", ValueError, "empty string"),
        ("stop", [""], ValueError, "empty string"),
        ("stop", ["a", ""], ValueError, "empty string"),
        ("stop", "\ud83d", ValueError, "lone surrogate"),
        ("stop", 5, TypeError, "a str or a list of str"),
        ("stop", ["a", 5], TypeError, "a str or a list of str"),
        ("stop", {"a"}, TypeError, "a str or a list of str"),
        ("stop", {"x": 1}, TypeError, "a str or a list of str"),
        ("stop", b"a", TypeError, "a str or a list of str"),
        ("stop", [b"x"], TypeError, "a str or a list of str"),
        ("stop", object, TypeError, "a str or a list of str"),
        ("stop_token_ids", 5, TypeError, "a list of int"),
        ("stop_token_ids", "5", TypeError, "a list of int"),
        ("stop_token_ids", b"ab", TypeError, "a list of int"),
        ("stop_token_ids", np.array([1]), TypeError, "a list of int"),
        ("stop_token_ids", [-1], ValueError, "at least 0"),
        ("stop_token_ids", ["5"], TypeError, "must be an int"),
        ("stop_token_ids", [False], TypeError, "must be an int"),
        ("stop_token_ids", [1.0], TypeError, "must be an int"),
        ("stop_token_ids", [np.int64(1)], TypeError, "must be an int"),
        ("ignore_eos", 1, TypeError, "must be a bool"),
        ("ignore_eos", "no", TypeError, "must be a bool"),
        ("ignore_eos", None, TypeError, "must be a bool"),
        ("seed", 1.0, TypeError, "must be an int"),
        ("seed", math.nan, TypeError, "must be an int"),
        ("seed", True, TypeError, "must be an int"),
        ("seed", "0", TypeError, "must be an int"),
        ("seed", b"1", TypeError, "must be an int"),
        ("seed", 2**128 + 1, ValueError, "seed must be from"),
        ("seed", -(2**128) - 1, ValueError, "seed must be from"),
        ("nonsense", 1, TypeError, "unexpected keyword argument 'nonsense'"),
    ],
)
def test_an_invalid_parameter_is_named(field: str, value: object, error: type, words: str) -> None:
    with pytest.raises(error) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert field in message and words in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"temperature": 1e6}, {"temperature": 5e-324}, {"top_k": -1}, {"top_k": 10**30}, {"top_p": 1},
     {"top_p": 5e-324}, {"seed": -(2**100)}, {"seed": 2**128}, {"max_tokens": 1}, {"max_tokens": 10**30}, {"n": 1},
     {"n": 1024}, {"ignore_eos": True}],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed(params: dict[str, object]) -> None:
    made = SamplingParams(**params)
    assert {field: getattr(made, field) for field in params} == params


@pytest.mark.parametrize(
    ("given", "kept"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())]
)
def test_stop_becomes_a_tuple_of_strings(given: object, kept: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given).stop == kept


@pytest.mark.parametrize(("given", "kept"), [(None, ()), ([3, 1], (3, 1)), ((0,), (0,)), ([], ())])
def test_stop_token_ids_become_a_tuple_of_ints(given: object, kept: tuple[int, ...]) -> None:
    assert SamplingParams(stop_token_ids=given).stop_token_ids == kept


def test_parameters_that_requests_share_cannot_change() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop == ("a",)
    with pytest.raises(AttributeError):
        params.temperature = 0.5
    assert params == SamplingParams(stop="a") and hash(params) == hash(SamplingParams(stop="a"))


def test_a_hash_is_64_bits_that_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert hashed(0, "request", 0) == 15144549398520167848
    assert hashed(42, 7) == 15980472668965022911
    assert all(0 <= hashed(i) < 2**64 for i in range(1000))
    assert max(hashed(i) for i in range(1000)) > 2**63


def test_a_hash_depends_on_every_part_and_on_their_order() -> None:
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, "a"), ("a", 0), (0, 0, 0), (-1,), (2**128,), (11,), (1, 1), ("",)]
    assert len({hashed(*one) for one in parts}) == len(parts)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**128])
def test_the_first_continuation_keeps_the_seed_and_each_other_has_its_own(seed: int) -> None:
    seeds = [continuation_seed(seed, i) for i in range(1024)]
    assert seeds[0] == seed and len(set(seeds)) == 1024
    assert not set(seeds) & {continuation_seed(seed + 1, i) for i in range(1024)}


def test_one_prompt_or_many_are_paired_with_one_set_of_parameters_or_with_many() -> None:
    a, b = SamplingParams(seed=1), SamplingParams(seed=2)
    assert one_for_each("text", a) == [("text", a)]
    assert one_for_each(["one", [1, 2]], a) == [("one", a), ([1, 2], a)]
    assert one_for_each(("one", [1, 2]), (a, b)) == [("one", a), ([1, 2], b)]
    assert one_for_each(["one", [1, 2]], None) == [("one", None), ([1, 2], None)]
    assert one_for_each([], a) == one_for_each([], []) == []


@pytest.mark.parametrize("prompts", [[1, 2, 3], [[1], 2], [True], 7, None, b"x", {"a": 1}], ids=repr)
def test_prompts_of_the_wrong_shape_say_what_is_right(prompts: object) -> None:
    with pytest.raises(TypeError, match="prompts must be a str, or a list of str and of lists of token ids") as caught:
        one_for_each(prompts, SamplingParams())
    assert f"([[1, 2, 3]] is one prompt of three tokens), got {prompts!r}" in str(caught.value)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_another_number_of_parameters_than_of_prompts_is_an_error_with_both(number: int) -> None:
    with pytest.raises(ValueError, match=f"got {number} sampling_params for 2 prompts: give one for all, or one"):
        one_for_each(["a", "b"], [SamplingParams()] * number)
