"""``make soak``: training and inference for half an hour, through Keras and NumPy at once, while the
memory is watched.

One thread trains and asks two models, with and without XLA, on batches of several sizes; another
runs convolutions and poolings of many shapes, algorithms and layouts on arrays, and compares each
result with that of the first time, bit for bit. Both know a fixed set of shapes: after one pass over
them nothing has a reason to grow. From then on the resident memory of the process and fastconv's
scratch memory are noted. Memory is flat if

* the median resident memory of the last quarter of the time is at most 16 MiB or 2 % (the larger)
  above that of the first quarter, and
* scratch memory kept between calls never exceeds 64 MiB, and none is in use at the end.

Exit status 1 if it is not, or if a result was wrong or a loss not finite.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import click
import numpy as np

import fastconv
from conv2d_problems import Problem, both_layouts, normals, solve
from fastconv import _core

MIB = 1 << 20
MOST_KEPT = 64 * MIB  # csrc/core/workspace.cpp
ALLOWED_GROWTH = 16 * MIB
ALLOWED_SHARE = 0.02

PROBLEMS = both_layouts(
    [
        Problem((n, size, size + 1, channels), filters, **options)
        for n, size in ((1, 9), (4, 20), (9, 31))
        for channels, filters, options in (
            (1, 32, {}),
            (3, 20, {"kernel": (5, 5), "strides": (2, 2), "padding": "same"}),
            (16, 33, {"padding": "same"}),
            (24, 24, {"groups": 24, "padding": "same"}),
            (24, 12, {"groups": 4, "dilation_rate": (2, 2)}),
            (31, 17, {"kernel": (1, 1)}),
        )
    ]
)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(samples):
    """Median of the last quarter less median of the first quarter."""
    quarter = max(len(samples) // 4, 1)
    return float(np.median(samples[-quarter:]) - np.median(samples[:quarter]))


def is_flat(samples):
    return growth(samples) <= max(ALLOWED_GROWTH, ALLOWED_SHARE * samples[0])


class Arrays:
    """Convolutions and poolings on arrays; each pass must give the bits of the first."""

    def __init__(self):
        self._cases = [(problem, normals(problem)) for problem in PROBLEMS]
        self._first = None
        self.calls = self.passes = 0

    def run_once(self, go_on=lambda: True):
        sums = []
        for problem, data in self._cases:
            if not go_on():
                return
            results = solve(problem, data)
            pooling = {"padding": "same", "data_format": problem.data_format}
            y, argmax = fastconv.max_pool2d(results["y"], 3, return_argmax=True, **pooling)
            results["max"] = y
            results["max dx"] = fastconv.max_pool2d_grad(
                y, argmax, results["y"].shape, 3, **pooling
            )
            results["average"] = fastconv.avg_pool2d(results["y"], 2, **pooling)
            pooled, argmax = fastconv.conv2d_max_pool2d(
                data.x, data.w, data.bias, return_argmax=True, **problem.geometry
            )
            _, results["pooled dw"], _ = fastconv.conv2d_max_pool2d_grad(
                data.x, data.w, pooled, pooled, argmax, **problem.geometry
            )
            self.calls += 11
            sums.append({name: zlib.crc32(array.tobytes()) for name, array in results.items()})
        self._first = self._first or sums
        if sums != self._first:
            raise AssertionError("a result differs from that of the first pass")
        self.passes += 1


class Models:
    """Two small networks of our layers, trained and asked on batches of several sizes."""

    def __init__(self):
        import keras

        from fastconv.keras import FastAveragePooling2D, FastConv2D, FastMaxPooling2D

        keras.utils.set_random_seed(0)
        self._models = []
        for jit_compile in (False, True):
            model = keras.Sequential(
                [
                    keras.Input((20, 20, 3)),
                    FastConv2D(24, 3, activation="relu"),
                    FastMaxPooling2D(),
                    FastConv2D(32, 3, padding="same", activation="relu"),
                    FastAveragePooling2D(2),
                    keras.layers.Flatten(),
                    keras.layers.Dense(10),
                ]
            )
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adam", loss, jit_compile=jit_compile)
            self._models.append(model)
        rng = np.random.default_rng(0)
        self._batches = [
            (rng.standard_normal((n, 20, 20, 3)).astype("float32"), rng.integers(0, 10, n))
            for n in (32, 7, 1)
        ]
        self.steps = self.predictions = self.passes = 0

    def run_once(self, go_on=lambda: True):
        for model in self._models:
            for x, labels in self._batches:
                if not go_on():
                    return
                if not np.isfinite(loss := model.train_on_batch(x, labels)):
                    raise AssertionError(f"a loss of {loss}")
                self.steps += 1
                model.predict_on_batch(x)
                self.predictions += len(x)
        self.passes += 1


def soak(seconds, every, tell=lambda *row: None):
    """(samples of resident bytes, the most scratch bytes kept, Arrays, Models)."""
    arrays, models = Arrays(), Models()
    for worker in (arrays, models, arrays, models):
        worker.run_once()
    end = threading.Event()

    def body(worker):
        while not end.is_set():
            worker.run_once(lambda: not end.is_set())

    samples, most_kept = [], 0
    with ThreadPoolExecutor(2) as executor:
        working = [executor.submit(body, worker) for worker in (arrays, models)]
        begun = time.monotonic()
        try:
            while (elapsed := time.monotonic() - begun) < seconds:
                wait(working, every, FIRST_COMPLETED)
                if any(work.done() for work in working):
                    break
                in_use, kept = _core.workspace_bytes()
                samples.append(resident_bytes())
                most_kept = max(most_kept, kept)
                tell(elapsed, samples[-1], in_use, kept, arrays, models)
        finally:
            end.set()
        for work in working:
            work.result()
    return samples, most_kept, arrays, models


@click.command(help=__doc__.partition("\n\n")[0])
@click.option("--minutes", default=30.0, show_default=True, help="How long, after the warm-up.")
@click.option("--every", default=10.0, show_default=True, help="Seconds between two looks.")
def main(minutes, every):
    if not os.path.exists("/proc/self/statm"):
        raise click.ClickException("Resident memory is read from /proc, which is not here.")
    click.echo("     time  resident MiB  scratch MiB: in use  kept  array calls  training steps")

    def tell(elapsed, resident, in_use, kept, arrays, models):
        click.echo(
            f"{elapsed:8.0f}s  {resident / MIB:12.1f}  {in_use / MIB:19.1f}  {kept / MIB:4.1f}"
            f"  {arrays.calls:11,}  {models.steps:14,}"
        )
        sys.stdout.flush()

    samples, most_kept, arrays, models = soak(60 * minutes, every, tell)
    in_use, _ = _core.workspace_bytes()
    flat = is_flat(samples) and most_kept <= MOST_KEPT and in_use == 0
    click.echo(
        f"{arrays.calls:,} calls on arrays in {arrays.passes:,} passes, none wrong; "
        f"{models.steps:,} training steps, {models.predictions:,} images inferred\n"
        f"resident memory {samples[0] / MIB:.1f} to {samples[-1] / MIB:.1f} MiB, "
        f"least {min(samples) / MIB:.1f}, most {max(samples) / MIB:.1f}; "
        f"last quarter less first {growth(samples) / MIB:+.2f} MiB; "
        f"scratch memory kept at most {most_kept / MIB:.1f} MiB, in use at the end {in_use}\n"
        f"memory is {'flat' if flat else 'NOT flat'}"
    )
    sys.exit(not flat)


if __name__ == "__main__":
    main()
