"""``fastconv roofline``: what the CUDA kernels' tiles allow at most on GPUs that are not here.

An estimate from published figures, not a measurement. For each layer the ceiling is the least of

* the arithmetic peak, less what tiles compute beyond the edges of the matrices (quantisation) and
  less the multiprocessors that idle while the last blocks run (balance);
* the bytes of every tensor moved once, over the memory's bandwidth.

It knows nothing of latencies, caches and launches: kernels reach a share of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import click

from fastconv.bench import suites
from fastconv.bench.problem import DIRECTIONS, ProblemError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from fastconv.bench.problem import Problem


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Dense peaks in TFLOP/s, float32 sums; bytes in TB/s. Sources: NVIDIA's data sheets."""

    name: str
    multiprocessors: int
    peaks: dict[str, float]  # by dtype
    bandwidth: float
    # The share of the tensor cores' peak that mma.sync reaches, where newer instructions do more.
    mma_share: float = 1.0


GPUS = {
    "a100": Gpu(
        "A100 SXM 80 GB", 108, {"float32": 19.5, "tf32": 156, "float16": 312}, bandwidth=2.039
    ),
    # mma.sync: 62.9 % on average in Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
    # Architecture via Microbenchmarking", 2024; the rest needs wgmma.
    "h100": Gpu(
        "H100 SXM", 132, {"float32": 66.9, "tf32": 494.7, "float16": 989.4}, 3.35, mma_share=0.629
    ),
    "rtx4090": Gpu(
        "RTX 4090", 128, {"float32": 82.6, "tf32": 82.6, "float16": 165.2}, bandwidth=1.008
    ),
}
# As csrc/cuda/simt_gemm.cu and tensor_core_gemm.cu have them: rows and columns, the step along the
# sum, blocks that a multiprocessor holds.
_SIMT_TILES = [(128, 128, 8, 2), (64, 64, 8, 6), (128, 32, 8, 6)]
_TENSOR_TILES = {
    "float16": [(128, 128, 32, 2), (128, 64, 32, 3), (64, 64, 32, 4)],
    "tf32": [(128, 128, 16, 2), (128, 64, 16, 3), (64, 64, 16, 4)],
}
_LEAST_STEPS_A_PART = 8


@dataclasses.dataclass(frozen=True)
class Ceiling:
    kernel: str
    seconds: float
    flops: float
    bytes: float
    useful: float  # of the products that tiles compute
    balance: float  # of the multiprocessors' time
    bound: str  # "arithmetic" or "memory"

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12


def moved_bytes(problem: Problem, direction: str, dtype: str) -> int:
    """Every tensor once."""
    size = 2 if dtype == "float16" else 4
    total = sum(problem.bytes(direction))
    if not problem.is_pool or size == 4:
        return total * size // 4
    y = math.prod(problem.y_shape)
    argmax = total - 4 * (math.prod(problem.x_shape) + y)
    return (math.prod(problem.x_shape) + y) * size + argmax


def _matrices(problem: Problem, direction: str, dtype: str) -> tuple[int, int, float, int]:
    """Rows, columns and terms of the products, and how many products there are."""
    p = problem
    channels, filters = p.c // p.groups, p.channels_out // p.groups
    if dtype != "float32":  # channels in chunks of 16 bytes
        chunk = 8 if dtype == "float16" else 4
        channels = math.ceil(channels / chunk) * chunk
        filters = math.ceil(filters / chunk) * chunk
    taps, pixels = p.r * p.s, p.n * p.oh * p.ow
    if direction == "fprop":
        return pixels, p.channels_out // p.groups, taps * channels, p.groups
    if direction == "wgrad":
        return taps * channels, p.channels_out // p.groups, pixels, p.groups
    # Pixels that see the same taps: as many classes as strides and taps have it.
    classes = [
        min(stride // math.gcd(stride, dilation), extent)
        for stride, dilation, extent in zip(p.strides, p.dilations, (p.r, p.s), strict=True)
    ]
    rows = p.n * math.prod(
        math.ceil(size / stride) for size, stride in zip((p.h, p.w), p.strides, strict=True)
    )
    per_class = math.prod(
        extent / classes_of for extent, classes_of in zip((p.r, p.s), classes, strict=True)
    )
    return rows, p.c // p.groups, per_class * filters, p.groups * math.prod(classes)


def ceiling(problem: Problem, direction: str, gpu: Gpu, dtype: str) -> Ceiling:
    """The best of the tiles that may be chosen."""
    flops, moved = problem.flops(), moved_bytes(problem, direction, dtype)
    memory = moved / (gpu.bandwidth * 1e12)
    depthwise = not problem.is_pool and problem.groups == problem.c
    if problem.is_pool or depthwise or problem.c // problem.groups <= 4:
        kernel = "pool" if problem.is_pool else "depthwise" if depthwise else "small_channel"
        arithmetic = flops / (gpu.peaks["float32"] * 1e12)
        bound = "arithmetic" if arithmetic > memory else "memory"
        return Ceiling(kernel, max(arithmetic, memory), flops, moved, 1.0, 1.0, bound)
    tensor = dtype != "float32"
    peak = gpu.peaks[dtype] * (gpu.mma_share if tensor else 1.0) * 1e12
    rows, columns, terms, products = _matrices(problem, direction, dtype)
    found = []
    for height, width, step, at_once in _TENSOR_TILES[dtype] if tensor else _SIMT_TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width) * products
        steps = math.ceil(terms / step)
        parts = 1
        if direction == "wgrad":
            parts = max(
                1, min(gpu.multiprocessors * at_once // tiles, steps // _LEAST_STEPS_A_PART)
            )
        steps_a_part = math.ceil(steps / parts)
        parts = math.ceil(steps / steps_a_part)
        computed = 2.0 * height * width * steps_a_part * step * tiles * parts
        in_turn = math.ceil(tiles * parts / gpu.multiprocessors)
        balance = tiles * parts / (in_turn * gpu.multiprocessors)
        traffic = memory
        if parts > 1:
            traffic += 8.0 * parts * math.prod(problem.w_shape) / (gpu.bandwidth * 1e12)
        arithmetic = computed / (peak * balance)
        seconds = max(arithmetic, traffic)
        name = "tensor_core_gemm" if tensor else "simt_gemm"
        found.append(
            Ceiling(
                f"{name} {height}x{width}" + (f" in {parts} parts" if parts > 1 else ""),
                seconds,
                flops,
                moved,
                flops / computed,
                balance,
                "arithmetic" if arithmetic > traffic else "memory",
            )
        )
    # Of tiles bound by the memory alike, the one that computes least in vain.
    return min(found, key=lambda tile: (tile.seconds, -tile.useful))


HEADINGS = (
    "layer", "pass", "kernel", "GFLOP", "FLOP/byte", "useful", "balance", "bound", "us", "TFLOP/s",
)  # fmt: skip


def rows_of(
    problems: Iterable[Problem], gpu: Gpu, dtype: str, directions: Collection[str]
) -> Iterator[tuple[str, ...]]:
    for problem in problems:
        for direction in directions:
            if direction not in problem.directions:
                continue
            best = ceiling(problem, direction, gpu, dtype)
            yield (
                f"{problem.name or problem} (batch {problem.n})",
                direction,
                best.kernel,
                f"{best.flops / 1e9:.2f}",
                f"{best.flops / best.bytes:.0f}",
                f"{best.useful:.0%}",
                f"{best.balance:.0%}",
                best.bound,
                f"{best.seconds * 1e6:.1f}",
                f"{best.tflops:.1f}",
            )


@click.command(short_help="Estimate what the CUDA kernels allow at most.")
@click.option(
    "--suite", "names", multiple=True, default=("resnet50",), show_default=True, metavar="NAME",
    help="mnist, vgg16, ... as of fastconv bench.",
)  # fmt: skip
@click.option(
    "--gpu", "gpus", multiple=True, type=click.Choice(list(GPUS)), default=tuple(GPUS),
    help="Default: all.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "tf32", "float16"]), default="float16",
    show_default=True,
)  # fmt: skip
@click.option(
    "--dir", "directions", metavar="LIST", default=",".join(DIRECTIONS), show_default=True,
    help="fprop, dgrad, wgrad, with commas.",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), help="Instead of each problem's batch size.")
def roofline(
    names: tuple[str, ...], gpus: tuple[str, ...], dtype: str, directions: str, batch: int | None
) -> None:
    """Estimate what the CUDA kernels' tiles allow at most, layer by layer; as Markdown."""
    chosen = directions.lower().split(",")
    if not set(chosen) <= set(DIRECTIONS):
        raise click.UsageError(f"--dir takes {', '.join(DIRECTIONS)}. Received: {directions!r}")
    try:
        problems = [problem for name in names for problem in suites.suite(name)]
    except ProblemError as error:
        raise click.UsageError(str(error)) from error
    if batch:
        problems = list(dict.fromkeys(problem.with_batch(batch) for problem in problems))
    for gpu in (GPUS[name] for name in gpus):
        click.echo(f"\n**{gpu.name}, {dtype}: estimated from published peaks, not measured**\n")
        click.echo(f"| {' | '.join(HEADINGS)} |")
        click.echo("|---|---|---|" + "---:|" * 4 + "---|---:|---:|")
        for row in rows_of(problems, gpu, dtype, chosen):
            click.echo(f"| {' | '.join(row)} |")
