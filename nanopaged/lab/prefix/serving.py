"""What must hold of requests that share a pool? The checks of part 5, with an engine that shows what is read."""

from __future__ import annotations

from nanopaged.lab.grading import check, expect_equal, numbers, tell
from nanopaged.lab.prefix.engine import Engine, output_of


def rounded_down(num_tokens: int, size: int) -> int:
    return num_tokens // size * size


@check(5, "The second request with a prompt finds its full blocks, and computes the rest: at least the last token.")
def second_request() -> None:
    for num_tokens in range(1, 9):
        engine, prompt = Engine(12), [*range(num_tokens)]
        for name in ("A", "B"):
            request = engine.add(name, prompt, 2)
            engine.run(request)
            expect_equal(f"the output of {name}", request.output_token_ids, output_of(prompt, 2))
        expect_equal("the tokens that B found", engine.hits["B"], rounded_down(num_tokens - 1, 2))


@check(5, "What was generated is found too, by the next question of a chat.")
def generated_tokens() -> None:
    engine, prompt = Engine(16), [1, 2, 3]
    engine.run(engine.add("A", prompt, 6))
    engine.run(engine.add("B", [*prompt, *output_of(prompt, 6), 4], 2))
    expect_equal("the tokens that B found", engine.hits["B"], 8)  # the last of A's 9 was never computed


@check(5, "Blocks that a long prompt fills chunk by chunk are found one by one.")
def chunks() -> None:
    for budget in (1, 2, 3, 5):
        engine, prompt = Engine(12, budget=budget), [4, 3, 2, 1, 0, 1, 2]
        request = engine.add("A", prompt)
        for _ in range(100):
            engine.step()
            found = len(engine.pool.find_prefix(prompt, len(prompt)))
            expect_equal("the number of full blocks that are found", found, engine.computed["A"] // 2)
            if request.finish_reason is not None:
                break
        engine.run(engine.add("B", prompt))
        expect_equal("the tokens that B found", engine.hits["B"], 6)


@check(5, "Two requests that compute the same blocks in one step hold the same ones from then on.")
def same_step() -> None:
    for one, other, common in (([1, 2, 3], [1, 2, 3], 1), ([1, 2, 3], [1, 2, 4], 1),
                               ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], 2)):
        engine = Engine(12)
        first, second = engine.add("A", one, 6), engine.add("B", other, 6)
        engine.step()
        tables = first.block_table.tolist(), second.block_table.tolist()
        expect_equal("the first blocks of B's table", tables[1][:common], tables[0][:common])
        held = engine.pool.num_blocks - engine.pool.num_available
        expect_equal("the number of blocks that are held", held, len({*tables[0], *tables[1]}))
        engine.add("C", [4, 4, 4, 4, 4, 4, 4, 4])  # takes the free twin, and writes into it
        engine.run()
        for request, prompt in ((first, one), (second, other)):
            expect_equal(f"the output of {request.request_id}", request.output_token_ids, output_of(prompt, 6))


@check(5, "The same tokens after another beginning are computed again.")
def engine_with_other_parents() -> None:
    engine = Engine(16)
    for name, prompt, hit in (("A", [1, 1, 3, 3, 0], 0), ("B", [2, 2, 3, 3, 0], 0), ("C", [3, 3, 0], 0),
                              ("D", [1, 1, 3, 3, 4], 4), ("E", [2, 2, 3, 3, 3], 4)):
        request = engine.add(name, prompt, 3)
        engine.run(request)
        expect_equal(f"the tokens that {name} found", engine.hits[name], hit)
        expect_equal(f"the output of {name}", request.output_token_ids, output_of(prompt, 3))


@check(5, "In a crowd that does not fit, each request reads its own text, and returns what it would alone.")
def a_crowd() -> None:
    random = numbers("a crowd")
    for num_requests, num_blocks, budget in ((3, 6, 8), (6, 8, 5), (12, 10, 16)):
        engine, requests = Engine(num_blocks, budget=budget, alphabet=2), []
        for i in range(num_requests):
            prompt = [random.randrange(2) for _ in range(random.randint(1, 7))]
            requests.append((engine.add(f"R{i}", prompt, random.randint(1, 5)), prompt))
            if random.random() < 0.5 and engine.scheduler.has_unfinished():
                engine.step()
        engine.run()
        for request, prompt in requests:
            expected = output_of(prompt, request.params.max_tokens, alphabet=2)
            expect_equal(f"the output of {request.request_id}", request.output_token_ids, expected)
        tell("all have ended")
