"""Part 1: what is recorded of a step that was computed?"""

from __future__ import annotations

from nanopaged.lab.grading import check, expect, expect_equal
from nanopaged.lab.scheduler.crowd import crowds
from nanopaged.lab.scheduler.naive import shown
from nanopaged.lab.scheduler.outside import Run
from nanopaged.request import RequestStatus


@check(1, "What was computed counts as computed, and a request that was sampled has one token more.")
def computed() -> None:
    run = Run(4)
    a = run.add("A", 3, 3)
    run.step()
    expect_equal("A's num_computed_tokens", a.num_computed_tokens, 3)
    expect_equal("A's output", a.output_token_ids, run.answers[a][:1])
    run.step()
    expect_equal("A's num_computed_tokens", a.num_computed_tokens, 4)
    expect_equal("A's output", a.output_token_ids, run.answers[a][:2])


@check(1, "A request leaves with the step that gives it its last token; the others of its batch go on.")
def ends_alone() -> None:
    run = Run(8)
    a, b = run.add("A", 3, 1), run.add("B", 3, 3)
    step = run.step()
    expect(step.ended == [a], "A has its only token, and B has not: step.ended should be A, and is "
           f"{shown(step.ended)}")
    expect_equal("A's finish_reason", a.finish_reason, "length")
    expect(run.scheduler.running == [b], f"B should run alone, and {shown(run.scheduler.running)} runs")
    run.finish(2)
    expect(a.block_table.tolist() == b.block_table.tolist() == [], "a request that has ended holds no block")


@check(1, "A request that stops ends with \"stop\", also if that was its last token.")
def stops() -> None:
    for max_tokens in (1, 5):
        run = Run(8)
        a, b = run.add("A", 3, max_tokens), run.add("B", 2, 2)
        run.step(stopped=[a])
        expect_equal("A's finish_reason", a.finish_reason, "stop")
        expect_equal("B's finish_reason", b.finish_reason, None)
        run.finish()


@check(1, "A chunk that does not reach the last known token is recorded, and gives no token.")
def chunk() -> None:
    run = Run(4, budget=2)
    a = run.add("A", 5, 2)
    for computed_tokens, output in ((2, 0), (4, 0), (5, 1), (6, 2)):
        run.step()
        expect_equal("the number of A's output tokens", a.num_output_tokens, output)
        if a.status is RequestStatus.RUNNING:
            expect_equal("A's num_computed_tokens", a.num_computed_tokens, computed_tokens)


@check(1, "A block can be found as soon as it is full, and not before, wherever chunks begin and end.")
def full_blocks() -> None:
    for size in (1, 2, 3):
        for budget in range(1, 8):
            run = Run(12, size, budget=budget)
            a = run.add("A", 7, 5)
            while a.status is not RequestStatus.FINISHED and run.time < 30:
                run.step()
                if a.status is RequestStatus.RUNNING:
                    found = run.pool.find_prefix(a.token_ids + [0] * size, a.num_computed_tokens + size)
                    expect(len(found) == a.num_computed_tokens // size, f"of A's {a.num_computed_tokens} computed "
                           f"tokens {len(found)} blocks of {size} can be found, not {a.num_computed_tokens // size}")
            last = run.pool.find_prefix(a.token_ids, 11)
            expect(len(last) == 11 // size, "all full blocks of A can be found after its end, and the last token, "
                   f"which was never computed, is in none: {11 // size} blocks, not {len(last)}")


@check(1, "Equal blocks that two requests compute in one step are stored once.")
def twins() -> None:
    for length in (2, 5):
        run = Run(12)
        a, b = run.add("A", range(1, length + 1), 4), run.add("B", range(1, length + 1), 4)
        run.step()
        full = length // 2
        expect(a.block_table[:full] == b.block_table[:full], f"A and B have computed the same {full} full blocks, and "
               f"should hold the same ones; they hold {[*a.block_table]} and {[*b.block_table]}")
        run.finish()


@check(1, "The other continuations start with the step that computes their prompt, each with a token of its own.")
def continuations() -> None:
    for length in (3, 4):
        run = Run(12)
        a = run.add("A", length, 3, n=3)
        members = [*run.members]
        step = run.step()
        expect(run.scheduler.running == members, f"all three should run, and {shown(run.scheduler.running)} run")
        for one in members:
            expect_equal(f"{one.request_id}'s output", one.output_token_ids, run.answers[one][:1])
        expect_equal("step.leaders", step.leaders, [a])
        run.finish()
    run = Run(12)
    run.add("A", 3, 1, n=2)
    expect_equal("the ends in a step of two continuations with max_tokens=1", shown(run.step().ended), "A0, A1")


@check(1, "A request that failed ends with an error, with all its continuations, and nobody finds what it wrote.")
def failures() -> None:
    for n in (1, 2):
        for both in (False, True):
            run = Run(12)
            a, b = run.add("A", [1, 2, 3, 4, 5], 3, n), run.add("B", 3, 2)
            failed = {a: "not finite", b: "too large"} if both else {a: "not finite"}
            run.step(failed=failed)
            for member in run.members[:n]:
                expect_equal(f"{member.request_id}'s finish_reason and error", (member.finish_reason, member.error),
                             ("error", "not finite"))
            expect_equal("B's error", b.error, "too large" if both else None)
            expect(not run.pool.find_prefix(a.token_ids, 4), "what A wrote is garbage, and can be found")
            run.add("C", [1, 2, 3, 4, 5], 2)
            run.finish()


@check(1, "A failed request spoils nothing that was recorded before.")
def failed_later() -> None:
    run = Run(8, budget=4)
    a = run.add("A", range(1, 8), 3)
    run.step()
    run.step(failed={a: "not finite"})
    found = run.pool.find_prefix(list(range(1, 8)), 6)
    expect(len(found) == 2, f"the first 4 tokens were computed in a step that was right: 2 blocks, not {len(found)}, "
           "are found")


@check(1, "Tokens, and the times of the first and the last one, are noted in a request's metrics.")
def metrics() -> None:
    run = Run(8, budget=3)
    a = run.add("A", 5, 3)
    run.step()
    expect_equal("first_token_time, before there is one,", a.metrics.first_token_time, None)
    run.finish()
    noted = a.metrics
    expect_equal("first_token_time, last_token_time and finished_time, with a step each second,",
                 (noted.first_token_time, noted.last_token_time, noted.finished_time), (2.0, 4.0, 4.0))
    expect_equal("output_tokens", noted.output_tokens, 3)


@check(1, "Tokens that are computed again after a preemption are counted, each time.")
def recomputed() -> None:
    run = Run(4)
    run.add("A", 3, 6)
    b = run.add("B", 3, 3)
    run.finish()
    expect_equal("the tokens that B computed again, who lost 4 of them,", b.metrics.recomputed_tokens, 4)


@check(1, "Listeners are told of the step, then of the ends, when everything is counted.")
def listeners() -> None:
    run = Run(8)
    a, b = run.add("A", 3, 1), run.add("B", 3, 2)
    step = run.step()
    expect(run.heard.steps == [step], "listeners should be told of the step, and of this one")
    expect_equal("the ends that listeners are told of", run.heard.ends, [a.request_id])
    run.step()
    expect_equal("the ends that listeners are told of", run.heard.ends, [a.request_id, b.request_id])


@check(1, "Whatever arrives: after each step all is where it belongs.")
def any_crowd() -> None:
    crowds("recording", 8, blocks=(10, 16), failing=True)
