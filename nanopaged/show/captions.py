"""What does a frame show, in one sentence? Actor, deed, count and reason, with the figures of that very moment.

`narrate` goes through a recording and gives each frame its caption, the names of what happened in it (what a reader
can jump to), the rule behind it, and, where the reader could have guessed, a question to ask first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nanopaged.show.reading import Event, Line
from nanopaged.show.replay import Frame, State, frames, labels
from nanopaged.show.rules import WHY

LONGEST = 90  # characters of a caption
ENDS = {"finishes": ("stop", "length"), "aborted": ("abort",), "error": ("error",)}  # finish reasons
VERBS = {"finishes": ("is done", "are done"), "aborted": ("is aborted", "are aborted"),
         "error": ("ends with an error", "end with an error")}


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
        self.also: list[str] = []  # names of what happened, and is told with something else

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
        caption, names = "", []
        for name, sentence in self.clauses:
            sentence = sentence[0].upper() + sentence[1:] + "."
            if caption and len(caption) + 1 + len(sentence) >= LONGEST:
                break
            caption = f"{caption} {sentence}" if caption else sentence
            names.append(name)
        names += self.also
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

    def _begin(self) -> None:
        ids = [event[1]["add"] for event in self.each("add")]
        running = len(self.state.with_status("running"))
        self.say("begins", f"the recording begins: {self.who(*ids)} {'is' if len(ids) == 1 else 'are'} here, "
                 f"{running} {'runs' if running == 1 else 'run'}")

    def _wait(self) -> None:
        request_id, reason, *numbers = self.frame.events[0][1:]
        list(self.each())
        if reason == "memory":
            needed, available, found = numbers
            beside = f" beside {found} that it finds" if found else ""
            why = f"it needs {plural(needed, 'block')}{beside}, {are(available)} available" if available < needed else \
                f"{are(available)} available, it needs {needed}, and the policy keeps some to grow into"
        elif reason == "seats":
            needed, available = numbers
            why = f"it needs {plural(needed, 'seat')} in the batch, {are(available)} free"
        else:
            why = "this step's tokens are used up"
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
            self.also.append("swaps")
            self.why = f"{WHY['gives way'].partition('. ')[0]}. {WHY['swaps']}"
        if victim not in (needy, running[0]):  # else several answers would be right
            self.ask(f"{capital(self.who(needy))} needs a block, and {free}. Who gives way?",
                     ["nobody: it waits", f"the oldest, {self.who(running[0])}", f"{last}, {self.who(victim)}"], 2)

    def _take(self) -> None:
        seated: dict[str, int] = {}  # blocks that each found
        resumed, restored, holder = 0, 0, ""
        taken: dict[str, list[int]] = {}  # blocks, by request
        evicted: dict[str, list[int]] = {}  # those of them that were cached
        for event in self.frame.events:
            name, request_id = event[:2]
            if name == "seat":
                seated[request_id] = len(event[2])
                resumed += self.state.sequences[request_id].preemptions > 0
                holder = holder or (self.holder_of(event[2][0], request_id) if event[2] else "")
            self.state.apply(event)
            if name in ("take", "in"):
                restored += name == "in"
                taken.setdefault(request_id, []).extend(event[2] if name == "take" else [event[3]])
                if self.state.evicted:
                    evicted.setdefault(request_id, []).extend(self.state.evicted)
        others = {request_id: blocks for request_id, blocks in taken.items() if request_id not in seated}
        if seated:
            num_taken = sum(len(taken.get(request_id, ())) for request_id in seated)
            self._seated(seated, resumed, num_taken, restored, holder)
        if evicted:
            self._evicted(evicted, taken, bool(seated))
        elif others:
            blocks = [block for blocks in others.values() for block in blocks]
            which = f"block {blocks[0]}" if len(blocks) == 1 else plural(len(blocks), "block")
            verb = "takes" if len(others) == 1 else "take"
            self.say("takes", f"{self.who(*others)} {verb} {which} for the next tokens")

    def _evicted(self, evicted: dict[str, list[int]], taken: dict[str, list[int]], beside: bool) -> None:
        """Cached blocks that were reused; `beside` what the caption says of admissions already."""
        blocks = [block for blocks in evicted.values() for block in blocks]
        free = sum(map(len, taken.values())) - len(blocks)
        which = f"cached block {blocks[0]} is" if len(blocks) == 1 else f"{len(blocks)} cached blocks are"
        before = "" if beside else f"{plural(free, 'free block')} first, then " if free else "no block is free: "
        self.say("evicts", f"{before}{which} evicted" + ("" if beside else f" for {self.who(*evicted)}"))
        self.ask("No more block is free, but some are cached: nobody holds them. Which one is reused?",
                 ["none: a request gives way", "the one used least recently", "the one used most recently"], 1)

    def _seated(self, seated: dict[str, int], resumed: int, taken: int, restored: int, holder: str) -> None:
        """Requests that were admitted: what they found, and what they took."""
        found, number = sum(seated.values()), len(seated)
        if 0 < resumed < number:
            deed = f"{resumed} {'request resumes' if resumed == 1 else 'requests resume'}, " \
                   f"{number - resumed} {'is' if number - resumed == 1 else 'are'} admitted"
        else:
            deed = f"{self.who(*seated)} " + (("resumes" if number == 1 else "resume") if resumed else
                                              ("is admitted" if number == 1 else "are admitted"))
        parts = []
        if found and number > 1 and len(set(seated.values())) == 1:
            parts.append(f"each finds {plural(found // number, 'block')}")
        elif found:
            with_whom = f" beside {holder}" if holder and number == 1 and not resumed else ""
            parts.append(f"{plural(found, 'block')} found{with_whom}")
        if restored:
            parts.append(f"{restored} back from CPU memory")
            self.why = WHY["swaps"]
        if taken > restored:
            parts.append(f"{taken - restored if parts else plural(taken - restored, 'block')} taken")
        name = "resumes" if resumed else "shares" if found else "admitted"
        self.say(name, f"{deed}: {', '.join(parts)}" if parts else deed)
        self.also += ["admitted"] * (resumed < number) + ["swaps"] * (restored > 0)
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
                free_before = self.state.holders.count(0) - cached_before
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
            self.say("gains", f"{self.who(*gained)} {'gains a token' if len(gained) == 1 else 'gain a token each'}"
                     if gained else "the computed tokens are recorded: more of the prompt is to come")

    def _ended(self, ended: list[str], given: int, cached_before: int, free_before: int) -> None:
        cached = sum(map(self.state.is_cached, self.state.published))
        free = self.state.holders.count(0) - cached
        stay, gone = cached - cached_before, free - free_before
        parts = [f"{number} {one if number == 1 else many}" for number, one, many in (
            (stay, "stays cached", "stay cached"), (gone, "is free", "are free"),
            (given - stay - gone if len(ended) == 1 else 0, "is still held", "are still held")) if number]
        rest = ", and held no block"
        if given:
            of = f"its {plural(given, 'block')}" if len(ended) == 1 else "their blocks"
            rest = f": of {of} {', '.join(parts)}"
        how = {reason: [request_id for request_id in ended if self.state.sequences[request_id].reason in reasons]
               for reason, reasons in ENDS.items()}
        for name, who in how.items():
            if who:
                verb = VERBS[name][len(who) > 1]
                self.say(name, f"{self.who(*who)} {verb}{rest if len(who) == len(ended) else ''}")
        if stay and gone and len(how["finishes"]) == len(ended) == 1:
            self.ask(f"{capital(self.who(*ended))} has its last token. What becomes of its blocks?",
                     ["all are free, and erased", "full ones stay cached, the others are free",
                      "they stay reserved for it"], 1)

    _abort = _record

    def _fail(self) -> None:
        list(self.each())
        self.say("fails", f"the step failed ({self.frame.events[0][1]})"[: LONGEST - 22] + ": nothing is lost")

    def _storm(self) -> None:
        list(self.each())
        _, cause, again, computed, steps = self.frame.events[0]
        self.say("storm", f"eviction storm: {again} of the {computed} tokens of the last {steps} steps were computed "
                 "again")
        self.why = f"{WHY['storm']} {cause}."


def narrate(header: Line, lines: Iterator[Line],
            before: Callable[[State, Frame], None] = lambda state, frame: None) -> Iterator[tuple[State, Told]]:
    """Each frame with its caption, and the state after it. `before` is told each frame and the state before it."""
    state, names = State(header), {}
    for frame in frames(lines):
        for event in frame.events:
            if event[0] == "add":
                names |= labels(event[1])
        before(state, frame)
        yield state, Telling(state, frame, names).told()


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def are(number: int) -> str:
    return {0: "none is", 1: "1 is"}.get(number, f"{number} are")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
