"""python -m nanopaged.simulate: paging beside contiguous reservation, on one trace and in one memory.

Repeats Figure 2 of the vLLM paper (Kwon et al., SOSP 2023) with the real scheduler and no model. The
defaults are the paper's: 15,700 slots of KV memory and contexts of at most 2,048 tokens, its OPT-13B on an
A100 with 40 GB. Requests arrive faster than any of the servers can answer, so that memory is what limits
them all; lower --rate to see the latencies of servers that keep up.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from nanopaged import traces
from nanopaged.admission import policy
from nanopaged.block_allocator import BlockAllocator
from nanopaged.contiguous import RESERVATIONS, ContiguousAllocator, ContiguousScheduler
from nanopaged.report import main, show_progress, table
from nanopaged.simulator import Clock, PagedServer, Result, Server, StepCost, Trace, TraceSummary, simulate, summarize
from nanopaged.validation import require_int

# Arrivals a second: about three times what can be served in steps of the default StepCost.
RATES = {"sharegpt": 0.4, "alpaca": 7.5}
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POOL_SHARES = (0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cost = StepCost()
    requests = parser.add_argument_group("requests")
    requests.add_argument("--dataset", choices=sorted(traces.DATASETS), default="sharegpt",
                          help="whose length statistics to draw from (default: %(default)s)")
    requests.add_argument("--requests", type=int, default=2000, help="how many (default: %(default)s)")
    requests.add_argument("--rate", type=float, help="Poisson arrivals a second (default: by dataset, "
                          f"{', '.join(f'{name} {rate:g}' for name, rate in RATES.items())}; "
                          "a quarter of that for --sweep pool, so that a pool can be large enough)")
    requests.add_argument("--shared-prefix", type=float, metavar="SHARE", help="share of each prompt that is one of "
                          f"{traces.NUM_SHARED_PREFIXES} common beginnings (default: 0; 0.5 for --sweep block-size)")
    requests.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    requests.add_argument("--trace", metavar="FILE", help="a trace of your own instead: one JSON object a line, such as "
                          '{"arrival_s": 0.25, "prompt": 161, "output_tokens": 338}, where prompt may also be a list '
                          "of token ids")
    server = parser.add_argument_group("servers")
    server.add_argument("--servers", nargs="+", choices=["paged", *RESERVATIONS], default=["paged", *RESERVATIONS],
                        metavar="NAME", help="of paged, max, pow2, oracle (default: all)")
    server.add_argument("--slots", type=int, default=15_700, help="KV memory, in tokens (default: %(default)s)")
    server.add_argument("--max-num-seqs", type=int, default=256, help="requests in a step (default: %(default)s)")
    server.add_argument("--max-num-batched-tokens", type=int, default=2048, help="(default: %(default)s)")
    server.add_argument("--max-model-len", type=int, default=2048, help="prompt and output (default: %(default)s)")
    paged = parser.add_argument_group("paging")
    paged.add_argument("--block-size", type=int, default=16, help="slots in a block (default: %(default)s)")
    paged.add_argument("--admission", choices=["watermark", "reserve", "greedy"], default="watermark",
                       help="whom to let in, see admission.py (default: %(default)s)")
    paged.add_argument("--watermark", type=float, default=0.01, help="share of blocks kept free (default: %(default)s)")
    paged.add_argument("--swap-blocks", type=int, default=0,
                       help="in CPU memory, for preempted requests; their copying costs no time here (default: %(default)s)")
    paged.add_argument("--sweep", choices=["block-size", "pool"], help="instead: paging alone, over many of these")
    seconds = parser.add_argument_group("seconds of a step, see StepCost")
    seconds.add_argument("--fixed-s", type=float, default=cost.fixed_s, help="(default: %(default)s)")
    seconds.add_argument("--per-token-s", type=float, default=cost.per_token_s, help="(default: %(default)s)")
    seconds.add_argument("--per-kv-token-s", type=float, default=cost.per_kv_token_s, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Runs what was asked for, prints its table, and returns its figures."""
    logging.getLogger("nanopaged.storm").setLevel(logging.ERROR)  # storms are provoked here, and counted
    cost = StepCost(args.fixed_s, args.per_token_s, args.per_kv_token_s)
    require_int("slots", args.slots, 1)
    require_int("block_size", args.block_size, 1, args.slots)
    trace = chosen_trace(args)
    summary = summarize(trace)
    print(f"{summary.requests:,} requests of {summary.mean_prompt:.0f} prompt and {summary.mean_output:.0f} output tokens "
          f"on average, in {summary.last_arrival_s:,.0f} s; {args.slots:,} slots of KV memory.\n"
          f"A step takes {cost.fixed_s * 1e3:g} ms, and {cost.per_token_s * 1e3:g} ms for each token computed, and "
          f"{cost.per_kv_token_s * 1e3:g} ms for each token of context read.\n")
    show = {None: compare, "block-size": sweep_block_size, "pool": sweep_pool}[args.sweep]
    results = show(args, partial(timed, trace, summary, cost))
    return {"trace": summary._asdict(), "step_cost": asdict(cost), "results": results}


def chosen_trace(args: argparse.Namespace) -> Trace:
    if args.trace:
        return partial(traces.read, args.trace, args.max_model_len)
    if args.rate is None:
        args.rate = RATES[args.dataset] / (4 if args.sweep == "pool" else 1)
    if args.shared_prefix is None:
        args.shared_prefix = 0.5 if args.sweep == "block-size" else 0.0
    return partial(traces.generate, traces.DATASETS[args.dataset], args.requests, args.rate, args.max_model_len,
                   args.shared_prefix, args.seed)


def make_server(args: argparse.Namespace, name: str, clock: Clock, slots: int, block_size: int) -> Server:
    """An empty server: "paged", or one of `RESERVATIONS`."""
    limits = args.max_num_seqs, args.max_num_batched_tokens, args.max_model_len
    if name == "paged":
        return PagedServer(BlockAllocator(slots // block_size, block_size), *limits,
                           policy(args.admission, args.watermark), args.swap_blocks, clock=clock)
    return ContiguousScheduler(ContiguousAllocator(slots), RESERVATIONS[name], *limits, clock=clock)


Timed = Callable[[str, Callable[[Clock], Server]], tuple[Result, dict[str, object]]]


def timed(trace: Trace, summary: TraceSummary, cost: StepCost, name: str,
          make: Callable[[Clock], Server]) -> tuple[Result, dict[str, object]]:
    """One server's run: its result, and the same as plain figures, with the real seconds that it took."""
    clock, start = Clock(), time.perf_counter()

    def progress(finished: int) -> None:
        show_progress(f"{name}: {finished:,} of {summary.requests:,} requests, {time.perf_counter() - start:.0f} s")

    result = simulate(trace, summary.last_arrival_s, make(clock), clock, cost, progress)
    return result, {**asdict(result), "wall_s": time.perf_counter() - start}


def compare(args: argparse.Namespace, timed: Timed) -> dict[str, object]:
    """Figure 2, and what it means for the users."""
    rows, figures = [], {}
    for name in args.servers:
        result, figures[name] = timed(name, lambda clock: make_server(args, name, clock, args.slots, args.block_size))
        rows.append((name, result))
    show_progress("")
    print("Share of all KV memory, averaged over the time in which requests arrive:\n")
    print(table(["server", "tokens", "reserved", "internal", "external", "free"],
                [[name, *(f"{share:.1%}" for share in result.memory.values())] for name, result in rows]))
    print("\n`tokens` holds computed K and V: higher is better, 100% is the ceiling. `reserved` waits for tokens that its\n"
          "request will still generate, `internal` is never used, `external` is free but was refused to a request that\n"
          "waits, `free` is wanted by nobody.\n")
    print(table(["server", "batch", "tokens/s", "first token p50 s", "p99 s", "between tokens p50 s", "p99 s", "preemptions",
                 "goodput", "seconds to simulate"],
                [[name, result.average_batch, result.tokens_per_s, result.ttft_p50_s, result.ttft_p99_s, result.tbt_p50_s,
                  result.tbt_p99_s, result.counts.num_preemptions, result.goodput, figures[name]["wall_s"]]
                 for name, result in rows]))
    print("\nA larger `batch` and more generated `tokens/s` are better, and shorter times. `goodput` is the share of computed\n"
          "tokens that were computed for the first time: below 1 the pool let in more than it could hold.")
    return figures


def sweep_block_size(args: argparse.Namespace, timed: Timed) -> dict[str, object]:
    """Small blocks waste less and share more; large ones make short block tables."""
    rows, figures = [], {}
    for size in BLOCK_SIZES:
        result, figures[str(size)] = timed(f"blocks of {size}",
                                           lambda clock: make_server(args, "paged", clock, args.slots, size))
        rows.append([size, args.slots // size, f"{result.memory['tokens']:.1%}", f"{result.memory['internal']:.1%}",
                     f"{result.hit_share:.1%}", result.average_table, result.average_batch, result.tokens_per_s,
                     result.counts.num_preemptions, result.goodput])
    show_progress("")
    print(table(["block size", "blocks", "tokens", "internal waste", "prompt tokens shared", "table entries", "batch",
                 "tokens/s", "preemptions", "goodput"], rows))
    print("\n`tokens`, `shared`, `batch`, `tokens/s`, `goodput`: higher is better. `internal waste`, the unfilled ends of blocks, as\n"
          "a share of all KV memory, and `table entries`, the length of a request's block table: lower is better.")
    return figures


def sweep_pool(args: argparse.Namespace, timed: Timed) -> dict[str, object]:
    """Where does the storm begin? The same requests, in pools from 0.15 to 2 times --slots."""
    rows, figures = [], {}
    for share in POOL_SHARES:
        slots = int(args.slots * share)
        result, figures[str(slots)] = timed(f"{slots:,} slots",
                                            lambda clock: make_server(args, "paged", clock, slots, args.block_size))
        counts = result.counts
        rows.append([slots, slots // args.block_size, f"{result.memory['tokens']:.1%}", result.average_batch,
                     result.tokens_per_s, result.ttft_p50_s, result.ttft_p99_s, counts.num_preemptions, counts.num_storms,
                     result.goodput])
    show_progress("")
    print(table(["slots", "blocks", "tokens", "batch", "tokens/s", "first token p50 s", "p99 s", "preemptions", "storms",
                 "goodput"], rows))
    print("\nA storm begins when goodput over 64 steps falls below 0.8 (storm.py): fewer are better. The other columns as\n"
          "without --sweep; `tokens` is a share of that row's memory.")
    return figures


if __name__ == "__main__":
    command = argparse.ArgumentParser(prog="python -m nanopaged.simulate", description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(command)
    sys.exit(main(command, run))
