"""What must hold of a batch? Each row looked up token by token, and logits compared with a model that has no cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product
from typing import Any, NamedTuple

import torch

from nanopaged.attention_arguments import AttentionBackend
from nanopaged.batch import Batch
from nanopaged.gpt2 import GPT2, GPT2Config
from nanopaged.lab.grading import Failed, begin, check, expect, expect_equal, tell
from nanopaged.request import Request
from nanopaged.sampling_params import SamplingParams
from nanopaged.step import Step
from nanopaged.torch_attention import paged_attention_torch, write_kv_torch

CPU = torch.device("cpu")


class Asked(NamedTuple):
    """A request, and what of it is computed: `num_tokens` from position `start` on."""

    name: str
    token_ids: list[int]
    table: list[int]
    start: int
    num_tokens: int
    followers: int = 0


class Row(NamedTuple):
    name: str  # of its request
    position: int
    token_id: int
    slot: int


A = Asked("A", [*range(60, 70)], [0, 3, 7], 9, 1)
B = Asked("B", [70, 71, 72], [5], 0, 3)
C = Asked("C", [*range(80, 87)], [6, 2], 4, 2)  # the example of batch.py


def scenes() -> Iterator[tuple[int, list[Asked]]]:
    """(block size, requests): the shortest first."""
    yield 4, [Asked("A", [50], [2], 0, 1)]
    yield 4, [Asked("A", [50, 51, 52], [2], 0, 3)]
    yield 2, [Asked("A", [50, 51, 52], [4, 1], 2, 1)]
    yield 2, [Asked("A", [50, 51, 52, 53], [4, 1], 1, 2)]  # starts amid a block
    yield 4, [B, A]
    yield 4, [B, A, C]
    beside = B._replace(table=[5, 11, 10])  # blocks enough for size 1
    for size, start in product((1, 2, 3, 4), range(6)):
        for end in range(start + 1, 7):
            yield size, [beside, Asked("D", [*range(90, 96)], [9, 8, 1, 0, 6, 7][: -(-6 // size)], start, end - start)]


class Laid:
    """A step, and the batch that was made of it."""

    def __init__(self, size: int, asked: list[Asked]) -> None:
        begin(f"block_size = {size}")
        self.size = size
        self.requests = {a.name: made(a) for a in asked}
        self.step = step_of([(self.requests[a.name], a.start, a.num_tokens) for a in asked])
        order = [request.request_id for request in self.step.requests]
        for a in sorted(asked, key=lambda a: order.index(a.name)):
            tell(f"{a.name}: token_ids {a.token_ids}, block_table {a.table}; computes {a.num_tokens}, from position "
                 f"{a.start}" + (f"; {a.followers} followers start with it" if a.followers else ""))
        self.batch = Batch.from_step(self.step, size, CPU)
        expect(isinstance(self.batch, Batch), f"from_step should return a Batch, and returned {self.batch!r:.60}")

    def rows(self) -> list[Row]:
        """Looked up token by token."""
        found = []
        for request, start, n in zip(self.step.requests, self.step.starts, self.step.num_tokens):
            for p in range(start, start + n):
                block = request.block_table[p // self.size]
                found.append(Row(request.request_id, p, request.token_ids[p], block * self.size + p % self.size))
        return found

    def values(self, name: str) -> list[Any]:
        tensor = getattr(self.batch, name, None)
        expect(isinstance(tensor, torch.Tensor), f"batch.{name} should be a tensor, and is {tensor!r:.60}")
        expect_equal(f"the dtype of batch.{name}", tensor.dtype, torch.int32)
        return tensor.tolist()

    def compare_rows(self, name: str, field: str) -> None:
        got, rows = self.values(name), self.rows()
        expect(len(got) == len(rows), f"batch.{name} should have one entry for each of the {len(rows)} tokens, and has "
               f"{len(got)}: {got}")
        for number, (value, row) in enumerate(zip(got, rows)):
            expect(value == getattr(row, field), f"row {number} is {row.name}'s token at position {row.position}: "
                   f"batch.{name}[{number}] should be {getattr(row, field)}, and is {value}; all of it is {got}")


def made(asked: Asked) -> Request:
    request = Request(asked.name, asked.token_ids, SamplingParams())
    request.block_table.extend(asked.table)
    request.followers = [Request(f"{asked.name}.{i + 1}", asked.token_ids, SamplingParams())
                         for i in range(asked.followers)]
    return request


def step_of(parts: list[tuple[Request, int, int]]) -> Step:
    requests, starts, num_tokens = map(list, zip(*parts))
    step = Step(0, requests, starts, num_tokens)
    step.arrange()
    return step


@check(1, "There is one row for each token that the step computes, in order, and none for padding.")
def rows_are_the_tokens() -> None:
    for size, asked in scenes():
        Laid(size, asked).compare_rows("token_ids", "token_id")


@check(1, "A row's position counts from the beginning of its own request, also in a later chunk.")
def positions_are_the_requests_own() -> None:
    for size, asked in scenes():
        Laid(size, asked).compare_rows("positions", "position")


@check(1, "A row's slot lies in the block that the table has for its position, also if a chunk starts amid a block.")
def slots_are_found_through_the_table() -> None:
    for size, asked in scenes():
        Laid(size, asked).compare_rows("slots", "slot")


@check(2, "query_start tells where each request's rows begin, and where the last one's end.")
def query_start_counts_rows() -> None:
    for size, asked in scenes():
        laid = Laid(size, asked)
        expected = [sum(laid.step.num_tokens[:i]) for i in range(len(asked) + 1)]
        expect_equal("batch.query_start", laid.values("query_start"), expected)


@check(2, "seq_lens has what is computed of each request after this step, not all that is known of it.")
def lengths_are_the_computed_ones() -> None:
    for size, asked in scenes():
        laid = Laid(size, asked)
        expected = [start + n for start, n in zip(laid.step.starts, laid.step.num_tokens)]
        expect_equal("batch.seq_lens", laid.values("seq_lens"), expected)


@check(2, "Each row of block_tables begins with its request's blocks; behind the request's last block are zeros.")
def tables_are_padded_behind() -> None:
    for size, asked in [*scenes(), (4, [Asked("A", [1], [4, 9, 2], 0, 1), Asked("B", [1, 2], [3], 0, 2)])]:
        laid = Laid(size, asked)
        tables = laid.values("block_tables")
        expect(len(tables) == len(asked), f"block_tables should have {len(asked)} rows, and is {tables}")
        for request, start, n, table in zip(laid.step.requests, laid.step.starts, laid.step.num_tokens, tables):
            own = request.block_table.tolist()
            needed = own[: -(-(start + n) // size)]
            expect(table[: len(needed)] == needed and not any(table[len(own) :]),
                   f"{request.request_id}'s row of block_tables should begin with {needed}, and have zeros behind "
                   f"{own}; it is {table}")


@check(2, "num_decodes is the number of requests with one row, a prompt's chunk of one token included.")
def decodes_are_requests_of_one_row() -> None:
    for size, asked in [*scenes(), (4, [Asked("A", [1, 2, 3], [0], 0, 1), B])]:
        laid = Laid(size, asked)
        expect_equal("batch.num_decodes", laid.batch.num_decodes, laid.step.num_tokens.count(1))


@check(2, "Laying out a step changes nothing in the step, nor in its requests.")
def nothing_is_changed() -> None:
    for size, asked in [(4, [A, B]), (4, [B, A, C])]:
        laid, again = Laid(size, asked), step_of([(made(a), a.start, a.num_tokens) for a in asked])
        for name in ("starts", "num_tokens", "num_decodes", "cut"):
            expect_equal(f"step.{name}, after from_step,", getattr(laid.step, name), getattr(again, name))
        for a in asked:
            request = laid.requests[a.name]
            expect_equal(f"{a.name}.block_table, after from_step,", [*request.block_table], a.table)
            expect_equal(f"{a.name}.token_ids, after from_step,", request.token_ids, a.token_ids)


def compare_logits_rows(laid: Laid) -> None:
    ends, drawn, cut = [], [], []
    for i, (request, start, n) in enumerate(zip(laid.step.requests, laid.step.starts, laid.step.num_tokens)):
        ends.append(sum(laid.step.num_tokens[: i + 1]) - 1)
        if start + n == len(request.token_ids):
            drawn += [ends[i]] * (1 + len(request.followers))
        else:
            cut.append(ends[i])
    last = ", ".join(f"{request.request_id}'s is {end}" for request, end in zip(laid.step.requests, ends))
    got = laid.values("logits_rows")
    expect(got == drawn + cut, f"logits_rows should be {drawn + cut}, {len(drawn)} to draw from and then {len(cut)} "
           f"that give no token, and is {got} (of the last rows {last})")
    expect_equal("batch.num_cut", laid.batch.num_cut, len(cut))


@check(3, "A token is drawn from the last row of each request whose last known token is computed.")
def last_rows_are_drawn_from() -> None:
    for size, asked in scenes():
        if all(a.start + a.num_tokens == len(a.token_ids) for a in asked):
            compare_logits_rows(Laid(size, asked))


@check(3, "The row of a prompt is there once for each of its continuations.")
def continuations_share_a_row() -> None:
    prompt = Asked("P", [1, 2], [4], 0, 2, followers=2)
    for asked in ([prompt], [prompt, A], [B, prompt, A]):
        compare_logits_rows(Laid(4, asked))


@check(3, "Rows of requests that the budget has cut off come last, and num_cut is how many they are.")
def cut_rows_come_last() -> None:
    one_row = Asked("O", [1, 2, 3], [8], 0, 1)  # stands among the decodes, in front of B
    for asked in ([C], [B, C], [B, one_row], [A, C, B], [C._replace(followers=2), B], [one_row, C, A, B]):
        compare_logits_rows(Laid(4, asked))
    for size, asked in scenes():
        compare_logits_rows(Laid(size, asked))


def make_model() -> GPT2:
    torch.manual_seed(1)
    model = GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=4, n_kv_head=2))
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.4)
    return model.eval()


class Served:
    """A tiny model, and a pool with blocks of 2 that is NaN wherever nothing was written."""

    SIZE = 2

    def __init__(self) -> None:
        begin("block_size = 2; the pool holds NaN where nothing was written")
        self.model = make_model()
        self.cache = torch.full((2, 2, 20, 2, self.SIZE, 4), torch.nan)

    def step(self, *parts: tuple[Request, int], faulty: int | None = None) -> None:
        """Computes so many tokens more of each request, and compares. In row `faulty` the last layer computes a NaN."""
        step = step_of([(request, request.num_computed_tokens, n) for request, n in parts])
        names = [f"{request.request_id} computes {n}, from position {start}, of {len(request.token_ids)} known tokens"
                 for request, start, n in zip(step.requests, step.starts, step.num_tokens)]
        tell(f"a step: {'; '.join(names)}" + ("" if faulty is None else f"; a NaN comes up in row {faulty}"))
        batch = Batch.from_step(step, self.SIZE, CPU)
        logits = self.model(batch, self.cache, attention(faulty, self.model.config.n_layer))
        expect(isinstance(logits, torch.Tensor), f"forward should return a tensor, and returned {logits!r:.60}")
        expect_equal("the shape of the logits", tuple(logits.shape), (len(step.sampled) + len(step.cut), 11))
        spoiled = next((i for i, n in enumerate(step.num_tokens)
                        if faulty is not None and 0 <= faulty - sum(step.num_tokens[:i]) < n), None)
        for row, i in enumerate([i for i, _ in step.sampled] + step.cut):
            self._compare(logits[row], step, i, i == spoiled, f"row {row} of the logits")
        for request, n in parts:
            request.num_computed_tokens += n
            if request.num_computed_tokens == len(request.token_ids):
                request.token_ids.append(7 * len(request.token_ids) % 11)

    def _compare(self, got: torch.Tensor, step: Step, i: int, spoiled: bool, what: str) -> None:
        request, end = step.requests[i], step.starts[i] + step.num_tokens[i]
        if spoiled:
            expect(got.isnan().all(), f"{what} belongs to {request.request_id}, which has a row that is not finite: it "
                   f"should be NaN, and is {shown(got)}")
        elif i in step.cut:
            expect(got.isfinite().all(), f"{what} belongs to {request.request_id}, whose rows are all finite, so it "
                   f"should be finite, and is {shown(got)}")
        else:
            expected = self.model.dense(torch.tensor(request.token_ids[:end]))[-1]
            if not torch.allclose(got, expected, atol=1e-3):
                raise Failed(f"{what} belongs to {request.request_id}: with {end} tokens computed, GPT2.dense gives "
                             f"{shown(expected)}, and this is {shown(got)}")


def shown(logits: torch.Tensor) -> str:
    return f"[{', '.join(f'{value:.2f}' for value in logits[:4].tolist())}, ...]"


def attention(faulty: int | None, layers: int) -> AttentionBackend:
    calls = count(1)

    def attend(*arguments: Any, **options: Any) -> torch.Tensor:
        out = paged_attention_torch(*arguments, **options)
        if next(calls) == layers and faulty is not None:
            out[faulty] = torch.nan
        return out

    return AttentionBackend(write_kv_torch, attend)


def request(name: str, num_tokens: int, table: list[int], followers: int = 0) -> Request:
    return made(Asked(name, [(ord(name) + 3 * i * i) % 11 for i in range(num_tokens)], table, 0, 0, followers))


@check(4, "A prompt's logits are those that GPT2.dense gives for its last token.")
def a_prompt() -> None:
    for n in (1, 2, 5):
        Served().step((request("A", n, [7, 3, 5]), n))


@check(4, "A decode gives the logits of the whole sequence, although it computes one token.")
def a_decode() -> None:
    served, asked = Served(), request("A", 3, [7, 3, 5, 1])
    for n in (3, 1, 1, 1, 1):
        served.step((asked, n))


@check(4, "A prompt that is computed in chunks gives the same logits, wherever it is cut.")
def chunks() -> None:
    for sizes in ([1, 1], [2, 1], [1, 2], [3, 2], [2, 2, 1], [1, 3, 1]):
        served, asked = Served(), request("A", sum(sizes), [7, 3, 5])
        for n in (*sizes, 1):
            served.step((asked, n))


@check(4, "Requests that share a step do not change each other's logits.")
def company() -> None:
    served = Served()
    served.step((request("A", 3, [7, 3]), 3), (request("B", 2, [4]), 2))
    served, a, b, c = Served(), request("A", 2, [7, 3, 2]), request("B", 5, [4, 0, 9]), request("C", 3, [5, 1, 6], 2)
    served.step((a, 2), (b, 1))
    served.step((a, 1), (b, 2), (c, 3))
    served.step((a, 1), (b, 2), (c, 1))
    served.step((a, 1), (b, 1), (c, 1))


@check(5, "If any row of a request is not finite, its logits are NaN, though its last row may be finite.")
def a_fault_spoils_its_request() -> None:
    for n in (1, 2, 4):
        for faulty in range(n):
            Served().step((request("A", n, [7, 3]), n), faulty=faulty)
    for faulty in range(2):
        Served().step((request("A", 4, [7, 3]), 2), faulty=faulty)  # cut off


@check(5, "A fault in one request leaves the logits of all others as they are.")
def a_fault_spoils_nobody_else() -> None:
    for faulty in range(4):
        Served().step((request("A", 2, [7]), 2), (request("B", 2, [4]), 2), faulty=faulty)
    for faulty in range(8):
        served, a, b = Served(), request("A", 2, [7, 3]), request("B", 2, [8, 11])
        served.step((a, 2), (b, 2))
        served.step((a, 1), (request("C", 3, [5, 1], 1), 3), (b, 1), (request("D", 6, [4, 0, 9]), 3), faulty=faulty)
