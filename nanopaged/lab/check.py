"""Does a part hold? Runs its checks on a package, and says of the first that fails what was expected.

A part is checked with the student's bodies of this part and the parts before it. What later parts ask for, and is not
written yet, is lent from the source: so each part can be checked as soon as it is written.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from nanopaged.lab import labs
from nanopaged.lab.bodies import BLANK, Body, lend
from nanopaged.lab.grading import Check, checks_of
from nanopaged.lab.isolation import Outcome, Report, imported_from_elsewhere, isolated
from nanopaged.lab.labs import Lab
from nanopaged.lab.workspace import PACKAGE, is_blank_in

STARTING = 30.0  # seconds for imports
MESSAGE = 4000  # characters that are shown of a message
NOT_TRIED = "not tried: the check before it did not end"
NO_IMPORT = "the package cannot be imported: "


@dataclass(frozen=True)
class Verdict:
    words: str  # what should hold
    holds: bool
    message: str = ""  # what was expected, and what was done
    printed: str = ""  # the end of what the code printed meanwhile
    note: str = ""  # what was found out besides


@dataclass(frozen=True)
class PartResult:
    lab: str
    number: int
    asks: str
    verdicts: list[Verdict]

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def first_failure(self) -> Verdict | None:
        return next((verdict for verdict in self.verdicts if not verdict.holds), None)

    @property
    def cannot_be_imported(self) -> bool:
        return all(verdict.message.startswith(NO_IMPORT) for verdict in self.verdicts)

    @property
    def not_written(self) -> bool:  # and so fails, in every check
        return all(BLANK.search(verdict.message) for verdict in self.verdicts)


def check_part(folder: Path, lab: Lab, number: int, seed: int = 0) -> PartResult:
    """Part `number` of a lab, of the package in `folder`."""
    if lab.needs_torch:
        choose_how_kernels_run()
    wanted = checks_of(lab.name, number)
    limit = STARTING + sum(check.seconds for check in wanted)
    outcome = isolated(lambda report: _run(report, folder, lab, number, seed, wanted), folder, limit)
    reported = {str(result["words"]): result for result in outcome.results}
    verdicts: list[Verdict] = []
    ended = ""
    for check in wanted:
        if result := reported.get(check.words):
            verdicts.append(Verdict(check.words, result["holds"] is True, *(
                str(result.get(key, "")) for key in ("message", "printed", "note"))))
        elif ended:
            verdicts.append(Verdict(check.words, False, NOT_TRIED))
        else:
            ended = _why_not_reported(outcome, check)
            verdicts.append(Verdict(check.words, False, ended, outcome.printed))
    return PartResult(lab.name, number, lab.parts[number - 1].asks, verdicts)


def _why_not_reported(outcome: Outcome, check: Check) -> str:
    if outcome.stands:
        return f"the code was still running after {check.seconds:.0f} s; it stood at {outcome.stands}"
    return f"the process {outcome.status} before this was checked"


def _run(report: Report, folder: Path, lab: Lab, number: int, seed: int, wanted: list[Check]) -> None:
    """In the process of its own: reports each of the checks that are wanted."""
    if lab.needs_torch:
        import torch

        torch.set_num_threads(1)  # the threads that a fork's parent had are not there
    printed = sys.stdout  # which the code may replace
    grading_here = importlib.import_module("nanopaged.lab.grading")  # the grader's, which is another than ours
    grading_here.seed = seed
    try:
        _lend_the_rest(folder, lab, number)
        checks = grading_here.checks_of(lab.name, number)
        if strangers := imported_from_elsewhere(folder):
            raise ImportError(f"these modules are not the workspace's own: {', '.join(strangers)}")
    except BaseException as error:
        for check in wanted:
            report(words=check.words, holds=False, message=f"{NO_IMPORT}{_words(error, folder)}")
        return
    for check in checks:
        report.allow(check.seconds)
        grading_here.begin()
        grading_here.notes.clear()
        printed.tail = message = ""
        try:
            check.run()
        except BaseException as error:  # SystemExit too: whatever it was, the check did not hold
            try:
                message = _failure(error, folder, grading_here)[:MESSAGE]
            except BaseException:  # whose text raises
                message = f"it raised {type(error).__name__}, which cannot be shown"
        report(words=check.words, holds=not message, message=message, printed=printed.tail.strip(),
               note="\n".join(grading_here.notes))


def choose_how_kernels_run() -> None:
    """Before any grader imports Triton, which reads this once: a fork has what its parent has."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch's other way to look for a GPU makes it unusable in forks
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _lend_the_rest(folder: Path, lab: Lab, number: int) -> None:
    """Whatever neither this part nor those before it ask for, and is not written; of other labs too."""
    own = lab.bodies(1, number)
    rest = [name for each in labs.every() for name in each.bodies() if name not in own and not each.launchers]
    for name in rest:  # what launches a kernel raises until it is written, so a lent kernel would not run
        if is_blank_in(folder, name):
            body = Body.of(name)
            path = PACKAGE / body.file
            lend(importlib.import_module(f"nanopaged.{body.module}"), path.read_text(encoding="utf-8"), body.function,
                 str(path))


def _failure(error: BaseException, folder: Path, grading_here: object) -> str:
    told = grading_here.told_lines()
    done = "\nwhat was done:\n" + "\n".join(f"    {line}" for line in told) if told else ""
    if isinstance(error, grading_here.Failed):
        return f"{error}{done}"
    return _words(error, folder) + ("" if _not_written(error) else done)


def _words(error: BaseException, folder: Path) -> str:
    if missing := _not_written(error):
        return f"this is not written yet: {missing}"
    if isinstance(error, SyntaxError):
        return f"{_place(error.filename or '', folder)}, line {error.lineno}: {error.msg}"
    own = [frame for frame in _frames(error) if Path(frame.filename).is_relative_to(folder)]
    where = f", in {own[-1].name} ({_place(own[-1].filename, folder)}, line {own[-1].lineno})" if own else ""
    return f"it raised {type(error).__name__}{f': {error}' if str(error) else ''}{where}"


def _frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    """The innermost last: those of an error's cause are further in, as in a kernel that Triton's interpreter runs."""
    frames: list[traceback.FrameSummary] = []
    while error is not None:
        frames += traceback.extract_tb(error.__traceback__)
        error = error.__cause__
    return frames


def _not_written(error: BaseException | None) -> str | None:
    """The text of the line that stands in place of a body, if that was met."""
    while error is not None:
        if isinstance(error, NotImplementedError) and BLANK.match(str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _place(filename: str, folder: Path) -> str:
    path = Path(filename)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else filename
