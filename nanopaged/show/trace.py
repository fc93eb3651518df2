"""Where did a run's time go? A recording in the trace-event format, which Perfetto and chrome://tracing open.

    engine        │ step 7 ............................. │   │ step 8 ...
                  │ schedule │ model ........ │ record │     │ ...
    request 3.0   │ waiting ...............................│ prefill ... │ decode ...
    request 4.0   │ decode ..................│             a slice lasts until the next begins

The format has no name for a state, so each change of a request's state ends one slice and begins another. Times are
whole microseconds: fractions would be rounded by the reader, and two slices that touch might then overlap, which
Perfetto refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nanopaged.show.reading import Event, Line
from nanopaged.show.replay import Frame, Sequence, State, frames

PHASES = ("schedule", "copy blocks", "model", "sample", "record")  # of a step, as in line["seconds"]
ENGINE, REQUESTS = 1, 2  # processes, which the viewers show as groups of tracks
FIRST_REQUEST_TRACK = 3  # a viewer takes a track with the number of its process for the main one


def write_trace(lines: Iterable[Line], path: str) -> None:
    """Writes the trace of a recording's lines, the header first. Raises OSError if the file cannot be written."""
    text = json.dumps(trace(lines), separators=(",", ":"))  # first: what is no recording leaves no file
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")


def trace(lines: Iterable[Line]) -> dict[str, Any]:
    """A recording's lines, the header first, as one object of the format. A recording that was cut off has one too."""
    lines = iter(lines)
    tracer = _Tracer(next(lines))
    for frame in frames(lines):
        tracer.follow(frame)
    return tracer.finished()


@dataclass
class _Slice:
    """What a request has been doing since `start`."""

    name: str
    start: int
    args: Line = field(default_factory=dict)


class _Tracer:
    """Replays a recording, and writes down what is seen of it."""

    def __init__(self, header: Line) -> None:
        self.state, self.zero, self.now = State(header), header["t"], 0  # now in microseconds
        self.names: list[Line] = []  # of tracks
        self.events: list[Line] = []
        self.tracks: dict[str, int] = {}
        self.slices: dict[str, _Slice] = {}  # of the requests that have not ended
        self.group("engine", ENGINE)
        self.group("requests", REQUESTS)
        self.track("engine", ENGINE, ENGINE)

    def follow(self, frame: Frame) -> None:
        """One frame; what the scheduler decides happens when its step begins."""
        if frame.kind in ("record", "fail"):
            self.begin_step(frame)
        elif frame.kind not in ("begin", "arrive"):
            self.advance(frame.line["t"])
        for event in frame.events:
            self.state.apply(event)
            self.mark(event)
        if frame.kind in ("record", "abort"):
            self.count()

    def advance(self, t: float) -> int:
        """To a time of the recording; never back, since its seconds are rounded."""
        self.now = max(self.now, round((t - self.zero) * 1e6))
        return self.now

    def begin_step(self, frame: Frame) -> None:
        """Of a step that was recorded also its phases, which take the time to its end."""
        line = frame.line
        start, is_recorded = self.advance(line["t"]), frame.kind == "record"
        plan = {request_id: row for request_id, *row in line["plan"]} if is_recorded else {}
        for request_id in self.slices:
            self.change(self.state.sequences[request_id], plan.get(request_id), line["step"])
        if is_recorded:
            seconds, bounds = line["t"], [start]
            for phase in line["seconds"]:
                seconds += phase
                bounds.append(self.advance(seconds))
            args = {"requests": len(plan), "tokens": sum([num_tokens for _, num_tokens in plan.values()])}
            if "waits" in line:
                args["first waiting"] = line["waits"]
            self.slice(f"step {line['step']}", start, self.now, ENGINE, args)
            for name, begin, end in zip(PHASES, bounds, bounds[1:]):
                self.slice(name, begin, end, ENGINE)

    def change(self, request: Sequence, planned: list[int] | None, step: int) -> None:
        """What a request does from here on; decoding goes on in the same slice, each chunk of a prefill has its own."""
        name, piece = _doing(request, planned), self.slices[request.request_id]
        if name != piece.name or name == "prefill":
            self.close(request.request_id)
            piece = self.slices[request.request_id] = _Slice(name, self.now)
        if planned:
            piece.args = {"first step": piece.args.get("first step", step), "last step": step,
                          "tokens": piece.args.get("tokens", 0) + planned[1]}

    def mark(self, event: Event) -> None:
        """What is seen of one event, which has just been applied."""
        match event:
            case ["add", line]:
                self.advance(line["t"])
                for request_id in (line["add"], *line["followers"]):
                    self.tracks[request_id] = FIRST_REQUEST_TRACK + len(self.tracks)
                    self.track(f"request {request_id}", REQUESTS, self.tracks[request_id])
                    request = self.state.sequences[request_id]
                    self.slices[request_id] = _Slice(_doing(request, None), self.now)
            case ["preempt", request_id, for_whom, needed, available]:
                self.instant("preemption", request_id, {
                    "for request": for_whom, "blocks needed": needed, "blocks available": available})
            case ["copy", request_id, source, target]:
                self.instant("copy", request_id, {"from block": source, "to block": target})
            case ["end", request_id, reason]:
                self.close(request_id, {"ended": reason})
                del self.slices[request_id]
            case ["storm", cause, *_]:
                self.instant("storm", None, {"cause": cause})
            case ["fail", why]:
                self.instant("failed step", None, {"error": why})
        if self.state.evicted:
            self.instant("eviction", event[1], {"blocks": self.state.evicted})

    def close(self, request_id: str, more: Line | None = None) -> None:
        piece = self.slices[request_id]
        self.slice(piece.name, piece.start, self.now, self.tracks[request_id], piece.args | (more or {}))

    def count(self) -> None:
        """The pool's slots, which add up to all of them, and the requests."""
        figures, size = self.state.figures(), self.state.block_size
        self.counter("slots", {
            "computed tokens": figures["filled_slots"], "unfilled": figures["reserved_slots"] - figures["filled_slots"],
            "cached": figures["cached_blocks"] * size, "free": figures["free_blocks"] * size})
        self.counter("requests", {"running": figures["num_running"], "waiting": figures["num_waiting"]})

    def finished(self) -> dict[str, Any]:
        """The trace; what is still going on ends with the recording."""
        for request_id in self.slices:
            self.close(request_id)
        self.events.sort(key=lambda event: event["ts"])  # stable: a step stands before its phases
        return {"traceEvents": self.names + self.events, "displayTimeUnit": "ms"}

    def group(self, name: str, process: int) -> None:
        self.names += [
            {"ph": "M", "name": "process_name", "pid": process, "tid": process, "args": {"name": name}},
            {"ph": "M", "name": "process_sort_index", "pid": process, "tid": process, "args": {"sort_index": process}}]

    def track(self, name: str, process: int, track: int) -> None:
        self.names += [
            {"ph": "M", "name": "thread_name", "pid": process, "tid": track, "args": {"name": name}},
            {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": track, "args": {"sort_index": track}}]

    def slice(self, name: str, start: int, end: int, track: int, args: Line | None = None) -> None:
        """One of less than a microsecond is left out."""
        if end > start:
            self.event("X", name, start, track, args, dur=end - start)

    def instant(self, name: str, request_id: str | None, args: Line) -> None:
        """Something that happened to a request, or, in a line across all tracks, to everybody."""
        self.event("i", name, self.now, ENGINE if request_id is None else self.tracks[request_id], args,
                   s="g" if request_id is None else "t")

    def counter(self, name: str, values: dict[str, int]) -> None:
        self.event("C", name, self.now, ENGINE, values)

    def event(self, kind: str, name: str, ts: int, track: int, args: Line | None, **more: object) -> None:
        process = ENGINE if track == ENGINE else REQUESTS
        event = {"ph": kind, "name": name, "ts": ts, "pid": process, "tid": track, **more}
        self.events.append(event | {"args": args} if args else event)


def _doing(request: Sequence, planned: list[int] | None) -> str:
    """The name of a request's slice; `planned` is [start, number of tokens] if the step computes some of it."""
    if request.status != "running":
        return "swapped" if request.swapped_blocks else request.status
    if planned is None:
        return "idle"  # the step's budget has left it out, or the step failed
    start, num_tokens = planned
    return "decode" if num_tokens == 1 and start >= request.prompt_length else "prefill"
