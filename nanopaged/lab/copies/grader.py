"""What must hold of blocks that are shared until somebody writes? Contents are followed token by token (`model.py`)."""

from __future__ import annotations

from array import array
from itertools import product

import torch

from nanopaged.block_allocator import OutOfBlocks
from nanopaged.lab.copies.memory import cache_of, engine, expect_pool, moves_of
from nanopaged.lab.copies.model import Run, expect_copies, held_block, pool, started
from nanopaged.lab.grading import begin, check, expect, expect_equal, raising, tell
from nanopaged.request import RequestStatus
from nanopaged.sampling_params import SamplingParams, continuation_seed


@check(1, "When the prompt is computed, all continuations run, with equal block tables that are lists of their own.")
def all_run() -> None:
    for prompt, n in ((1, 2), (4, 2), (6, 2), (3, 3), (9, 4)):
        run = Run()
        members = run.add(prompt, n, 3)
        run.step()
        names = [member.request_id for member in members]
        expect_equal("the list of running requests", [request.request_id for request in run.scheduler.running], names)
        blocks = [*members[0].block_table]
        for member in members:
            expect_equal(f"{member.request_id}.status", member.status, RequestStatus.RUNNING)
            expect_equal(f"{member.request_id}.num_computed_tokens", member.num_computed_tokens, prompt)
            expect_equal(f"{member.request_id}.block_table", member.block_table, array("i", blocks))
            expect_equal(f"{member.request_id}.num_output_tokens", member.num_output_tokens, 1)
        expect_equal("the followers that still wait for r.0", members[0].followers, [])
        expect(len({id(member.block_table) for member in members}) == n, "each continuation should have a block table "
               "of its own, and some have the same object")
        for block in blocks:
            expect_equal(f"the number of holders of block {block}", run.pool.ref_count(block), n)


@check(1, "They take their places among the running requests, in the order of their keys.")
def they_take_their_places() -> None:
    run = Run()
    run.add(3, 3, 3)
    run.add(2, 1, 3, "later")
    run.step()
    expect_equal("the list of running requests", [request.request_id for request in run.scheduler.running],
                 ["r.0", "r.1", "r.2", "later.0"])


@check(1, "Starting them takes no block and plans no copy, so it needs no room.")
def starting_is_free() -> None:
    for prompt, n in ((3, 2), (6, 3)):
        run = Run(num_blocks=-(-prompt // 4))
        run.add(prompt, n, 2)
        run.step()
        expect_equal("the list of planned moves", run.scheduler.moves, [])
        expect_equal("num_available, in a pool that the prompt fills,", run.pool.num_available, 0)


@check(1, "They start with the last chunk of the prompt, and not before.")
def they_wait_for_the_prompt() -> None:
    for prompt, budget in ((2, 1), (5, 2), (9, 4)):
        run = Run(budget=budget)
        leader, follower = run.add(prompt, 2, 2)
        while leader.num_computed_tokens < prompt:
            expect_equal("the status of r.1, whose prompt is not computed", follower.status, RequestStatus.WAITING)
            expect(not follower.block_table, f"r.1 should hold no block yet, and holds {follower.block_table.tolist()}")
            run.step()
        expect_equal("the status of r.1", follower.status, RequestStatus.RUNNING)


@check(1, "From then on no continuation writes into a block that another holds, the first one neither.")
def writes_are_exclusive() -> None:
    for budget, prompt, n in product((64, 1), (3, 4, 5), (2, 3)):
        run = Run(budget=budget)
        run.add(prompt, n, 4)
        run.finish()


@check(1, "A request that is aborted takes with it the continuations that have not started, in every phase.")
def aborted_in_every_phase() -> None:
    for steps in range(7):
        run = Run(budget=3)
        members = run.add(7, 3, 3)
        other = run.add(2, 1, 3, "o")
        for _ in range(steps):
            run.step()
        started = members[1].status is not RequestStatus.WAITING
        if members[0].status is not RequestStatus.FINISHED:
            run.abort(members[0])
        for member in members[:1] if started else members:
            expect_equal(f"{member.request_id}.status", member.status, RequestStatus.FINISHED)
        run.finish()
        expect_equal("o.0.num_output_tokens", other[0].num_output_tokens, 3)


@check(2, "A block with one holder, which nobody can find, is written in place: fork returns it, and changes nothing.")
def alone_it_writes_in_place() -> None:
    for size in (1, 3):
        blocks = pool(size)
        block = held_block(blocks, 2, 1)
        before = blocks.stats()
        expect_equal("the block that fork gives", blocks.fork(block), block)
        expect_equal("stats()", blocks.stats(), before)
        expect_equal("the number of holders", blocks.ref_count(block), 1)


@check(2, "n holders that fork one after another get n - 1 other blocks; the last one keeps the block.")
def writers_minus_one() -> None:
    for n in (2, 3, 4):
        blocks = pool(n)
        block = held_block(blocks, 2, n)
        answers = []
        for left in range(n, 0, -1):
            expect_equal("the number of holders", blocks.ref_count(block), left)
            answers.append(blocks.fork(block))
        expect(answers[-1] == block and {*answers} == {*range(n)}, f"the {n} answers of fork should all "
               f"differ, and the last should be {block} itself; they are {answers}")
        for answer in answers:
            expect_equal(f"the number of holders of block {answer}", blocks.ref_count(answer), 1)
        expect_equal("filled_slots, 2 in each block,", blocks.stats().filled_slots, 2 * n)
        expect_equal("shared_blocks", blocks.stats().shared_blocks, 0)
        for answer in answers:
            blocks.give_back(answer)
        expect_equal("free_blocks, when all are given back,", blocks.stats().free_blocks, n)


@check(2, "A block that others can find is not written, even by its only holder: it stays as it is, cached.")
def findable_blocks_do_not_change() -> None:
    blocks = pool(2, size=2)
    block = held_block(blocks, 2, 1)
    blocks.publish(block, None, [5, 6])
    copy = blocks.fork(block)
    expect(copy != block, f"fork should give another block than {block}, which find_prefix can find, and gave it")
    expect_equal("the number of holders of the published block", blocks.ref_count(block), 0)
    expect_equal("cached_blocks()", blocks.cached_blocks(), {block})
    expect_equal("find_prefix([5, 6], 2)", blocks.find_prefix([5, 6], 2), [block])
    expect(not blocks.is_published(copy), "the copy should not be published: it is about to change")


@check(2, "If there is no room for a copy, fork raises OutOfBlocks, and nothing is changed.")
def no_room_for_a_copy() -> None:
    for holders in (2, 3):
        blocks = pool(1)
        block = held_block(blocks, 3, holders)
        before = blocks.stats()
        for _ in range(2):
            with raising(OutOfBlocks, "fork of a shared block, with no block available,"):
                blocks.fork(block)
            expect_equal("the number of holders", blocks.ref_count(block), holders)
            expect_equal("stats()", blocks.stats(), before)


@check(3, "A partly filled block that n continuations share is copied for n - 1 of them, when they write.")
def tails_are_copied_for_all_but_one() -> None:
    for prompt, n in ((3, 2), (1, 2), (6, 2), (3, 3), (7, 4)):
        run, members = started(prompt, n)
        shared = members[0].block_table[-1]
        step = run.plan()
        expect_copies(run, members, shared, prompt)
        expect_equal("step.moves", step.moves, run.scheduler.moves)
        for i, block in enumerate(members[0].block_table[: prompt // 4]):
            expect_equal(f"the number of holders of full block {i}", run.pool.ref_count(block), n)
        run.carry_out()
        run.record(step)
        expect_equal("the list of moves of the next step", run.plan().moves, [])


@check(3, "A prompt that fills its blocks has no tail: nothing is copied.")
def full_blocks_are_not_copied() -> None:
    for prompt, n in ((4, 2), (8, 3)):
        run, members = started(prompt, n)
        step = run.plan()
        expect_equal("the list of planned moves", run.scheduler.moves, [])
        expect_equal("the number of holders of the last full block", run.pool.ref_count(members[0].block_table[0]), n)
        run.carry_out()
        run.record(step)
        run.finish()


@check(3, "A continuation that does not write yet keeps the shared block; it is copied when its turn comes.")
def copies_wait_for_the_writer() -> None:
    for n in (2, 3):
        run, members = started(3, n, max_tokens=3, budget=1)  # one of them writes at a time, until it ends
        shared, copies = members[0].block_table[0], 0
        for _ in range(2 * n):
            step = run.plan()
            copies += len(step.moves)
            for member in members:
                if member.num_computed_tokens == 3 and member not in step.requests:
                    expect_equal(f"{member.request_id}.block_table", member.block_table.tolist(), [shared])
            run.carry_out()
            run.record(step)
        expect_equal(f"the number of copies for {n} continuations", copies, n - 1)
        run.finish()


@check(3, "A continuation that is left alone with the shared block writes in place.")
def the_last_holder_writes_in_place() -> None:
    for n, alone in product((2, 3), (0, 1)):
        run, members = started(3, n)
        shared = members[0].block_table[0]
        for member in members:
            if member is not members[alone]:
                run.abort(member)
        run.plan()
        expect_equal("the list of planned moves", run.scheduler.moves, [])
        expect_equal("the block table", members[alone].block_table.tolist(), [shared])
        run.finish()


@check(3, "In a full pool the others give way, and then the first continuation needs no copy: it goes on in place.")
def others_give_way_first() -> None:
    for n in (2, 3):
        run, members = started(6, n, max_tokens=3, num_blocks=2)
        step = run.plan()
        expect_equal("the list of requests that compute", [request.request_id for request in step.requests], ["r.0"])
        expect_equal("the list of planned moves", run.scheduler.moves, [])
        run.carry_out()
        run.record(step)
        run.finish()


@check(3, "A request that reads a position finds its own tokens there, until all have ended and no block is held.")
def contents_are_right_to_the_end() -> None:
    for n, prompt, num_blocks, budget, caching in product((2, 3), (3, 5, 8), (4, 6, 20), (3, 64), (False, True)):
        run = Run(num_blocks, 4, budget, caching)
        run.add(2, 1, 5, "o")
        run.add(prompt, n, 6)
        run.finish()


@check(3, "If a step fails before it is recorded, its copies stay planned, and none is planned twice.")
def failed_steps() -> None:
    for carried_out in (False, True):
        run, members = started(3, 3)
        shared = members[0].block_table[0]
        for attempt in range(3):
            run.plan()
            if attempt and carried_out:
                expect_equal("the list of planned moves", run.scheduler.moves, [])
            else:
                expect_copies(run, members, shared, 3)
            tell(f"something raises {'after' if carried_out else 'before'} the copies are made")
            if carried_out:
                run.carry_out()
        run.finish()
    for aborted in range(3):
        run, members = started(3, 3)
        run.plan()
        tell("something raises before the copies are made")
        run.abort(members[aborted])
        run.add(5, 2, 4, "p")
        run.finish()


@check(4, "A copy moves K and V of all layers, and changes no other block.")
def whole_blocks_are_copied() -> None:
    for moves, sources in (([("copy", 0, 1)], [0, 0, 2, 3, 4, 5]), ([("copy", 4, 2)], [0, 1, 4, 3, 4, 5]),
                           ([("copy", 1, 3), ("copy", 1, 5)], [0, 1, 2, 1, 4, 1])):
        cache, before = cache_of()
        cache.carry_out(moves_of(*moves))
        expect_pool(cache, before, sources)


@check(4, "Moves that are made are taken off the list, so that the next step does not make them again.")
def moves_are_made_once() -> None:
    cache, before = cache_of()
    moves = moves_of(("copy", 0, 1), ("to_host", 2, 0), ("copy", 3, 4))
    cache.carry_out(moves)
    expect_equal("the list of moves", moves, [])
    cache.blocks.copy_(before)
    tell("block 1 is written again, and the same list is carried out")
    cache.carry_out(moves)
    expect_pool(cache, before, [0, 1, 2, 3, 4, 5])


@check(4, "Blocks come back from CPU memory as they went.")
def there_and_back() -> None:
    cache, before = cache_of()
    cache.carry_out(moves_of(("to_host", 4, 1), ("to_host", 1, 0)))
    expect_pool(cache, before, [0, 1, 2, 3, 4, 5])
    for host, block in ((1, 4), (0, 1)):
        expect(torch.equal(cache.host_blocks[host], before[:, :, block]), f"block {host} in CPU memory should hold "
               f"what is in block {block} of the pool, in all layers")
    cache.carry_out(moves_of(("to_pool", 1, 0), ("to_pool", 0, 5)))
    expect_pool(cache, before, [4, 1, 2, 3, 4, 1])


@check(4, "Moves are made in their order; copies that follow each other read all sources before they write.")
def order_of_moves() -> None:
    for moves, sources in (
        ([("copy", 1, 0), ("to_host", 0, 0), ("to_pool", 0, 2)], [1, 1, 1, 3, 4, 5]),
        ([("to_host", 0, 0), ("copy", 1, 0), ("to_pool", 0, 1)], [1, 0, 2, 3, 4, 5]),
        ([("copy", 0, 1), ("copy", 1, 2)], [0, 0, 1, 3, 4, 5]),
        ([("copy", 0, 1), ("to_host", 5, 0), ("copy", 1, 2)], [0, 0, 0, 3, 4, 5]),
        ([("copy", 0, 5), ("copy", 1, 4), ("copy", 2, 5)], [0, 1, 2, 3, 1, 2]),
    ):
        cache, before = cache_of()
        cache.carry_out(moves_of(*moves))
        expect_pool(cache, before, sources)


@check(4, "If a move fails, those before it are off the list, and it and those behind it are still on it.")
def moves_that_fail_stay() -> None:
    cache, before = cache_of()
    moves = moves_of(("copy", 0, 1), ("to_host", 2, 99), ("copy", 3, 4))
    left = moves[1:]
    with raising(Exception, "carry_out, with a block 99 in CPU memory that does not exist,"):
        cache.carry_out(moves)
    expect_equal("the list of moves", moves, left)
    expect_pool(cache, before, [0, 0, 2, 3, 4, 5])


PROMPT, PARAMS = [3 * i % 29 for i in range(12)], SamplingParams(n=3, seed=7, max_tokens=6)


@check(4, "In an engine each continuation gets the tokens that it would get alone.")
def as_if_alone() -> None:
    single = [SamplingParams(seed=continuation_seed(7, i), max_tokens=6) for i in range(3)]
    alone = [engine().generate([PROMPT], params)[0].outputs[0].token_ids for params in single]
    for num_blocks in (16, 5):
        begin(f"a random model; a prompt of 12 tokens, n=3, {num_blocks} blocks of 8")
        together = engine(num_blocks).generate([PROMPT], PARAMS)[0]
        for i, (completion, expected) in enumerate(zip(together.outputs, alone)):
            ended = f" (it ended with: {completion.error})" if completion.error else ""
            expect_equal(f"the output of continuation {i}{ended}", completion.token_ids, expected)


@check(4, "In an engine a request can be aborted after any step: no block stays held, and the others get their tokens.")
def aborted_engine() -> None:
    expected = engine().generate([PROMPT[:5]], SamplingParams(seed=1, max_tokens=9))[0].outputs[0].token_ids
    for steps in range(8):
        begin(f"a request with n=3 and another; after {steps} steps the first is aborted")
        llm = engine()
        first = llm.add_request(PROMPT, PARAMS)
        other = llm.add_request(PROMPT[:5], SamplingParams(seed=1, max_tokens=9))
        outputs = [output for _ in range(steps) for output in llm.step()]
        if all(output.request_id != first or not output.finished for output in outputs):
            llm.abort_request(first)
        for _ in range(40):
            outputs += llm.step()
        last = [output for output in outputs if output.request_id == other][-1]
        expect_equal("the other request's output", last.outputs[0].token_ids, expected)
        expect_equal("referenced_blocks, at the end,", llm.stats().referenced_blocks, 0)
