"""fastconv.accelerate() on Keras's ResNet50: the same network, its convolutions on our kernels.

    python examples/resnet50.py
    python examples/resnet50.py --size 160 --batch 4 --rounds 10

Weights are random, so nothing is downloaded. Prints who computes how many layers, how far apart the
outputs of the stock and the fast network are, and how long each takes on this machine.
"""

import argparse
import collections
import statistics
import time

import keras
import numpy as np

import fastconv
import fastconv.keras


def make_model(size):
    keras.utils.set_random_seed(3)
    return keras.applications.ResNet50(weights=None, input_shape=(size, size, 3), classes=10)


def tell_layers(model):
    """How many layers of each class fastconv computes, and how many Keras does."""
    told = [fastconv.keras.explain_layer(layer) for layer in model.layers]
    for who in ("fastconv", "stock"):
        kinds = collections.Counter(layer.type for layer in told if layer.served_by == who)
        print(f"  {who:8} {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")


def difference(one, other):
    """Largest difference, relative to the largest value."""
    return float(np.abs(one - other).max() / np.abs(one).max())


def seconds_of(models, images, rounds):
    """Median seconds of a forward pass of each model, which take turns."""
    seconds = [[] for _ in models]
    for _ in range(rounds):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.predict_on_batch(images)
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=10, help="to time (default: 10)")
    arguments = parser.parse_args(arguments)

    stock = make_model(arguments.size)
    fast = fastconv.accelerate(make_model(arguments.size))  # the only line that differs
    fast.set_weights(stock.get_weights())
    print(f"ResNet50, {stock.count_params():,} parameters; who computes its layers:")
    tell_layers(fast)

    shape = (arguments.batch, arguments.size, arguments.size, 3)
    images = np.random.default_rng(4).standard_normal(shape).astype("float32")
    # The first call of each also traces the network.
    outputs = [model.predict_on_batch(images) for model in (stock, fast)]
    print(f"largest difference of the outputs, relative: {difference(*outputs):.1e}", flush=True)

    of_stock, of_fast = seconds_of((stock, fast), images, arguments.rounds)
    print(
        f"a forward pass of {arguments.batch} x {arguments.size} x {arguments.size}: "
        f"stock {of_stock * 1e3:.0f} ms, fast {of_fast * 1e3:.0f} ms, "
        f"ratio {of_stock / of_fast:.2f}"
    )

    fastconv.restore(fast)
    again = fast.predict_on_batch(images)
    print(f"restored to stock layers: difference {difference(outputs[0], again):.1e}")


if __name__ == "__main__":
    main()
