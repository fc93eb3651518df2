"""nanopaged at work, with nothing to download and nothing to train.

With no arguments, many requests continue passages of one story at once. Each prompt is the whole
story and then a cue, a few words cut from it; the right continuation is what follows these words in
the story, so every answer can be checked. The pool of KV blocks is far too small for all of these
prompts side by side; it is enough because the story is held once, and shared.

--workload storm and --workload long are for looking at what paging does not help with; see
docs/eviction_storms.md. With --prompt, or with --model gpt2, it continues ordinary prompts.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import nanopaged
from nanopaged import RequestOutput, SamplingParams
from nanopaged.block_allocator import blocks_for
from nanopaged.interrupts import uninterrupted
from nanopaged.report import refuse_unwritable, until_interrupted
from nanopaged.request import Request
from nanopaged.step import Listener, Step
from nanopaged.validation import has_folder, require_int

DOCUMENT = """\
The librarian who never moved a book

A town once kept its letters in a library. Every family that wrote to the library was promised one
long shelf, long enough for the longest story anyone could tell, because nobody knew in advance who
would stop after a page and who would go on all winter. So the shelves stood mostly empty, and yet
the doors were shut: there was no room left to promise.

A new librarian cut the shelves into small boxes of sixteen pages each and numbered them. She kept a
card for every family, and on the card she wrote the numbers of their boxes, in order. When a family
filled its last box, she took any empty one from the pile by the window, wherever it happened to be,
and wrote down one more number. The pages of a story could now lie in every corner of the building,
and nobody reading the card would ever notice.

Soon she saw something else. Forty families had copied out the same old legend before beginning a
tale of their own. She kept the legend once, put its numbers on all forty cards, and pencilled a
small count on each box, so that no box would be thrown away while a card still named it. If someone
wished to change a shared page, she made a copy first and changed only that.

Was the library now without end? It was not. On busy nights every box was taken, and then the family
that had come last was asked, politely, to wait in the hall and write its newest pages again later.
One family whose story filled the whole building could not be helped by any card at all. And if she
let too many through the door at once, they spent the night fetching and carrying instead of writing.
Careful counting, she said, makes good use of the room that there is; it does not build another wing.
"""

PROMPTS = [
    "The librarian opened the last box and found",
    "Paging was invented so that programs larger than memory could",
    "In the middle of the storm the lighthouse keeper",
    "The three most important things about a good teacher are",
]
STORY_INTRO = """\
Each prompt is the whole story and a cue of a few words. The story is held once, by all: nearly all that is saved here \
is saved by sharing. Paging alone saves little, since a prompt is most of each request; for that, see the scene with \
contiguous memory."""


class PromptRefused(Exception):
    """The engine does not take a prompt; says why."""


@dataclass
class Job:
    """One request of the demonstration."""

    prompt: str
    arrival_step: int
    expected: str | None = None  # the known continuation, where there is one


def story_jobs(count: int, max_tokens: int, seed: int) -> list[Job]:
    """Cues of different lengths, cut from the story; each occurs in it only once, so its continuation is known."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    while len(jobs) < count:
        length = rng.randint(12, 48)
        start = rng.randrange(len(DOCUMENT) - length - max_tokens)
        cue, after = DOCUMENT[start : start + length], start + length
        if DOCUMENT.count(cue) == 1:
            # The first runs alone for a step and computes the story; 19 join it, the others come while these run.
            arrival_step = 0 if not jobs else max(1, len(jobs) - 19)
            jobs.append(Job(DOCUMENT + cue, arrival_step, DOCUMENT[after : after + max_tokens]))
    return jobs


def storm_jobs(count: int, max_tokens: int, seed: int) -> list[Job]:
    """Passages with nothing to share, each followed by its own first 20 bytes: they go on, round and round."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    for _ in range(count):
        start = rng.randrange(len(DOCUMENT) - 44)
        passage = DOCUMENT[start : start + 44]
        jobs.append(Job(passage + passage[:20], 0, (passage * 9)[20 : 20 + max_tokens]))
    return jobs


def long_jobs(count: int, max_tokens: int, seed: int) -> list[Job]:
    """One request with the whole story as its prompt, and short ones that come just after it."""
    shorts = storm_jobs(count - 1, max_tokens, seed)
    return story_jobs(1, max_tokens, seed) + [Job(job.prompt, 1, job.expected) for job in shorts]


# name: (jobs, how many, blocks of the pool for a block size of 16, tokens to generate)
WORKLOADS = {"story": (story_jobs, 32, 200, 24), "storm": (storm_jobs, 64, 96, 112), "long": (long_jobs, 16, 140, 96)}


class Lines(Listener):
    """What happens, in a few lines: the first event of a kind at once, later ones together, less and less often."""

    def __init__(self, llm: nanopaged.LLM) -> None:
        self.llm, self.next_step = llm, 0
        self.told: set[str] = set()
        self.news: dict[str, set[int]] = defaultdict(set)  # the numbers of requests, by what happened to them
        llm.scheduler.listeners.append(self)

    def added(self, request: Request) -> None:
        self.news["arrived"].add(int(request.group_id))

    def stepped(self, step: Step) -> None:
        for kind, requests in ("gave way, as the pool was full", step.preempted), ("done", step.ended):
            if requests:
                self.news[kind].update(int(request.group_id) for request in requests)

    def show(self) -> None:
        """After a step: prints a line, if there is something to tell and it is time."""
        stats = self.llm.stats()
        step = stats.num_steps
        is_time = step >= self.next_step or self.news.keys() - self.told or not self.llm.has_unfinished_requests()
        if not self.news or not is_time:
            return
        print(f"step {step}: {stats.num_running} running, {stats.num_waiting} waiting, {stats.referenced_blocks} of "
              f"{stats.num_blocks} blocks in use" +
              "".join(f"; {kind}: {numbered(ids)}" for kind, ids in self.news.items()), flush=True)
        self.told |= self.news.keys()
        self.news.clear()
        self.next_step = step + 1 + (step - 1) // 4


def numbered(ids: set[int]) -> str:
    """Such as "requests 1 to 19"."""
    first, last = min(ids), max(ids)
    if first == last:
        return f"request {first}"
    return f"requests {first} to {last}" if len(ids) == last - first + 1 else f"{len(ids)} requests"


def display_of(llm: nanopaged.LLM) -> AbstractContextManager[Listener]:
    """On a terminal a picture, elsewhere lines."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and has_folder("show"):
        from nanopaged.show.terminal import TerminalPicture
        return closing(TerminalPicture(llm, sys.stdout))
    return nullcontext(Lines(llm))


class Memory(NamedTuple):
    """Blocks for the requests that run together, at one moment."""

    reserved: int  # for each request at full length
    prompts: int  # of these, blocks that hold prompt
    copies: int  # for the tokens that there are, if each request had its own copy
    used: int

    @classmethod
    def now(cls, llm: nanopaged.LLM) -> Memory:
        running, size = llm.scheduler.running, llm.config.block_size
        return cls(sum(blocks_for(request.max_length, size) for request in running),
                   sum(blocks_for(request.num_prompt_tokens, size) for request in running),
                   sum(len(request.block_table) for request in running), llm.stats().referenced_blocks)


def recorded(llm: nanopaged.LLM, arguments: argparse.Namespace) -> tuple[AbstractContextManager[None], list[str]]:
    """Records the run, if a file for what happened was named; and what went wrong in the scenes before a movie."""
    files = {"recording": arguments.record, "movie": arguments.movie, "trace": arguments.trace}
    if not any(files.values()):
        if arguments.no_text:
            raise ValueError("--no-text has no effect without --record, --movie or --trace: add one, or leave it out")
        return nullcontext(), []
    if not has_folder("show"):
        raise ValueError("--record, --movie and --trace need the folder nanopaged/show/, which is missing: restore it")
    from nanopaged.show.keep import kept
    for path in filter(None, files.values()):
        refuse_unwritable(path)  # before the scenes are played
    own = arguments.model != "copycat" or arguments.prompt
    scenes, wrong = scenes_before(llm, arguments) if arguments.movie and not own else ([], [])
    story = not own and arguments.workload == "story"
    return kept(llm, **files, text=not arguments.no_text, title="the story" if story else "this run", intro=STORY_INTRO
                if story else "What was just run.", scenes_before=scenes), wrong


def scenes_before(llm: nanopaged.LLM, arguments: argparse.Namespace) -> tuple[list[dict[str, object]], list[str]]:
    """Small runs of the same model, each with one thing to see; and what went wrong in them."""
    from nanopaged.show.scenes import record_all
    scenes, wrong = record_all(partial(nanopaged.LLM, llm.model, device=arguments.device,
                                       attention=arguments.attention))
    if has_folder("simulate") and has_folder("pressure"):
        from nanopaged.simulate.twin import twin_scene
        scenes.insert(2, twin_scene())
    return scenes, wrong


def run(llm: nanopaged.LLM, jobs: list[Job], params: SamplingParams) -> tuple[list[RequestOutput], dict[str, str]]:
    """Feeds jobs to the engine as they arrive. Returns their outputs, in order, and the table's rows."""
    ids: list[str] = []
    finished: dict[str, RequestOutput] = {}
    moments: list[Memory] = []
    start = time.perf_counter()
    with display_of(llm) as display:
        while len(finished) < len(jobs):
            while len(ids) < len(jobs) and jobs[len(ids)].arrival_step <= len(moments):
                try:
                    ids.append(llm.add_request(jobs[len(ids)].prompt, params))
                except ValueError as error:
                    raise PromptRefused(str(error)) from error
            finished |= {output.request_id: output for output in llm.step() if output.finished}
            moments.append(Memory.now(llm))
            display.show()
    seconds = time.perf_counter() - start
    outputs = [finished[request_id] for request_id in ids]
    return outputs, table(llm, outputs, moments, seconds)


def table(llm: nanopaged.LLM, outputs: list[RequestOutput], moments: list[Memory], seconds: float) -> dict[str, str]:
    """What is printed in the end, by row."""
    stats, fullest = llm.stats(), max(moments)
    longest = blocks_for(llm.config.max_model_len, llm.config.block_size)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    metrics = [completion.metrics for output in outputs for completion in output.outputs]
    first = sorted(m.time_to_first_token_s for m in metrics)
    between = [m.time_between_tokens_s for m in metrics if m.time_between_tokens_s is not None]
    return {
        "requests": f"{len(outputs)}, in {stats.num_steps} steps",
        "tokens generated": f"{generated}",
        "tokens/s": f"{generated / seconds:.1f} ({seconds:.1f} s, {llm.device}, "
                    f"{str(llm.dtype).removeprefix('torch.')})",
        "prompt tokens asked for": f"{stats.prompt_tokens}",
        "prompt tokens computed": f"{stats.prompt_tokens - stats.prompt_hit_tokens} "
                                  f"({stats.prompt_hit_tokens} were shared)",
        "peak blocks used": f"{max(moment.used for moment in moments)} of {stats.num_blocks}",
        "contiguous reservation": f"{fullest.reserved} blocks, for those running together at full length "
                                  f"({fullest.prompts} hold prompt)",
        "saved, of these": f"{fullest.copies - fullest.used} by sharing, {fullest.reserved - fullest.copies} by "
                           f"paging; {fullest.used} were used",
        "longest reservation": f"{longest} blocks ({llm.config.max_model_len} tokens) for each, if lengths are "
                               f"unknown: the pool has room for {stats.num_blocks // longest or 'none'}",
        "preemptions": f"{stats.num_preemptions}",
        "eviction storms": f"{stats.num_storms}",
        "tokens computed": f"{stats.computed_tokens}, of which {stats.recomputed_tokens} again; "
                           f"{stats.swapped_in_tokens} were swapped in instead",
        "goodput": f"{1 - stats.recomputed_tokens / stats.computed_tokens:.2f}",
        "time to first token": f"{first[len(first) // 2]:.2f} s (median), {first[-1]:.2f} s (longest)",
        "time between tokens": f"{1000 * sum(between) / max(1, len(between)):.0f} ms (mean)",
    }


def printable(text: str) -> str:
    """A text whose control characters are escaped, line ends apart: from a prompt, they would command the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="copycat", help="copycat, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to continue; repeat it for more")
    parser.add_argument("--workload", default="story", choices=WORKLOADS, help="what copycat is given (default: story)")
    parser.add_argument("--requests", type=int, metavar="N", help="how many (default: the workload's)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate (default: the workload's)")
    parser.add_argument("--num-blocks", type=int, metavar="N", help="blocks in the pool (default: the workload's, with "
                        "--prompt from the memory there is)")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens in a block (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--attention", default="auto", help="auto, triton or torch (default: auto)")
    parser.add_argument("--admission", default="watermark", help="watermark, reserve or greedy (default: watermark)")
    parser.add_argument("--watermark", type=float, default=0.01, metavar="X", help="share left free (default: 0.01)")
    parser.add_argument("--preemption", default="recompute", help="recompute or swap (default: recompute)")
    parser.add_argument("--swap-blocks", type=int, default=1024, metavar="N", help="of swap space (default: 1024)")
    parser.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="seats (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seeds cues and sampling (default: 0)")
    kept = parser.add_argument_group("what happened, to look at (nanopaged/show/)")
    kept.add_argument("--movie", metavar="FILE", help="play small scenes, then this run, and write a page")
    kept.add_argument("--record", metavar="FILE", help="write a recording; python -m nanopaged.show makes a page of it")
    kept.add_argument("--trace", metavar="FILE", help="write a trace for Perfetto or chrome://tracing")
    kept.add_argument("--no-text", action="store_true", help="leave out of these what the requests of this run say")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; 0 if every known continuation was right."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    known = arguments.model == "copycat" and not arguments.prompt
    make_jobs, count, num_blocks, max_tokens = WORKLOADS[arguments.workload]
    try:
        if arguments.max_tokens is not None:
            max_tokens = arguments.max_tokens
        if arguments.requests is not None:
            count = require_int("--requests", arguments.requests, 1, 1000)
        params = SamplingParams(temperature=arguments.temperature, max_tokens=max_tokens)
        if known and max_tokens > 120:
            raise ValueError(f"--max-tokens must be at most 120 where the answer is to be checked, got {max_tokens}")
        num_blocks = num_blocks * 16 // max(arguments.block_size, 1) if known else None
        if arguments.num_blocks is not None:
            num_blocks = arguments.num_blocks
        elif not known and arguments.movie:
            num_blocks = 64  # as many as a page can show with their words, on one screen
        with uninterrupted():  # torch may swallow an interrupt while it is imported
            from nanopaged import LLM
        llm = LLM(arguments.model, device=arguments.device, attention=arguments.attention,
                  block_size=arguments.block_size, num_blocks=num_blocks,
                  max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=2048,  # the whole story in one step
                  admission=arguments.admission, watermark=arguments.watermark,
                  preemption=arguments.preemption, swap_blocks=arguments.swap_blocks, seed=arguments.seed)
        jobs = make_jobs(count, max_tokens, arguments.seed) if known else [
            Job(prompt, 0) for prompt in arguments.prompt or PROMPTS]
        keeping, problems = recorded(llm, arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    outputs = None
    try:
        with keeping:
            outputs, rows = run(llm, jobs, params)
    except PromptRefused as error:
        parser.error(str(error))
    except (ValueError, OSError) as error:  # what was to be kept is too large, or the disk is full
        if outputs is None:
            raise
        problems.append(f"{error} (with --record FILE, python -m nanopaged.show FILE --steps A:B shows a part)")
    for job, output in zip(jobs, outputs) if not known else ():
        print(f"\n{printable(job.prompt + output.outputs[0].text)}")
    print()
    for name, value in rows.items():
        print(f"{name:>24}  {value}")
    if known:
        wrong = [(job, output) for job, output in zip(jobs, outputs) if output.outputs[0].text != job.expected]
        problems += [f"request {output.request_id} went wrong: {output.outputs[0].text!r} instead of {job.expected!r}"
                     for job, output in wrong]
        print(f"\n{len(jobs) - len(wrong)}/{len(jobs)} continuations match the document")
    for line in problems:
        print(line)
    for path in (arguments.record, arguments.movie, arguments.trace):
        if path and os.path.exists(path):
            print(f"{path}: {os.path.getsize(path):,} bytes")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(until_interrupted(main))
