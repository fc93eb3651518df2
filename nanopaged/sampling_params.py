"""What did the user ask for? The knobs of one request, checked once, when they are made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from nanopaged.validation import require_choice, require_int, require_number, require_seed, require_text, shown


def hashed(*parts: object) -> int:
    """64 bits that depend on all parts, and are the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def continuation_seed(seed: int, index: int) -> int:
    """The seed of continuation `index` of a request: its own for the first, one derived from both for the others."""
    return seed if index == 0 else hashed(seed, "continuation", index)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. The names and meanings are vLLM's.

    Attributes:
        n: continuations of the prompt, which is computed once for all of them.
        temperature: 0 takes the likeliest token (greedy); else logits are divided by it.
        top_k: sample among the k likeliest tokens; 0 or -1 is all of them.
        top_p: sample among the fewest likeliest tokens whose probabilities add up to at least
            top_p, in (0, 1] (nucleus sampling, Holtzman et al., 2020). Applied after top_k.
        max_tokens: tokens to generate at most. The model's context may end it sooner.
        stop: one string or several; the text ends before the first that appears.
        stop_token_ids: token ids that end the output. The id is the last of `token_ids`, but not
            part of the text.
        ignore_eos: go on past the model's end-of-text token.
        seed: an int of at most 128 bits; the same request with the same seed gives the same tokens, whatever
            other requests run, up to the model's rounding: where that moves two tokens past each other,
            either may be drawn (see README). None: a seed is derived from the engine's own. Continuation i of n
            is what the request would give alone with the seed `continuation_seed(seed, i)`.

    Raises:
        TypeError, ValueError: with the field, what was given and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        require_int("n", self.n, 1, 1024)
        require_number("temperature", self.temperature, 0.0, 1e6)
        require_int("top_k", self.top_k, -1)
        if require_number("top_p", self.top_p, 0.0, 1.0) == 0.0:
            raise ValueError("top_p must be in (0, 1], got 0: for the likeliest token alone set temperature=0")
        require_int("max_tokens", self.max_tokens, 1)
        require_choice("ignore_eos", self.ignore_eos, (True, False))
        if self.seed is not None:
            require_seed("seed", self.seed)
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(s, str) for s in stop):
            raise TypeError(f"stop must be a str or a list of str, got {shown(self.stop)}")
        if "" in stop:
            raise ValueError("stop must not hold an empty string: every text ends with one")
        for text in stop:
            require_text("stop", text)
        stop_token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(stop_token_ids, (tuple, list)):
            raise TypeError(f"stop_token_ids must be a list of int, got {shown(stop_token_ids)}")
        for token_id in stop_token_ids:
            require_int("stop_token_ids", token_id, 0)
        # The dataclass is frozen, so that requests may share one; this is its own constructor.
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(stop_token_ids))


def one_for_each(prompts: object, sampling_params: object) -> list[tuple[object, object]]:
    """The arguments of `LLM.generate`, paired: (prompt, sampling_params) of each request.

    Raises TypeError or ValueError if they are not lists of equal length, or one text, or one SamplingParams.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or any(isinstance(prompt, int) for prompt in prompts):
        raise TypeError("prompts must be a str, or a list of str and of lists of token ids ([[1, 2, 3]] is one prompt "
                        f"of three tokens), got {shown(prompts)}")
    if not isinstance(sampling_params, (list, tuple)):
        sampling_params = [sampling_params] * len(prompts)
    if len(sampling_params) != len(prompts):
        raise ValueError(f"got {len(sampling_params)} sampling_params for {len(prompts)} prompts: give one for all, or "
                         "one for each")
    return list(zip(prompts, sampling_params))
