"""Part 2: who may begin?"""

from __future__ import annotations

from nanopaged.lab.grading import check, expect, expect_equal
from nanopaged.lab.scheduler.crowd import by_priority, crowds
from nanopaged.lab.scheduler.naive import shown
from nanopaged.lab.scheduler.outside import Run
from nanopaged.waiting import AdmissionContext


class Judge:
    """An admission policy that notes what it is asked about a candidate, and answers always the same."""

    def __init__(self, answer: bool = True) -> None:
        self.answer, self.asked = answer, []

    def __call__(self, context: AdmissionContext) -> bool:
        if context.chunk == context.prompt == 0:  # it is being added
            return True
        self.asked.append(context)
        return self.answer


@check(2, "Requests are admitted in the order of their keys, several in a step, and computed in this very step.")
def in_order() -> None:
    run = Run(12)
    a, b, c = (run.add(name, 3, 2) for name in "ABC")
    step = run.step()
    expect_equal("who is admitted", shown(admission.request for admission in step.admitted), "A, B, C")
    run.finish(1)
    run = Run(12, order=by_priority, about=", served by priority")
    run.add("A", 3, 2, priority=1)
    run.add("B", 3, 2, priority=0)
    step = run.step()
    expect_equal("who is admitted", shown(admission.request for admission in step.admitted), "B, A")


@check(2, "Nobody is admitted without a seat; a request with n continuations needs n, from its admission on.")
def seats() -> None:
    run = Run(12, seats=2)
    for name in "ABC":
        run.add(name, 2, 2)
    run.step()
    expect(len(run.scheduler.running) == 2, f"with 2 seats A and B run, not {shown(run.scheduler.running)}")
    run.finish(4)
    run = Run(12, seats=3, budget=2)
    run.add("A", 5, 2, n=2)
    run.add("B", 2, 2, n=2)
    run.add("C", 1, 1)
    run.step()
    expect(len(run.scheduler.running) == 1, "A takes two of 3 seats, also while its prompt is computed, B needs two, "
           f"and C is behind it: so A runs alone, and not {shown(run.scheduler.running)}")
    run.finish()


@check(2, "Nobody is admitted when the budget is used up.")
def no_budget() -> None:
    run = Run(12, budget=4)
    run.add("A", 4, 2)
    run.add("B", 2, 2)
    step = run.step()
    expect(len(step.admitted) == 1, f"A's prompt uses up the budget, and {len(step.admitted)} requests were admitted")
    run.finish()


@check(2, "Who does not fit waits, preempts nobody, and is overtaken by nobody.")
def head_of_line() -> None:
    run = Run(4)
    a = run.add("A", 5, 2)
    run.add("B", 3, 2)
    run.add("C", 1, 1)
    step = run.step()
    expect(run.scheduler.running == [a], "A holds 3 of 4 blocks, B needs 2, and C, which needs 1, is behind B; but "
           f"these run: {shown(run.scheduler.running)}")
    expect(not step.preempted, f"to admit somebody makes nobody give way, and {shown(step.preempted)} gave way")
    run.step()
    run.finish(2)


@check(2, "A request that is alone is admitted, and no policy is asked; else the policy's answer counts.")
def alone() -> None:
    judge = Judge(answer=False)
    run = Run(8, admission=judge, about=", a policy that refuses everybody while others run")
    a, b = run.add("A", 3, 2), run.add("B", 3, 1)
    run.step()
    expect(run.scheduler.running == [a], "A is alone, then B is refused; these run: "
           f"{shown(run.scheduler.running)}")
    expect(len(judge.asked) == 1, f"the policy is asked about B alone, and was asked {len(judge.asked)} times")
    run.step()
    run.finish(1)
    expect(b.finish_reason == "length", "B is alone when A has ended, and should be admitted")


@check(2, "The policy is told what is there, and what the candidate needs.")
def context() -> None:
    for budget, chunk in ((16, 2), (3, 1)):
        judge = Judge()
        run = Run(10, budget=budget, admission=judge, about=", a policy that notes what it is told")
        a = run.add("A", [1, 2, 3, 4, 5], 3)
        while a.num_computed_tokens < 5 and run.time < 9:
            run.step()
        run.add("B", [1, 2, 3, 4, 9, 10, 11], 2, n=2)
        run.step()
        told = judge.asked[0]._asdict() if judge.asked else {}
        expect_equal("of B, which finds 2 blocks that A holds, the policy is told what", told,
                     {"pool": 10, "available": 7, "committed": 4, "chunk": chunk, "prompt": 2, "full": 8})
        run.finish()


@check(2, "A request begins behind the blocks that are found for it, and holds them.")
def hits() -> None:
    run = Run(8)
    a = run.add("A", [1, 2, 3, 4, 5], 4)
    run.step()
    b = run.add("B", [1, 2, 3, 4, 6], 2)
    step = run.step()
    expect_equal("the tokens that B finds", step.admitted[0].hit_tokens if step.admitted else None, 4)
    expect_equal("prefix_hit_tokens in B's metrics", b.metrics.prefix_hit_tokens, 4)
    expect_equal("the blocks that A and B share", a.block_table[:2].tolist(), b.block_table[:2].tolist())
    run.finish()


@check(2, "The last known token is always computed, also if all of them could be found.")
def last_token() -> None:
    for length, found in ((2, 0), (4, 2), (5, 4)):
        run = Run(8)
        run.add("A", [*range(1, length + 1)], 3)
        run.finish()
        b = run.add("B", [*range(1, length + 1)], 2)
        step = run.step()
        expect_equal(f"the tokens that B finds, with the same prompt of {length} as A,", b.metrics.prefix_hit_tokens,
                     found)
        expect_equal("the tokens that the step computes", step.num_tokens, [length - found])
        run.finish()


@check(2, "Cached blocks that a request will hold are no room for what it still has to write.")
def cached_hits() -> None:
    for blocks, fits in ((6, True), (5, False)):
        run = Run(blocks)
        run.add("A", [1, 2, 3, 4, 5], 1)
        run.step()
        run.add("B", 3, 2)
        run.step()
        c = run.add("C", [1, 2, 3, 4, 6, 7, 8], 1)
        step = run.step()
        expect(not step.preempted, f"{shown(step.preempted)} gave way because C was admitted")
        expect((c in step.requests or c.finish_reason == "length") == fits, f"of {blocks} blocks B holds 2, C finds 2 "
               f"that are cached, and needs 2 more: it should {'be admitted' if fits else 'wait'}")
        run.finish()


@check(2, "A request that comes back is admitted like any other, with all its tokens.")
def comes_back() -> None:
    run = Run(4)
    a = run.add("A", 3, 6)
    b = run.add("B", 3, 4)
    entries = []
    while run.scheduler.has_unfinished() and run.time < 30:
        entries += [entry for entry in run.step().admitted if entry.request is b]
    got = [(entry.known_tokens, entry.is_first) for entry in entries]
    expect_equal("B's admissions, as (known_tokens, is_first)", got, [(3, True), (5, False)])
    expect_equal("the seconds that B has waited, with a step each second,", b.metrics.waiting_s, 1.0 + 4.0)
    expect_equal("the seconds that A has waited", a.metrics.waiting_s, 1.0)


@check(2, "What a subclass brings back is not computed again, and takes room.")
def restored() -> None:
    run = Run(4, swap_blocks=4, about=", preempted requests are swapped out")
    run.add("A", 3, 6)
    b = run.add("B", 3, 4)
    run.finish()
    expect_equal("the tokens that B computed again", b.metrics.recomputed_tokens, 0)
    for budget in (2, 3, 4, 16):
        run = Run(5, budget=budget, swap_blocks=4, about=", preempted requests are swapped out")
        run.add("A", 2, 8)
        run.add("B", 2, 6)
        run.finish()
    crowds("restoring", 9, swapping=True)


@check(2, "Whatever arrives: who is admitted finds room, in turn, and all come to their end.")
def any_crowd() -> None:
    crowds("admission")
