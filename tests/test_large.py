"""Tensors beyond what caches hold; and of more than 2**31 elements: places in these fit no 32 bits.

Nearly all of an input of the latter is memory that was never written, which costs nothing to read; the
windows are far apart, and what they see is compared with the same windows side by side in a small
tensor. What writes or reads all 8 GiB runs by ``make test ARGS="-m sweep tests/test_large.py"``.
"""

import itertools

import numpy as np
import pytest

import fastconv
from fastconv import _core
from running import assert_equal_arrays, running_on

# Shape, window, strides. More than 2**31 elements each, by rows, by images and by channels.
SHAPES = {
    "rows": ((1, 2**16 + 16, 2**15 + 3, 1), (2, 3), (2**14, 2**13)),
    "images": ((2**15 + 3, 256, 256, 1), (3, 2), (300, 300)),
    "columns": ((1, 3, 2**28 + 9, 3), (3, 3), (1, 2**26)),
    "channels": ((3, 700, 1030, 1000), (2, 2), (600, 600)),
}
EACH = pytest.mark.parametrize("shape, window, strides", SHAPES.values(), ids=SHAPES)


class Tensors:
    """An input, its windows, and the two side by side."""

    def __init__(self, shape, window, strides, filters=5):
        assert np.prod(shape) > 2**31
        try:
            self.x = np.zeros(shape, np.float32)
        except MemoryError:
            pytest.skip("this machine grants no 8 GiB of memory, not even unwritten")
        rng = np.random.default_rng(1)
        n, h, w, c = shape
        self.counts = [
            (extent - size) // stride + 1
            for extent, size, stride in zip((h, w), window, strides, strict=True)
        ]
        self.images = sorted({0, 1, n // 2, n - 1} & set(range(n)))
        self.window, self.strides = window, strides
        self.small = np.zeros(
            (n, self.counts[0] * window[0], self.counts[1] * window[1], c), np.float32
        )
        for image in self.images:
            for here, there in self.places():
                values = rng.integers(-4, 5, (*window, c))
                self.x[(image, *here)] = self.small[(image, *there)] = values
        self.w = rng.integers(-4, 5, (*window, c, filters)).astype(np.float32)
        self.dy = rng.integers(-4, 5, (n, *self.counts, filters)).astype(np.float32)

    def places(self):
        """The windows' pixels, in the input and side by side."""
        for at in itertools.product(*map(range, self.counts)):
            yield tuple(
                tuple(
                    slice(i * step, i * step + size)
                    for i, step, size in zip(at, steps, self.window, strict=True)
                )
                for steps in (self.strides, self.window)
            )


@EACH
def test_inputs(shape, window, strides):
    tensors = Tensors(shape, window, strides)
    x, small, w, dy = tensors.x, tensors.small, tensors.w, tensors.dy
    right = [
        fastconv.conv2d(small, w, strides=window),
        fastconv.conv2d_grad_filter(small, dy, w.shape, strides=window),
        *fastconv.max_pool2d(small, window, return_argmax=True),
    ]
    average = fastconv.avg_pool2d(small, window)
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            results = [
                fastconv.conv2d(x, w, strides=strides),
                fastconv.conv2d_grad_filter(x, dy, w.shape, strides=strides),
                *fastconv.max_pool2d(x, window, strides=strides, return_argmax=True),
            ]
            assert_equal_arrays(results, right)
            np.testing.assert_allclose(
                fastconv.avg_pool2d(x, window, strides=strides), average, rtol=1e-6, atol=1e-6
            )


@pytest.mark.sweep
@EACH
def test_gradients_of_pooling(shape, window, strides):
    tensors = Tensors(shape, window, strides)
    small, dx = tensors.small, tensors.x
    top, argmax = fastconv.max_pool2d(small, window, return_argmax=True)
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            for wanted, call in [
                (
                    fastconv.max_pool2d_grad(top, argmax, small.shape, window),
                    lambda: fastconv.max_pool2d_grad(
                        top, argmax, shape, window, strides=strides, out=dx
                    ),
                ),
                (
                    fastconv.avg_pool2d_grad(top, small.shape, window),
                    lambda: fastconv.avg_pool2d_grad(top, shape, window, strides=strides, out=dx),
                ),
            ]:
                dx[-1, -1, -1] = np.nan  # which must go
                call()
                for image in tensors.images:
                    for here, there in tensors.places():
                        np.testing.assert_array_equal(dx[(image, *here)], wanted[(image, *there)])
                # What no window sees is zero, and so is dy of all other images.
                assert np.count_nonzero(dx) == np.count_nonzero(wanted)


@pytest.mark.parametrize(
    "c, filters, kernel, strides, rate",
    [
        (96, 1, (3, 3), (1, 1), (1, 1)),  # filters: of a channel
        (96, 1, (3, 3), (2, 2), (1, 1)),
        (100, 1, (5, 5), (1, 1), (1, 1)),
        (96, 1, (3, 3), (1, 1), (2, 2)),
        (96, 2, (3, 3), (1, 1), (1, 1)),
        (96, 1, (1, 4), (2, 1), (1, 1)),
    ],
)
def test_depthwise_batches_beyond_caches(c, filters, kernel, strides, rate):
    """Their tiles ask for lines ahead. An image has the bits that it has alone."""
    assert_images_are_as_alone((24, 37, 41, c), c * filters, c, kernel, strides, rate)


@pytest.mark.parametrize("channels, strides", [(4, (1, 1)), (4, (2, 2)), (8, (1, 1)), (6, (1, 2))])
def test_grouped_batches_beyond_caches(channels, strides):
    with running_on(algorithm="grouped"):
        assert_images_are_as_alone((24, 37, 41, 96), 96, 96 // channels, (3, 3), strides, (1, 1))


@pytest.mark.parametrize(
    "c, filters, strides", [(96, 24, (1, 1)), (91, 21, (1, 1)), (96, 40, (2, 1))]
)
def test_one_tap_batches_beyond_caches(c, filters, strides):
    """The filter gradient reads the input where it lies, and asks for the next block of pixels."""
    with running_on(algorithm="direct"):
        assert_images_are_as_alone((24, 37, 41, c), filters, 1, (1, 1), strides, (1, 1))


@pytest.mark.parametrize(
    "window, strides, padding", [(2, 2, "valid"), (3, 2, "same"), (2, 3, "valid"), (3, 1, "same")]
)
def test_pooling_batches_beyond_caches(window, strides, padding):
    """Rows of windows ask for the next row's lines, and whole lines of results are written past the caches.

    An image has the bits that it has alone, and so has a result that does not begin with a line.
    """
    x = np.random.default_rng(2).standard_normal((56, 37, 41, 96), np.float32)
    options = {"strides": strides, "padding": padding}
    wanted = fastconv.max_pool2d(x, window, **options)
    assert 4 * (x.size + wanted.size) > 32 * 2**20
    apart = np.empty(wanted.size + 1, np.float32)[1:].reshape(wanted.shape)
    fastconv.max_pool2d(x, window, **options, out=apart)
    assert_equal_arrays([apart], [wanted])
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            results = [
                fastconv.max_pool2d(x, window, **options),
                *fastconv.max_pool2d(x, window, return_argmax=True, **options),
                fastconv.avg_pool2d(x, window, **options),
            ]
            for image in range(len(x)):
                one = x[image : image + 1]
                alone = [
                    fastconv.max_pool2d(one, window, **options),
                    *fastconv.max_pool2d(one, window, return_argmax=True, **options),
                    fastconv.avg_pool2d(one, window, **options),
                ]
                assert_equal_arrays([result[image : image + 1] for result in results], alone)


def assert_images_are_as_alone(shape, filters, groups, kernel, strides, rate):
    assert 4 * np.prod(shape) > 12 * 2**20
    rng = np.random.default_rng(2)
    x = rng.standard_normal(shape, np.float32)
    w = rng.standard_normal((*kernel, shape[-1] // groups, filters), np.float32)
    options = {"strides": strides, "padding": "same", "dilation_rate": rate, "groups": groups}
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            y = fastconv.conv2d(x, w, **options)
            dy = y / 8
            dx = fastconv.conv2d_grad_input(dy, w, shape, **options)
            dw = fastconv.conv2d_grad_filter(x, dy, w.shape, **options)
            sums = np.zeros(w.shape)
            for image in range(shape[0]):
                one = slice(image, image + 1)
                assert_equal_arrays(y[one], fastconv.conv2d(x[one], w, **options))
                one_dx = fastconv.conv2d_grad_input(dy[one], w, x[one].shape, **options)
                assert_equal_arrays(dx[one], one_dx)
                sums += fastconv.conv2d_grad_filter(x[one], dy[one], w.shape, **options)
            np.testing.assert_allclose(dw, sums, rtol=1e-4, atol=1e-4 * np.abs(sums).max())


@pytest.mark.sweep
def test_convolution_of_every_element():
    """2**31 products and more in each direction: 1 x 1, of many channels."""
    shape = (3, 700, 1030, 1000)
    x = np.zeros(shape, np.float32)
    rng = np.random.default_rng(1)
    w = rng.integers(-4, 5, (1, 1, shape[-1], 1)).astype(np.float32)
    x[-1, -1, -9:] = rng.integers(-4, 5, (9, shape[-1]))
    dy = np.zeros((*shape[:-1], 1), np.float32)
    dy[-1, -1, -9:] = 3
    right = x[-1, -1, -9:] @ w[0, 0]
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            y = fastconv.conv2d(x, w)
            np.testing.assert_array_equal(y[-1, -1, -9:], right)
            assert np.count_nonzero(y) == np.count_nonzero(right)
            dw = fastconv.conv2d_grad_filter(x, dy, w.shape)
            np.testing.assert_array_equal(dw[0, 0, :, 0], 3 * x[-1, -1, -9:].sum(axis=0))
    for isa in _core.available_isas():
        with running_on(isa=isa, threads=2):
            x[-1, 0, 0] = np.nan
            fastconv.conv2d_grad_input(dy, w, shape, out=x)
            np.testing.assert_array_equal(x[-1, -1, -9:], np.tile(3 * w[0, 0, :, 0], (9, 1)))
            assert np.count_nonzero(x) == 9 * np.count_nonzero(w)
