"""Where do requests come from, when there are no users? Lengths, arrivals, prefixes, and damaged files."""

from __future__ import annotations

import json
import os
import random
from itertools import islice, pairwise
from pathlib import Path

import pytest

from nanopaged.simulate import traces
from nanopaged.simulate.traces import DATASETS, Lengths, generate, read


@pytest.mark.parametrize("dataset, mean_prompt, mean_output", [("sharegpt", 161, 338), ("alpaca", 19, 58)])
@pytest.mark.parametrize("max_model_len", [1024, 2048])
def test_mean_lengths_after_limiting_are_those_of_the_paper(dataset: str, mean_prompt: int, mean_output: int,
                                                            max_model_len: int) -> None:
    seed = 7
    requests = list(generate(DATASETS[dataset], 20_000, 1.0, max_model_len, seed=seed))
    prompt = sum(len(request.prompt) for request in requests) / len(requests)
    output = sum(request.output_tokens for request in requests) / len(requests)
    assert prompt == pytest.approx(mean_prompt, rel=0.03), f"seed {seed}"
    assert output == pytest.approx(mean_output, rel=0.03), f"seed {seed}"
    assert max(len(request.prompt) + request.output_tokens for request in requests) <= max_model_len, f"seed {seed}"
    assert min(min(len(request.prompt), request.output_tokens) for request in requests) >= 1, f"seed {seed}"


def test_lengths_have_a_long_tail() -> None:
    outputs = sorted(request.output_tokens for request in generate(DATASETS["sharegpt"], 5000, 1.0, 2048))
    assert outputs[2500] < 0.8 * 338 and outputs[-50] > 3 * 338


def test_a_limit_too_low_for_the_mean_is_refused_with_the_lowest_that_is_allowed() -> None:
    with pytest.raises(ValueError, match="half of --max-model-len: raise it to 752 at least"):
        generate(DATASETS["sharegpt"], 1, 1.0, 512)
    generate(DATASETS["sharegpt"], 1, 1.0, 752)


def test_lengths_near_the_limit_still_have_their_mean() -> None:
    seed, rng = 3, random.Random(3)
    lengths = Lengths(90, 0.9, 100)
    assert sum(lengths.draw(rng) for _ in range(20_000)) / 20_000 == pytest.approx(90, rel=0.02), f"seed {seed}"


def test_arrivals_are_ordered_and_come_at_the_given_rate() -> None:
    times = [request.arrival_s for request in generate(DATASETS["alpaca"], 10_000, 4.0, 2048, seed=1)]
    assert all(a < b for a, b in pairwise(times))
    assert times[-1] == pytest.approx(2500, rel=0.05)
    gaps = [b - a for a, b in pairwise(times)]
    longer = sum(gap > 0.25 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(0.368, abs=0.02), "a Poisson process exceeds its mean gap with probability 1/e"


def test_the_same_seed_is_the_same_trace_and_another_seed_is_not() -> None:
    first, again, other = (list(generate(DATASETS["alpaca"], 50, 1.0, 2048, 0.5, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_trace_is_generated_as_it_is_used() -> None:
    endless = generate(DATASETS["sharegpt"], 10**12, 1.0, 2048)
    assert len(list(islice(endless, 3))) == 3


def test_prompts_have_a_common_prefix_of_the_given_share_and_no_more() -> None:
    requests = list(generate(DATASETS["sharegpt"], 200, 1.0, 2048, shared_prefix=0.5))
    prefixes = {request.prompt[0] for request in requests if len(request.prompt) > 1}
    assert len(prefixes) == traces.NUM_SHARED_PREFIXES
    for request in requests:
        half = len(request.prompt) // 2
        assert set(request.prompt[:half]) <= prefixes
        assert not set(request.prompt[half:]) & prefixes
    own = [request.prompt[-1] for request in requests]
    assert len(set(own)) == len(own), "each request has tokens that no other has"


def test_without_a_shared_prefix_no_two_prompts_have_a_token_in_common() -> None:
    requests = list(generate(DATASETS["alpaca"], 300, 1.0, 2048))
    assert len(set().union(*(request.prompt for request in requests))) == 300


@pytest.mark.parametrize("change, message", [
    ({"num_requests": 0}, "num_requests must be at least 1"), ({"rate": 0.0}, "rate must be at least 1e-06"),
    ({"rate": -1.0}, "rate must be at least 1e-06"), ({"rate": float("inf")}, "rate must be finite"),
    ({"shared_prefix": 1.5}, "shared_prefix must be from 0.0 to 1.0"), ({"max_model_len": 1}, "max_model_len must be"),
    ({"max_model_len": 2}, "raise it to 43 at least")])
def test_bad_arguments_are_refused_before_the_first_request(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"statistics": DATASETS["alpaca"], "num_requests": 1, "rate": 1.0, "max_model_len": 2048, **change})


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


GOOD = {"arrival_s": 1.0, "prompt": 5, "output_tokens": 3}


def test_a_file_gives_its_requests_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", GOOD, {**GOOD, "arrival_s": 1, "prompt": [4, 4, 2]}, {**GOOD, "arrival_s": 2.5})
    first, second, third = read(path, 2048)
    assert (first.arrival_s, len(first.prompt), first.output_tokens) == (1.0, 5, 3)
    assert second.prompt == [4, 4, 2] and third.arrival_s == 2.5 and isinstance(second.arrival_s, float)
    assert not set(first.prompt) & set(third.prompt), "prompts given by their length have nothing in common"


def test_requests_in_a_file_may_have_priorities(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", GOOD, {**GOOD, "priority": -1.5}, {**GOOD, "priority": 2})
    assert [request.priority for request in read(path, 2048)] == [0, -1.5, 2]


SECONDS, WHOLE = "a number from 0 to 10,000,000,000", "a whole number of at least"
EXPECTED = "expected an object with arrival_s, prompt, output_tokens, once each, and perhaps priority"


@pytest.mark.parametrize("line, message", [
    ('{"arrival_s": 1.0, "prompt', f"not JSON (unterminated string at character 20): {EXPECTED}"),
    ('{"arrival_s": 1.0 "prompt"', f"not JSON (expecting ',' delimiter at character 19): {EXPECTED}"),
    ("", f"the line is empty: {EXPECTED}"), ("[" * 100_000, f"too deeply nested: {EXPECTED}"),
    ('{"arrival_s": 1, "prompt": 5, "prompt": 6, "output_tokens": 3}', f'"prompt" is given 2 times: {EXPECTED}'),
    ("[1, 2, 3]", f"{EXPECTED}, got [1, 2, 3]"), ("7", f"{EXPECTED}, got 7"), ("{}", f"{EXPECTED}, got {{}}"),
    ({"prompt": 5, "output_tokens": {"a": 1}}, f'{EXPECTED}, got {{"prompt": 5, "output_tokens": {{"a": 1}}}}'),
    ({**GOOD, "extra": None}, f'{EXPECTED}, got {{"arrival_s": 1.0, "prompt": 5, "output_tokens": 3, "extra": null}}'),
    ({**GOOD, "extra": "x" * 99}, f'{EXPECTED}, got {{"arrival_s": 1.0, "prompt": 5, "output_tokens": 3, "extra": '
     f'"{"x" * 15}...'),
    ({**GOOD, "arrival_s": 0.123456789}, "arrival_s is 0.123456789, but the line before has 1.0: sort the lines by "
     "arrival"),
    ({**GOOD, "arrival_s": "soon"}, f'arrival_s must be {SECONDS}, got "soon"'),
    ({**GOOD, "arrival_s": True}, f"arrival_s must be {SECONDS}, got true"),
    ({**GOOD, "arrival_s": float("nan")}, f"arrival_s must be {SECONDS}, got NaN"),
    ({**GOOD, "arrival_s": float("inf")}, f"arrival_s must be {SECONDS}, got Infinity"),
    ({**GOOD, "arrival_s": -1}, f"arrival_s must be {SECONDS}, got -1"),
    ({**GOOD, "arrival_s": 10**400}, f"arrival_s must be {SECONDS}, got 1{'0' * 76}..."),
    ({**GOOD, "priority": "high"}, 'priority must be a finite number, got "high"'),
    ({**GOOD, "priority": float("nan")}, "priority must be a finite number, got NaN"),
    ({**GOOD, "priority": -float("inf")}, "priority must be a finite number, got -Infinity"),
    ({**GOOD, "prompt": []}, "prompt has no tokens: at least one is needed"),
    ({**GOOD, "prompt": 0}, f"prompt must be {WHOLE} 1, or a list of token ids, got 0"),
    ({**GOOD, "prompt": None}, f"prompt must be {WHOLE} 1, or a list of token ids, got null"),
    ({**GOOD, "prompt": "hello"}, f'prompt must be {WHOLE} 1, or a list of token ids, got "hello"'),
    ({**GOOD, "prompt": [1, [2]]}, f"a token id of prompt must be {WHOLE} 0, got [2]"),
    ({**GOOD, "prompt": [-7]}, f"a token id of prompt must be {WHOLE} 0, got -7"),
    ({**GOOD, "output_tokens": 0}, f"output_tokens must be {WHOLE} 1, got 0"),
    ({**GOOD, "output_tokens": 1.5}, f"output_tokens must be {WHOLE} 1, got 1.5"),
    ({**GOOD, "output_tokens": True}, f"output_tokens must be {WHOLE} 1, got true"),
    ({**GOOD, "prompt": 2046}, "prompt and output_tokens are 2049 tokens together, and --max-model-len allows 2048: "
     "raise it, or shorten the request")], ids=lambda value: str(value)[:20])
def test_a_damaged_line_is_named_in_the_words_of_json(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "trace", GOOD, GOOD, line, GOOD)
    with pytest.raises(ValueError) as caught:
        list(read(path, 2048))
    assert str(caught.value) == f"{path}, line 3: {message}"


def test_bytes_that_are_not_text_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="bytes, line 2: not JSON"):
        list(read(str(tmp_path / "bytes"), 2048))
    with pytest.raises(ValueError, match="empty is empty"):
        list(read(write(tmp_path / "empty"), 2048))
    with pytest.raises(OSError):
        list(read(str(tmp_path / "missing"), 2048))


def test_a_trace_that_can_be_read_only_once_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would block
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=f"{path} must be a regular file, since it is read several times"):
            list(read(str(path), 2048))
