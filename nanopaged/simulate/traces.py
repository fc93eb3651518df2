"""Where do requests come from, when there are no users?

A trace is a stream of requests in order of arrival, each with a prompt and the number of tokens that
it will generate. It is generated or read one request at a time, as it is used, so a long trace takes no
more memory than a short one.

The lengths follow the two data sets of the vLLM paper (Kwon et al., SOSP 2023, section 6.1): their
means are Figure 11's. The paper shows their long tails but gives no number for them, so each length is
drawn from a lognormal distribution whose width is our own choice. Arrivals are Poisson, as in the paper.
"""

from __future__ import annotations

import json
import math
import os
import random
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from nanopaged.validation import require_int, require_number

REQUIRED = ("arrival_s", "prompt", "output_tokens")  # of a request in a file
EXPECTED = f"expected an object with {', '.join(REQUIRED)}, once each, and perhaps priority"
LATEST_S = 10**10  # a clock that shows more would not advance in the shortest steps
NUM_SHARED_PREFIXES = 8  # different prefixes that requests share, such as system prompts


class TraceRequest(NamedTuple):
    """One user's request. `output_tokens` is the true length, which a real server learns only at the end."""

    arrival_s: float
    prompt: list[int]  # token ids
    output_tokens: int
    priority: float = 0


@dataclass(frozen=True)
class LengthStatistics:
    """Means, in tokens, after lengths are limited; and the widths (sigma of log length) of the distributions."""

    mean_prompt: float
    mean_output: float
    prompt_sigma: float
    output_sigma: float


DATASETS = {"sharegpt": LengthStatistics(161, 338, 1.2, 0.9), "alpaca": LengthStatistics(19, 58, 0.5, 0.9)}


class Lengths:
    """Draws lengths from 1 to `limit` tokens, lognormal before they are limited, of the given mean after it.

    Raises ValueError if the limit is too low for such a mean.
    """

    def __init__(self, mean: float, sigma: float, limit: int) -> None:
        if not 1 <= mean <= 0.9 * limit:
            raise ValueError(f"lengths of {mean:g} tokens on average cannot be drawn with at most {limit} each, half "
                             f"of --max-model-len: raise it to {math.ceil(2 * mean / 0.9)} at least")
        self.sigma, self.limit = sigma, limit
        low, high = math.log(mean) - sigma**2, math.log(limit) + 10 * sigma
        for _ in range(60):  # the mean after limiting rises with mu: bisection
            self.mu = (low + high) / 2
            low, high = (self.mu, high) if self._limited_mean() < mean else (low, self.mu)

    def _limited_mean(self) -> float:
        """E[min(X, limit)] of a lognormal X, in closed form; lengths below one token are too rare to count."""
        phi, distance = NormalDist().cdf, (math.log(self.limit) - self.mu) / self.sigma
        return math.exp(self.mu + self.sigma**2 / 2) * phi(distance - self.sigma) + self.limit * (1 - phi(distance))

    def draw(self, rng: random.Random) -> int:
        return max(1, round(min(self.limit, rng.lognormvariate(self.mu, self.sigma))))


def generate(statistics: LengthStatistics, num_requests: int, rate: float, max_model_len: int,
             shared_prefix: float = 0.0, seed: int = 0) -> Iterator[TraceRequest]:
    """A random trace; the same seed gives the same trace.

    Args:
        rate: arrivals a second, on average.
        max_model_len: prompt and output, in tokens, are each limited to half of it.
        shared_prefix: share of each prompt, from its start, that is one of `NUM_SHARED_PREFIXES` common
            prefixes, chosen at random.

    Raises TypeError or ValueError for an invalid argument, before the first request is drawn.
    """
    require_int("num_requests", num_requests, 1)
    require_number("rate", rate, 1e-6)  # positive, and large enough for finite arrival times
    require_number("shared_prefix", shared_prefix, 0.0, 1.0)
    limit = require_int("max_model_len", max_model_len, 2) // 2
    prompts = Lengths(statistics.mean_prompt, statistics.prompt_sigma, limit)
    outputs = Lengths(statistics.mean_output, statistics.output_sigma, limit)

    def requests() -> Iterator[TraceRequest]:
        rng, arrival_s = random.Random(seed), 0.0
        for i in range(num_requests):
            arrival_s += rng.expovariate(rate)
            length = prompts.draw(rng)
            shared = int(shared_prefix * length)
            # One token id of its own, repeated, is enough to tell a request from all others.
            prompt = [rng.randrange(NUM_SHARED_PREFIXES)] * shared + [NUM_SHARED_PREFIXES + i] * (length - shared)
            yield TraceRequest(arrival_s, prompt, outputs.draw(rng))

    return requests()


def read(path: str, max_model_len: int) -> Iterator[TraceRequest]:
    """A trace from a file with one JSON object a line, in order of arrival:

        {"arrival_s": 0.25, "prompt": 161, "output_tokens": 338}

    `prompt` is a number of tokens, or a list of token ids if it matters which prompts have a common prefix.
    `priority`, a number, may be given too. Raises OSError if the file cannot be read, and ValueError, with the
    number of the line, if it is damaged.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} must be a regular file, since it is read several times")
    previous_s, number = 0.0, 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                request = _parse(line, number, max_model_len)
                if request.arrival_s < previous_s:
                    raise ValueError(f"arrival_s is {request.arrival_s}, but the line before has {previous_s}: "
                                     "sort the lines by arrival")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            previous_s = request.arrival_s
            yield request
    if number == 0:
        raise ValueError(f"{path} is empty: it needs one JSON object a line")


def _parse(line: bytes, number: int, max_model_len: int) -> TraceRequest:
    if not line.strip():
        raise ValueError(f"the line is empty: {EXPECTED}")
    try:
        fields = json.loads(line.decode().rstrip(), object_pairs_hook=_once_each)
    except UnicodeDecodeError:
        raise ValueError(f"not JSON (not even UTF-8): {EXPECTED}") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" starting at").lower()
        raise ValueError(f"not JSON ({what} at character {error.pos + 1}): {EXPECTED}") from None
    except RecursionError:
        raise ValueError(f"too deeply nested: {EXPECTED}") from None
    if not isinstance(fields, dict) or not {*REQUIRED} <= fields.keys() <= {*REQUIRED, "priority"}:
        raise ValueError(f"{EXPECTED}, got {_json(fields)}")
    arrival_s = float(_number("arrival_s", fields["arrival_s"], 0, LATEST_S))
    priority = _number("priority", fields.get("priority", 0))
    output_tokens = _whole("output_tokens", fields["output_tokens"], 1)
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        if not prompt:
            raise ValueError("prompt has no tokens: at least one is needed")
        for token_id in prompt:
            _whole("a token id of prompt", token_id, 0)
    length = len(prompt) if isinstance(prompt, list) else _whole("prompt", prompt, 1, ", or a list of token ids")
    if length + output_tokens > max_model_len:
        raise ValueError(f"prompt and output_tokens are {length + output_tokens} tokens together, and --max-model-len "
                         f"allows {max_model_len}: raise it, or shorten the request")
    # No token id in a file is negative, so such a prompt has no prefix in common with any other.
    return TraceRequest(arrival_s, prompt if isinstance(prompt, list) else [-number] * length, output_tokens, priority)


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{_json(name)} is given {times} times: {EXPECTED}")
    return dict(pairs)


def _whole(name: str, value: object, minimum: int, otherwise: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}{otherwise}, got {_json(value)}")
    return value


def _number(name: str, value: object, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != math.inf
    if not is_number or not minimum <= value <= maximum:  # nan is not
        allowed = "finite number" if maximum == math.inf else f"number from {minimum:,} to {maximum:,}"
        raise ValueError(f"{name} must be a {allowed}, got {_json(value)}")
    return value


def _json(value: object) -> str:
    """A value as it stands in the file, on one line and not too long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
