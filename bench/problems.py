"""The layers of the article's MNIST model at its batch size, and what their results must be."""

import dataclasses

import numpy as np

from fastconv import _core
from fastconv.bench.adapters import dense


@dataclasses.dataclass(frozen=True)
class Conv2dLayer:
    """A 3 x 3 convolution without padding, with bias and ReLU."""

    name: str
    x_shape: tuple
    filters: int
    directions: tuple  # those that training the model computes

    def draw(self):
        """(x, w, bias, dy)"""
        rng = np.random.default_rng(0)
        n, h, w, c = self.x_shape
        shapes = (
            self.x_shape,
            (3, 3, c, self.filters),
            (self.filters,),
            (n, h - 2, w - 2, self.filters),
        )
        return [dense(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]

    def expected(self, direction, x, w, bias, dy):
        """By the slow reference; for wgrad a pair."""
        geometry = ((1, 1), ("valid", (0, 0, 0, 0)), (1, 1), 1)
        reference = _core.reference
        if direction == "fprop":
            return reference.conv2d(x, w, bias, *geometry, "relu", "channels_last")
        linear = (*geometry, "linear", "channels_last")
        if direction == "dgrad":
            return reference.conv2d_grad_input(dy, w, x.shape, None, *linear)
        return reference.conv2d_grad_filter(x, dy, w.shape, None, True, *linear)


@dataclasses.dataclass(frozen=True)
class PoolLayer:
    """A 2 x 2 max-pooling."""

    name: str
    x_shape: tuple

    def draw(self):
        """(x, dy)"""
        rng = np.random.default_rng(0)
        n, h, w, c = self.x_shape
        shapes = (self.x_shape, (n, h // 2, w // 2, c))
        return [dense(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]

    def expected(self, direction, x, dy):
        """By the slow reference."""
        window = ((2, 2), (2, 2), ("valid", (0, 0, 0, 0)), "channels_last")
        y, argmax = _core.reference.max_pool2d(x, True, *window)
        if direction == "fprop":
            return y
        return _core.reference.max_pool2d_grad(dy, argmax, x.shape, *window)


CONV2D_LAYERS = [
    Conv2dLayer("conv1 32x28x28x1->32", (32, 28, 28, 1), 32, ("fprop", "wgrad")),
    Conv2dLayer("conv2 32x13x13x32->64", (32, 13, 13, 32), 64, ("fprop", "dgrad", "wgrad")),
]
POOL_LAYERS = [
    PoolLayer("pool1 32x26x26x32", (32, 26, 26, 32)),
    PoolLayer("pool2 32x11x11x64", (32, 11, 11, 64)),
]


def assert_right(result, expected):
    """A single array or several, fastconv's or TensorFlow's."""
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    for array, right in zip(result, expected, strict=True):
        array = np.asarray(array)
        assert array.shape == right.shape
        assert array.dtype == np.float32
        assert abs(array - right).max() <= 1e-5 * abs(right).max()
