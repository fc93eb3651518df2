"""What really happened in a run? Every decision of the scheduler, written down while it runs.

    with record(llm, "run.jsonl"):
        llm.generate(...)

A recording is a file of JSON lines: a header, and then one line for each request that arrived, each step, and each
request that was aborted between steps. docs/recording.md describes them. `show.replay` makes the block tables and
counts of every moment from these lines alone.

How it is done: while it records, the scheduler's class is one with `_Recorded` in front of it, whose methods note what
is about to happen and call the scheduler's own. The core knows nothing of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

from nanopaged.block_allocator import blocks_for
from nanopaged.request import Request, RequestStatus
from nanopaged.scheduler import Scheduler
from nanopaged.show.reading import FORMAT, VERSION, Event, Line
from nanopaged.step import Step

if TYPE_CHECKING:
    from nanopaged.engine import LLM
    from nanopaged.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@contextmanager
def record(engine: LLM | Scheduler, path: str, text: bool = True) -> Iterator[Recorder]:
    """Records what an engine, or a scheduler with no engine, does inside the `with`.

    Args:
        path: the file to write. What is in it is replaced.
        text: False leaves out what requests say: prompts, outputs and their token ids.

    Raises OSError if the file cannot be opened. If it cannot be written later, that is logged, and the engine goes on.
    Raises ValueError if the engine is recorded already.
    """
    scheduler = getattr(engine, "scheduler", engine)
    if isinstance(scheduler, _Recorded):
        raise ValueError("this engine is being recorded already: end that recording first")
    recorder = Recorder(scheduler, open(path, "w", encoding="utf-8"), getattr(engine, "tokenizer", None), text)
    recorder.begin_with(engine)
    plain = type(scheduler)
    scheduler.recorder = recorder
    scheduler.__class__ = type(f"Recorded{plain.__name__}", (_Recorded, plain), {})
    logits_of = getattr(engine, "logits_of", None)
    if logits_of is not None:
        engine.logits_of = recorder.timed(logits_of)
    try:
        yield recorder
    finally:
        if logits_of is not None:
            engine.logits_of = logits_of
        scheduler.__class__ = plain
        del scheduler.recorder
        recorder.finish_step(recorded=False)
        recorder.close()


class Recorder:
    """Collects the events of a step, and writes a line when it is over."""

    def __init__(self, scheduler: Scheduler, file: TextIO, tokenizer: Tokenizer | None, text: bool) -> None:
        self.scheduler, self.file, self.tokenizer, self.text = scheduler, file, tokenizer, text
        self.step: Line | None = None  # that was planned, and is not recorded yet
        self.events: list[Event] = []  # since the last line, or since the plan
        self.later: list[Line] = []  # requests that arrived since the plan
        self.num_steps = 0
        self.known_texts: set[int] = set()  # token ids whose text is in the file
        self.needing: Request | None = None  # that others give way to
        self.refused: list[Any] | None = None
        self.subject: Request | None = None  # whose blocks are moved
        self.forward: tuple[float, float] | None = None  # when the model began and ended
        self.is_broken = False  # the file cannot be written

    def begin_with(self, engine: LLM | Scheduler) -> None:
        """The header, and the requests that are there already."""
        scheduler, pool = self.scheduler, self.scheduler.allocator
        stats = pool.stats()
        self.write({
            "format": FORMAT, "version": VERSION, "text": self.text, "num_blocks": pool.num_blocks,
            "block_size": pool.block_size, "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens, "max_model_len": scheduler.max_model_len,
            "swap_blocks": scheduler.swap_space.num_blocks if hasattr(scheduler, "swap_space") else 0,
            "t": scheduler.clock(), "cached": sorted(pool.cached_blocks()),
            "published": [block for block in range(pool.num_blocks) if pool.is_published(block)],
            "counts": {"evicted_blocks": stats.evicted_blocks, "prefix_hit_tokens": stats.prefix_hit_tokens,
                       **vars(scheduler.stats)},
            "unrecorded": self.unrecorded()})
        for request in [*scheduler.running, *scheduler.waiting]:
            self.added(request)
        self.num_storms = self.storms_so_far()

    def unrecorded(self) -> Line:
        """What a step has done that failed before the recording began; the next one counts it as its own."""
        step = self.scheduler._unrecorded or Step(0)
        return {"preempted": len(step.preempted),
                "admitted": [[admission.request.num_prompt_tokens if admission.is_first else 0, admission.hit_tokens,
                              admission.restored_tokens] for admission in step.admitted]}

    def added(self, request: Request) -> None:
        """A request arrived; or it was there when the recording began, and then it says how far it has come."""
        token_ids = request.token_ids
        line = {"add": request.request_id, "group": request.group_id, "t": self.scheduler.clock(),
                "prompt": self.tokens(token_ids[: request.num_prompt_tokens]), "max_length": request.max_length,
                "n": request.params.n, "followers": [follower.request_id for follower in request.followers]}
        if request.status is RequestStatus.RUNNING or request.metrics.preemptions:
            swapped = getattr(self.scheduler, "swapped", {}).get(request)
            line |= {"output": self.tokens(request.output_token_ids), "status": request.status.value,
                     "computed": request.num_computed_tokens, "most_computed": request.most_computed_tokens,
                     "table": request.block_table.tolist(), "preemptions": request.metrics.preemptions,
                     "swapped_blocks": len(swapped.blocks) if swapped else 0}
        line |= self.texts_of(token_ids)
        if self.step is None:
            self.write(line)
        else:  # a step is planned, and may still be recorded: its line comes first
            self.later.append(line)

    def tokens(self, token_ids: list[int]) -> list[int] | int:
        """What the file says of tokens: their ids, or only how many they are."""
        return list(token_ids) if self.text else len(token_ids)

    def texts_of(self, token_ids: Iterable[int]) -> Line:
        """The texts of ids that the file does not have yet: their bytes, each as the character of its number."""
        if not self.text or self.tokenizer is None or self.known_texts.issuperset(token_ids):
            return {}
        fresh = sorted(set(token_ids) - self.known_texts)
        self.known_texts.update(fresh)
        return {"texts": {token_id: self.tokenizer.bytes_of(token_id).decode("latin-1") for token_id in fresh}}

    def begin_step(self) -> None:
        self.finish_step(recorded=False)
        self.num_steps += 1
        self.refused = self.forward = None
        self.step = {"step": self.num_steps, "t": self.scheduler.clock(), "recorded": False}

    def planned(self, step: Step) -> None:
        plan = zip(step.requests, step.starts, step.num_tokens)
        self.step |= {"plan": [[request.request_id, start, num_tokens] for request, start, num_tokens in plan],
                      "events": self.events, "planned_t": self.scheduler.clock()}
        self.events = []
        if waits := self.why_the_first_waits(step):
            self.step["waits"] = waits

    def why_the_first_waits(self, step: Step) -> list[Any] | None:
        """[request id, reason, needed, available], of seats, or of blocks: then also how many it finds in the pool."""
        scheduler = self.scheduler
        if not scheduler.waiting:
            return None
        first = scheduler.waiting.first()
        if self.refused and self.refused[0] == first.request_id:
            return self.refused
        if any(event[0] == "preempt" for event in self.step["events"]):
            return [first.request_id, "preempted"]  # nobody is admitted in a step that took blocks from others
        if scheduler.committed_seats + first.num_seats > scheduler.max_num_seqs:
            return [first.request_id, "seats", first.num_seats, scheduler.max_num_seqs - scheduler.committed_seats]
        return [first.request_id, "budget"]

    def timed(self, logits_of: Any) -> Any:
        """The same function; notes when it begins and ends, and what it raises."""
        def timed_logits_of(step: Step) -> Any:
            start = self.scheduler.clock()
            try:
                return logits_of(step)
            except BaseException as error:
                if self.step is not None:
                    self.step["error"] = f"{type(error).__name__}: {error}"
                raise
            finally:
                self.forward = start, self.scheduler.clock()

        return timed_logits_of

    def finish_step(self, recorded: bool, computed_t: float = 0.0, gained: Sequence[Event] = (),
                    failed: Sequence[str] = ()) -> None:
        """Writes the step that was planned, if there is one, or what has happened between steps."""
        line, events = self.step, self.events
        self.step, self.events = None, []
        if line is None:
            if events:
                self.write({"events": events, "t": self.scheduler.clock()})
            return
        if recorded:
            planned_t, now = line.pop("planned_t"), self.scheduler.clock()
            start, end = self.forward or (planned_t, computed_t)
            line |= {"recorded": True, "tokens": gained, "after": events,
                     "seconds": [round(seconds, 7) for seconds in (
                         planned_t - line["t"], start - planned_t, end - start, computed_t - end, now - computed_t)]}
            if failed:
                line["failed"] = list(failed)
            if self.storms_so_far() > self.num_storms:
                self.num_storms = self.storms_so_far()
                watch = self.storm_watch()
                line["storm"] = [watch.cause(), watch.window.recomputed_tokens, watch.window.computed_tokens,
                                 len(watch.steps)]
        elif events:
            line["after" if "plan" in line else "events"] = events  # a policy raised in the middle of planning
        line.pop("planned_t", None)
        for each in (line, *self.later):
            self.write(each)
        self.later = []

    def recorded(self, step: Step, computed_t: float, failed: Iterable[Request]) -> None:
        sampled = [request for _, request in step.sampled]
        gained = [[request.request_id, request.token_ids[-1] if self.text else 0] for request in sampled]
        if self.step is not None:
            self.step |= self.texts_of([request.token_ids[-1] for request in sampled])
        self.finish_step(True, computed_t, gained, [request.request_id for request in failed])

    def storm_watch(self) -> Any:
        """The listener that counts eviction storms, if there is one."""
        return next((listener for listener in self.scheduler.listeners if hasattr(listener, "num_storms")), None)

    def storms_so_far(self) -> int:
        return getattr(self.storm_watch(), "num_storms", 0)

    def note(self, *event: Any) -> None:
        self.events.append([*event])

    def write(self, line: Line) -> None:
        if self.is_broken:
            return
        try:
            self.file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self.file.flush()  # so that it is complete up to a crash
        except OSError as error:
            self.give_up(error)

    def close(self) -> None:
        try:
            self.file.close()  # tries once more to write what could not be written
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        if not self.is_broken:
            logger.error("the recording ends here, since %s cannot be written: %s", self.file.name, error)
        self.is_broken = True


class _Recorded:
    """In front of a scheduler's class: notes what its methods do, in the order in which they do it."""

    recorder: Recorder

    def add(self, request: Request) -> None:
        super().add(request)
        self.recorder.added(request)

    def schedule(self) -> Step:
        self.recorder.begin_step()
        step = super().schedule()
        self.recorder.planned(step)
        return step

    def update(self, step: Step, token_ids: Mapping[Request, int], stopped: Container[Request] = (),
               failed: Mapping[Request, str] = MappingProxyType({})) -> None:
        computed_t = self.clock()
        super().update(step, token_ids, stopped, failed)
        self.recorder.recorded(step, computed_t, failed)

    def abort(self, request: Request) -> None:
        self.recorder.finish_step(recorded=False)
        super().abort(request)
        self.recorder.finish_step(recorded=False)

    def _fits(self, request: Request, prefix: list[int], budget: int) -> bool:
        fits = super()._fits(request, prefix, budget)
        if not fits:
            unheld = sum(self.allocator.ref_count(block) == 0 for block in prefix)
            needed = blocks_for(len(request.token_ids), self.block_size) - len(prefix)
            self.recorder.refused = [request.request_id, "memory", needed, self.allocator.num_available - unheld,
                                     len(prefix)]
        return fits

    def _seat(self, request: Request, prefix: list[int]) -> None:
        restored = self._restorable_tokens(request, len(prefix) * self.block_size)
        self.recorder.note("seat", request.request_id, list(prefix), restored)
        self.recorder.subject = request
        super()._seat(request, prefix)

    def _make_room(self, request: Request, end: int, step: Step) -> bool:
        recorder, table = self.recorder, request.block_table
        missing, shares_tail = blocks_for(end, self.block_size) - len(table), self._shares_tail(request)
        may_share = request.may_share_tail and request.num_computed_tokens % self.block_size
        recorder.needing, recorder.subject, held = (request, max(0, missing) + shares_tail), request, len(table)
        num_events = len(recorder.events)
        made = super()._make_room(request, end, step)
        if made:
            copied = any(event[0] == "copy" for event in recorder.events[num_events:])
            if may_share and not copied:
                recorder.note("keep", request.request_id, request.num_computed_tokens // self.block_size)
            if len(table) > held:
                recorder.note("take", request.request_id, table[held:].tolist())
        return made

    def _preempt(self, request: Request, step: Step) -> None:
        needing, needed = self.recorder.needing
        self.recorder.note("preempt", request.request_id, needing.request_id, needed, self.allocator.num_available)
        subject, self.recorder.subject = self.recorder.subject, request
        super()._preempt(request, step)
        self.recorder.subject = subject

    def _leave(self, request: Request) -> None:
        self.recorder.note("back", request.request_id)
        super()._leave(request)

    def _move(self, kind: str, source: int, target: int) -> None:
        self.recorder.note({"copy": "copy", "to_host": "out", "to_pool": "in"}[kind],
                           self.recorder.subject.request_id, source, target)
        super()._move(kind, source, target)

    def _publish(self, request: Request, i: int) -> None:
        before = request.block_table[i]
        super()._publish(request, i)
        after = request.block_table[i]
        if after != before:
            self.recorder.note("twin", request.request_id, i, after)
        elif self.allocator.is_published(after):
            self.recorder.note("publish", request.request_id, i)

    def _start_followers(self, leader: Request) -> None:
        for follower in leader.followers:
            self.recorder.note("start", follower.request_id, leader.request_id)
        super()._start_followers(leader)

    def _finish(self, request: Request, reason: str) -> None:
        self.recorder.note("end", request.request_id, reason)
        super()._finish(request, reason)
