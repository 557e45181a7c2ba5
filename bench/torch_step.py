"""A training step of the article's MNIST network: Keras on fastconv's layers beside PyTorch's own.

    python bench/torch_step.py [--rounds 30] [--steps 20] [--steps-per-execution 1] [--jit]

Needs PyTorch and TensorFlow. PyTorch runs eagerly in channels_last, its best mode on a CPU. Each side
has a process of its own, so that neither's waiting threads disturb the other, and they take turns of
--steps steps on one batch that stays in memory. Both have malloc's thresholds raised, without which
PyTorch maps fresh memory at every step. Prints medians and the ratio of each pair of turns.
"""

import os
import statistics
import subprocess
import sys
import time

import click
import numpy as np

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def batch(size):
    rng = np.random.default_rng(0)
    images = rng.random((size, 28, 28, 1), "float32")
    return images, np.eye(10, dtype="float32")[rng.integers(10, size=size)]


def keras_step(size, threads, steps_per_execution, jit):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    from fastconv.keras import FastConv2D, FastMaxPooling2D
    from train_step import build, stepper

    model = build((FastConv2D, FastMaxPooling2D), jit, steps_per_execution)
    return stepper(model, batch(size))


def torch_step(size, threads, steps_per_execution, jit):
    del steps_per_execution, jit
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images, labels = batch(size)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
    y = torch.from_numpy(labels.argmax(1))
    loss_of = nn.CrossEntropyLoss()

    def run():
        optimizer.zero_grad(set_to_none=True)
        scores = model(x)
        loss = loss_of(scores, y)
        loss.backward()
        optimizer.step()
        (scores.argmax(1) == y).float().mean().item()  # the accuracy, which Keras computes as well
        loss.item()

    return run


SIDES = {"PyTorch": torch_step, "fastconv": keras_step}


def serve(side, *options):
    """Takes as many steps as each line of standard input says and prints the milliseconds of one."""
    run = SIDES[side](*options)
    per_call = options[2] if side == "fastconv" else 1
    for line in sys.stdin:
        calls = max(1, int(line) // per_call)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        print(f"ms {1e3 * (time.perf_counter() - start) / calls / per_call}", flush=True)


class Side:
    def __init__(self, side, arguments):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", side, *arguments],
            env={**os.environ, **MALLOC},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, number):
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ms "):
                return float(line.split()[1])
        raise click.ClickException("a side ended early; its error is above")


@click.command()
@click.option("--rounds", default=30, show_default=True, help="Turns of each side.")
@click.option("--steps", default=20, show_default=True, help="Steps of a turn.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Of both sides.")
@click.option("--steps-per-execution", default=1, show_default=True, help="Of Keras.")
@click.option("--jit", is_flag=True, help="Compile Keras's step with XLA.")
@click.option("--serve", "served", hidden=True)
def main(rounds, steps, batch_size, threads, steps_per_execution, jit, served):
    """Time PyTorch and Keras on fastconv in turn."""
    if served:
        return serve(served, batch_size, threads, steps_per_execution, jit)
    arguments = [
        *("--batch-size", str(batch_size), "--threads", str(threads)),
        *("--steps-per-execution", str(steps_per_execution), *(["--jit"] if jit else [])),
    ]
    sides = {name: Side(name, arguments) for name in SIDES}
    for side in sides.values():
        side.steps(50)
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(side.steps(steps))
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(
            f"{name:>9}: median {median:6.3f} ms a step, quartiles {low:.3f} .. {high:.3f}; "
            f"{1e3 * batch_size / median:,.0f} images/s"
        )
    ratios = [a / b for a, b in zip(times["PyTorch"], times["fastconv"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f"    ratio: median {median:.2f} (PyTorch / fastconv), quartiles {low:.2f} .. {high:.2f}; "
        f"batch {batch_size}, {threads} threads, steps_per_execution {steps_per_execution}, "
        f"jit {'on' if jit else 'off'}, load {os.getloadavg()[0]:.1f}"
    )
    return None


if __name__ == "__main__":
    main()
