"""Parts 3 and 4: who computes how many tokens in this step?"""

from __future__ import annotations

from nanopaged.lab.grading import check, expect, expect_equal
from nanopaged.lab.scheduler.crowd import by_priority, crowds
from nanopaged.lab.scheduler.naive import shown
from nanopaged.lab.scheduler.outside import Run
from nanopaged.step import Step


def shares(step: Step) -> dict[str, int]:
    return {request.request_id: number for request, number in zip(step.requests, step.num_tokens)}


@check(3, "With nothing to do a step is empty.")
def idle() -> None:
    run = Run(4)
    for _ in range(2):
        step = run.step()
        expect_equal("the requests of the step", step.requests, [])
    run.add("A", 2, 1)
    run.finish(1)
    expect_equal("the requests of the step after the last one", run.step().requests, [])


@check(3, "Each running request computes its newest token, in every step.")
def everybody_advances() -> None:
    run = Run(20)
    for name in "ABC":
        run.add(name, 3, 4)
    run.step()
    for _ in range(3):
        expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "B": 1, "C": 1})


@check(3, "The budget counts tokens, not requests.")
def budget_counts_tokens() -> None:
    run = Run(20, budget=5)
    for name in "ABC":
        run.add(name, 3, 2)
    expect_equal("the tokens that each computes", shares(run.step()), {"A": 3, "B": 2})
    expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "B": 1, "C": 3})
    run.finish()


@check(3, "If the budget does not last, the first in order are served.")
def first_in_order() -> None:
    run = Run(20, budget=2, order=by_priority, about=", served by priority")
    run.add("A", 1, 5, priority=1)
    run.add("B", 1, 3, priority=2)
    run.step()
    run.add("C", 1, 2, priority=0)
    expect_equal("the tokens that each computes, while C waits,", shares(run.step()), {"A": 1, "B": 1})
    run.finish()
    run = Run(20, budget=3, order=by_priority, about=", served by priority")
    run.add("A", 1, 6, priority=1)
    run.step()
    run.add("B", 5, 2, priority=0)
    expect_equal("the tokens that each computes: A runs already,", shares(run.step()), {"A": 1, "B": 2})
    expect_equal("the tokens that each computes: both run, B is first,", shares(run.step()), {"B": 3})
    run.finish()


@check(3, "A request joins while others run, and leaves while others run.")
def continuous() -> None:
    run = Run(20)
    a = run.add("A", 3, 6)
    run.steps(2)
    run.add("B", 2, 2)
    expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "B": 2})
    expect_equal("who ends in the next step", shown(run.step().ended), "B")
    run.add("C", 2, 1)
    expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "C": 2})
    expect_equal("A's output tokens in 5 steps", a.num_output_tokens, 5)
    run.finish(1)


@check(3, "A block is taken when its first slot is written, and not before.")
def blocks_when_needed() -> None:
    for size in (1, 2, 3):
        for length in (1, 2, 3, 4):
            run = Run(20, size)
            run.add("A", length, 6)
            run.add("B", length + 1, 3)
            while run.scheduler.has_unfinished() and run.time < 20:
                step = run.plan()
                for request, start, number in zip(step.requests, step.starts, step.num_tokens):
                    expect_equal(f"the number of {request.request_id}'s blocks, for {start + number} tokens and "
                                 f"{size} slots in a block,", len(request.block_table), -(-(start + number) // size))
                run.carry_out(step)
                run.record(step)


@check(3, "A step in which somebody gives way admits nobody.")
def nobody_moves_up() -> None:
    run = Run(5, order=by_priority, about=", served by priority")
    run.add("A", 3, 4, priority=1)
    run.add("B", 3, 4, priority=2)
    run.steps(2)
    c = run.add("C", 3, 1, priority=0)
    step = run.step()
    expect_equal("who gives way: A takes the last of 5 blocks, and B needs one too:", shown(step.preempted), "B")
    expect(c not in step.requests, "C was admitted into the blocks that B gave back in the same step")
    run.finish()
    run = Run(5, budget=3, caching=False)
    run.add("A", 2, 3)
    b = run.add("B", 5, 2)
    while not b.metrics.preemptions and run.time < 9:
        run.step()
    run.finish()


@check(3, "A step that failed is planned again: the same tokens, in the blocks that it has taken already.")
def repeated() -> None:
    for in_model in (False, True):
        run = Run(6, budget=6)
        a, b = run.add("A", 3, 3), run.add("B", 2, 2)
        run.fail(in_model)
        tables = a.block_table.tolist(), b.block_table.tolist()
        run.fail(in_model)
        expect_equal("the block tables, when the same step is planned again,",
                     (a.block_table.tolist(), b.block_table.tolist()), tables)
        step = run.step()
        expect_equal("who was admitted since the last step that was recorded",
                     shown(entry.request for entry in step.admitted), "A, B")
        expect(not run.step().admitted, "nobody was admitted since the last step")
        run.finish()


@check(3, "What a failed step has done stands, and is told with the next one: who gave way, and which blocks move.")
def takes_over() -> None:
    run = Run(4)
    run.add("A", 3, 4)
    run.add("B", 3, 4)
    run.steps(2)
    run.fail()
    step = run.step()
    expect("B" in shown(step.preempted), "B gave way in a step that failed; the next step's preempted should have "
           f"it, and has {shown(step.preempted) or 'nobody'}")
    run.finish()
    for in_model in (False, True):
        run = Run(8)
        run.add("A", 3, 4, n=2)
        run.step()
        run.fail(in_model)
        step = run.step()
        expect(len(step.moves) == 1, "A0 and A1 shared a block, and one of them got a copy of it in a step that "
               f"failed; the next step's moves should have it, and are {step.moves}")
        expect(not run.step().moves, "a step that was recorded has taken its moves with it")
        run.finish()


@check(3, "Whatever arrives or fails: the shares are right, and all come to their end.")
def any_crowd() -> None:
    crowds("planning", failing=True, budget=(3, 12))


@check(4, "A prompt that is longer than the budget is computed in chunks, and gives a token with the last one.")
def chunks() -> None:
    for length, budget in ((2, 1), (5, 2), (6, 3), (7, 5)):
        run = Run(12, budget=budget)
        a = run.add("A", length, 2)
        sizes = []
        while not a.num_output_tokens and run.time < 20:
            step = run.step()
            sizes += step.num_tokens
            expect(bool(step.cut) == (sum(sizes) < length), f"step.cut should be {[0] * (sum(sizes) < length)}, the "
                   f"requests of which a part is computed, and is {step.cut}")
        right = [min(budget, length - start) for start in range(0, length, budget)]
        expect_equal(f"the chunks of {length} tokens, with a budget of {budget},", sizes, right)
        run.finish(1)


@check(4, "While a long prompt is computed, those before it get a token in each step.")
def beside() -> None:
    run = Run(20, budget=4)
    a = run.add("A", 2, 8)
    run.step()
    run.add("B", 10, 2)
    for number in (3, 3, 3):
        expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "B": number})
    expect_equal("the tokens that each computes", shares(run.step()), {"A": 1, "B": 1})
    expect_equal("A's output tokens in 5 steps", a.num_output_tokens, 5)
    run.finish()


@check(4, "What the last chunk leaves of the budget begins the next prompt.")
def next_prompt() -> None:
    run = Run(20, budget=4)
    for name in "ABC":
        run.add(name, 5, 1)
    expect_equal("the tokens that each computes in each step", [shares(run.step()) for _ in range(4)],
                 [{"A": 4}, {"A": 1, "B": 3}, {"B": 2, "C": 2}, {"C": 3}])


@check(4, "A chunk takes the blocks that it writes, and no more.")
def blocks_of_a_chunk() -> None:
    for size, budget in ((2, 3), (3, 2), (4, 4), (2, 1)):
        run = Run(20, size, budget=budget)
        a = run.add("A", 9, 1)
        while not a.num_output_tokens and run.time < 20:
            end = min(9, a.num_computed_tokens + budget)
            step = run.plan()
            expect_equal(f"A's blocks, after a chunk that ends at {end},", len(a.block_table), -(-end // size))
            run.carry_out(step)
            run.record(step)


@check(4, "A chunk begins behind what was found, and what was computed.")
def behind_a_hit() -> None:
    run = Run(20, budget=3)
    run.add("A", [*range(1, 7)], 1)
    run.finish()
    b = run.add("B", [*range(1, 5), *range(10, 15)], 2)
    starts = []
    while not b.num_output_tokens and run.time < 20:
        starts += run.step().starts
    expect_equal("where B's chunks begin: 4 of its 9 tokens are found, the budget is 3:", starts, [4, 7])
    run.finish()


@check(4, "A request that comes back is computed in chunks too, its output like its prompt.")
def comes_back_in_chunks() -> None:
    run = Run(4, budget=2)
    run.add("A", 3, 6)
    b = run.add("B", 2, 5)
    sizes, output = [], 0
    while run.scheduler.has_unfinished() and run.time < 40:
        step = run.step()
        if b.metrics.preemptions and b in step.requests:
            sizes.append(shares(step)["B"])
            expect(b.num_output_tokens == output or sum(sizes) >= 2 + output, "B gets a token before all it knew is "
                   "computed")
        output = b.num_output_tokens
    expect(b.metrics.preemptions > 0 and len(sizes) > 1, "B should give way once, and come back in chunks; its "
           f"chunks are {sizes}")
    expect(max(sizes) == 2, f"B comes back in chunks of 2 tokens at most, and not {sizes}")


@check(4, "The answers do not depend on the budget.")
def any_budget() -> None:
    for budget in (1, 2, 3, 5, 8):
        run = Run(7, budget=budget)
        run.add("A", [1, 2, 3, 4, 5], 4)
        run.add("B", [1, 2, 3, 4, 6, 7], 3, n=2)
        run.add("C", 3, 5)
        run.finish()
        for one in run.members:
            expect_equal(f"{one.request_id}'s answer", one.output_token_ids, run.answers[one])


@check(4, "Whatever arrives, with small budgets: the shares are right, and all come to their end.")
def any_crowd_in_chunks() -> None:
    crowds("chunks", budget=(1, 3), failing=True)
