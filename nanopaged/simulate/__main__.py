"""python -m nanopaged.simulate: paging compared with contiguous reservation, on one trace, in the same memory.

Repeats Figure 2 of the vLLM paper (Kwon et al., SOSP 2023) with the real scheduler and no model. The
defaults are the paper's: 15,700 slots of KV memory and contexts of at most 2,048 tokens, its OPT-13B on an
A100 with 40 GB. Requests arrive faster than any of the servers can answer them, so that memory is what
limits them all; lower --rate to see the latencies of servers that keep up.

Try a policy here before you use it in the engine: --order and --admission take the names of those in
nanopaged/pressure/, or a function of your own as module:function. If mine.py in this directory has

    def longest_first(request):                  # a nanopaged.request.Request
        return -request.params.max_tokens        # the lowest number is served first

    def up_to_half(context):                     # a nanopaged.waiting.AdmissionContext
        return context.available > context.pool // 2

then --order mine:longest_first and --admission mine:up_to_half run them.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial, wraps

from nanopaged.validation import has_folder

if __name__ == "__main__" and not has_folder("pressure"):  # before it is imported
    sys.stderr.write("python -m nanopaged.simulate: error: this needs the folder nanopaged/pressure/, which is "
                     "missing: restore it\n")
    sys.exit(2)

from nanopaged.block_allocator import BlockAllocator
from nanopaged.pressure.admission import by_name as admission_by_name
from nanopaged.pressure.order import by_name as order_by_name
from nanopaged.progress import show_progress, time_left
from nanopaged.report import main
from nanopaged.simulate import tables, traces
from nanopaged.simulate.contiguous import ALLOCATORS, RESERVATIONS, ContiguousScheduler
from nanopaged.simulate.simulator import (SHORTEST_STEP_S, Clock, PagedServer, Server, StepCost, SwappingServer, Trace,
                                          as_request, simulate, summarize)
from nanopaged.simulate.traces import TraceRequest
from nanopaged.validation import require_choice, require_number, shown
from nanopaged.waiting import AdmissionPolicy, OrderPolicy, PolicyError

# Arrivals a second: two to three times what can be served in steps of the default StepCost.
RATES = {"sharegpt": 0.8, "alpaca": 15.0}
DEFAULT_REQUESTS = 2000  # without --sweep
ADMISSIONS = ("watermark", "reserve", "greedy")
ORDERS = ("fcfs", "priority", "shortest")
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POOL_SHARES = (0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)
ALLOWED: dict[str, tuple[float, ...]] = {  # of each number: at least this, and at most that
    "requests": (1,), "rate": (1e-6,), "shared_prefix": (0.0, 1.0), "slots": (1,), "max_num_seqs": (1,),
    "max_num_batched_tokens": (1,), "max_model_len": (2,), "block_size": (1,), "watermark": (0.0, 1.0),
    "swap_blocks": (0,), "fixed_s": (SHORTEST_STEP_S, 1000.0), "per_token_s": (0.0, 1000.0),
    "per_kv_token_s": (0.0, 1000.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cost = StepCost()
    requests = parser.add_argument_group("requests")
    requests.add_argument("--dataset", choices=sorted(traces.DATASETS),
                          help="draw lengths with the statistics of this data set (default: sharegpt)")
    requests.add_argument("--requests", type=int, help=f"how many (default: {DEFAULT_REQUESTS}; 1000 for --sweep)")
    requests.add_argument("--rate", type=float, help="Poisson arrivals a second (default: by dataset, "
                          f"{', '.join(f'{name} {rate:g}' for name, rate in RATES.items())}; "
                          "a quarter of that for --sweep pool, so that a pool can be large enough)")
    requests.add_argument("--shared-prefix", type=float, metavar="SHARE", help="share of each prompt that is one of "
                          f"{traces.NUM_SHARED_PREFIXES} common prefixes (default: 0; 0.5 for --sweep block-size)")
    requests.add_argument("--seed", type=int, help="of lengths and arrivals (default: 0)")
    requests.add_argument("--trace", metavar="FILE", help="serve the requests of this file instead: one JSON object a "
                          'line, such as {"arrival_s": 0.25, "prompt": 161, "output_tokens": 338}; prompt may be a '
                          'list of token ids, and "priority": 1 may be added, for --order priority')
    server = parser.add_argument_group("servers")
    server.add_argument("--servers", nargs="+", choices=["paged", *RESERVATIONS], metavar="NAME",
                        help="of paged, max, pow2, oracle (default: all)")
    server.add_argument("--order", default="fcfs", metavar="NAME", help="which waiting request every server serves "
                        f"first: {', '.join(ORDERS)} or module:function; shortest knows the true lengths here "
                        "(default: %(default)s)")
    server.add_argument("--contiguous", choices=ALLOCATORS, help="how max, pow2 and oracle allocate their ranges; the "
                        "paper's used buddy (default: first-fit)")
    server.add_argument("--slots", type=int, default=15_700, help="KV memory, in tokens (default: %(default)s)")
    server.add_argument("--max-num-seqs", type=int, default=256, help="requests in a step (default: %(default)s)")
    server.add_argument("--max-num-batched-tokens", type=int, default=2048,
                        help="tokens in a step (default: %(default)s)")
    server.add_argument("--max-model-len", type=int, default=2048,
                        help="prompt plus output, in tokens (default: %(default)s)")
    paged = parser.add_argument_group("paging")
    paged.add_argument("--block-size", type=int, help="slots in a block (default: 16)")
    paged.add_argument("--admission", default="watermark", metavar="NAME", help="when a waiting request is admitted: "
                       f"{', '.join(ADMISSIONS)} or module:function; reserve knows the true lengths here "
                       "(default: %(default)s)")
    paged.add_argument("--watermark", type=float, default=0.01,
                       help="share of the blocks that the policy of this name keeps free (default: %(default)s)")
    paged.add_argument("--swap-blocks", type=int, default=0, help="blocks of CPU memory for preempted requests; "
                       "copying takes no time here (default: %(default)s)")
    paged.add_argument("--record", metavar="FILE", help="write each step of the paged server here, for "
                       "python -m nanopaged.show")
    paged.add_argument("--sweep", choices=["block-size", "pool"], help="compare many block sizes, or pools, instead")
    seconds = parser.add_argument_group("seconds of a step")
    seconds.add_argument("--fixed-s", type=float, default=cost.fixed_s, help="of every step (default: %(default)s)")
    seconds.add_argument("--per-token-s", type=float, default=cost.per_token_s,
                         help="for each token that is computed (default: %(default)s)")
    seconds.add_argument("--per-kv-token-s", type=float, default=cost.per_kv_token_s,
                         help="for each token of context that is read (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Simulates the chosen servers, prints their tables, and returns their figures."""
    for name, allowed in ALLOWED.items():
        if getattr(args, name) is not None:
            require_number(flag(name), getattr(args, name), *allowed)
    cost = StepCost(args.fixed_s, args.per_token_s, args.per_kv_token_s)
    trace, clock = chosen_trace(args), Clock()
    make = partial(make_server, args, clock, chosen_admission(args), chosen_order(args))
    servers = {label: make(*server) for label, server in chosen_servers(args).items()}
    start, results = time.perf_counter(), {}
    summary = summarize(partial(fitting, trace, servers, args))  # all of it fits, or nothing is simulated
    with recording(args, servers):
        for i, (label, server) in enumerate(servers.items()):
            def progress(finished: int) -> None:
                share = (i + finished / summary.requests) / len(servers)
                show_progress(f"{label}: {finished:,} of {summary.requests:,} requests; "
                              f"all: {time_left(share, time.perf_counter() - start)}")

            try:
                results[label] = simulate(trace, summary.last_arrival_s, server, clock, cost, progress)
            except PolicyError as error:  # for the user to fix: one line, no traceback
                raise error.__cause__ if isinstance(error.__cause__, WrongAnswer) else ValueError(error) from error
    wall_s = time.perf_counter() - start
    show_progress("")
    print(f"{summary.requests:,} requests in {summary.last_arrival_s - summary.first_arrival_s:,.0f} s, of "
          f"{summary.mean_prompt:.0f} prompt and {summary.mean_output:.0f} output tokens on average; "
          f"{args.slots:,} slots of KV memory, each for one token.\n"
          f"A step takes {cost.fixed_s * 1e3:g} ms, and {cost.per_token_s * 1e3:g} ms for each token computed, and "
          f"{cost.per_kv_token_s * 1e3:g} ms for each token of context read.\nSimulated in {wall_s:.1f} s.")
    on_purpose = args.trace is None and args.rate == RATES[args.dataset]
    print(tables.load(summary, results, args.sweep, on_purpose), end="")
    print(tables.results(results, args.sweep, summary.requests < tables.FEW))
    if not args.sweep:
        print(f"\n{tables.beside_the_paper(args.servers, args.contiguous, unlike_the_paper(args))}")
    return {"trace": summary._asdict(), "step_cost": asdict(cost), "wall_s": wall_s,
            "results": {label: asdict(result) for label, result in results.items()}}


def unlike_the_paper(args: argparse.Namespace) -> list[str]:
    """The flags that change the load or the servers; the defaults are the paper's."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paper = parser.parse_args([])
    chosen_trace(paper), chosen_servers(paper)  # settle what depends on others
    return [flag(name) for name, value in vars(paper).items()
            if name not in ("seed", "servers", "contiguous", "record") and getattr(args, name) not in (None, value)]


def chosen_trace(args: argparse.Namespace) -> Trace:
    if args.trace is not None:
        refuse_beside(args, "--trace", "dataset", "requests", "rate", "shared_prefix", "seed")
        return partial(traces.read, args.trace, args.max_model_len)
    settle(args, dataset="sharegpt", requests=1000 if args.sweep else DEFAULT_REQUESTS, seed=0,
           shared_prefix=0.5 if args.sweep == "block-size" else 0.0)
    settle(args, rate=RATES[args.dataset] / (4 if args.sweep == "pool" else 1))
    return partial(traces.generate, traces.DATASETS[args.dataset], args.requests, args.rate, args.max_model_len,
                   args.shared_prefix, args.seed)


def chosen_servers(args: argparse.Namespace) -> dict[str | int, tuple[str, int, int]]:
    """By the first cell of its row in the tables: (name, slots, block size)."""
    if args.sweep:
        refuse_beside(args, f"--sweep {args.sweep}", "servers", "contiguous", "record")
    if args.sweep == "block-size":
        refuse_beside(args, "--sweep block-size", "block_size")
        return {size: ("paged", args.slots, size) for size in BLOCK_SIZES}
    settle(args, block_size=16)
    if args.sweep == "pool":
        return {int(share * args.slots): ("paged", int(share * args.slots), args.block_size) for share in POOL_SHARES}
    settle(args, servers=["paged", *RESERVATIONS], contiguous="first-fit")
    if args.record is not None and "paged" not in args.servers:
        raise ValueError("--record writes what the paged server does, and --servers has only "
                         f"{', '.join(args.servers)}: add paged")
    return {name: (name, args.slots, args.block_size) for name in args.servers}


def refuse_beside(args: argparse.Namespace, option: str, *others: str) -> None:
    """Raises ValueError if any of the others, which have no effect beside this option, was given."""
    given = [flag(other) for other in others if getattr(args, other) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} would have no effect beside {option}: give one or the other")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settle(args: argparse.Namespace, **defaults: object) -> None:
    """Fills in the default of each option that was not given, so that the arguments say what was run."""
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})


def chosen_admission(args: argparse.Namespace) -> AdmissionPolicy:
    if args.admission in ADMISSIONS:
        return admission_by_name(args.admission, args.watermark)
    return own_policy("--admission", args.admission, ADMISSIONS, partial(require_choice, allowed=(True, False)))


def chosen_order(args: argparse.Namespace) -> OrderPolicy:
    if args.order in ORDERS:
        return order_by_name(args.order)
    return own_policy("--order", args.order, ORDERS, partial(require_number, minimum=-math.inf))


def recording(args: argparse.Namespace, servers: dict[str | int, Server]) -> AbstractContextManager[object]:
    """Of the paged server, if one was asked for. Its file is opened before anything is simulated."""
    if args.record is None:
        return nullcontext()
    if not has_folder("show"):
        raise ValueError("--record needs the folder nanopaged/show/, which is missing: restore it")
    from nanopaged.show.recording import record

    return record(servers["paged"], args.record, text=False)  # prompts have no words here


class WrongAnswer(ValueError):
    """What a user's policy returned is no answer."""


def own_policy(option: str, text: str, names: tuple[str, ...],
               required: Callable[[str, object], object]) -> Callable[[object], object]:
    """The function that `text`, module:function, names; each of its answers is checked by `required`.

    Raises ValueError if there is no such function.
    """
    module_name, colon, name = text.partition(":")
    if not colon:
        raise ValueError(f"{option} must be one of {', '.join(names)}, or module:function, got {text!r}")
    try:
        module = importlib.import_module(module_name)  # from the current directory too, where `python -m` looks first
    except Exception as error:  # anything that the module raises
        raise ValueError(f"{option} {text}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{option} {text}: the module {module_name!r} has no function {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{option} {text} must be a function, got {shown(function)}")

    @wraps(function)
    def checked(subject: object) -> object:
        answer = function(subject)
        try:
            return required(f"what {option} {text} returns", answer)
        except (TypeError, ValueError) as error:
            raise WrongAnswer(error) from None

    return checked


def make_server(args: argparse.Namespace, clock: Clock, admission: AdmissionPolicy, order: OrderPolicy, name: str,
                slots: int, block_size: int) -> Server:
    """An empty server: "paged", or one of `RESERVATIONS`."""
    limits = args.max_num_seqs, args.max_num_batched_tokens, args.max_model_len
    if name != "paged":
        return ContiguousScheduler(ALLOCATORS[args.contiguous](slots), RESERVATIONS[name], *limits, clock, order)
    num_blocks, left_over = divmod(slots, block_size)
    if num_blocks == 0:
        raise ValueError(f"{slots:,} slots make no block of {block_size:,}: raise --slots, or choose smaller blocks")
    kind = partial(SwappingServer, swap_blocks=args.swap_blocks) if args.swap_blocks else PagedServer
    server = kind(BlockAllocator(num_blocks, block_size), *limits, admission, order, clock=clock)
    server.left_over = left_over
    return server


def fitting(trace: Trace, servers: dict[str | int, Server], args: argparse.Namespace) -> Iterator[TraceRequest]:
    """The same trace. Raises ValueError, naming the request, if one could never run on one of these servers."""
    for number, arrival in enumerate(trace(), 1):
        request = as_request(arrival, number)
        for label, server in servers.items():
            if (needed := server.slots_for(request)) > server.longest:
                where = f"request {number}" if args.trace is None else f"{args.trace}, line {number}"
                raise ValueError(
                    f"{where}: {len(arrival.prompt)} prompt and {arrival.output_tokens} output tokens need {needed:,} "
                    f"slots, and a request can have at most {server.longest:,} ({tables.row(args.sweep)} {label}): "
                    "raise --slots")
        yield arrival


if __name__ == "__main__":
    logging.getLogger("nanopaged.pressure.storm").setLevel(logging.ERROR)  # storms are provoked here, and counted
    command = argparse.ArgumentParser(prog="python -m nanopaged.simulate", description=__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(command)
    sys.exit(main(command, run))
