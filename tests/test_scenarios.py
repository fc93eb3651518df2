"""Everything at once, against the dense oracle: n, swapping, aborts, faults, sharing, chunks, policies, a full queue.

The suite runs 300 random scenarios. Any number more, from any seed:

    python tests/test_scenarios.py 5000 --first-seed 300
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the command above

import torch  # noqa: E402
from tests.crowds import check_every_plan, members_of  # noqa: E402
from tests.faults import step_with_fault  # noqa: E402
from tests.oracle import TINY, assert_dense_continuation, tiny_model  # noqa: E402
from tests.recordings import recorded  # noqa: E402
from tests.recount import assert_consistent, assert_nothing_is_held  # noqa: E402

from nanopaged import LLM, SamplingParams, TooManyWaiting  # noqa: E402
from nanopaged.gpt2 import GPT2  # noqa: E402
from nanopaged.request import Request  # noqa: E402
from nanopaged.sampling_params import continuation_seed, hashed  # noqa: E402
from nanopaged.scheduler import Scheduler  # noqa: E402
from nanopaged.waiting import AdmissionContext  # noqa: E402


def broken_at(position: int, seed: int) -> GPT2:
    model = tiny_model(seed=seed)
    model.wpe.weight[position] = torch.nan
    return model


MODELS = [tiny_model(seed=seed) for seed in range(3)]
BROKEN = 30  # this position is not finite in some engines: who reaches it must fail, and nobody else
BROKEN_MODELS = [broken_at(BROKEN, seed) for seed in range(3)]


def half_of_what_is_available(context: AdmissionContext) -> bool:
    return 2 * context.prompt <= context.available


def any_order(request: Request) -> float:
    return hashed(request.request_id) % 5


def random_engine(rng: random.Random, model: GPT2, work: list[tuple[list[int], SamplingParams]]) -> LLM:
    """An engine in which each request fits, some of them barely."""
    admission = rng.choice(["watermark", "reserve", "greedy", "greedy", half_of_what_is_available])
    block_size = rng.choice([8, 8, 16])
    barely = max(-(-(len(prompt) + params.max_tokens) // block_size) * (params.n if admission == "reserve" else 1)
                 for prompt, params in work)
    return LLM(
        model, device="cpu", block_size=block_size, num_blocks=barely + rng.choice([0, 1, 2, 12]),
        max_num_seqs=rng.choice([4, 6, 12]), max_num_batched_tokens=rng.choice([2, 9, 30, 200]),
        enable_prefix_caching=rng.random() < 0.7, admission=admission, watermark=rng.choice([0.0, 0.0, 0.3]),
        order=rng.choice(["fcfs", "priority", "shortest", any_order]), preemption=rng.choice(["recompute", "swap"]),
        swap_blocks=rng.choice([1, 4, 40]), max_waiting=rng.choice([None, None, 1, 3]))


def random_work(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of different lengths, most of which have a common prefix; one in three has several continuations."""
    stem = [rng.randrange(TINY.vocab_size) for _ in range(33)]

    def prompt() -> list[int]:
        suffix = [rng.randrange(TINY.vocab_size) for _ in range(rng.randint(1, 12))]
        return stem[: rng.choice([0, 0, 7, 16, 33])] + suffix

    return [(prompt(),
             SamplingParams(n=rng.choice([1, 1, 1, 1, 2, 4]), temperature=rng.choice([0.0, 0.8, 1.3]),
                            top_k=rng.choice([0, 10]), max_tokens=rng.randint(1, 24), seed=rng.randrange(1000),
                            stop_token_ids=rng.sample(range(TINY.vocab_size), rng.choice([0, 0, 2]))))
            for _ in range(rng.randint(2, 8))]


def run_scenario(seed: int, folder: Path) -> Counter[str]:
    """Runs one scenario and checks all that must hold, at every step; returns what happened how often.

    If something does not hold, a recording of the run is in the folder.
    """
    rng = random.Random(seed)
    work = random_work(rng)
    model, is_broken = rng.randrange(3), rng.random() < 0.2
    llm = random_engine(rng, (BROKEN_MODELS if is_broken else MODELS)[model], work)
    with recorded(llm, folder):
        return check_scenario(rng, llm, work, model, is_broken, f"in the scenario of seed {seed}")


def check_scenario(rng: random.Random, llm: LLM, work: list[tuple[list[int], SamplingParams]], model: int,
                   is_broken: bool, where: str) -> Counter[str]:
    check_every_plan(llm.scheduler, where)
    pending = list(range(len(work)))
    ids: dict[str, int] = {}
    results = {}
    happened: Counter[str] = Counter()
    while pending or llm.has_unfinished_requests():
        while pending and rng.random() < 0.6:
            prompt, params = work[pending[0]]
            try:
                ids[llm.add_request(prompt, params, priority=rng.choice([0, 0, -3, 0.5, 10**6]))] = pending[0]
                pending.pop(0)
            except TooManyWaiting:
                happened["refused"] += 1
                break
        chance = rng.random()
        if chance < 0.08 and llm.scheduler.has_unfinished():
            step_with_fault(llm, rng)
            happened["faults"] += 1
        elif chance < 0.12 and ids.keys() - results.keys():
            victim = rng.choice(sorted(ids.keys() - results.keys()))
            leader = members_of(llm, victim)[0]
            happened[f"abort while {leader.status.value}"] += 1
            results[victim] = llm.abort_request(victim)
        else:
            for output in llm.step():
                if output.finished:
                    results[output.request_id] = output
                for completion in output.outputs:
                    assert completion.finish_reason or not output.finished, where
        llm.scheduler.check_invariants()
        assert_consistent(llm.scheduler, where)
        arrivals = [request.key[1] for request in llm.scheduler.running]
        happened["out of order of arrival"] += arrivals != sorted(arrivals)
    assert_nothing_is_held(llm.scheduler, where)
    stats = llm.stats()
    assert stats.swap_blocks_used == 0, where
    assert results.keys() == ids.keys(), where
    for request_id, i in ids.items():
        prompt, params = work[i]
        assert [completion.index for completion in results[request_id].outputs] == list(range(params.n)), where
        for completion in results[request_id].outputs:
            failed = completion.finish_reason == "error"
            happened["errors"] += failed
            happened["forgiven"] += assert_dense_continuation(
                MODELS[model], prompt, params, continuation_seed(params.seed, completion.index), completion.token_ids,
                not failed and completion.finish_reason != "abort",
                f"{where}, request {request_id}, continuation {completion.index}")
            happened["tokens"] += len(completion.token_ids)
            if failed:  # in the step that computes the broken position, and never before
                assert is_broken and completion.error, where
                assert len(completion.token_ids) == max(0, BROKEN + 1 - len(prompt)), where
            elif is_broken and completion.finish_reason != "abort":
                assert len(prompt) + len(completion.token_ids) <= BROKEN + 1, where
    if llm.config.admission == "reserve":
        assert stats.num_preemptions == 0, where
    for name in ("admission", "order"):
        policy = getattr(llm.config, name)
        happened[policy if isinstance(policy, str) else policy.__name__] += 1
    happened.update(
        preemptions=stats.num_preemptions, recomputed_tokens=stats.recomputed_tokens, hits=stats.prefix_hit_tokens,
        swapped_in_tokens=stats.swapped_in_tokens, finished=stats.num_finished)
    return happened


def run_scenarios(first: int, number: int, folder: Path) -> Counter[str]:
    happened: Counter[str] = Counter()
    for seed in range(first, first + number):
        try:
            happened += run_scenario(seed, folder)
        except Exception as error:
            error.add_note(f"in the scenario of seed {seed}")
            raise
    return happened


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_a_requests_tokens_depend_on_nothing_but_itself(first: int, tmp_path: Path) -> None:
    happened = run_scenarios(first, 50, tmp_path)
    for what in ("preemptions", "swapped_in_tokens", "recomputed_tokens", "hits", "faults", "refused",
                 "errors", "abort while running", "abort while waiting", "out of order of arrival",
                 "watermark", "reserve", "greedy", "half_of_what_is_available",
                 "fcfs", "priority", "shortest", "any_order"):
        assert happened[what] > 0, f"seeds {first} to {first + 49} never had {what}: {happened}"
    assert happened["forgiven"] <= happened["tokens"] // 1000, happened


def test_a_scenario_that_fails_leaves_its_recording_up_to_the_failure(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    reading = pytest.importorskip("nanopaged.show.reading")
    checks = []

    def fails_in_the_end(scheduler: Scheduler, where: str) -> None:
        checks.append(scheduler.stats.num_steps)
        assert len(checks) < 9, where

    monkeypatch.setitem(globals(), "assert_consistent", fails_in_the_end)
    with pytest.raises(AssertionError, match="in the scenario of seed 7"):
        run_scenarios(7, 1, tmp_path)
    path = tmp_path / "run.jsonl"
    assert str(path) in capsys.readouterr().out
    assert sum(line.get("recorded", False) for line in reading.read(str(path))) == checks[-1] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    happened: Counter[str] = Counter()
    end, folder = arguments.first_seed + arguments.count, Path(tempfile.mkdtemp())
    for first in range(arguments.first_seed, end, 100):
        happened += run_scenarios(first, min(100, end - first), folder)
        print(f"\rseed {first}: {dict(happened)}", end="", flush=True)
    print(f"\n{arguments.count} scenarios, no difference: {dict(happened)}")


if __name__ == "__main__":
    main()
