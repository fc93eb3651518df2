"""What `python -m nanopaged.simulate` prints beside its figures: the load, the paper's figures, what columns mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.simulate.test_main import command

from nanopaged.simulate import __main__ as command_line


@pytest.fixture(autouse=True)
def few_requests_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run like the paper's is short."""
    monkeypatch.setattr(command_line, "DEFAULT_REQUESTS", 50)


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert command(*arguments) == 0
    return capsys.readouterr().out


def test_the_default_load_is_called_an_overload_on_purpose(capsys: pytest.CaptureFixture) -> None:
    text = r"This is overload on purpose: [23]\.\d times what it can do, so that memory limits every server\."
    assert re.search(text, printed(capsys, "--requests", "200", "--servers", "paged", "max"))
    for arguments, text in ((("--rate", "3"), "This is overload: "), (("--rate", "0.1"), ": it keeps up.")):
        shown = printed(capsys, "--requests", "200", "--servers", "paged", *arguments)
        assert text in shown and "on purpose" not in shown


@pytest.mark.parametrize("arguments, differ", [
    (["--slots", "15000"], "--slots"), (["--max-model-len", "1024"], "--max-model-len"),
    (["--block-size", "32", "--order", "shortest"], "--order, --block-size"), (["--rate", "0.7"], "--rate"),
    (["--dataset", "alpaca"], "--dataset, --rate"), (["--admission", "reserve"], "--admission"),
    (["--shared-prefix", "0.5"], "--shared-prefix"), (["--fixed-s", "0.05"], "--fixed-s"),
    (["--requests", "49"], "--requests")])
def test_a_run_unlike_the_papers_is_not_compared_with_it(
        arguments: list[str], differ: str, capsys: pytest.CaptureFixture) -> None:
    shown = printed(capsys, "--servers", "paged", *arguments)
    assert f"Not comparable with the paper's Figure 2, whose load and servers are the defaults: {differ}.\n" in shown
    assert "96.3%" not in shown


def test_a_run_like_the_papers_is_compared_with_it_whatever_seed_and_servers(capsys: pytest.CaptureFixture) -> None:
    paged, others = "The paper's Figure 2 has, as `tokens`, 96.3% for paged", "--contiguous buddy"
    assert f"{paged}.\n" in printed(capsys, "--servers", "paged", "--seed", "3")
    shown = printed(capsys)
    assert f"{paged}. The other servers" in shown and others in shown and "20.4%" not in shown
    assert f"{paged}, 38.2% for oracle.\n" in printed(capsys, "--servers", "paged", "oracle", "--contiguous", "buddy")
    assert "paper" not in printed(capsys, "--sweep", "pool", "--requests", "20")


def test_a_trace_is_not_compared_with_the_paper(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "trace"
    path.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 4}\n' * 5)
    shown = printed(capsys, "--trace", str(path))
    assert "Not comparable with the paper's Figure 2, whose load and servers are the defaults: --trace.\n" in shown


def test_few_requests_have_a_median_and_a_longest_instead_of_percentiles(tmp_path: Path,
                                                                         capsys: pytest.CaptureFixture) -> None:
    path, few, many = tmp_path / "json", ("--dataset=alpaca", "--servers=paged", "--requests=99"), ("--requests=100",)
    lines = printed(capsys, *few, "--json", str(path)).splitlines()
    header, row = next([lines[i], lines[i + 2]] for i, line in enumerate(lines) if "TTFT" in line)
    assert "| TTFT median s | TTFT longest s | TBT median s | TBT longest s |" in header and "p50 s" not in header
    result = json.loads(path.read_text())["figures"]["results"]["paged"]
    assert [float(cell) for cell in row.split("|")[4:8]] == pytest.approx(
        [result[name] for name in ("ttft_p50_s", "ttft_max_s", "tbt_p50_s", "tbt_max_s")], rel=0.01)
    assert "| TTFT p50 s | TTFT p99 s | TBT p50 s | TBT p99 s |" in printed(capsys, *few, *many)
    assert "| TTFT median s | TTFT longest s |" in printed(capsys, "--sweep", "pool", "--requests", "20")
