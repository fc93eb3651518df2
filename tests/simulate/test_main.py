"""`python -m nanopaged.simulate`: what it prints and writes, own policies, and mistakes in its arguments."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.terminal import in_terminal

from nanopaged import report
from nanopaged.simulate import __main__ as command_line

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> int:
    """The status of `python -m nanopaged.simulate`, run in this process."""
    parser = argparse.ArgumentParser(prog="simulate")
    command_line.add_arguments(parser)
    try:
        return report.main(parser, command_line.run, arguments)
    except SystemExit as end:
        return int(end.code)


def as_module(*arguments: str, directory: Path = ROOT, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m nanopaged.simulate`, run in `directory`, of the nanopaged that is in `package`."""
    return subprocess.run([sys.executable, "-m", "nanopaged.simulate", *arguments], cwd=directory, text=True,
                          env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True)


SMALL = ("--dataset", "alpaca", "--requests", "40", "--slots", "2400", "--max-model-len", "256")


def test_the_command_shows_every_server_and_writes_the_same_as_json(tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--json", str(path)) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    for name in ("paged", "max", "pow2", "oracle"):
        result = written["figures"]["results"][name]
        assert printed.count(f"| {name} ") == 2
        assert f"{result['memory']['tokens']:.1%}" in printed and result["counts"]["num_finished"] == 40
    assert written["figures"]["trace"]["requests"] == 40 and written["arguments"]["slots"] == 2400
    assert written["environment"]["versions"]["python"]


@pytest.mark.parametrize("sweep, rows, rate", [
    ("block-size", command_line.BLOCK_SIZES, command_line.RATES["alpaca"]),
    ("pool", command_line.POOL_SHARES, command_line.RATES["alpaca"] / 4)])
def test_a_sweep_has_a_row_for_each_size(sweep: str, rows: tuple[float, ...], rate: float, tmp_path: Path,
                                         capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--sweep", sweep, "--json", str(path)) == 0
    assert capsys.readouterr().out.count("\n| ") == 1 + len(rows)
    assert json.loads(path.read_text())["arguments"]["rate"] == rate


def test_smaller_blocks_waste_less_share_more_and_need_longer_tables(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert command(*SMALL, "--sweep", "block-size", "--json", str(path)) == 0
    results = json.loads(path.read_text())["figures"]["results"]
    small, middle, large = (results[size] for size in ("1", "16", "128"))
    assert 0 == small["memory"]["internal"] < middle["memory"]["internal"] < large["memory"]["internal"]
    assert small["average_table"] > middle["average_table"] > large["average_table"] >= 1
    assert small["hit_share"] > middle["hit_share"] > large["hit_share"] == 0


@pytest.mark.parametrize("arguments, message", [
    (["--requests", "0"], ": --requests must be at least 1"), (["--rate", "0"], ": --rate must be at least 1e-06"),
    (["--rate", "nan"], ": --rate must be finite"), (["--slots", "0"], ": --slots must be at least 1"),
    (["--slots", "-5"], ": --slots must be at least 1"), (["--block-size", "0"], ": --block-size must be at least 1"),
    (["--block-size", "99999"], "15,700 slots make no block of 99,999: raise --slots, or choose smaller blocks"),
    (["--sweep", "pool", "--slots", "99"], "14 slots make no block of 16"),
    (["--max-model-len", "99"], "half of --max-model-len: raise it to 358"),
    (["--max-model-len", "1"], ": --max-model-len must be at least 2"),
    (["--sweep", "pool", "--slots", "1"], "0 slots make"),
    (["--fixed-s", "0"], ": --fixed-s must be from 1e-05"), (["--watermark", "2"], ": --watermark must be from 0.0 to"),
    (["--per-token-s", "1e308"], ": --per-token-s must be from 0.0 to 1000.0"),
    (["--per-kv-token-s", "-1"], ": --per-kv-token-s must be from 0.0 to 1000.0"),
    (["--swap-blocks", "-1"], ": --swap-blocks must be at least 0"),
    (["--max-num-seqs", "0"], ": --max-num-seqs must be at least 1"),
    (["--servers", "max", "--max-num-seqs", "0"], ": --max-num-seqs must be at least 1"),
    (["--max-num-batched-tokens", "0"], ": --max-num-batched-tokens must be at least 1"),
    (["--shared-prefix", "7"], ": --shared-prefix must be from"), (["--trace", "no/such/file"], "no/such/file"),
    (["--trace", ""], "No such file"),
    (["--dataset", "other"], "invalid choice"), (["--servers", "orca"], "invalid choice"),
    (["--requests", "many"], "invalid int")])
def test_bad_arguments_get_one_clear_line_and_status_2(arguments: list[str], message: str,
                                                       capsys: pytest.CaptureFixture) -> None:
    assert command(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("simulate: error: ") and message in last and "_" not in last


def test_a_damaged_trace_file_names_its_line_before_anything_is_simulated(tmp_path: Path,
                                                                          capsys: pytest.CaptureFixture) -> None:
    good = '{"arrival_s": 0, "prompt": 9, "output_tokens": 4}\n'
    path = tmp_path / "trace.jsonl"
    path.write_text(good * 6 + '{"arrival_s": 0, "prompt": 9, "output\n' + good)
    assert command("--trace", str(path)) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and "trace.jsonl, line 7: not JSON" in streams.err and streams.err.count("\n") == 1
    path.write_text(good * 6)
    assert command("--trace", str(path), "--servers", "paged", "max") == 0
    assert "6 requests in 0 s, of 9 prompt and 4 output tokens" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, needed, room, row", [
    (["--servers", "paged", "oracle"], 48, 32, "server paged"), (["--servers", "oracle"], 37, 35, "server oracle"),
    (["--servers", "oracle", "--contiguous", "buddy"], 37, 32, "server oracle"),
    (["--servers", "max"], 63, 35, "server max"), (["--servers", "pow2"], 40, 35, "server pow2"),
    (["--sweep", "pool", "--slots", "190"], 48, 16, "slots 28")])
def test_a_request_that_can_never_fit_is_named_before_anything_is_simulated(
        arguments: list[str], needed: int, room: int, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command_line, "simulate", lambda *args: pytest.fail("a server ran"))
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"arrival_s": 1, "prompt": {prompt}, "output_tokens": {output}}}\n'
                            for prompt, output in ((9, 4), (9, 29))))
    assert command("--trace", str(path), "--slots", "35", "--max-model-len", "64", *arguments) == 2
    prompt, output, line = (9, 4, 1) if row == "server max" else (9, 29, 2)
    assert capsys.readouterr().err == (
        f"simulate: error: {path}, line {line}: {prompt} prompt and {output} output tokens need {needed} slots, "
        f"and a request can have at most {room} ({row}): raise --slots\n")


def test_on_a_terminal_progress_says_how_much_is_done_and_how_long_the_rest_will_take() -> None:
    status, written = in_terminal("-m", "nanopaged.simulate", "--requests", "300")
    lines = re.findall(r"\x1b\[K(\w+): [\d,]+ of 300 requests; all: (\d+)% done(, about \d+ s left)?(?=\r)", written)
    shares = [int(share) for _, share, _ in lines]
    assert status == 0 and shares == sorted(shares) and shares[-1] > 75 and len(set(shares)) > 8
    assert list(dict.fromkeys(server for server, _, _ in lines)) == ["paged", "max", "pow2", "oracle"]
    assert all(left for _, share, left in lines if share != "0")
    assert re.search(r"left\r\x1b\[K300 requests in ", written), "the line is cleared before the results"


def test_a_random_request_that_can_never_fit_is_numbered(capsys: pytest.CaptureFixture) -> None:
    assert command("--slots", "2040") == 2
    assert "request 1: " in capsys.readouterr().err, "for max every request is as long as the context"


def test_a_request_that_just_fits_is_served(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 24}\n')  # 32 slots: the last token takes none
    assert command("--trace", str(path), "--slots", "32", "--max-model-len", "33") == 0


@pytest.mark.parametrize("option, others", [
    (["--trace", "a"], ["--dataset", "alpaca"]), (["--trace", "a"], ["--requests", "2000"]),
    (["--trace", "a"], ["--rate", "0.8"]), (["--trace", "a"], ["--shared-prefix", "0"]),
    (["--trace", "a"], ["--seed", "0"]), (["--sweep", "pool"], ["--servers", "paged"]),
    (["--sweep", "pool"], ["--contiguous", "buddy"]), (["--sweep", "block-size"], ["--block-size", "16"]),
    (["--sweep", "pool"], ["--record", "a"])])
def test_an_option_without_effect_beside_another_is_refused(option: list[str], others: list[str],
                                                              capsys: pytest.CaptureFixture) -> None:
    assert command(*option, *others) == 2
    message = f"{others[0]} would have no effect beside {option[0]}"
    error = capsys.readouterr().err
    assert message in error and "give one or the other" in error


def test_the_written_arguments_are_those_that_were_used(tmp_path: Path) -> None:
    path, trace = tmp_path / "figures.json", tmp_path / "trace"
    assert command("--requests", "3", "--json", str(path)) == 0
    used = {"dataset": "sharegpt", "requests": 3, "rate": 0.8, "shared_prefix": 0.0, "seed": 0, "block_size": 16,
            "servers": ["paged", "max", "pow2", "oracle"], "contiguous": "first-fit"}
    assert used.items() <= json.loads(path.read_text())["arguments"].items()
    trace.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 4}\n')
    assert command("--trace", str(trace), "--json", str(path)) == 0
    written = json.loads(path.read_text())["arguments"]
    assert written["dataset"] is written["seed"] is written["requests"] is None, "they had no effect"


def test_shares_are_of_the_same_memory_if_blocks_do_not_fill_it(tmp_path: Path) -> None:
    """100 slots are six blocks of 16, and four slots. One of the blocks holds 9 tokens; the others are free."""
    path, trace = tmp_path / "figures.json", tmp_path / "trace"
    trace.write_text('{"arrival_s": 1, "prompt": 9, "output_tokens": 1}\n')
    assert command("--trace", str(trace), "--slots", "100", "--servers", "paged", "oracle", "--json", str(path)) == 0
    memory = {name: result["memory"] for name, result in json.loads(path.read_text())["figures"]["results"].items()}
    assert memory["paged"] == pytest.approx(dict(tokens=0.09, reserved=0, internal=0.07 + 0.04, external=0, free=0.8))
    assert memory["oracle"] == pytest.approx(dict(tokens=0.09, reserved=0, internal=0, external=0, free=0.91))


def test_buddies_waste_more_than_first_fit(tmp_path: Path) -> None:
    tokens = []
    for contiguous in ("first-fit", "buddy"):
        path = tmp_path / contiguous
        assert command(*SMALL, "--slots", "500", "--servers", "oracle", "--contiguous", contiguous,
                       "--json", str(path)) == 0
        tokens.append(json.loads(path.read_text())["figures"]["results"]["oracle"]["memory"]["tokens"])
    assert tokens[0] > 1.1 * tokens[1]


@pytest.mark.parametrize("before", [None, "figures of another run"])
def test_a_run_that_fails_leaves_the_file_of_figures_as_it_was(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    if before:
        path.write_text(before)
    assert command("--slots", "0", "--json", str(path)) == 2
    assert (path.read_text() if path.exists() else None) == before


OWN_POLICIES = """
number = 3

def longest_first(request):
    return -request.params.max_tokens

def shortest_first(request):
    return request.params.max_tokens

def in_full(context):
    return context.committed + context.full <= context.pool

def never(context):
    return False

def forgets(subject):
    pass

def says_yes(context):
    return "yes"

def infinite(request):
    return float("inf")

def raises(subject):
    return subject.no_such_field
"""


@pytest.fixture
def own_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `OWN_POLICIES` importable, as mine."""
    (tmp_path / "mine.py").write_text(OWN_POLICIES)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def figures(path: Path, *arguments: str) -> dict[str, dict[str, object]]:
    """By server."""
    assert command(*SMALL, "--json", str(path), *arguments) == 0
    return json.loads(path.read_text())["figures"]["results"]


@pytest.mark.policy
@pytest.mark.parametrize("option, default, name, own, servers", [
    ("--admission", "watermark", "reserve", "mine:in_full", {"paged"}),
    ("--order", "fcfs", "shortest", "mine:shortest_first", {"paged", "max", "pow2", "oracle"})])
def test_an_own_policy_does_what_the_same_policy_by_name_does(
        option: str, default: str, name: str, own: str, servers: set[str], tmp_path: Path, own_policies: None) -> None:
    """And a policy makes a difference to the servers that it is for, and to no others."""
    path = tmp_path / "figures.json"
    by_default, by_name, by_function = (figures(path, "--slots", "600", option, text) for text in (default, name, own))
    assert by_name == by_function
    assert {server for server in by_default if by_default[server] != by_name[server]} == servers
    assert json.loads(path.read_text())["arguments"][option.removeprefix("--")] == own


@pytest.mark.parametrize("option, own, message", [
    ("--order", "fastest", "--order must be one of fcfs, priority, shortest, or module:function, got 'fastest'"),
    ("--admission", "all", "--admission must be one of watermark, reserve, greedy, or module:function, got 'all'"),
    ("--order", "no_such_module:f", "--order no_such_module:f: cannot import 'no_such_module': ModuleNotFoundError: "
     "No module named 'no_such_module'"),
    ("--order", "broken:f", "--order broken:f: cannot import 'broken': SyntaxError: "),
    ("--order", ":f", "cannot import ''"),
    ("--admission", "mine:no_such", "--admission mine:no_such: the module 'mine' has no function 'no_such'"),
    ("--order", "mine:", "the module 'mine' has no function ''"),
    ("--admission", "mine:number", "--admission mine:number must be a function, got 3 (int)"),
    ("--order", "mine:forgets", "what --order mine:forgets returns must be a number, got None (NoneType)"),
    ("--order", "mine:never", "what --order mine:never returns must be a number, got False (bool)"),
    ("--order", "mine:infinite", "what --order mine:infinite returns must be finite, got inf"),
    ("--admission", "mine:forgets", "what --admission mine:forgets returns must be a bool, got None (NoneType)"),
    ("--admission", "mine:says_yes", "what --admission mine:says_yes returns must be a bool, got 'yes' (str)"),
    ("--order", "mine:raises", "the order policy raised AttributeError"),
    ("--order", "mine:raises", "whose fields are request_id"),
    ("--admission", "mine:raises", "has no attribute 'no_such_field'"),
    ("--admission", "mine:raises", "fields are pool, available, committed, chunk, prompt, full"),
    ("--admission", "mine:never", "the admission policy refuses it even in an empty pool")])
def test_a_mistake_in_an_own_policy_gets_one_clear_line_and_status_2(
        option: str, own: str, message: str, own_policies: None, capsys: pytest.CaptureFixture) -> None:
    assert command(*SMALL, option, own) == 2
    error = capsys.readouterr().err
    assert error.startswith("simulate: error: ") and message in error and error.count("\n") == 1
    assert "what" not in message or error.startswith("simulate: error: what")


def test_a_swap_space_is_given_to_the_paged_server(tmp_path: Path) -> None:
    path, tight = tmp_path / "figures.json", ("--servers", "paged", "--slots", "600", "--admission", "greedy")
    assert figures(path, *tight)["paged"]["goodput"] < 1
    result = figures(path, *tight, "--swap-blocks", "500")["paged"]
    assert result["goodput"] == 1 and result["counts"]["swapped_in_tokens"] > 0


@pytest.mark.parametrize("servers", [(), ("--servers", "oracle", "paged")])
def test_a_recording_of_the_paged_server_gives_its_figures_at_simulated_times(
        servers: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reading = pytest.importorskip("nanopaged.show.reading")
    replay = pytest.importorskip("nanopaged.show.replay")
    plain = figures(tmp_path / "figures.json", *servers)["paged"]
    printed = capsys.readouterr().out
    path = tmp_path / "run.jsonl"
    recorded = figures(tmp_path / "figures.json", *servers, "--record", str(path))["paged"]
    assert recorded == plain, "recording changes nothing"
    assert re.sub(r"Simulated in .*", "", capsys.readouterr().out) == re.sub(r"Simulated in .*", "", printed)
    lines = list(reading.read(str(path)))
    state = replay.State(lines[0])
    for frame in replay.frames(lines[1:]):
        for event in frame.events:
            state.apply(event)
    counts = plain["counts"]
    assert counts == {name: state.figures()[name] for name in counts} and counts["num_finished"] == 40
    assert lines[0]["text"] is False
    seconds = sum(sum(line["seconds"]) for line in lines if line.get("recorded"))
    assert 0.3 * plain["simulated_s"] < seconds <= 1.001 * plain["simulated_s"]


def test_a_recording_of_servers_that_do_not_page_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    assert command(*SMALL, "--servers", "max", "oracle", "--record", str(path)) == 2
    assert capsys.readouterr().err == ("simulate: error: --record writes what the paged server does, and --servers has "
                                       "only max, oracle: add paged\n")
    assert not path.exists()


def test_a_recording_that_cannot_be_written_is_refused_before_anything_is_simulated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("nanopaged.show.recording")
    monkeypatch.setattr(command_line, "simulate", lambda *args: pytest.fail("a server ran"))
    path = tmp_path / "no such folder" / "run.jsonl"
    assert command(*SMALL, "--servers", "max", "paged", "--record", str(path)) == 2
    error = capsys.readouterr().err
    assert "No such file" in error and str(path) in error and error.count("\n") == 1


def test_an_own_policy_is_found_in_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_POLICIES)
    done = as_module(*SMALL, "--order", "mine:longest_first", directory=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "| paged " in done.stdout
    (tmp_path / "mine.py").unlink()
    done = as_module(*SMALL, "--order", "mine:longest_first", directory=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No module named 'mine'" in done.stderr


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_without_the_folder_pressure_one_line_says_that_it_is_needed(left: str, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "pressure")
    shutil.copytree(ROOT / "nanopaged", tmp_path / "nanopaged", ignore=left_out)
    if left == "an empty folder":
        (tmp_path / "nanopaged" / "pressure").mkdir()
    done = as_module(*SMALL, directory=tmp_path, package=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("python -m nanopaged.simulate: error: this needs the folder nanopaged/pressure/, which is "
                           "missing: restore it\n")


def test_without_the_folder_show_it_runs_and_only_a_recording_is_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nanopaged", tmp_path / "nanopaged", ignore=shutil.ignore_patterns("__pycache__", "show"))
    done = as_module(*SMALL, directory=tmp_path, package=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "| paged " in done.stdout
    done = as_module(*SMALL, "--record", "run.jsonl", directory=tmp_path, package=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "run.jsonl").exists()
    assert done.stderr == ("python -m nanopaged.simulate: error: --record needs the folder nanopaged/show/, which is "
                           "missing: restore it\n")


def test_it_runs_without_torch() -> None:
    code = ("import runpy, sys; sys.modules['torch'] = sys.modules['numpy'] = None; "
            "runpy.run_module('nanopaged.simulate', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--swap-blocks", "9"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "") and "| paged " in done.stdout


def test_it_runs_as_a_module_and_logs_no_storms(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    done = as_module(*SMALL, "--slots", "600", "--admission", "greedy", "--json", str(path))
    assert done.returncode == 0 and "| paged " in done.stdout
    assert json.loads(path.read_text())["figures"]["results"]["paged"]["num_storms"] > 0
    assert done.stderr == "", "no storm is logged, and no progress is shown without a terminal"


def test_its_help_names_every_policy_and_how_to_give_an_own_one() -> None:
    done = as_module("--help")
    assert done.returncode == 0
    for name in (*command_line.ORDERS, *command_line.ADMISSIONS, "module:function", "--order mine:longest_first"):
        assert name in done.stdout
