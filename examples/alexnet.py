"""AlexNet with its overlapping pooling, on the fast layers.

    python examples/alexnet.py
    python examples/alexnet.py --size 99 --width 0.25 --images 512 --epochs 3
    python examples/alexnet.py --layers stock

The network of Krizhevsky, Sutskever and Hinton (2012) as one column with the groups of its second,
fourth and fifth convolution. Its pooling windows overlap: 3 x 3, two pixels apart, which its
authors found to overfit a little less than 2 x 2. Local response normalisation, which later
networks left out, is left out here.

The images are digits of MNIST, enlarged: they need no download, and a network of this size learns
them soon. ``--width`` scales all numbers of channels, ``--size`` the images; the defaults are small
enough for a laptop, ``--size 227 --width 1`` gives the shapes of the paper.
"""

import argparse
import time

import keras
import numpy as np
from keras import layers

from fastconv.keras import FastConv2D, FastMaxPooling2D
from fastconv.mnist import data

FAST = {"conv": FastConv2D, "pool": FastMaxPooling2D}
STOCK = {"conv": layers.Conv2D, "pool": layers.MaxPooling2D}


def make_model(size, width, classes=10, conv=FastConv2D, pool=FastMaxPooling2D):
    """AlexNet for images of size x size x 3, with ``width`` times its channels; compiled."""
    keras.utils.set_random_seed(5)

    def channels(count):
        return max(2, round(count * width / 2) * 2)  # even: there are two groups

    model = keras.Sequential(
        [
            keras.Input((size, size, 3)),
            conv(channels(96), 11, strides=4, activation="relu", name="conv1"),
            pool(3, strides=2, name="pool1"),
            conv(channels(256), 5, padding="same", groups=2, activation="relu", name="conv2"),
            pool(3, strides=2, name="pool2"),
            conv(channels(384), 3, padding="same", activation="relu", name="conv3"),
            conv(channels(384), 3, padding="same", groups=2, activation="relu", name="conv4"),
            conv(channels(256), 3, padding="same", groups=2, activation="relu", name="conv5"),
            pool(3, strides=2, name="pool5"),
            layers.Flatten(),
            layers.Dense(channels(4096), activation="relu", name="fc6"),
            layers.Dropout(0.5, seed=6),
            layers.Dense(channels(4096), activation="relu", name="fc7"),
            layers.Dropout(0.5, seed=7),
            layers.Dense(classes, activation="softmax", name="fc8"),
        ],
        name="alexnet",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(3e-4),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def enlarge(images, size):
    """Images of 28 x 28 grey pixels as size x size x 3, each pixel repeated."""
    place = np.arange(size) * 28 // size
    enlarged = images[:, place][:, :, place, None].astype("float32") / 255 - 0.1
    return np.repeat(enlarged, 3, axis=3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=99, help="of the images (default: 99)")
    parser.add_argument("--width", type=float, default=0.25, help="of layers (default: 0.25)")
    parser.add_argument("--images", type=int, default=1024, help="to train on (default: 1024)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: 5)")
    parser.add_argument("--layers", choices=["fast", "stock"], default="fast")
    arguments = parser.parse_args(arguments)
    if arguments.size < 67:
        parser.error(f"--size must be 67 or more. Received: {arguments.size}")

    model = make_model(
        arguments.size, arguments.width, **(FAST if arguments.layers == "fast" else STOCK)
    )
    print(f"{model.count_params():,} parameters; the shapes on the way:")
    for layer in model.layers:
        if layer.name.startswith(("conv", "pool", "fc")):
            print(f"  {layer.name:6} {' x '.join(map(str, layer.output.shape[1:]))}")

    mnist = data.read_npz(data.SUBSET, source="the packaged subset").limit(arguments.images)
    x_train, x_test = (enlarge(x, arguments.size) for x in (mnist.x_train, mnist.x_test))
    for epoch in range(arguments.epochs):
        start = time.perf_counter()
        history = model.fit(x_train, mnist.y_train, batch_size=32, verbose=0).history
        seconds = time.perf_counter() - start
        _, accuracy = model.evaluate(x_test, mnist.y_test, verbose=0)
        print(
            f"epoch {epoch + 1}: loss {history['loss'][0]:.3f}, "
            f"accuracy {history['accuracy'][0]:.2%}, on new images {accuracy:.2%}, {seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
