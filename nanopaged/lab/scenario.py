"""What does an engine do with this code? A lab's scenario, run on any version of the package.

It is played by copycat, whose right continuations are known. So the same run on two versions shows what a bug does to a
user: another text, blocks that are never given back, a run that does not end, a lost place, work done twice.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from nanopaged.lab.check import choose_how_kernels_run
from nanopaged.lab.isolation import Report, isolated
from nanopaged.lab.labs import Scenario

STEPS = 400  # more mean that it does not end
SECONDS = 30.0


def play(folder: Path, scenario: Scenario, recording: Path | None = None) -> dict[str, Any]:
    """Plays a scenario on the package in `folder`, and records it.

    Returns what a user sees: "texts" of each request in the order of arrival, "order" in which they finished, "steps",
    "computed" and "recomputed" tokens, tokens "found" in the pool, "preemptions"; blocks "held" and "shared" and slots
    "filled" at the end; the end of what was "printed"; and "error", if it did not get there.
    """
    choose_how_kernels_run()
    outcome = isolated(lambda report: _play(report, scenario, recording), folder, SECONDS)
    if outcome.results:
        return {**outcome.results[-1], "printed": outcome.printed}
    late = f"it was still running after {SECONDS:.0f} s; it stood at {outcome.stands}"
    return {"error": late if outcome.stands else f"the process {outcome.status}", "printed": outcome.printed}


def _play(report: Report, scenario: Scenario, recording: Path | None) -> None:
    import torch

    torch.set_num_threads(1)
    seen: dict[str, Any] = {"texts": {}, "order": [], "steps": 0, "error": ""}
    try:
        nanopaged = importlib.import_module("nanopaged")
        llm = nanopaged.LLM(**{"device": "cpu", "max_num_batched_tokens": 256} | scenario.options)
        if recording is None:
            _serve(nanopaged, llm, scenario, seen)
        else:
            with importlib.import_module("nanopaged.show.recording").record(llm, str(recording)):
                _serve(nanopaged, llm, scenario, seen)
    except BaseException as error:  # whatever it was, it is what the user sees
        seen["error"] = f"{type(error).__name__}: {error}"
    report(**seen)


def _serve(nanopaged: Any, llm: Any, scenario: Scenario, seen: dict[str, Any]) -> None:
    waiting = sorted(scenario.requests, key=lambda request: request[0])
    try:
        while (waiting or llm.has_unfinished_requests()) and seen["steps"] < STEPS:
            while waiting and waiting[0][0] <= seen["steps"]:
                _, prompt, params = waiting.pop(0)
                request_id = llm.add_request(prompt, nanopaged.SamplingParams(**{"temperature": 0.0} | params))
                seen["texts"][request_id] = ""
            for output in llm.step():
                seen["texts"][output.request_id] = " | ".join(completion.text for completion in output.outputs)
                if output.finished:
                    seen["order"].append(output.request_id)
            seen["steps"] += 1
        if waiting or llm.has_unfinished_requests():
            seen["error"] = f"it has not ended after {STEPS} steps"
    finally:
        stats = llm.stats()
        seen |= {"computed": stats.computed_tokens, "recomputed": stats.recomputed_tokens,
                 "found": stats.prefix_hit_tokens, "preemptions": stats.num_preemptions,
                 "held": stats.referenced_blocks, "shared": stats.shared_blocks, "filled": stats.filled_slots}
