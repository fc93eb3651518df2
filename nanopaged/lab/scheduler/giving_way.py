"""Part 5: who gives way when the pool is full, and what becomes of them?"""

from __future__ import annotations

from nanopaged.lab.grading import check, expect, expect_equal, tell
from nanopaged.lab.scheduler.crowd import by_priority, crowds
from nanopaged.lab.scheduler.naive import shown
from nanopaged.lab.scheduler.outside import Run
from nanopaged.request import Request, RequestStatus


def until(run: Run, request: Request, number: int = 1) -> None:
    """Steps until a request has given way so many times."""
    while request.metrics.preemptions < number and run.time < 60:
        run.step()
    expect(request.metrics.preemptions == number, f"{request.request_id} should have given way {number} times, and has "
           f"{request.metrics.preemptions} in its metrics, after {run.time:.0f} steps")


@check(5, "As long as there are blocks, each request gets what it writes, and nobody gives way.")
def enough() -> None:
    run = Run(8)
    a, b = run.add("A", 3, 6), run.add("B", 3, 6)
    run.finish()
    expect_equal("the preemptions", a.metrics.preemptions + b.metrics.preemptions, 0)


@check(5, "When no block is left, the last running request gives way; the first one advances in each step.")
def the_last() -> None:
    run = Run(6)
    a, b, c = (run.add(name, 3, 6) for name in "ABC")
    while run.scheduler.has_unfinished() and run.time < 40:
        first, output = run.scheduler.running[:1], [*a.token_ids]
        step = run.step()
        if run.time == 3:
            expect_equal("who gives way, since A and then B need a block,", shown(step.preempted), "C")
        expect(first != [a] or len(a.token_ids) == len(output) + 1, "A is first, and got no token in this step")
    expect(not a.metrics.preemptions, "A is the first, and gave way")
    run.finish(0)
    run = Run(4, order=by_priority, about=", served by priority")
    a = run.add("A", 3, 5, priority=1)
    run.step()
    run.add("B", 3, 3, priority=0)
    until(run, a)
    run.finish()


@check(5, "A request gives way itself if it is the last; then nothing of it is computed in this step.")
def itself() -> None:
    run = Run(5)
    run.add("A", 4, 2)
    b = run.add("B", 4, 4)
    run.step()
    step = run.step()
    expect_equal("who gives way: A takes the fifth block, B needs one too:", shown(step.preempted), "B")
    expect(b.status is RequestStatus.WAITING and b not in step.requests, "B should wait, and not be in the step")
    run.finish()


@check(5, "As many give way as are needed, not more.")
def several() -> None:
    run = Run(4, 4, order=by_priority, budget=16, about=", served by priority")
    run.add("B", 3, 2, priority=1)
    run.add("C", 3, 2, priority=2)
    run.step()
    a = run.add("A", 8, 8, priority=0)
    while not a.metrics.output_tokens and run.time < 20:
        run.step()
    run.finish()
    run = Run(6, 2, budget=4)
    for name, length, max_tokens in (("A", 7, 2), ("B", 1, 9), ("C", 1, 1), ("D", 1, 1)):
        run.add(name, length, max_tokens)
    run.finish()
    run = Run(5, 2)
    for name in "ABC":
        run.add(name, 2, 7)
    run.step()
    step = run.step()
    expect_equal("who gives way: A, B and C need a block, and 2 are left,", shown(step.preempted), "C")
    run.finish()


@check(5, "Who gives way keeps all tokens, holds no block, and waits.")
def keeps_its_tokens() -> None:
    run = Run(4)
    run.add("A", 3, 6)
    b = run.add("B", 3, 5)
    until(run, b)
    expect_equal("B's output, which it had when it gave way,", b.output_token_ids, run.answers[b][:2])
    expect_equal("B's status, blocks and computed tokens", (b.status, b.block_table.tolist(), b.num_computed_tokens),
                 (RequestStatus.WAITING, [], 0))
    expect_equal("B's preemptions", b.metrics.preemptions, 1)


@check(5, "It goes on where it stood: no token is lost, and none comes twice, wherever in a block that was.")
def goes_on() -> None:
    for size in (1, 2, 3, 4):
        for length in range(1, 6):
            blocks = -(-(length + 7) // size) + 1
            run = Run(blocks, size)
            run.add("A", length, 8)
            b = run.add("B", length, 8)
            run.finish()
            expect_equal("B's output", b.output_token_ids, run.answers[b])


@check(5, "It comes back before those that came after it.")
def its_turn() -> None:
    run = Run(4)
    a, b, c = run.add("A", 3, 6), run.add("B", 3, 3), run.add("C", 3, 3)
    until(run, b)
    ended = []
    while run.scheduler.has_unfinished() and run.time < 30:
        ended += run.step().ended
        waiting = [*run.scheduler.waiting]
        expect(b not in waiting or waiting[0] is b, "B came before C, and should be first of those that wait: "
               f"{shown(waiting)}")
    expect(ended in ([a, b, c], [b, a, c], [a, c, b]), f"they end in the order {shown(ended)}")


@check(5, "What it computes again is counted, also if it gives way again before it is where it was.")
def again_and_again() -> None:
    run = Run(5, budget=3, order=by_priority, caching=False, about=", served by priority")
    b = run.add("B", 5, 3, priority=1)
    run.steps(2)
    for number, name in enumerate("XYZ", 1):
        run.add(name, 5, 3, priority=0)
        until(run, b, number)
        while not b.block_table and run.time < 50:
            run.step()
    run.finish()
    expect(b.metrics.recomputed_tokens > 5, "B lost its tokens three times, and has computed "
           f"{b.metrics.recomputed_tokens} again")


@check(5, "Its full blocks can be found until their memory is needed, and are not computed again.")
def found_again() -> None:
    run = Run(6)
    run.add("A", 6, 4)
    b = run.add("B", 6, 2)
    run.step()
    step = run.step()
    expect_equal("who gives way: each holds 3 of 6 blocks, and A needs a fourth,", shown(step.preempted), "B")
    found = run.pool.find_prefix(b.token_ids, 6)
    expect(len(found) == 2, "B gave back 3 full blocks, and A took one, the last of them: B's first two can be found, "
           f"and {len(found)} are")
    run.finish()


@check(5, "A request that has not got its whole prompt computed gives way too.")
def in_its_prompt() -> None:
    run = Run(5, budget=3)
    run.add("A", 2, 7)
    b = run.add("B", 8, 2)
    until(run, b)
    expect(not b.num_output_tokens, "B gives way amid its prompt")
    run.finish()


@check(5, "Blocks that a failed step has taken are not taken twice.")
def taken_once() -> None:
    for in_model in (False, True):
        run = Run(5)
        a, b = run.add("A", 4, 3), run.add("B", 3, 2)
        run.step()
        run.fail(in_model)
        run.fail(in_model)
        expect_equal("A's blocks, for 5 tokens in blocks of 2,", len(a.block_table), 3)
        expect_equal("B's preemptions: 5 blocks are enough", b.metrics.preemptions, 0)
        run.finish()
    run = Run(8, budget=5)
    a, b = run.add("A", 1, 3), run.add("B", 9, 2)
    run.fail()
    tell("    so A is aborted, and B can compute 5 tokens")
    run.scheduler.abort(a)
    run.step()
    expect_equal("B's blocks, for 5 tokens in blocks of 2,", len(b.block_table), 3)
    run.finish()


@check(5, "Before a request writes into a block that others hold too, it gets a copy; the last holder writes without "
       "one.")
def copies() -> None:
    for n in (2, 3):
        for length in (3, 4, 5):
            run = Run(4 + 3 * n)
            run.add("A", length, 3, n=n)
            run.step()
            step = run.step()
            expect_equal(f"the copies of a block that {n} continuations are about to write into, with a prompt of "
                         f"{length},",
                         len(step.moves), n - 1 if length % 2 else 0)
            run.finish()


@check(5, "Who need not share any longer, because the others gave way, needs no copy.")
def copies_after_others_gave_way() -> None:
    run = Run(2, 4)
    a = run.add("A", 6, 2, n=2)
    run.step()
    step = run.step()
    expect_equal("who gives way: A0 and A1 hold the same 2 blocks of 2, and the second is half full:",
                 shown(step.preempted), "A1")
    expect(not step.moves, f"A1 gave way, so A0 writes into a block of its own; but it was copied: {step.moves}")
    expect(a.num_output_tokens == 2, "A0 should have got its token in this step")
    run.finish()


@check(5, "A copy counts as a block: the last gives way for it too.")
def room_for_a_copy() -> None:
    run = Run(4, 2)
    run.add("A", 3, 2, n=2)
    run.add("B", 3, 2)
    run.step()
    step = run.step()
    expect_equal("who gives way: 4 blocks are held, and A0 needs a copy,", shown(step.preempted), "B")
    expect_equal("the copies", len(step.moves), 1)
    run.finish()


@check(5, "Seats and blocks are counted without those that gave way.")
def counted() -> None:
    run = Run(4, seats=2)
    run.add("A", 3, 6)
    b = run.add("B", 3, 6)
    until(run, b)
    run.finish()
    for name in "CD":
        run.add(name, 2, 1)
    run.step()
    expect(not run.scheduler.has_unfinished(), "C and D should find two free seats, and end in one step")


@check(5, "Whatever arrives, in a pool that is too small: the last give way, and all come to their end.")
def any_crowd() -> None:
    crowds("giving way", 14, blocks=(3, 6), failing=True)
