"""The demonstration, run as a user runs it: as a process."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import train_free_demo
from tests.processes import run_python

from nanopaged.show import movie, scenes

DEMO = Path(train_free_demo.__file__)


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return run_python(DEMO, *arguments, environment=environment)


def test_with_no_arguments_every_continuation_matches_and_sharing_mattered() -> None:
    result = run_demo()
    assert result.returncode == 0, result.stderr
    assert "32/32 continuations match the document" in result.stdout

    def figure(name: str) -> int:
        return int(re.search(rf"^ *{name} +(\d+)", result.stdout, re.MULTILINE)[1])

    assert figure("prompt tokens computed") * 10 < figure("prompt tokens asked for")
    assert figure("peak blocks used") * 10 < figure("contiguous reservation")
    assert figure("preemptions") > 0
    used, copies, paging = map(int, re.search(r"saved, of these +(\d+) by sharing, (\d+) by paging; (\d+) were used",
                                              result.stdout).groups())
    assert used + copies + paging == figure("contiguous reservation") and used > 10 * copies
    assert re.search(r"longest reservation +256 blocks \(4096 tokens\) .*: the pool has room for none\n", result.stdout)
    lines = re.findall(r"^step (\d+): (.*)", result.stdout, re.MULTILINE)
    assert 12 <= len(lines) <= 25 and len(set(lines)) == len(lines), "few lines, and different ones"
    assert sum("arrived" in line for _, line in lines) > 5, "some were to arrive while others run"
    assert any("gave way, as the pool was full: request" in line for _, line in lines)
    assert "0 running, 0 waiting" in lines[-1][1] and "done: " in lines[-1][1]


def test_a_wrong_continuation_is_reported_and_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    jobs = train_free_demo.storm_jobs(3, 8, seed=0)  # their prompts are short
    jobs[1].expected = "nonsense"
    monkeypatch.setitem(train_free_demo.WORKLOADS, "story", (lambda *_: jobs, 3, 200, 8))
    assert train_free_demo.main(["--device", "cpu"]) == 1
    assert "2/3 continuations match" in capsys.readouterr().out


def test_prompts_of_ones_own_are_continued() -> None:
    result = run_demo("--prompt", "one two three, one two", "--prompt", "abcabcabc", "--max-tokens", "6",
                      "--block-size", "8", "--num-blocks", "20", "--device", "cpu", "--attention", "torch",
                      "--temperature", "0.1", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert "one two three, one two three\n" in result.stdout.replace(", one two three, ", ", one two three\n")
    assert "abcabcabcabcabc" in result.stdout
    assert re.search(r"tokens generated +12\b", result.stdout)
    assert re.search(r"peak blocks used +\d+ of 20", result.stdout)


@pytest.mark.parametrize("arguments, words", [
    (["--num-blocks", "20"], "can never fit"),
    (["--block-size", "12"], "power of two"),
    (["--max-tokens", "0"], "max_tokens must be at least 1"),
    (["--max-tokens", "121"], "at most 120 where the answer is to be checked"),
    (["--workload", "none"], "invalid choice: 'none'"),
    (["--admission", "none"], "admission must be one of"),
    (["--preemption", "none"], "preemption must be one of"),
    (["--swap-blocks", "-1"], "swap_blocks must be at least 1"),
    (["--max-tokens", "many"], "invalid int value"),
    (["--temperature", "nan"], "temperature must be finite"),
    (["--model", "nonsense"], "unknown model 'nonsense'"),
    (["--attention", "magic"], "attention must be one of"),
    (["--device", "cuda:77"], "CUDA devices"),
    (["--prompt", ""], "the prompt is empty"),
    (["--no-text"], "--no-text has no effect without --record, --movie or --trace"),
])
def test_a_wrong_argument_gets_one_clear_line_and_status_2(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_free_demo.main(arguments)
    assert exit_info.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in last_line


def test_the_storm_workload_storms_when_greedy_and_not_when_room_is_reserved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(train_free_demo.WORKLOADS, "storm", (train_free_demo.storm_jobs, 4, 8, 40))
    for admission, stormy in (("greedy", True), ("reserve", False)):
        caplog.clear()
        assert train_free_demo.main(["--workload", "storm", "--admission", admission, "--device", "cpu"]) == 0
        storms = int(re.search(r"eviction storms +(\d+)\n", capsys.readouterr().out)[1])
        assert len(caplog.records) == storms and (storms > 0) == stormy


def test_a_movie_has_the_scenes_and_then_the_run_and_a_recording_and_a_trace_of_it_are_kept_too(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("pool.html", "run.jsonl", "run.json")]
    result = run_demo("--movie", names[0], "--record", names[1], "--trace", names[2], "--requests", "4")
    assert result.returncode == 0, result.stderr
    assert "4/4 continuations match the document" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.endswith(" bytes")] == [
        f"{name}: {os.path.getsize(name):,} bytes" for name in (names[1], names[0], names[2])]
    assert "WARNING" not in result.stderr, "the storm of a scene is not this run's"
    html = (tmp_path / "pool.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 1_000_000
    scenes = json.loads(html.partition('id="data">')[2].partition("</script")[0])["scenes"]
    assert [scene["kind"] for scene in scenes] == ["pool", "pool", "twin", "pool", "pool", "pool", "pool", "pool"]
    assert (scenes[-1]["title"], scenes[-1]["num_blocks"]) == ("the story", 200)
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    steps = int(re.search(r"requests +4, in (\d+) steps", result.stdout)[1])
    assert sum('"step":' in line for line in (tmp_path / "run.jsonl").read_text().splitlines()) == steps


def test_without_text_nothing_of_a_prompt_is_kept(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("pool.html", "run.jsonl")]
    prompt = "Xyzzy says the wizard. Xyzzy says"
    result = run_demo("--prompt", prompt, "--max-tokens", "8", "--device", "cpu", "--record", names[1], "--no-text")
    assert result.returncode == 0, result.stderr
    assert "wizard" in result.stdout
    recording = (tmp_path / "run.jsonl").read_text()
    assert "wizard" not in recording and str(list(prompt[:6].encode()))[1:-1].replace(" ", "") not in recording


def test_a_scene_that_goes_wrong_is_reported_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    arrival = scenes.SCENES[1].arrivals[1]._replace(expected=("nonsense",))
    monkeypatch.setattr(scenes, "SCENES", [dataclasses.replace(scenes.SCENES[1], arrivals=[arrival])])
    assert train_free_demo.main(["--device", "cpu", "--workload", "storm", "--requests", "1", "--max-tokens", "2",
                                 "--movie", str(tmp_path / "pool.html")]) == 1
    written = capsys.readouterr().out
    assert "scene 1 (two lengths): request 0 went wrong" in written and "1/1 continuations match" in written


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(capsys: pytest.CaptureFixture) -> None:
    for option in ("--trace", "--movie", "--record"):
        with pytest.raises(SystemExit) as exit_info:
            train_free_demo.main(["--device", "cpu", option, "missing/folder/file"])
        assert exit_info.value.code == 2 and "missing/folder/file" in capsys.readouterr().err.splitlines()[-1]


def test_a_page_that_would_be_too_large_is_named_after_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(movie, "MOST_FRAMES", 3)
    assert train_free_demo.main(["--device", "cpu", "--prompt", "one two three, one two", "--max-tokens", "4",
                                 "--movie", str(tmp_path / "pool.html")]) == 1
    written = capsys.readouterr().out
    assert "tokens generated  4" in written and "too many for a page" in written and "--record FILE" in written


def test_help_names_every_option() -> None:
    result = run_demo("--help")
    assert result.returncode == 0
    for option in ("--model", "--prompt", "--max-tokens", "--num-blocks", "--block-size", "--device", "--attention",
                   "--temperature", "--seed", "--workload", "--requests", "--admission", "--watermark", "--preemption",
                   "--swap-blocks", "--max-num-seqs", "--movie", "--record", "--trace", "--no-text"):
        assert option in result.stdout
