"""How close is paged attention to the speed of memory, and what do scattered blocks cost?

For each shape: the time of our attention over scattered blocks, of torch's `scaled_dot_product_attention`
over the same K and V laid out contiguously, and of a plain copy that moves as many bytes. Decoding reads
each request's K and V once, so their bytes divided by the bandwidth of a large copy are its floor.

With --tune: for each shape, the time with our choice of tiles, stages, warps and parts, and with the best of others.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from nanopaged.attention_arguments import RaggedBatch
from nanopaged.attention_kernels import INTERPRETED, triton
from nanopaged.bench.inputs import uniform_batch
from nanopaged.bench.timing import copy_bandwidth, copy_seconds, device_name, num_input_sets, seconds
from nanopaged.bench.tune import ALTERNATIVES, Tuned, tune
from nanopaged.paged_attention import TRITON, Choice, choice_for, num_multiprocessors, paged_attention_triton
from nanopaged.progress import show_progress
from nanopaged.report import table
from nanopaged.torch_attention import TORCH, AttentionBackend
from nanopaged.validation import require_int, require_number

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}  # between two attentions


@dataclass(frozen=True)
class Shape:
    """A batch: `requests` contexts of `context` tokens, of which the last `queries` are computed."""

    requests: int
    queries: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def kv_bytes(self) -> int:
        return 2 * self.requests * self.context * self.kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize


GPU_SHAPES = [  # GPT-2 124M; a long context; grouped-query heads as in models of 8 billion parameters; prompts
    *(Shape(requests, 1, 1024, 12, 12, 64, "float16") for requests in (1, 8, 64, 256)),
    Shape(256, 1, 200, 12, 12, 64, "float16"),
    Shape(256, 1, 1024, 12, 12, 64, "bfloat16"),
    Shape(256, 1, 1024, 12, 12, 64, "float32"),
    Shape(1, 1, 65536, 12, 12, 64, "float16"),
    Shape(1, 1, 65536, 32, 8, 128, "float16"),
    Shape(64, 1, 4096, 32, 8, 128, "float16"),
    Shape(64, 1, 4096, 32, 32, 128, "float16"),
    Shape(8, 1024, 1024, 12, 12, 64, "float16"),
    Shape(1, 2048, 8192, 32, 8, 128, "float16"),
]
CPU_SHAPES = [
    *(Shape(requests, 1, 120, 12, 12, 64, "float32") for requests in (1, 8, 64)),
    Shape(4, 1, 1024, 12, 12, 64, "float32"),
    Shape(4, 1, 1024, 12, 2, 64, "float32"),
    Shape(1, 256, 256, 12, 12, 64, "float32"),
]


@dataclass(frozen=True)
class Timing:
    """Times in seconds; `share` of the bandwidth that a large copy reaches."""

    shape: Shape
    paged_s: float
    contiguous_s: float
    copy_s: float
    share: float


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, RaggedBatch, float]  # q, k_cache, v_cache, batch, scale


def random_inputs(shape: Shape, block_size: int, device: torch.device) -> list[Inputs]:
    """What paged attention takes: several sets of it, so that none is in a cache when its turn comes."""
    dtype, rng = getattr(torch, shape.dtype), torch.Generator(device).manual_seed(0)
    blocks_each = -(-shape.context // block_size)
    num_blocks = shape.requests * blocks_each

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng, device=device, dtype=torch.float32).to(dtype)

    sets = []
    for _ in range(num_input_sets(shape.kv_bytes)):
        q = random(shape.requests * shape.queries, shape.heads, shape.head_dim)
        k_cache, v_cache = (random(num_blocks, shape.kv_heads, block_size, shape.head_dim) for _ in range(2))
        tables = torch.randperm(num_blocks, generator=rng, device=device).int().view(shape.requests, blocks_each)
        sets.append((q, k_cache, v_cache, uniform_batch(tables, shape.queries, shape.context), shape.head_dim**-0.5))
    return sets


def measure(shape: Shape, block_size: int, attention: AttentionBackend, device: torch.device,
            bandwidth: float) -> Timing:
    """Raises RuntimeError if the two attentions differ."""
    allowed = None  # the last part of a longer context: is_causal counts from the context's beginning, not its end
    if 1 < shape.queries < shape.context:
        allowed = causal_lower_right(shape.queries, shape.context)
    paged, contiguous = [], []
    for inputs in random_inputs(shape, block_size, device):
        q, k_cache, v_cache, batch, _ = inputs
        k, v = (cache[batch.block_tables.long()].transpose(2, 3).flatten(1, 2)[:, : shape.context].transpose(1, 2)
                .contiguous() for cache in (k_cache, v_cache))  # (requests, kv_heads, context, head_dim)
        rows = q.view(shape.requests, shape.queries, shape.heads, shape.head_dim).transpose(1, 2).contiguous()
        paged.append(lambda inputs=inputs: attention.paged_attention(*inputs))
        contiguous.append(lambda q=rows, k=k, v=v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None and shape.queries > 1,
            enable_gqa=shape.heads != shape.kv_heads))
    ours = paged[0]().view(shape.requests, shape.queries, shape.heads, shape.head_dim).transpose(1, 2)
    difference = (ours.float() - contiguous[0]().float()).abs().max().item()
    if not difference < TOLERANCE[shape.dtype]:
        raise RuntimeError(f"paged and contiguous attention differ by {difference} for {shape}")
    paged_s = seconds(paged, device)
    return Timing(shape, paged_s, seconds(contiguous, device), copy_seconds(shape.kv_bytes, device),
                  shape.kv_bytes / paged_s / bandwidth)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block (default: %(default)s)")
    parser.add_argument("--shape", action="append", metavar="REQUESTS,QUERIES,CONTEXT,HEADS,KV_HEADS,HEAD_DIM,DTYPE",
                        help="a batch to measure, such as 8,1,1024,12,12,64,float16; may be repeated")
    parser.add_argument("--tune", type=float, nargs="?", const=280.0, metavar="SECONDS", help="instead: try other "
                        "choices of tiles, stages, warps and parts for each shape, for so long (280 s unless given)")


def run(args: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_int("--block-size", args.block_size, 8, 256)
    shapes = [parse_shape(text) for text in args.shape or ()]
    if args.tune is not None:
        return _tune_all(shapes, args.block_size, device, require_number("--tune", args.tune, 0.0))
    shapes = shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    attention = TRITON if device.type == "cuda" and triton is not None and not INTERPRETED else TORCH
    bandwidth = copy_bandwidth(device)
    print(f"On {device_name(device)}; a large copy moves {bandwidth / 1e9:,.0f} GB/s, read and written.")
    if attention is TORCH:
        print("There is no CUDA device: paged is the torch path, which gathers each context; the kernels need a GPU.")
    timings = []
    for i, shape in enumerate(shapes):
        show_progress(f"{i} of {len(shapes)} shapes")
        try:
            timings.append(measure(shape, args.block_size, attention, device, bandwidth))
        except RuntimeError as error:  # out of memory, say: time on a GPU is too expensive to lose the other shapes
            print(f"Not measured: {shape}: {error}")
    show_progress("")
    print(table(
        ["requests", "queries", "context", "heads", "kv heads", "head dim", "dtype", "paged us", "contiguous us",
         "paged / contiguous", "copy us", "share of copy bandwidth"],
        [[*asdict(t.shape).values(), t.paged_s * 1e6, t.contiguous_s * 1e6, t.paged_s / t.contiguous_s, t.copy_s * 1e6,
          f"{t.share:.0%}" if t.shape.queries == 1 else None] for t in timings]))
    print("\npaged / contiguous: 1 if scattered blocks cost nothing; lower is better. The paper's kernel took 1.20 to"
          "\n1.26 (section 7.1). copy: a plain copy that moves the same bytes. share: the bytes of K and V, divided by"
          "\npaged's time, as a share of a large copy's bandwidth; 100% is the floor. Prompts are bound by arithmetic,"
          "\nand have no share.")
    return {"device": device_name(device), "copy_bytes_per_s": bandwidth, "timings": [asdict(t) for t in timings]}


def _tune_all(shapes: list[Shape], block_size: int, device: torch.device, limit_s: float) -> dict[str, object]:
    if triton is None or not (INTERPRETED and shapes or device.type == "cuda" and not INTERPRETED):
        raise ValueError("--tune times the Triton kernels, and torch sees no CUDA device: without one, set "
                         "TRITON_INTERPRET=1 and give a tiny --shape to see that it runs")
    print(f"On {device_name(device)}: {', '.join(f'{name} {values}' for name, values in ALTERNATIVES.items())}.")
    deadline_s, tuned, left_out = time.monotonic() + limit_s, [], []
    shapes = shapes or GPU_SHAPES
    for i, shape in enumerate(shapes):
        show_progress(f"{i} of {len(shapes)} shapes, {max(0.0, deadline_s - time.monotonic()):.0f} s left")
        if time.monotonic() >= deadline_s:
            left_out.append(shape)
            continue
        try:
            tuned.append((shape, _tune(shape, block_size, device, deadline_s)))
        except Exception as error:  # out of memory, say: time on a GPU is too expensive to lose the other shapes
            print(f"Not measured: {shape}: {error}")
    show_progress("")
    _print_tuned(tuned)
    for shape in left_out:
        print(f"Left out, after {limit_s:g} s: {shape}")
    return {"device": device_name(device), "left_out": [asdict(shape) for shape in left_out],
            "tuned": [{"shape": asdict(shape), **tuning.as_dict()} for shape, tuning in tuned]}


def _tune(shape: Shape, block_size: int, device: torch.device, deadline_s: float) -> Tuned:
    present = choice_for("decode" if shape.queries == 1 else "prompt", shape.head_dim,
                         getattr(torch, shape.dtype).itemsize)
    most_programs = max(ALTERNATIVES["programs"]) * num_multiprocessors(device)
    splits = shape.queries == 1 and shape.requests * shape.kv_heads < most_programs
    return tune(paged_attention_triton, random_inputs(shape, block_size, device), present, splits,
                TOLERANCE[shape.dtype], device, deadline_s)


def _print_tuned(tuned: list[tuple[Shape, Tuned]]) -> None:
    def shown(choice: Choice) -> str:
        return " ".join(map(str, choice))

    print(table(
        ["requests", "queries", "context", "heads", "kv heads", "head dim", "dtype", "present", "present us", "best",
         "best us", "best / present", "tried"],
        [[*asdict(shape).values(), shown(t.present.choice), t.present.seconds * 1e6, shown(t.best.choice),
          t.best.seconds * 1e6, t.best.seconds / t.present.seconds,
          f"{len(t.trials)}{'' if t.complete else ', then the time was up'}"] for shape, t in tuned]))
    print(f"\nChoices are {', '.join(Choice._fields)}. best / present: lower is better; those in nanopaged/"
          "paged_attention.py\nmake all equal to 1.")
    problems = {(trial.choice, trial.problem): shape for shape, t in tuned for trial in t.trials if trial.problem}
    for (choice, problem), shape in problems.items():
        print(f"{shown(choice)} was skipped for {shape}: {problem}")


def parse_shape(text: str) -> Shape:
    *numbers, dtype = text.split(",")
    if len(numbers) != 6 or not all(n.isdecimal() and int(n) for n in numbers) or dtype not in ("float32", "float16",
                                                                                               "bfloat16"):
        raise ValueError("--shape takes six positive numbers and a dtype, such as 8,1,1024,12,12,64,float16, got "
                         f"{text!r}")
    shape = Shape(*map(int, numbers), dtype)
    if shape.queries > shape.context or shape.heads % shape.kv_heads:
        raise ValueError(f"--shape needs queries <= context and kv heads that divide the heads, got {text!r}")
    return shape
