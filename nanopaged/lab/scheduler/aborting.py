"""Part 6: what if the user no longer wants it?"""

from __future__ import annotations

from nanopaged.lab.grading import check, expect, expect_equal, raising, tell
from nanopaged.lab.scheduler.crowd import crowds
from nanopaged.lab.scheduler.naive import count_again
from nanopaged.lab.scheduler.outside import Run


@check(6, "A waiting request leaves the queue, and the others do not notice.")
def waiting() -> None:
    for which in range(3):
        run = Run(4)
        requests = [run.add(name, 3, 2) for name in "ABC"]
        run.abort(requests[which])
        expect(requests[which] not in [*run.scheduler.waiting], "it was aborted, and still waits")
        run.finish()
        expect_equal("how they ended", [one.finish_reason for one in requests],
                     ["abort" if i == which else "length" for i in range(3)])


@check(6, "A running request gives back its blocks and its seats; the others go on.")
def running() -> None:
    for which in range(3):
        run = Run(9, seats=3)
        requests = [run.add(name, 3, 4) for name in "ABC"]
        run.steps(2)
        run.abort(requests[which])
        d = run.add("D", 3, 2)
        run.step()
        expect(d in run.scheduler.running, "D should find the seat and the blocks that are free again")
        run.finish()
        expect_equal("the output tokens of each", [one.num_output_tokens for one in requests],
                     [2 if i == which else 4 for i in range(3)])


@check(6, "Blocks that others hold too stay with them.")
def shared() -> None:
    run = Run(8)
    a = run.add("A", [1, 2, 3, 4, 5], 4)
    run.step()
    b = run.add("B", [1, 2, 3, 4, 6], 3)
    run.step()
    run.abort(a)
    expect(len(b.block_table) == 3, f"B should still hold 3 blocks, and holds {b.block_table.tolist()}")
    run.finish()


@check(6, "Continuations that have not started end with their first one.")
def followers() -> None:
    for steps in (0, 1):
        run = Run(8, budget=2)
        a = run.add("A", 5, 3, n=3)
        run.steps(steps)
        run.abort(a)
        expect_equal("how the continuations ended", [one.finish_reason for one in run.members], ["abort"] * 3)
        expect(not run.scheduler.has_unfinished(), "the scheduler should have nothing left to do")
        run.finish(0)


@check(6, "Continuations that have started end one by one.")
def started() -> None:
    for which in range(3):
        run = Run(12)
        run.add("A", 3, 3, n=3)
        run.step()
        run.abort(run.members[which])
        run.finish()
        expect_equal("how the continuations ended", [one.finish_reason for one in run.members],
                     ["abort" if i == which else "length" for i in range(3)])


@check(6, "A request that gave way, and waits to come back, has no block to give back.")
def preempted() -> None:
    run = Run(4)
    a, b = run.add("A", 3, 6), run.add("B", 3, 4)
    run.steps(3)
    expect_equal("B's preemptions", b.metrics.preemptions, 1)
    run.abort(b)
    expect_equal("B's output tokens", b.num_output_tokens, 2)
    run.finish()
    expect_equal("A's finish_reason", a.finish_reason, "length")


@check(6, "Between a step that failed and the next one a request can be aborted: its blocks go back, once.")
def in_flight() -> None:
    for which in range(2):
        for in_model in (False, True):
            run = Run(8, seats=2)
            requests = [run.add("A", 3, 3), run.add("B", 3, 3)]
            run.steps(1)
            run.fail(in_model)
            run.abort(requests[which])
            step = run.step()
            expect(requests[which] not in step.requests, "it was aborted, and the next step computes it")
            run.finish()
    for which in range(2):
        run = Run(8)
        run.add("A", 3, 4, n=2)
        run.step()
        run.fail()
        run.abort(run.members[which])
        run.finish()


@check(6, "Full blocks of an aborted request can still be found.")
def found() -> None:
    run = Run(8)
    a = run.add("A", [1, 2, 3, 4, 5], 3)
    run.step()
    run.abort(a)
    b = run.add("B", [1, 2, 3, 4, 6], 1)
    run.step()
    expect_equal("the tokens that B finds", b.metrics.prefix_hit_tokens, 4)


@check(6, "Listeners are told of each end, when everything is counted; and the time of it is noted.")
def listeners() -> None:
    run = Run(8, budget=2)
    a, b = run.add("A", 5, 3, n=2), run.add("B", 3, 3)
    run.step()
    run.abort(a)
    expect_equal("the ends that listeners are told of", sorted(run.heard.ends), ["A0", "A1"])
    run.time = 7.0
    run.abort(b)
    expect_equal("the ends that listeners are told of", sorted(run.heard.ends), ["A0", "A1", "B"])
    expect_equal("B's finished_time", b.metrics.finished_time, 7.0)


@check(6, "What has ended, or has not started, cannot be aborted: ValueError, and nothing is changed.")
def too_late() -> None:
    run = Run(8, budget=2)
    a = run.add("A", 2, 1)
    run.add("B", 5, 2, n=2)
    run.step()
    for request in (a, run.members[2]):
        tell(f"abort {request.request_id}")
        reason = request.finish_reason
        with raising(ValueError, f"aborting {request.request_id}, which "
                     f"{'has ended' if reason else 'has not started'},"):
            run.scheduler.abort(request)
        expect_equal(f"{request.request_id}'s finish_reason", request.finish_reason, reason)
        count_again(run)
    run.finish()


@check(6, "Whatever is aborted, at whatever time: nothing is leaked, and the others come to their end.")
def any_crowd() -> None:
    crowds("aborting", 14, aborting=True, failing=True)
