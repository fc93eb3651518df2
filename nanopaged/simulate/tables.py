"""What do the simulator's figures look like, and how are they to be read?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanopaged.report import table
from nanopaged.simulate.simulator import Result, TraceSummary

PAPER = {"paged": "96.3%", "max": "20.4%", "pow2": "26.8%", "oracle": "38.2%"}  # Figure 2: what is `tokens` here
FEW = 100  # of fewer requests the 99th percentile is just the longest

COLUMNS: dict[str, Callable[[Result], object]] = {
    "tokens": lambda result: f"{result.memory['tokens']:.1%}",
    "reserved": lambda result: f"{result.memory['reserved']:.1%}",
    "internal": lambda result: f"{result.memory['internal']:.1%}",
    "external": lambda result: f"{result.memory['external']:.1%}",
    "free": lambda result: f"{result.memory['free']:.1%}",
    "batch": lambda result: result.average_batch,
    "tokens/s": lambda result: result.tokens_per_s,
    "TTFT p50 s": lambda result: result.ttft_p50_s,
    "TTFT p99 s": lambda result: result.ttft_p99_s,
    "TBT p50 s": lambda result: result.tbt_p50_s,
    "TBT p99 s": lambda result: result.tbt_p99_s,
    "TTFT median s": lambda result: result.ttft_p50_s,
    "TTFT longest s": lambda result: result.ttft_max_s,
    "TBT median s": lambda result: result.tbt_p50_s,
    "TBT longest s": lambda result: result.tbt_max_s,
    "preemptions": lambda result: result.counts.num_preemptions,
    "storms": lambda result: result.num_storms,
    "goodput": lambda result: result.goodput,
    "prefix hits": lambda result: f"{result.hit_share:.1%}",
    "table entries": lambda result: result.average_table,
}
MEMORY = ["tokens", "reserved", "internal", "external", "free"]
LATENCY = ["TTFT p50 s", "TTFT p99 s", "TBT p50 s", "TBT p99 s"]
READ_MEMORY = """\
Shares of all KV memory, averaged over the time in which requests arrive. `tokens`: K and V of computed tokens;
higher is better, at most 100%. `reserved`: for tokens that a request will still generate. `internal`: held, and
never used. `external`: not held, but refused to a waiting request. `free`: not held, and no request waits for it."""
READ_SPEED = """\
`batch`: requests in a step; `tokens/s`: generated; higher is better. TTFT, time to first token, and TBT, time between
tokens: lower is better; p50 and p99 are percentiles, replaced by median and longest of fewer than 100 requests.
`goodput`: share of the computed tokens that were computed for the first time; below 1, more requests were admitted
than the pool could hold, and `preemptions` threw work away."""
READ_BLOCK_SIZE = """\
Small blocks waste less and share more, large blocks have shorter block tables. `internal`: the unfilled ends of
blocks, and slots that make no whole block, as a share of all KV memory; lower is better. `prefix hits`: share of the
prompt tokens that were found in the pool; higher is better. `table entries`: length of a request's block table; lower
is better."""
READ_POOL = """\
In how small a pool do eviction storms begin? `storms`: how often goodput over 64 steps fell below 0.8 (see
pressure/storm.py); fewer are better. `goodput`: share of the computed tokens that were computed for the first time;
at most 1. TTFT: time to first token, lower is better. `tokens`: share of that row's memory."""
TABLES = {  # by what is swept: (what a row is, columns, how to read them)
    None: [("server", MEMORY, READ_MEMORY),
           ("server", ["batch", "tokens/s", *LATENCY, "preemptions", "goodput"], READ_SPEED)],
    "block-size": [("block size", ["internal", "prefix hits", "table entries", "tokens", "batch", "tokens/s"],
                    READ_BLOCK_SIZE)],
    "pool": [("slots", ["tokens", "batch", "tokens/s", "TTFT p50 s", "TTFT p99 s", "preemptions", "storms", "goodput"],
              READ_POOL)],
}


def row(sweep: str | None) -> str:
    """What a row of the tables is."""
    return TABLES[sweep][0][0]


def results(by_label: dict[str | int, Result], sweep: str | None, few: bool) -> str:
    """The tables of a sweep, or of several servers; `few`: with the median and the longest instead of percentiles."""
    texts = []
    for rows, columns, explanation in TABLES[sweep]:
        if few:
            columns = [column.replace("p50", "median").replace("p99", "longest") for column in columns]
        cells = [[label, *(COLUMNS[column](result) for column in columns)] for label, result in by_label.items()]
        texts.append(f"\n{table([rows, *columns], cells)}\n\n{explanation}")
    return "\n".join(texts)


def load(summary: TraceSummary, by_label: dict[str | int, Result], sweep: str | None, on_purpose: bool) -> str:
    """What arrives in a second, compared with what the fastest server generates meanwhile."""
    seconds = summary.last_arrival_s - summary.first_arrival_s
    if summary.requests < FEW or seconds == 0:
        return ""  # averages over so short a time say little
    wanted = summary.requests * summary.mean_output / seconds
    fastest, result = max(by_label.items(), key=lambda item: item[1].tokens_per_s)
    text = (f"\n{summary.requests / seconds:.3g} requests arrive a second, and want {wanted:,.0f} tokens a second; the "
            f"fastest ({row(sweep)} {fastest}) generates {result.tokens_per_s:,.0f}")
    if wanted < 1.25 * result.tokens_per_s:
        return f"{text}: it keeps up.\n"
    return (f"{text}.\nThis is overload{' on purpose' * on_purpose}: {wanted / result.tokens_per_s:.1f} times what it "
            f"can do{', so that memory limits every server' * on_purpose}. The time to first\ntoken is mostly time in "
            "the queue; with fewer requests a second, servers keep up.\n")


def beside_the_paper(servers: Sequence[str], contiguous: str, unlike: Sequence[str]) -> str:
    """The paper's figures for servers that are like its own; or, if flags made the run unlike it, which."""
    if unlike:
        return ("Not comparable with the paper's Figure 2, whose load and servers are the defaults: "
                f"{', '.join(unlike)}.")
    alike = [name for name in servers if name == "paged" or contiguous == "buddy"]
    figures = ", ".join(f"{PAPER[name]} for {name}" for name in alike)
    ours = f"The paper's Figure 2 has, as `tokens`, {figures}." if alike else ""
    others = "The other servers are comparable with it under --contiguous buddy." if alike != list(servers) else ""
    return f"{ours} {others}".strip()
