"""Which small runs show one idea each? Scenes for the movie, played by a real engine, with copycat as its model.

Each has a pool of 24 to 32 blocks, prompts whose right continuations are known, and one thing to see. They are
recorded as they run, and every answer is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from nanopaged.progress import show_progress
from nanopaged.sampling_params import SamplingParams
from nanopaged.show.movie import pool_scene
from nanopaged.show.recording import record

if TYPE_CHECKING:
    from nanopaged.engine import LLM

GREETING = "You are the clerk of a small library, kind to all who write; answer in few words. "
CAT_OR_BAT = ("In the garden sat a cat, black as the night. In the garden sat a bat, black as the night. "
              "In the garden sat a")


class Arrival(NamedTuple):
    """A request that arrives before the given step (the first is 0), and what it may be continued with."""

    step: int
    prompt: str
    params: SamplingParams
    expected: tuple[str, ...]  # each continuation must be one of these, and each must occur


@dataclass(frozen=True)
class Scene:
    title: str
    intro: str
    arrivals: list[Arrival]
    num_blocks: int = 24
    options: dict[str, object] = field(default_factory=dict)  # of LLM


def round_and_round(step: int, passage: str, tokens: int, before: str = "", cue: int = 18) -> Arrival:
    """A prompt that begins to repeat itself: copycat goes on repeating the passage, for so many tokens."""
    expected = (passage * (1 + (cue + tokens) // len(passage)))[cue : cue + tokens]
    params = SamplingParams(temperature=0, max_tokens=tokens)
    return Arrival(step, before + passage + passage[:cue], params, (expected,))


SCENES = [
    Scene("growth", "Requests grow a token at a time, and take a block only when the last one is full. Blocks lie "
          "wherever there is room: the block table keeps the order. Watch request 3: it comes when others have left.", [
              round_and_round(0, "She kept a card for every family, and on it she wrote. ", 20),
              round_and_round(0, "The pages of a story lie in every corner. ", 70),
              round_and_round(4, "A town kept its letters in a library once. ", 60),
              round_and_round(26, "So the shelves stood mostly empty, and the doors were shut. ", 40)]),
    Scene("two lengths", "Nobody knows in advance how long a request becomes. Here one writes 96 tokens and others 8. "
          "Each wastes at most the end of its last block. The next scene shows what contiguous memory does with such "
          "requests.", [
              round_and_round(0, "The long one goes on and on, as the rain does. ", 96),
              round_and_round(0, "Short ones come and go. ", 8),
              round_and_round(12, "Another short one comes and goes. ", 8),
              round_and_round(30, "And one more, not long at all. ", 8)]),
    Scene("a shared prefix", "Four prompts begin with the same words. The first computes them; the others, which "
          "come later, find its full blocks, hold them too, and compute only what is their own.", [
              round_and_round(0, "Dear clerk, where is the blue book? ", 24, GREETING),
              round_and_round(2, "Dear clerk, when do you open today? ", 24, GREETING),
              round_and_round(2, "Dear clerk, who took my umbrella? ", 24, GREETING),
              round_and_round(4, "Dear clerk, do you have any maps? ", 24, GREETING)]),
    Scene("copy-on-write", "One prompt, three continuations. They share all blocks, even the last one, which is not "
          "full. The first that writes into it gets a copy, and so does the second. Then the third has it for "
          "itself.", [
              Arrival(0, CAT_OR_BAT, SamplingParams(n=3, seed=3, temperature=2.0, max_tokens=24),
                      (" cat, black as the night", " bat, black as the night"))]),
    Scene("cached, found, evicted", "When a request ends, its full blocks stay: cached, held by nobody. A request "
          "with the same beginning finds them. Only when no block is free are they used for others, the least recently "
          "used first.", [
              round_and_round(0, "Dear clerk, where is the blue book? ", 12, GREETING),
              round_and_round(14, "Dear clerk, when do you open today? ", 12, GREETING),
              round_and_round(28, "A stranger writes on and on, of wind and of rain and of the sea. ", 90),
              round_and_round(28, "Another tells of mountains that nobody ever climbed in winter. ", 90)]),
    Scene("full", "The pool is full, and a request needs one more block. The youngest running request gives way, "
          "waits, and resumes when there is room. It keeps its words. What of its K and V is still in the pool by "
          "then is found again, the rest is computed again.", [
              round_and_round(0, "On busy nights every box in the library was taken by dusk. ", 64),
              round_and_round(0, "The family that had come last was asked to wait in the hall. ", 64),
              round_and_round(0, "Careful counting makes good use of the room that there is. ", 64),
              round_and_round(3, "If too many come at once, they fetch and carry all night. ", 40),
              round_and_round(6, "Late guests stand in the hall and read the notices there. ", 24)],
          options={"watermark": 0.0}),
]


def play(llm: LLM, arrivals: Iterable[Arrival]) -> list[str]:
    """Serves requests as they arrive. Returns a sentence for each that was continued with the wrong words."""
    wanted = sorted(arrivals, key=lambda arrival: arrival.step)
    expected: dict[str, tuple[str, ...]] = {}
    wrong, step = [], 0
    while wanted or llm.has_unfinished_requests():
        while wanted and wanted[0].step <= step:
            arrival = wanted.pop(0)
            expected[llm.add_request(arrival.prompt, arrival.params)] = arrival.expected
        for output in llm.step():
            if output.finished:
                texts = {completion.text for completion in output.outputs}
                if texts != set(expected[output.request_id]):
                    wrong.append(f"request {output.request_id} went wrong: {sorted(texts)} instead of "
                                 f"{sorted(expected[output.request_id])}")
        step += 1
    return wrong


def record_all(make_llm: Callable[..., LLM]) -> tuple[list[dict[str, object]], list[str]]:
    """Plays and records each scene. Returns them as scenes of a page, and a sentence for each wrong answer.

    `make_llm` makes an engine, with the given options of LLM.
    """
    shown, wrong = [], []
    log = logging.getLogger("nanopaged")
    level = log.level
    log.setLevel(logging.ERROR)  # a storm is provoked here, and shown
    with TemporaryDirectory() as folder:
        for number, scene in enumerate(SCENES, 1):
            show_progress(f"scene {number} of {len(SCENES)}: {scene.title}")
            llm = make_llm(num_blocks=scene.num_blocks, max_num_batched_tokens=256, **scene.options)
            path = f"{folder}/{number}.jsonl"
            with record(llm, path):
                wrong += [f"scene {number} ({scene.title}): {sentence}" for sentence in play(llm, scene.arrivals)]
            shown.append(pool_scene(path, scene.title, scene.intro))
    log.setLevel(level)
    show_progress("")
    return shown, wrong
