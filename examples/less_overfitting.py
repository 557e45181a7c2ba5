"""Three remedies against overfitting around the fast layers, on few images of MNIST.

    python examples/less_overfitting.py
    python examples/less_overfitting.py --images 2000 --epochs 30

A network that sees few images learns them by heart: it does better on them than on new ones. The
example trains it as it is, then with augmentation (every image a little rotated, shifted and
zoomed, otherwise in each epoch), L1 and L2 penalties on the weights, and Dropout, and prints how
well each does on the images of the training and on others.
"""

import argparse

import keras
from keras import layers, regularizers

from fastconv.keras import FastConv2D as Conv2D
from fastconv.keras import FastMaxPooling2D as MaxPooling2D
from fastconv.mnist import data


def make_model(remedies, conv=Conv2D, pool=MaxPooling2D):
    """The tutorial's network, as it is or with the remedies; compiled."""
    keras.utils.set_random_seed(11)
    augmentation, dropout = [], []
    kernel_1 = kernel_2 = kernel_3 = None
    if remedies:
        # Active in training alone.
        augmentation = [
            layers.RandomRotation(0.03, fill_mode="constant", seed=1),
            layers.RandomTranslation(0.08, 0.08, fill_mode="constant", seed=2),
            layers.RandomZoom(0.1, fill_mode="constant", seed=3),
        ]
        dropout = [layers.Dropout(0.4, seed=4)]
        kernel_1, kernel_2 = regularizers.L2(1e-4), regularizers.L1L2(1e-6, 1e-4)
        kernel_3 = regularizers.L1(1e-6)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *augmentation,
            conv(32, (3, 3), activation="relu", kernel_regularizer=kernel_1),
            pool((2, 2)),
            conv(64, (3, 3), activation="relu", kernel_regularizer=kernel_2),
            pool((2, 2)),
            layers.Flatten(),
            *dropout,
            layers.Dense(64, activation="relu", kernel_regularizer=kernel_3),
            layers.Dense(10, activation="softmax"),
        ]
    )
    # XLA off: the augmentation layers do not run inside it.
    model.compile(
        optimizer="adam",
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500, help="to train on (default: 500)")
    parser.add_argument("--epochs", type=int, default=40, help="(default: 40)")
    arguments = parser.parse_args()

    mnist = data.load()
    print(mnist.describe())
    x_train = mnist.x_train[: arguments.images, ..., None].astype("float32") / 255
    y_train = mnist.y_train[: arguments.images]
    x_test, y_test = mnist.x_test[..., None].astype("float32") / 255, mnist.y_test
    for remedies in (False, True):
        model = make_model(remedies)
        model.fit(x_train, y_train, epochs=arguments.epochs, batch_size=32, verbose=0)
        _, seen = model.evaluate(x_train, y_train, verbose=0)
        _, new = model.evaluate(x_test, y_test, verbose=0)
        name = "with the remedies" if remedies else "as it is"
        print(f"{name:18} accuracy on its images {seen:.2%}, on new ones {new:.2%}")


if __name__ == "__main__":
    main()
