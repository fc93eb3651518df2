"""`python -m nanopaged.bench host`: the parts of a step add up, and are those of the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanopaged.bench import host
from nanopaged.bench.__main__ import main


@pytest.mark.parametrize("arguments, message", [(["--steps", "0"], "steps must be from 1 to 1000, got 0"),
                                                (["--requests", "0"], "requests must be from 1 to 4096, got 0")])
def test_bad_values_get_one_line_and_status_2(arguments: list[str], message: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_parts_of_each_size_are_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert main(["host", "--steps", "3", "--requests", "2", "--requests", "5", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["figures"]["steps"]
    assert [(row["requests"], row["context"]) for row in rows] == [(2, 100), (2, 900), (5, 100), (5, 900)]
    for row in rows:
        assert list(row["ms"]) == list(host.PARTS) and all(ms > 0 for ms in row["ms"].values())
        assert row["ms"]["step"] >= max(row["ms"].values()) * 0.99
    assert capsys.readouterr().out.count("\n| ") == 4


def test_every_timed_step_decodes_all_requests_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], host.engine_without_model
    monkeypatch.setattr(host, "engine_without_model", lambda *arguments: made.append(plain(*arguments)) or made[-1])
    host.decode_costs(3, 20, 5)
    (llm,) = made
    assert [request.num_output_tokens for request in llm.scheduler.running] == [6, 6, 6]  # the first with the prompt
    assert llm.stats().computed_tokens == 3 * (20 + 5) and llm.stats().num_preemptions == 0
