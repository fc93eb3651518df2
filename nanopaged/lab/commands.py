"""What do the commands print? One function for each; it returns the exit status."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from nanopaged.lab import bugs, labs
from nanopaged.lab import hunt as hunting
from nanopaged.lab.at_commit import check_elsewhere
from nanopaged.lab.bodies import Body
from nanopaged.lab.check import PartResult, check_part
from nanopaged.lab.isolation import CHECKOUT
from nanopaged.lab.labs import Lab
from nanopaged.lab.prove import check_planted, proofs_of
from nanopaged.lab.scenario import play
from nanopaged.lab.workspace import Workspace
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.validation import has_folder, require_int

COMMAND = "python -m nanopaged.lab"


def overview(args: argparse.Namespace) -> int:
    for lab in labs.every():
        print(f"{lab.name:<10} {lab.title} ({lab.hours} hours, an estimate; {len(lab.parts)} parts)")
        print(textwrap.fill(f"You learn {lab.learns}.", 100, initial_indent=" " * 11, subsequent_indent=" " * 11))
    print(f"{'hunt':<10} Write tests that find planted bugs (4 to 8 hours, an estimate)")
    print(f"\n{COMMAND} start LAB DIR    begins one; --help shows all commands")
    return 0


def start(args: argparse.Namespace) -> int:
    workspace = Workspace.start(args.lab, args.folder)
    task = "write tests" if args.lab == "hunt" else "write the functions that raise NotImplementedError"
    print(f"{workspace.folder} is ready: read its README.md, {task}, then\n    {COMMAND} check {args.folder}")
    if workspace.state["commit"] is None:
        print("This checkout is no commit's, so the workspace will be checked by whatever the checkout is by then.")
    return 0


def check(args: argparse.Namespace) -> int:
    workspace = Workspace(args.folder)
    if args.json:
        args.json.write_text(json.dumps({"score": 0, "output": "the check did not end"}) + "\n", encoding="utf-8")
    if (status := check_elsewhere(workspace, args)) is not None:
        return status
    if workspace.name == "hunt":
        if args.part is not None:
            raise ValueError("the hunt has no parts: name a lab with --lab to try its bugs alone")
        return _check_hunt(workspace, args.lab, args.json)
    results: list[PartResult] = []
    for result in _results(workspace, _chosen(workspace, args.lab, args.part), args.part, args.seed):
        _print_result(workspace, result, results)
        results.append(result)
    if args.json:
        args.json.write_text(json.dumps(gradescope(results), indent=1) + "\n", encoding="utf-8")
    held = sum(result.holds for result in results)
    if len(results) > 1:
        print(f"\n{held} of {len(results)} parts hold.")
    if held == len(results) == sum(len(lab.parts) for lab in workspace.labs):
        print(f"{COMMAND} diff {args.folder} shows the source's solution beside yours.")
    return int(held < len(results))


def _chosen(workspace: Workspace, name: str | None, part: int | None) -> list[Lab]:
    """The labs of a workspace that were asked for. Raises ValueError if there is none, or no such part."""
    chosen = [lab for lab in workspace.labs if name in (None, lab.name)]
    if workspace.name == "hunt":
        raise ValueError("the hunt has nothing but `check`: no hints, no scenario, and no solution to compare with")
    if not chosen:
        raise ValueError(f"this workspace is of the lab {workspace.name}" + (f", not of {name}" if name else ""))
    if part is not None:
        if len(chosen) > 1:
            raise ValueError("this workspace has all labs: name one with --lab")
        require_int("PART", part, 1, len(chosen[0].parts))
    return chosen


def _results(workspace: Workspace, chosen: list[Lab], part: int | None = None, seed: int = 0) -> Iterator[PartResult]:
    for lab in chosen:
        for number in [part] if part else range(1, len(lab.parts) + 1):
            show_progress(f"checking {lab.name}, part {number}")
            result = check_part(workspace.folder, lab, number, seed)
            show_progress("")
            yield result


def _print_result(workspace: Workspace, result: PartResult, before: list[PartResult]) -> None:
    """Of what fails in a part, the first thing; a package that cannot be imported is told once."""
    held = sum(verdict.holds for verdict in result.verdicts)
    failure = result.first_failure
    if result.cannot_be_imported:
        state = failure.message
        if any(other.first_failure and other.first_failure.message == state for other in before):
            state = "the same"
    elif result.not_written:
        names = [Body.of(name).function for name in labs.get(result.lab).parts[result.number - 1].bodies
                 if workspace.is_blank(name)]
        state = f"not written yet: {', '.join(names) or 'what earlier parts ask for'}"
    else:
        state = "holds" if failure is None else f"{held} of {len(result.verdicts)} checks hold"
    print(f"{result.lab}, part {result.number}: {result.asks}: {state}", flush=True)
    if failure and not result.cannot_be_imported and not result.not_written:
        print(textwrap.indent(f"does not hold: {failure.words}\n{failure.message}", "    "))
        if failure.printed:
            print(textwrap.indent(f"the code printed (the end of it):\n{failure.printed}", "    "))
    for note in filter(None, [verdict.note for verdict in result.verdicts]):
        print(textwrap.indent(note, "    "))


def gradescope(results: list[PartResult]) -> dict[str, object]:
    """As Gradescope reads it: each check is a test, and all weigh the same; together they are 100 points."""
    verdicts = [(result, verdict) for result in results for verdict in result.verdicts]
    points = 100 / len(verdicts)
    tests = [{"name": f"{result.lab}, part {result.number}: {verdict.words}", "score": points * verdict.holds,
              "max_score": points, "status": "passed" if verdict.holds else "failed", "output": verdict.message}
             for result, verdict in verdicts]
    return {"score": round(points * sum(verdict.holds for _, verdict in verdicts), 2), "tests": tests,
            "extra_data": {"lab": results[0].lab, "held": sum(result.holds for result in results),
                           "parts": len(results)}}


def _check_hunt(workspace: Workspace, lab: str | None, file: Path | None) -> int:
    found = hunting.hunt(workspace.folder, show_progress, lab)
    show_progress("")
    for solution, complaint in found.right.items():
        print(f"{solution}: {'the tests pass' if not complaint else 'the tests fail, and must not'}")
        if complaint:
            print(textwrap.indent(complaint, "    "))
    killed, total = found.score
    if found.is_fair:
        print(f"\nkilled: {killed} of {total} bugs")
        for name, dead in found.killed.items():
            alive = ", ".join(str(number) for number, is_dead in enumerate(dead, 1) if not is_dead)
            print(f"    {name:<10} {sum(dead):>2} of {len(dead)}" + (f"; alive: {alive}" if alive else ""))
    else:
        print("\nNo bug counts: first the tests must pass on every right solution, each time.")
    if file:
        unfair = "\n".join(f"{solution}: {complaint}" for solution, complaint in found.right.items() if complaint)
        tests = [{"name": f"{name}, bug {number}", "score": 100 / total * is_dead, "max_score": 100 / total}
                 for name, dead in found.killed.items() for number, is_dead in enumerate(dead, 1)]
        results = {"score": round(100 * killed / total, 2), "output": unfair, "tests": tests,
                   "extra_data": {"lab": "hunt", "held": int(found.is_fair), "parts": 1}}
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(killed < total)


def see(args: argparse.Namespace) -> int:
    if not has_folder("show"):
        raise ValueError("this needs the folder nanopaged/show/, which is missing: restore it")
    from nanopaged.show.movie import page, pool_scene

    workspace = Workspace(args.folder)
    scenes, failed = [], False
    with TemporaryDirectory() as scratch:
        for lab in _chosen(workspace, None, None):
            recording = Path(scratch) / f"{lab.name}.jsonl"
            seen = play(workspace.folder, lab.scenario, recording)
            for request, text in seen.get("texts", {}).items():
                print(f"{lab.name}, request {request}: {text!r}")
            if seen["printed"]:
                print(f"{lab.name}: the code printed (the end of it):\n{textwrap.indent(seen['printed'], '    ')}")
            if seen["error"]:
                print(f"{lab.name}: it did not get to its end: {seen['error']}")
                failed = True
            if recording.exists() and recording.stat().st_size:
                scenes.append(pool_scene(str(recording), lab.title, lab.scenario.watch))
    if scenes:
        file = workspace.folder / "see.html"
        file.write_text(page(scenes, f"Lab {workspace.name}"), encoding="utf-8")
        print(f"{file}: open it in a browser. {' '.join(lab.scenario.watch for lab in workspace.labs)}")
    return int(failed)


def hint(args: argparse.Namespace) -> int:
    workspace = Workspace(args.folder)
    chosen = _chosen(workspace, args.lab, args.part)
    if args.part is not None:
        print(workspace.next_hint(chosen[0], args.part))
    elif failing := next((result for result in _results(workspace, chosen) if not result.holds), None):
        print(workspace.next_hint(labs.get(failing.lab), failing.number))
    else:
        print("Every part holds: no hint is needed.")
    return 0


def diff(args: argparse.Namespace) -> int:
    workspace = Workspace(args.folder)
    results = _results(workspace, _chosen(workspace, None, None))
    if failing := next((result for result in results if not result.holds), None):
        raise ValueError(f"{failing.lab}, part {failing.number} does not hold yet: the source is shown when the lab "
                         "passes")
    print(workspace.diff() or "The functions are the source's, to the letter.")
    return 0


def grade(args: argparse.Namespace) -> int:
    folders = sorted(path for path in args.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{args.folder} has no folders: it should have one for each student, with a workspace in it")
    with open(args.csv, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["folder", "lab", "score", "parts that hold", "parts", "first failure"])
        for number, folder in enumerate(folders, 1):
            show_progress(f"{number} of {len(folders)}: {folder.name}")
            rows.writerow([folder.name, *_graded(folder)])
            file.flush()
    show_progress("")
    print(f"{len(folders)} folders graded: {args.csv}")
    return 0


def _graded(folder: Path) -> list[object]:
    """By `check` in a process of its own, which also finds the commit that the workspace came from."""
    found = [path.parent for path in (folder / ".lab.json", *sorted(folder.glob("*/.lab.json"))) if path.exists()]
    if not found:
        return ["", 0, 0, 0, "there is no workspace in it"]
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "results.json"
        command = [sys.executable, "-m", "nanopaged.lab", "check", str(found[0].resolve()), "--json", str(file)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, errors="replace", check=False)
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "extra_data" not in results:
        return ["", 0, 0, 0, (done.stderr.strip().splitlines() or ["it could not be checked"])[-1]]
    first = results.get("output", "") or next((test["name"] for test in results["tests"] if not test["score"]), "")
    extra = results["extra_data"]
    return [extra["lab"], results["score"], extra["held"], extra["parts"], first]


def bug(args: argparse.Namespace) -> int:
    if args.name is None:
        for lab, planted in bugs.every_bug():
            if args.lab in (None, lab):
                print(f"{planted.name} ({lab}, part {planted.part})")
                print(textwrap.fill(planted.symptom, 110, initial_indent="    ", subsequent_indent="    "))
        return 0
    lab_name, planted = bugs.named(args.name)
    lab = labs.get(lab_name)
    print(textwrap.fill(f"{planted.name} (lab {lab_name}, part {planted.part}). {planted.story}", 110))
    print(textwrap.fill(f"Symptom: {planted.symptom}", 110))
    for file, old, new in planted.changes:
        print("\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), file, file, lineterm="", n=0)))
    scenario = planted.scenario or lab.scenario
    with TemporaryDirectory() as scratch:
        folder = bugs.variant(Path(scratch).resolve())
        right = play(folder, scenario)
        bugs.plant(planted, folder)
        wrong = play(folder, scenario)
    print("\nThe same requests, on the source and on the bug:\n" + table(["", "source", "bug"], _beside(right, wrong)))
    caught = check_planted(lab, planted).first_failure
    print(f"\nCaught by part {planted.part}: {caught.words}\n{textwrap.indent(caught.message, '    ')}" if caught
          else f"\nNot caught: part {planted.part} holds.")
    return int(caught is None)


def _beside(right: dict[str, object], wrong: dict[str, object]) -> list[list[object]]:
    rows = [["steps", "steps"], ["tokens computed", "computed"], ["of them again", "recomputed"],
            ["tokens found in the pool", "found"], ["preemptions", "preemptions"], ["blocks held at the end", "held"],
            ["blocks shared at the end", "shared"], ["slots filled at the end", "filled"],
            ["order of finishing", "order"], ["error", "error"]]
    cells = [[title, _cell(right.get(key)), _cell(wrong.get(key))] for title, key in rows]
    texts = [right.get("texts", {}), wrong.get("texts", {})]
    return cells + [[f"text of request {request}", *(_cell(repr(text.get(request, ""))) for text in texts)]
                    for request in sorted({*texts[0], *texts[1]}, key=int)]


def _cell(value: object) -> str:
    text = " ".join(value) if isinstance(value, list) else "" if value is None else str(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def prove(args: argparse.Namespace) -> int:
    require_int("--seeds", args.seeds, 1)
    wrong = total = 0
    for name in args.lab or labs.NAMES:
        lab = labs.get(name)
        number = 0
        for number, proof in enumerate(proofs_of(lab, range(args.seeds)), 1):
            show_progress(f"{number}: {proof.what}")
            if proof.wrong:
                show_progress("")
                print(f"wrong: {proof.what}: {proof.wrong}", flush=True)
                wrong += 1
        show_progress("")
        print(f"{name}: {number} proofs", flush=True)
        total += number
    print(f"{total - wrong} of {total} proofs are as they should be.")
    return int(wrong > 0)
