"""The graders grade: this is the proof that `python -m nanopaged.lab prove` gives, with one seed."""

from __future__ import annotations

import pytest

from nanopaged.lab import bugs, labs, prove
from nanopaged.lab.__main__ import main
from nanopaged.lab.bugs import Bug
from nanopaged.lab.prove import proofs_of


@pytest.mark.parametrize("name", labs.NAMES)
def test_parts_fail_until_they_are_written_hold_then_and_fail_on_every_planted_bug(name: str) -> None:
    lab = labs.get(name)
    proofs = list(proofs_of(lab))
    assert [proof for proof in proofs if proof.wrong] == []
    count = len(lab.parts) * (len(lab.parts) + 1) + len(bugs.bugs_of(name)) + bugs.has_alternative(name)
    assert len(proofs) == count


def test_a_grader_that_lets_a_bug_pass_is_found(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harmless = Bug("harmless", 1, "", "", (
        ("request.py", "return 1 + len(self.followers)", "return len(self.followers) + 1"),))
    monkeypatch.setattr(bugs, "bugs_of", lambda lab: [harmless])
    monkeypatch.setattr(bugs, "has_alternative", lambda lab: False)
    monkeypatch.setattr(prove, "handed_out", lambda lab: iter(()))
    assert main(["prove", "blocks", "--seeds", "2"]) == 1
    printed = capsys.readouterr().out
    assert "wrong: blocks, bug harmless, seed 1: part 1 holds" in printed
    assert "0 of 2 proofs are as they should be." in printed
