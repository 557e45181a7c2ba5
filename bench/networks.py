"""Networks of keras.applications, stock and accelerate()d, interleaved in one run.

    python bench/networks.py [ResNet50 MobileNetV2 ...] [--batch 1] [--size 224] [--rounds 30]
    python bench/networks.py ResNet50 --train --batch 8

Times predict_on_batch(), or with --train a step of train_on_batch(), of models with equal random
weights on one batch that stays in memory. XLA is off; --jit turns it on for both sides. Prints
medians, quartiles, the ratio of each pair of calls and the machine's load.
"""

import os
import statistics
import time

import click
import numpy as np


def build(name, size, jit):
    import keras

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation="softmax"
    )
    model.compile(keras.optimizers.SGD(1e-3), "categorical_crossentropy", jit_compile=jit)
    return model


def measure(name, batch, size, rounds, train, jit):
    import fastconv.keras

    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3)).astype("float32")
    labels = np.eye(10, dtype="float32")[rng.integers(10, size=batch)]
    models = {"stock": build(name, size, jit), "fast": build(name, size, jit)}
    fastconv.accelerate(models["fast"])
    models["fast"].set_weights(models["stock"].get_weights())

    def run(model):
        return model.train_on_batch(images, labels) if train else model.predict_on_batch(images)

    first = [run(model) for model in models.values()]
    if not train:
        apart = np.abs(first[0] - first[1]).max() / np.abs(first[0]).max()
        assert apart < 1e-3, f"the outputs of {name} differ by {apart}"
    seconds = {side: [] for side in models}
    for turn in range(rounds + 2):
        for side, model in models.items():
            start = time.perf_counter()
            run(model)
            if turn >= 2:
                seconds[side].append(time.perf_counter() - start)

    what = f"{name} {batch} x {size} x {size} {'training' if train else 'inference'}"
    for side, values in seconds.items():
        low, median, high = (1e3 * q for q in statistics.quantiles(values, n=4))
        print(f"{what} {side:>6}: median {median:8.2f} ms, quartiles {low:.2f} .. {high:.2f}")
    ratios = [a / b for a, b in zip(seconds["stock"], seconds["fast"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    least = min(seconds["stock"]) / min(seconds["fast"])
    print(
        f"{what}  ratio: median {median:.2f} (stock / fast), quartiles {low:.2f} .. {high:.2f}; "
        f"of the least times {least:.2f}",
        flush=True,
    )


@click.command()
@click.argument("names", nargs=-1)
@click.option("--batch", default=1, show_default=True)
@click.option("--size", default=224, show_default=True, help="Height and width of the images.")
@click.option("--rounds", default=30, show_default=True, help="Timed calls of each side.")
@click.option("--train", is_flag=True, help="Training steps instead of inference.")
@click.option("--jit", is_flag=True, help="Compile both sides with XLA.")
def main(names, batch, size, rounds, train, jit):
    """Time networks of keras.applications, stock and fast, in turn."""
    import keras
    import tensorflow as tf

    import fastconv

    info = fastconv.info()
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, fastconv {info['version']} on "
        f"{info['isa']}, {info['num_threads']} threads, jit {'on' if jit else 'off'}, "
        f"{rounds} interleaved calls a side, load {os.getloadavg()[0]:.1f}"
    )
    for name in names or ("ResNet50", "MobileNetV2"):
        measure(name, batch, size, rounds, train, jit)


if __name__ == "__main__":
    main()
