"""What comes back? The answers of the public interface; the names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass

from nanopaged.request import RequestMetrics


@dataclass
class CompletionOutput:
    """A continuation of the prompt, one of n, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length" or "abort"; None while it runs
    metrics: RequestMetrics


@dataclass
class RequestOutput:
    """A request, as far as it has come."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics  # of the first continuation, which also computed the prompt
