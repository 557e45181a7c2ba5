"""A small network trained with fastconv's functions on NumPy arrays: no Keras, no TensorFlow.

    python examples/numpy_network.py
    python examples/numpy_network.py --images 2000 --epochs 2

Forward pass, gradients and the optimizer are all written out. Two blocks of convolution, ReLU and
2 x 2 max-pooling, each computed in one pass, lie in front of one dense layer. It learns the images
of MNIST that ship with fastconv, by stochastic gradient descent with momentum.
"""

import argparse
import time

import numpy as np

import fastconv
from fastconv.mnist import data

BATCH = 32


def make_parameters(rng):
    """He's initialisation for what a ReLU follows; biases are zero."""

    def weights(*shape):
        inputs = np.prod(shape[:-1])
        return (rng.standard_normal(shape) * np.sqrt(2 / inputs)).astype("float32")

    return {
        "w1": weights(3, 3, 1, 16),
        "b1": np.zeros(16, "float32"),
        "w2": weights(3, 3, 16, 32),
        "b2": np.zeros(32, "float32"),
        "w3": weights(7 * 7 * 32, 10),
        "b3": np.zeros(10, "float32"),
    }


def block(x, w, b):
    """Convolution, ReLU and max-pooling; the argmax is what the gradient needs of the pooling."""
    return fastconv.conv2d_max_pool2d(
        x, w, b, padding="same", activation="relu", return_argmax=True
    )


def block_grad(x, w, dy, y, argmax, with_input_grad=True):
    return fastconv.conv2d_max_pool2d_grad(
        x, w, dy, y, argmax, padding="same", activation="relu", with_input_grad=with_input_grad
    )


def forward(parameters, x):
    """Logits, and what the backward pass needs of the way there."""
    y1, argmax1 = block(x, parameters["w1"], parameters["b1"])  # (n, 14, 14, 16)
    y2, argmax2 = block(y1, parameters["w2"], parameters["b2"])  # (n, 7, 7, 32)
    flat = y2.reshape(len(x), -1)
    logits = flat @ parameters["w3"] + parameters["b3"]
    return logits, (x, y1, argmax1, y2, argmax2, flat)


def loss_and_gradients(parameters, x, labels):
    """Mean cross-entropy of a batch, its gradient by every parameter, and how many were right."""
    logits, (x, y1, argmax1, y2, argmax2, flat) = forward(parameters, x)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    rows = np.arange(len(x))
    loss = float(np.mean(log_sums - shifted[rows, labels]))

    dlogits = np.exp(shifted - log_sums[:, None])  # the softmax
    dlogits[rows, labels] -= 1
    dlogits /= len(x)
    gradients = {"w3": flat.T @ dlogits, "b3": dlogits.sum(axis=0)}
    dy2 = (dlogits @ parameters["w3"].T).reshape(y2.shape)
    dy1, gradients["w2"], gradients["b2"] = block_grad(y1, parameters["w2"], dy2, y2, argmax2)
    _, gradients["w1"], gradients["b1"] = block_grad(
        x, parameters["w1"], dy1, y1, argmax1, with_input_grad=False
    )
    return loss, gradients, int((logits.argmax(axis=1) == labels).sum())


def train_epoch(parameters, velocity, x, labels, rng, rate, momentum=0.9):
    """One pass over the images in random order, in place; mean loss and share of right answers."""
    order = rng.permutation(len(x))
    losses, right = [], 0
    for start in range(0, len(x), BATCH):
        batch = order[start : start + BATCH]
        loss, gradients, right_here = loss_and_gradients(parameters, x[batch], labels[batch])
        for name, gradient in gradients.items():
            velocity[name] = momentum * velocity[name] - rate * gradient
            parameters[name] += velocity[name]
        losses.append(loss * len(batch))
        right += right_here
    return sum(losses) / len(x), right / len(x)


def accuracy(parameters, x, labels):
    right = 0
    for start in range(0, len(x), 256):
        logits, _ = forward(parameters, x[start : start + 256])
        right += int((logits.argmax(axis=1) == labels[start : start + 256]).sum())
    return right / len(x)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="to train on (default: all 10,000)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate (default: 0.02)")
    arguments = parser.parse_args(arguments)

    mnist = data.read_npz(data.SUBSET, source="the packaged subset")
    x_train = mnist.x_train[: arguments.images, ..., None].astype("float32") / 255
    y_train = mnist.y_train[: arguments.images]
    x_test, y_test = mnist.x_test[..., None].astype("float32") / 255, mnist.y_test
    print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on")

    rng = np.random.default_rng(1)
    parameters = make_parameters(rng)
    velocity = {name: np.zeros_like(value) for name, value in parameters.items()}
    for epoch in range(arguments.epochs):
        start = time.perf_counter()
        loss, seen = train_epoch(parameters, velocity, x_train, y_train, rng, arguments.rate)
        new = accuracy(parameters, x_test, y_test)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, accuracy {seen:.2%}, on new images {new:.2%}, "
            f"{seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
