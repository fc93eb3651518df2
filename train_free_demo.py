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
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

import nanopaged
from nanopaged import RequestOutput, SamplingParams
from nanopaged.block_allocator import blocks_for
from nanopaged.interrupts import uninterrupted
from nanopaged.report import until_interrupted
from nanopaged.validation import require_int

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
OWNERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


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


class Display:
    """What happens, as it happens: on a terminal a picture of the pool, elsewhere a line for each event."""

    def __init__(self, llm: nanopaged.LLM) -> None:
        self.llm = llm
        self.picture = sys.stdout.isatty()
        self.height = 0  # lines of the picture that the next one is drawn over
        if self.picture:
            for handler in logging.getLogger().handlers:
                handler.addFilter(self.make_way)

    def make_way(self, record: logging.LogRecord) -> bool:
        """Before a message is logged: removes the picture, so that the next one is drawn below the message."""
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="", flush=True)
            self.height = 0
        return True

    def event(self, step: int, text: str) -> None:
        if not self.picture:
            print(f"step {step:3}: {text}", flush=True)

    def show(self, step: int) -> None:
        """Draws the first 1,000 blocks: the owner's letter, # for several owners, . for cached, a space for free."""
        if not self.picture:
            return
        stats, running = self.llm.stats(), self.llm.scheduler.running
        holders = Counter(block for request in running for block in request.block_table)
        owner = {block: OWNERS[int(request.group_id) % len(OWNERS)]
                 for request in running for block in request.block_table}
        cached = self.llm.scheduler.allocator.cached_blocks()
        cells = ["#" if holders[block] > 1 else owner.get(block, "." if block in cached else " ")
                 for block in range(stats.num_blocks)][:1000]
        lines = [f"step {step}: {stats.num_running} running, {stats.num_waiting} waiting, {stats.referenced_blocks} of "
                 f"{stats.num_blocks} blocks in use, {stats.shared_blocks} of them shared (#), {stats.cached_blocks} "
                 "cached (.)"]
        lines += ["  |" + "".join(cells[i : i + 100]) + "|" for i in range(0, len(cells), 100)]
        rewind = f"\x1b[{self.height}A" if self.height else ""
        print(rewind + "\n".join("\x1b[2K" + line for line in lines), flush=True)
        self.height = len(lines)


def run(llm: nanopaged.LLM, jobs: list[Job], params: SamplingParams) -> tuple[list[RequestOutput], dict[str, str]]:
    """Feeds jobs to the engine as they arrive. Returns their outputs, in order, and the table's rows."""
    display = Display(llm)
    ids: list[str] = []
    finished: dict[str, RequestOutput] = {}
    step = preemptions = peak_blocks = peak_contiguous = 0
    start = time.perf_counter()
    while len(finished) < len(jobs):
        while len(ids) < len(jobs) and jobs[len(ids)].arrival_step <= step:
            try:
                ids.append(llm.add_request(jobs[len(ids)].prompt, params))
            except ValueError as error:
                raise PromptRefused(str(error)) from error
            display.event(step, f"request {ids[-1]} arrives")
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = output
                display.event(step, f"request {output.request_id} is done: {output.outputs[0].text[:60]!r}")
        stats, running = llm.stats(), llm.scheduler.running
        if stats.num_preemptions > preemptions:
            display.event(step, f"the pool is full, requests that give way: {stats.num_preemptions - preemptions}")
        preemptions = stats.num_preemptions
        peak_blocks = max(peak_blocks, stats.referenced_blocks)
        reserved = sum(blocks_for(request.max_length, llm.config.block_size) for request in running)
        peak_contiguous = max(peak_contiguous, reserved)
        display.show(step)
        step += 1
    display.height = 0  # the last picture stays
    seconds = time.perf_counter() - start
    outputs = [finished[request_id] for request_id in ids]
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    metrics = [completion.metrics for output in outputs for completion in output.outputs]
    first = sorted(m.time_to_first_token_s for m in metrics)
    between = [m.time_between_tokens_s for m in metrics if m.time_between_tokens_s is not None]
    rows = {
        "requests": f"{len(jobs)}, in {stats.num_steps} steps",
        "tokens generated": f"{generated}",
        "tokens/s": f"{generated / seconds:.1f} ({seconds:.1f} s, {llm.device}, "
                    f"{str(llm.dtype).removeprefix('torch.')})",
        "prompt tokens asked for": f"{stats.prompt_tokens}",
        "prompt tokens computed": f"{stats.prompt_tokens - stats.prompt_hit_tokens} "
                                  f"({stats.prompt_hit_tokens} were shared)",
        "peak blocks used": f"{peak_blocks} of {stats.num_blocks}",
        "contiguous reservation": f"{peak_contiguous} blocks, for those running together at full length",
        "preemptions": f"{stats.num_preemptions}",
        "eviction storms": f"{stats.num_storms}",
        "tokens computed": f"{stats.computed_tokens}, of which {stats.recomputed_tokens} again; "
                           f"{stats.swapped_in_tokens} were swapped in instead",
        "goodput": f"{1 - stats.recomputed_tokens / stats.computed_tokens:.2f}",
        "time to first token": f"{first[len(first) // 2]:.2f} s (median), {first[-1]:.2f} s (longest)",
        "time between tokens": f"{1000 * sum(between) / max(1, len(between)):.0f} ms (mean)",
    }
    return outputs, rows


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
        with uninterrupted():  # torch may swallow an interrupt while it is imported
            from nanopaged import LLM
        llm = LLM(arguments.model, device=arguments.device, attention=arguments.attention,
                  block_size=arguments.block_size, num_blocks=num_blocks,
                  max_num_seqs=arguments.max_num_seqs, max_num_batched_tokens=2048,  # the whole story in one step
                  admission=arguments.admission, watermark=arguments.watermark,
                  preemption=arguments.preemption, swap_blocks=arguments.swap_blocks, seed=arguments.seed)
        jobs = make_jobs(count, max_tokens, arguments.seed) if known else [
            Job(prompt, 0) for prompt in arguments.prompt or PROMPTS]
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    try:
        outputs, rows = run(llm, jobs, params)
    except PromptRefused as error:
        parser.error(str(error))
    if not known:
        for job, output in zip(jobs, outputs):
            print(f"\n{job.prompt}\x1b[1m{output.outputs[0].text}\x1b[0m" if sys.stdout.isatty() else
                  f"\n{job.prompt}{output.outputs[0].text}")
    print()
    for name, value in rows.items():
        print(f"{name:>24}  {value}")
    if not known:
        return 0
    wrong = [(job, output) for job, output in zip(jobs, outputs) if output.outputs[0].text != job.expected]
    for job, output in wrong:
        print(f"request {output.request_id} went wrong: {output.outputs[0].text!r} instead of {job.expected!r}")
    print(f"\n{len(jobs) - len(wrong)}/{len(jobs)} continuations match the document")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(until_interrupted(main))
