"""Convolutions of bfloat16, forward and both gradients: beside our float32's and PyTorch's of bfloat16.

    python bench/bfloat16.py [--threads 2] [--suite resnet50] [--json FILE]

Needs ml_dtypes, and PyTorch for the comparison, which computes in channels_last by oneDNN. All take turns
in one process, each with a moment's rest and a call before its time is taken, for threads that wait for
more work take a core from who comes next. Calls are from Python; ours write to memory that is there,
PyTorch's allocate, with malloc's thresholds raised. Prints medians in microseconds and two ratios: PyTorch's
time, and that of our float32 without Winograd, over ours of bfloat16.
"""

import json
import os
import statistics
import time

import click
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import fastconv
from fastconv.bench import suites
from fastconv.bench.adapters import empty
from fastconv.bench.problem import DIRECTIONS
from pooling import keep_freed_memory

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
REST = 0.005  # seconds


def of_fastconv(problem, direction, arrays):
    x, w, dy = arrays
    (top, bottom), (left, right) = problem.sides
    options = {
        "strides": problem.strides, "padding": ((top, bottom), (left, right)),
        "dilation_rate": problem.dilations, "groups": problem.groups,
    }  # fmt: skip
    out = empty({"fprop": dy, "dgrad": x, "wgrad": w}[direction].shape).astype(x.dtype)

    def call():
        if direction == "fprop":
            return fastconv.conv2d(x, w, out=out, **options)
        if direction == "dgrad":
            return fastconv.conv2d_grad_input(dy, w, x.shape, out=out, **options)
        return fastconv.conv2d_grad_filter(x, dy, w.shape, out=out, **options)

    return call


def of_torch(problem, direction, arrays):
    import torch

    x, w, dy = (torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for a in arrays)
    x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    w = w.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    geometry = [problem.strides, problem.pads, problem.dilations]
    if direction == "fprop":
        return lambda: torch.conv2d(x, w, None, *geometry, problem.groups)
    wanted = [direction == "dgrad", direction == "wgrad", False]
    more = [*geometry, False, (0, 0), problem.groups, wanted]
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *more)


def medians(calls, seconds, rounds=7):
    """Of (accuracy, function) by name."""
    repeats, times = {}, {name: [] for name in calls}
    for name, (accuracy, call) in calls.items():
        fastconv.set_accuracy(accuracy)
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / rounds / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, (accuracy, call) in calls.items():
            fastconv.set_accuracy(accuracy)
            time.sleep(REST)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def compare(problem, direction, with_torch, seconds):
    rng = np.random.default_rng(0)
    shapes = [
        (problem.n, problem.h, problem.w, problem.c),
        (problem.r, problem.s, problem.c // problem.groups, problem.channels_out),
        (problem.n, problem.oh, problem.ow, problem.channels_out),
    ]
    wide = [rng.standard_normal(shape, np.float32) for shape in shapes]
    arrays = [array.astype(BFLOAT16) for array in wide]
    calls = {
        "fastconv": ("default", of_fastconv(problem, direction, arrays)),
        "float32": ("strict", of_fastconv(problem, direction, wide)),
    }
    if with_torch:
        calls["PyTorch"] = ("default", of_torch(problem, direction, arrays))
    times = medians(calls, seconds)
    fastconv.set_accuracy("default")
    plan = fastconv.explain(
        shapes[0], shapes[1], direction=direction, dtype="bfloat16", strides=problem.strides,
        padding=problem.sides, dilation_rate=problem.dilations, groups=problem.groups,
    )  # fmt: skip
    return {
        "name": problem.name, "problem": str(problem), "direction": direction,
        "algorithm": plan["algorithm"], "seconds": times, "flops": plan["flops"],
    }  # fmt: skip


def ratio(row, other):
    return row["seconds"][other] / row["seconds"]["fastconv"]


@click.command()
@click.option("--threads", default=2, show_default=True, help="Of both sides.")
@click.option("--suite", default="resnet50", show_default=True, help="Of `fastconv bench`.")
@click.option("--seconds", default=0.05, show_default=True, help="For a side and a case.")
@click.option("--json", "path", type=click.Path(dir_okay=False), help="Write JSON there.")
def main(threads, suite, seconds, path):
    keep_freed_memory()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of PyTorch's threads
    fastconv.set_num_threads(threads)
    try:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        peer = f"PyTorch {torch.__version__}"
    except ImportError:
        peer = None
    facts = fastconv.info()
    title = f"bfloat16, {threads} threads, {facts['isa']}, beside {peer or 'nothing'}"
    table = Table(title=title)
    for name in ("layer", "direction", "algorithm", "us", "GFLOP/s", "PyTorch / ours",
                 "our float32 / ours"):  # fmt: skip
        table.add_column(
            name, justify="left" if name in ("layer", "direction", "algorithm") else "right"
        )
    rows = []
    for problem in suites.suite(suite):
        if problem.is_pool:
            continue
        for direction in DIRECTIONS:
            row = compare(problem, direction, peer is not None, seconds)
            rows.append(row)
            mine = row["seconds"]["fastconv"]
            table.add_row(
                f"{row['name'] or ''} {row['problem']}", direction, row["algorithm"],
                f"{1e6 * mine:,.0f}", f"{row['flops'] / mine / 1e9:,.0f}",
                f"{ratio(row, 'PyTorch'):.2f}" if peer else "", f"{ratio(row, 'float32'):.2f}",
            )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    for direction in DIRECTIONS:
        of_it = [row for row in rows if row["direction"] == direction]
        for other in ("PyTorch", "float32") if peer else ("float32",):
            values = [ratio(row, other) for row in of_it]
            console.print(
                f"{direction}: {other} / ours, geometric mean {statistics.geometric_mean(values):.2f}, "
                f"least {min(values):.2f}, largest {max(values):.2f}, {len(values)} layers"
            )
    if path:
        with open(path, "w") as file:
            json.dump({"title": title, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
