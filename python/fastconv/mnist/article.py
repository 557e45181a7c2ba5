"""The article's program: its model on either set of layers, its training, and a comparison."""

from __future__ import annotations

import dataclasses
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastconv.mnist.data import Mnist

Array: TypeAlias = NDArray[Any]

STOCK = SimpleNamespace(Conv2D=keras.layers.Conv2D, MaxPooling2D=keras.layers.MaxPooling2D)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one training came to. ``images_per_second`` is None when there was but one step.

    ``history`` holds loss and accuracy on the training images, a value for each epoch.
    """

    loss: float
    accuracy: float
    seconds: float
    images_per_second: float | None
    history: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far fast is from stock in one array; ``relative`` is to the largest value of stock."""

    name: str
    shape: tuple[int, ...]
    largest: float
    relative: float


def fast_layers() -> SimpleNamespace:
    """fastconv's layers. A function, so that the stock program needs nothing of fastconv's."""
    from fastconv.keras import FastConv2D, FastMaxPooling2D

    return SimpleNamespace(Conv2D=FastConv2D, MaxPooling2D=FastMaxPooling2D)


def build_model(layers: Any) -> keras.Model:
    """The article's model, compiled, with Conv2D and MaxPooling2D taken from ``layers``.

    XLA is off for either: on a CPU it slows the stock layers down, so a comparison with them as
    they come would flatter us.
    """
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        optimizer="adam",
        loss="categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def prepare(images: Array, labels: Array) -> tuple[Array, Array]:
    """Images as (n, 28, 28, 1) float32 in 0..1, and one-hot labels."""
    images = images.reshape((len(images), 28, 28, 1)).astype("float32") / 255
    return images, keras.utils.to_categorical(labels, num_classes=10)


def train(model: keras.Model, data: Mnist, *, epochs: int, batch_size: int, seed: int) -> Result:
    """Fits and evaluates ``model`` as the article does; the order of images follows ``seed``."""
    x_train, y_train = prepare(data.x_train, data.y_train)
    x_test, y_test = prepare(data.x_test, data.y_test)
    # A bar redraws itself by control characters, which make no sense in a file.
    verbose = 1 if sys.stdout.isatty() else 2
    clock = _Clock()
    keras.utils.set_random_seed(seed)
    history = model.fit(
        x_train,
        y_train,
        batch_size=batch_size,
        epochs=epochs,
        verbose=verbose,
        callbacks=[clock],
    )
    loss, accuracy = model.evaluate(x_test, y_test, verbose=verbose)
    images = epochs * len(x_train) - min(batch_size, len(x_train))
    return Result(
        loss=float(loss),
        accuracy=float(accuracy),
        seconds=clock.end - clock.begin,
        images_per_second=images / (clock.end - clock.first_step)
        if images and clock.first_step
        else None,
        history=history.history,
    )


def differences(
    stock: keras.Model, fast: keras.Model, data: Mnist, batch_size: int
) -> list[Difference]:
    """Compares one forward pass and every gradient of two models of equal weights.

    Takes the first ``batch_size`` training images and runs them as ``fit`` would: as a graph.
    """
    images, labels = prepare(data.x_train[:batch_size], data.y_train[:batch_size])
    names = ["forward pass", *_variable_names(stock)]
    return [
        _difference(name, ours, theirs)
        for name, ours, theirs in zip(
            names,
            _forward_and_gradients(fast, images, labels),
            _forward_and_gradients(stock, images, labels),
            strict=True,
        )
    ]


def same_start(seed: int) -> tuple[keras.Model, keras.Model]:
    """A stock and a fast model with the same initial weights."""
    keras.utils.set_random_seed(seed)
    stock = build_model(STOCK)
    fast = build_model(fast_layers())
    fast.set_weights(stock.get_weights())
    return stock, fast


class _Clock(keras.callbacks.Callback):
    """Notes when fit began, when its first step (which traces the graph) was done, and its end."""

    begin: float
    first_step: float | None
    end: float

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.begin = time.perf_counter()
        self.first_step = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.first_step is None:
            self.first_step = time.perf_counter()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.end = time.perf_counter()


def _variable_names(model: keras.Model) -> list[str]:
    """Names such as "conv2d 2 kernel", which do not depend on how many models there were."""
    names = []
    seen: dict[str, int] = {}
    for layer in model.layers:
        kind = type(layer).__name__
        seen[kind] = seen.get(kind, 0) + 1
        names += [f"{kind} {seen[kind]} {v.name} gradient" for v in layer.trainable_variables]
    return names


def _forward_and_gradients(model: keras.Model, images: Array, labels: Array) -> list[Array]:
    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            prediction = model(x, training=True)
            loss = tf.reduce_mean(keras.losses.categorical_crossentropy(y, prediction))
        variables = [variable.value for variable in model.trainable_variables]
        return [prediction, *tape.gradient(loss, variables)]

    return [value.numpy() for value in step(images, labels)]


def _difference(name: str, ours: Array, theirs: Array) -> Difference:
    largest = float(np.max(np.abs(ours - theirs)))
    scale = float(np.max(np.abs(theirs)))
    relative = largest / scale if scale else (0.0 if largest == 0 else float("inf"))
    return Difference(name, theirs.shape, largest, relative)
