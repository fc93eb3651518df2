"""What should a step be, and where should everything be after it? A naive model, compared with a run.

Who runs, who waits, and in which order; who computes how many tokens, who gives way, who is admitted; which blocks have
how many holders, and what is in them. All of it is worked out anew, from names that are public.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanopaged.lab.grading import expect, expect_equal
from nanopaged.request import Request, RequestStatus
from nanopaged.step import Step

if TYPE_CHECKING:
    from nanopaged.lab.scheduler.outside import Run


def shown(requests: Iterable[Request]) -> str:
    return ", ".join(request.request_id for request in requests)


def check_rows(run: Run, step: Step) -> None:
    for number, (request, start, num_tokens) in enumerate(zip(step.requests, step.starts, step.num_tokens)):
        name, known = request.request_id, len(request.token_ids)
        expect(request not in step.requests[:number], f"{name} is planned twice in one step")
        expect(request.status is RequestStatus.RUNNING and request in run.scheduler.running,
               f"{name} is planned, and does not run: its status is {request.status}")
        expect_equal(f"the start of {name}, of which {request.num_computed_tokens} tokens are computed,", start,
                     request.num_computed_tokens)
        expect(0 < num_tokens <= known - start, f"{name} has {known - start} tokens that are not computed; a row "
               f"is from 1 to so many of them, and here it has {num_tokens}")
        room = len(request.block_table) * run.size
        expect(start + num_tokens <= room, f"{name} computes up to position {start + num_tokens}, and its "
               f"{len(request.block_table)} blocks have {room} slots")
    total = sum(step.num_tokens)
    expect(total <= run.budget, f"the step computes {total} tokens, and the budget is {run.budget}")
    expect_equal("step.budget, what is left of it,", step.budget, run.budget - total)
    ends = [start + num_tokens == len(request.token_ids) for request, start, num_tokens
            in zip(step.requests, step.starts, step.num_tokens)]
    sampled = [(i, one) for i, request in enumerate(step.requests) if ends[i] for one in (request, *request.followers)]
    expect(step.sampled == sampled, "a token is drawn for requests whose last known token is computed, and their "
           f"followers: {shown(one for _, one in sampled)}; step.sampled has {shown(one for _, one in step.sampled)} "
           "(Step.arrange fills it)")
    expect_equal("step.num_decodes, the requests at the front that compute one token each,", step.num_decodes,
                 step.num_tokens.count(1))


def check_shares(run: Run, step: Step, before: list[Request]) -> None:
    """Who was served, who was admitted, and who gave way?"""
    scheduler, now = run.scheduler, [*run.scheduler.running]
    stayed = [request for request in before if request in now]
    admitted, gone = [request for request in now if request not in before], before[len(stayed):]
    expect(stayed == before[: len(stayed)], f"of {shown(before)} the last give way, and {shown(stayed)} "
           "are left")
    expect(not before or stayed, f"nobody is left of {shown(before)}: the first running request never gives "
           "way")
    for request in gone:
        expect(request in [*scheduler.waiting], f"{request.request_id} gave way, and does not wait")
        expect(request in step.preempted, f"{request.request_id} gave way, and is not in step.preempted")
    expect(not (gone and admitted), f"{shown(gone)} gave way in this step, and {shown(admitted)} was "
           "admitted: the blocks that are left are for those that gave way, and for those that made them")
    for request in admitted:
        expect(all(request < other for other in scheduler.waiting), f"{request.request_id} was admitted before "
               f"its turn: {shown(scheduler.waiting)} wait")
    shares, left = dict(zip(step.requests, step.num_tokens)), run.budget
    for request in stayed + admitted:
        share = min(left, len(request.token_ids) - request.num_computed_tokens)
        expect(shares.get(request, 0) == share, f"{request.request_id} has "
               f"{len(request.token_ids) - request.num_computed_tokens} tokens to compute, and {left} are left of the "
               f"budget: it should compute {share}, and computes {shares.get(request, 0)}")
        left -= share
    expect(not admitted or shares.get(admitted[-1]), f"{shown(admitted[-1:])} was admitted, and computes "
           "nothing")
    noted = {admission.request: admission for admission in step.admitted}
    for request in admitted:
        expect(request in noted, f"{request.request_id} was admitted, and is not in step.admitted")
        entry = noted[request]
        expect(tuple(entry[1:3]) == (len(request.token_ids), request.num_computed_tokens - entry.restored_tokens),
               f"{request.request_id} was admitted with {len(request.token_ids)} known tokens, of which "
               f"{request.num_computed_tokens} need not be computed; step.admitted has {entry}")
    expect(step.requests or not scheduler.has_unfinished(), "running: "
           f"{shown(scheduler.running) or 'nobody'}, waiting: {shown(scheduler.waiting) or 'nobody'}; the step "
           "computes nothing, and so no step ever will")


def check_writes(run: Run, step: Step) -> None:
    for request, start, num_tokens in zip(step.requests, step.starts, step.num_tokens):
        for block in request.block_table[start // run.size : -(-(start + num_tokens) // run.size)]:
            others = [one for one in run.scheduler.running if one is not request and block in one.block_table]
            expect(not others, f"{request.request_id} writes into block {block}, which {shown(others)} holds "
                   "too")
            expect(not run.pool.is_published(block), f"{request.request_id} writes into block {block}, which "
                   "others can find")


def count_again(run: Run) -> None:
    """Counts again who is where, and who holds what."""
    scheduler, pool = run.scheduler, run.pool
    running, waiting, run.pool.asked = [*scheduler.running], [*scheduler.waiting], 0
    expect(not run.problems, "; ".join(run.problems))
    for what, requests in (("running", running), ("waiting", waiting)):
        right = sorted(requests, key=lambda request: (run.order(request), run.members.index(request)))
        expect(requests == right, f"{what} should be in the order {shown(right)}, and is "
               f"{shown(requests)}")
    places = Counter(member for request in running + waiting for member in (request, *request.followers))
    for member in run.members:
        name, ended = member.request_id, member.status is RequestStatus.FINISHED
        expect(places[member] == (not ended), f"{name} is {member.status.value}, and running, waiting and their "
               f"followers have it {places[member]} times: it should be there {0 if ended else 1} times")
        tokens = run.prompts[member] + run.answers[member][: member.num_output_tokens]
        expect(member.token_ids == tokens, f"{name} should have the tokens {tokens}, and has {member.token_ids}")
        expect(ended == (member.finish_reason is not None), f"{name} is {member.status.value}, and its "
               f"finish_reason is {member.finish_reason!r}")
        expect(member in running or not member.block_table, f"{name} is {member.status.value}, and still has the "
               f"blocks {[*member.block_table]}")
    for request in waiting:
        expect(request.status is RequestStatus.WAITING, f"{request.request_id} waits, and its status is "
               f"{request.status}")
        expect_equal(f"num_computed_tokens of {request.request_id}, which waits,", request.num_computed_tokens, 0)
    for request in running:
        run.had[request] = max(run.had[request], request.num_computed_tokens)
    expect(all(one.status is RequestStatus.RUNNING for one in running), f"not all of {shown(running)} are "
           "RUNNING")
    holders = Counter(block for request in running for block in request.block_table)
    for block in range(run.blocks):
        expect(pool.ref_count(block) == holders[block], f"block {block} counts {pool.ref_count(block)} holders, "
               f"and {holders[block]} tables name it: "
               f"{'it is leaked' if pool.ref_count(block) > holders[block] else ''}")
    expect_equal("the number of blocks that can be handed out", pool.num_available, run.blocks - len(holders))
    filled = {block: min(run.size, max(0, request.num_computed_tokens - i * run.size))
              for request in running for i, block in enumerate(request.block_table)}
    expect_equal("the slots that count as filled, of blocks that are held,", pool.stats().filled_slots,
                 sum(filled.values()))
    seats = sum(1 + len(request.followers) for request in running)
    expect(seats <= run.seats, f"{seats} continuations have seats, and there are {run.seats}")
    expect_equal("committed_seats", scheduler.committed_seats, seats)
    expect_equal("committed_blocks", scheduler.committed_blocks,
                 sum(request.full_blocks * (1 + len(request.followers)) for request in running))
    if not scheduler.moves:
        check_findable(run)


def check_findable(run: Run) -> None:
    for request in run.members:
        for i, block in enumerate(run.pool.find_prefix(request.token_ids, len(request.token_ids))):
            for p in range(i * run.size, (i + 1) * run.size):
                got, right = run.memory.get(("pool", block, p % run.size)), tuple(request.token_ids[: p + 1])
                expect(got == right, f"find_prefix finds block {block} for the tokens {list(right)}, and what was "
                       f"written there is {'garbage' if got is None else list(got)}")
