"""What does a frame show, in one sentence? Actor, deed, count and reason, with the figures of that very moment.

`narrate` goes through a recording and gives each frame its caption, the names of what happened in it (what a reader
can jump to), the rule behind it, and, where the reader could have guessed, a question to ask first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nanopaged.show.reading import Event, Line
from nanopaged.show.replay import Frame, State, frames
from nanopaged.show.rules import WHY

LONGEST = 90  # characters of a caption


class Question(NamedTuple):
    """What a reader may guess before a frame is shown."""

    text: str
    choices: list[str]
    answer: int


class Told(NamedTuple):
    frame: Frame
    caption: str
    names: list[str]  # keys of WHY, the most telling first
    why: str  # the rule behind it
    question: Question | None


class Telling:
    """One frame: what its events did, found out while they are applied."""

    def __init__(self, state: State, frame: Frame, labels: dict[str, str]) -> None:
        self.state, self.frame, self.labels = state, frame, labels
        self.clauses: list[tuple[str, str]] = []  # (name, sentence without its full stop)
        self.question: Question | None = None
        self.why = ""  # if it is not the usual one

    def say(self, name: str, sentence: str) -> None:
        self.clauses.append((name, sentence))

    def ask(self, text: str, choices: Sequence[str], answer: int) -> None:
        self.question = self.question or Question(text, [*choices], answer)

    def who(self, *request_ids: str) -> str:
        """Such as "request 3", "requests 3 and 4", or "19 requests"."""
        names = [self.labels[request_id] for request_id in request_ids]
        if len(names) == 1:
            return f"request {names[0]}"
        if len(names) <= 3:
            return f"requests {', '.join(names[:-1])} and {names[-1]}"
        return f"{len(names)} requests"

    def told(self) -> Told:
        getattr(self, "_" + self.frame.kind.replace(" ", "_"))()
        caption, names = "", [name for name, _ in self.clauses]
        for _, sentence in self.clauses:
            sentence = sentence[0].upper() + sentence[1:] + "."
            if caption and len(caption) + 1 + len(sentence) >= LONGEST:
                break
            caption = f"{caption} {sentence}" if caption else sentence
        if len(caption) >= LONGEST:
            caption = caption[: LONGEST - 2] + "…"
        return Told(self.frame, caption, list(dict.fromkeys(names)), self.why or WHY[names[0]], self.question)

    def each(self, *names: str) -> Iterator[Event]:
        """Applies the events, one by one; gives those of these names, each after it was applied."""
        for event in self.frame.events:
            self.state.apply(event)
            if event[0] in names:
                yield event

    # By the kind of the frame.

    def _arrive(self) -> None:
        arrived = [event[1] for event in self.each("add")]
        ids = [line["add"] for line in arrived]
        if len(ids) == 1:
            request = self.state.sequences[ids[0]]
            more = f", {1 + len(arrived[0]['followers'])} continuations wanted" if arrived[0]["followers"] else ""
            self.say("arrives", f"{self.who(*ids)} arrives: {plural(request.length, 'token')} of prompt{more}")
        else:
            self.say("arrives", f"{self.who(*ids)} arrive, {self.labels[ids[0]]} to {self.labels[ids[-1]]}"
                     if len(ids) > 3 else f"{self.who(*ids)} arrive")

    def _wait(self) -> None:
        request_id, reason, *numbers = self.frame.events[0][1:]
        list(self.each())
        if reason == "memory":
            needed, available, found = numbers
            beside = f" beside {found} that it finds" if found else ""
            why = f"it needs {plural(needed, 'block')}{beside}, {are(available)} available" if available < needed else \
                f"{are(available)} available, it needs {needed}, and the policy keeps some to grow into"
        else:
            why = {"seats": "every seat in the batch is taken", "budget": "this step's tokens are used up"}[reason]
        self.say("waits", f"{self.who(request_id)} waits: {why}")

    def _give_back(self) -> None:
        _, victim, needy, needed, available = self.frame.events[0]
        running = [request.request_id for request in self.state.with_status("running")]
        given, free_before = len(self.state.sequences[victim].table), self.state.holders.count(0)
        swapped = len(list(self.each("out")))
        shared = given - (self.state.holders.count(0) - free_before)
        youngest = victim == max(running, key=list(self.state.sequences).index)
        last, free = "the youngest" if youngest else "the last in order", f"{are(available)} free"
        needs = f"{self.who(needy)} needs {plural(needed, 'block')}, {free}"
        deed = "swaps out" if swapped else "gives back"
        what = f"{given - shared} of {given}" if shared else f"{given}"
        long, short = (f"as {last}, it {deed} its own", f"it {deed} its own") if victim == needy else (
            f"{self.who(victim)}, {last}, {deed}", f"{self.who(victim)} {deed}")
        sentence = f"{needs}: {long} {what}"
        self.say("gives way", sentence if len(sentence) < LONGEST - 1 else f"{needs}: {short} {what}")
        if swapped:
            self.say("swaps", f"{plural(swapped, 'block')} move to CPU memory")
        if len(running) > 1:
            self.ask(f"{capital(self.who(needy))} needs a block, and {free}. Who gives way?",
                     ["nobody: it waits", f"the oldest, {self.who(running[0])}", f"{last}, {self.who(victim)}"], 2)

    def _take(self) -> None:
        seated: dict[str, int] = {}  # blocks found
        resumed, takers, blocks, evicted, taken, restored = [], [], [], [], 0, 0
        holder = ""
        for event in self.frame.events:
            name, request_id = event[:2]
            request = self.state.sequences[request_id]
            if name == "seat":
                seated[request_id] = len(event[2])
                if request.preemptions:
                    resumed.append(request_id)
                if event[2] and not holder:
                    holder = self.holder_of(event[2][0], request_id)
            self.state.apply(event)
            evicted += self.state.evicted
            if name == "take" and request_id in seated:
                taken += len(event[2])
            elif name == "take":
                takers.append(request_id)
                blocks += event[2]
            restored += name == "in"
        found = sum(seated.values())
        if seated:
            self._seated(seated, resumed, found, taken, restored, holder)
            if takers and not evicted:
                self.say("takes", f"{self.who(*takers)} {'takes' if len(takers) == 1 else 'take'} {len(blocks)} more")
        elif len(blocks) == 1 and not evicted:
            self.say("takes", f"{self.who(*takers)} takes block {blocks[0]} for its next tokens")
        elif takers and not evicted:
            self.say("takes", f"{self.who(*takers)} {'takes' if len(takers) == 1 else 'take'} "
                     f"{plural(len(blocks), 'block')} for the next tokens")
        if evicted:
            self._evicted(evicted, takers, bool(seated))

    def _evicted(self, evicted: list[int], takers: list[str], beside: bool) -> None:
        """Cached blocks that were reused; `beside` what the caption says of admissions already."""
        blocks = f"cached block {evicted[0]} is" if len(evicted) == 1 else f"{len(evicted)} cached blocks are"
        for_whom = f" for {self.who(*dict.fromkeys(takers))}" if takers and not beside else ""
        self.say("evicts", f"{'' if beside else 'no block is free: '}{blocks} evicted{for_whom}")
        self.ask("No block is free, but some are cached: nobody holds them. Which one is reused?",
                 ["none: a request gives way", "the one used least recently", "the one used most recently"], 1)

    def _seated(self, seated: dict[str, int], resumed: list[str], found: int, taken: int, restored: int,
                holder: str) -> None:
        """Requests that were admitted: what they found, and what they took."""
        one, all_resume = len(seated) == 1, len(resumed) == len(seated)
        name = "resumes" if resumed else "admitted"
        deed = f"{self.who(*seated)} {'resume' if all_resume else 'are admitted'}"
        if one:
            deed = f"{self.who(*seated)} {'resumes' if all_resume else 'is admitted'}"
        parts = []
        if found:
            with_whom = f" beside {holder}" if holder and one and not resumed else ""
            alike = len(seated) > 1 and len(set(seated.values())) == 1
            parts.append(f"each finds {plural(found // len(seated), 'block')}" if alike else
                         f"{plural(found, 'block')} found{with_whom}")
        if restored:
            parts.append(f"{restored} back from CPU memory")
        if taken:
            parts.append(f"{taken if parts else plural(taken, 'block')} taken")
        self.say("shares" if found and not resumed else name, f"{deed}: {', '.join(parts)}" if parts else deed)
        if found and not resumed:
            self.say("admitted", f"{found * self.state.block_size:,} tokens need no computing")
            first = next(request_id for request_id, blocks in seated.items() if blocks)
            self.ask(f"{capital(self.who(first))} is next, and its prompt begins like one that is in the pool. What "
                     "must be computed?", ["all of its prompt", "what is not in the pool", "nothing"], 1)

    def holder_of(self, block: int, other_than: str) -> str:
        """Who else holds a block, in words; "" if nobody does: then it was cached."""
        holders = [request.request_id for request in self.state.with_status("running")
                   if block in request.table and request.request_id != other_than]
        return self.who(*holders) if holders else ""

    def _copy(self) -> None:
        name, request_id, *blocks = self.frame.events[0]
        request = self.state.sequences[request_id]
        source = blocks[0] if name == "copy" else request.table[blocks[0]]
        holders = self.state.holders[source]
        list(self.each())
        if name == "copy":
            self.say("copies", f"{self.who(request_id)} writes into block {source}: held by {holders}, so it gets a "
                     f"copy, block {blocks[1]}")
            self.say("copies", f"×{holders} becomes ×{holders - 1}")
        else:
            self.say("no copy", f"{self.who(request_id)} writes into block {source}: no copy, nobody else holds it")
        self.ask(f"{capital(self.who(request_id))} is about to write into block {source}, which {holders} requests "
                 "hold. What happens?", ["it writes there: the others see it", "it gets a copy of its own",
                                         "it waits until the others are done"], 1) if name == "copy" else None

    def _write(self) -> None:
        decodes, prompts, again = [], [], 0
        for event in self.frame.events:
            _, request_id, start, num_tokens = event
            request = self.state.sequences[request_id]
            again += max(0, min(start + num_tokens, request.most_computed) - start)
            known = request.length
            self.state.apply(event)
            (prompts if num_tokens > 1 or start + num_tokens < known else decodes).append((request_id, num_tokens))
        if prompts:
            tokens = sum(num_tokens for _, num_tokens in prompts)
            who = self.who(*[request_id for request_id, _ in prompts])
            beside = f", while {len(decodes)} decode" if len(decodes) > 1 else \
                f", while {self.who(decodes[0][0])} decodes" if decodes else ""
            verb = "computes" if len(prompts) == 1 else "compute"
            lost = f", {again} of them again" if again else ""
            self.say("computes", f"{who} {verb} {plural(tokens, 'token')}{lost}{beside}")
        elif len(decodes) == 1:
            self.say("computes", f"{self.who(decodes[0][0])} computes its newest token")
        elif decodes:
            self.say("computes", f"{self.who(*[request_id for request_id, _ in decodes])} compute a token each")

    def _record(self) -> None:
        ended, started, full, twins, gained = [], [], [], [], []
        cached_before = free_before = given = 0
        for event in self.frame.events:
            name = event[0]
            if name == "back":
                given += len(self.state.sequences[event[1]].table)
            if name == "end" and not ended:
                cached_before = sum(map(self.state.is_cached, self.state.published))
                free_before = sum(holders == 0 for holders in self.state.holders) - cached_before
            if name == "twin":
                twins.append((event[1], self.state.sequences[event[1]].table[event[2]], event[3]))
            self.state.apply(event)
            if name == "end":
                ended.append(event[1])
            elif name == "start":
                started.append(event[1:])
            elif name == "publish":
                full.append(self.state.sequences[event[1]].table[event[2]])
            elif name == "token":
                gained.append(event[1])
        if ended:
            self._ended(ended, given, cached_before, free_before)
        if started:
            leader = self.who(started[0][1])
            more = "another continuation" if len(started) == 1 else f"{len(started)} more continuations"
            verb = "starts" if len(started) == 1 else "start"
            self.say("starts", f"{more} of {leader} {verb}, from the same blocks")
        if twins:
            who, own, twin = twins[0]
            self.say("duplicate", f"block {own} equals block {twin}: {self.who(who)} holds {twin} instead")
        if full and len(full) <= 2:
            self.say("publishes", f"block {full[0]} is full, and can be found" if len(full) == 1 else
                     f"blocks {full[0]} and {full[1]} are full, and can be found")
        elif full:
            self.say("publishes", f"{len(full)} blocks are full, and can be found")
        if not self.clauses:
            self.say("computes", f"{self.who(*gained)} {'gains a token' if len(gained) == 1 else 'gain a token each'}"
                     if gained else "the computed tokens are recorded: more of the prompt is to come")

    def _ended(self, ended: list[str], given: int, cached_before: int, free_before: int) -> None:
        cached = sum(map(self.state.is_cached, self.state.published))
        free = sum(holders == 0 for holders in self.state.holders) - cached
        stay, gone = cached - cached_before, free - free_before
        kept = given - stay - gone
        parts = [f"{number} {one if number == 1 else many}" for number, one, many in (
            (stay, "stays cached", "stay cached"), (gone, "is free", "are free"),
            (kept if len(ended) == 1 else 0, "is still held", "are still held")) if number]
        verb = "is done" if len(ended) == 1 else "are done"
        name = "finishes"
        reason = self.state.sequences[ended[0]].reason
        if reason in ("abort", "error"):
            name = "aborted"
            verb = {"abort": "is aborted", "error": "ends with an error"}[reason]
        of = f"its {plural(given, 'block')}" if len(ended) == 1 else "their blocks"
        rest = f": of {of} {', '.join(parts)}" if given else ", and held no block"
        self.say(name, f"{self.who(*ended)} {verb}{rest}")
        if stay and gone and len(ended) == 1:
            self.ask(f"{capital(self.who(*ended))} has its last token. What becomes of its blocks?",
                     ["all are free, and erased", "full ones stay cached, the others are free",
                      "they stay reserved for it"], 1)

    _abort = _record

    def _fail(self) -> None:
        list(self.each())
        self.say("fails", f"the step failed ({self.frame.events[0][1]})"[: LONGEST - 22] + ": nothing is lost")

    def _storm(self) -> None:
        list(self.each())
        self.say("storm", "eviction storm: work is thrown away nearly as fast as it is done")
        self.why = f"{WHY['storm']} {self.frame.events[0][1]}."


def narrate(header: Line, lines: Iterator[Line],
            before: Callable[[State, Frame], None] = lambda state, frame: None) -> Iterator[tuple[State, Told]]:
    """Each frame with its caption, and the state after it. `before` is told each frame and the state before it."""
    state, labels = State(header), {}
    for frame in frames(lines):
        for event in frame.events:
            if event[0] == "add":
                line = event[1]
                members = [line["add"], *line["followers"]]
                labels |= {member: member if len(members) > 1 else line["group"] for member in members}
        before(state, frame)
        yield state, Telling(state, frame, labels).told()


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def are(number: int) -> str:
    return {0: "none is", 1: "1 is"}.get(number, f"{number} are")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
