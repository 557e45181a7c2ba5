"""One training step of the article's MNIST model on Keras's backends, stock and fast, interleaved.

    KERAS_BACKEND=jax python bench/backends.py [--steps 200] [--batch-size 32] [--jit]

Times train_on_batch() on one batch that stays in memory, which returns when the loss is there, and
predict_on_batch(). JAX is always compiled; --jit is torch.compile on PyTorch and XLA on TensorFlow,
on both sides. Prints medians, quartiles, the ratio of each pair of steps and the machine's load.
"""

import importlib.metadata
import os
import statistics
import time

import click
import numpy as np

from train_step import build


def interleaved(runs, steps):
    """Seconds of each of ``steps`` calls, by name."""
    for _ in range(10):
        for run in runs.values():
            run()
    seconds = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(what, seconds):
    for name, values in seconds.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(values, n=4))
        print(f"{what:>8} {name:>6}: median {median:7.3f} ms, quartiles {low:.3f} .. {high:.3f}")
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["fast"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    best = min(seconds["stock"]) / min(seconds["fast"])
    print(
        f"{what:>8}  ratio: median {median:.2f} (stock / fast), quartiles {low:.2f} .. {high:.2f}, "
        f"of the fastest calls {best:.2f}"
    )


@click.command()
@click.option("--steps", default=200, show_default=True, help="Timed calls of each side.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--jit", is_flag=True, help="Compile both sides.")
def main(steps, batch_size, jit):
    """Time stock and fast training steps and predictions in turn."""
    import keras

    import fastconv
    from fastconv.keras import FastConv2D, FastMaxPooling2D

    backend = keras.backend.backend()
    rng = np.random.default_rng(0)
    x = rng.random((batch_size, 28, 28, 1), "float32")
    y = np.eye(10, dtype="float32")[rng.integers(10, size=batch_size)]
    jit = jit or backend == "jax"
    sides = {
        "stock": build((keras.layers.Conv2D, keras.layers.MaxPooling2D), jit),
        "fast": build((FastConv2D, FastMaxPooling2D), jit),
    }
    info = fastconv.info()
    print(
        f"Keras {keras.__version__} on {backend} {importlib.metadata.version(backend)}",
        f"fastconv {info['version']} on {info['isa']}, {info['num_threads']} threads, batch "
        f"{batch_size}, jit {'on' if jit else 'off'}, {steps} interleaved calls a side, load "
        f"{os.getloadavg()[0]:.1f}",
        sep=", ",
    )
    train = {name: lambda m=model: m.train_on_batch(x, y) for name, model in sides.items()}
    report("train", interleaved(train, steps))
    predict = {name: lambda m=model: m.predict_on_batch(x) for name, model in sides.items()}
    report("predict", interleaved(predict, steps))
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
