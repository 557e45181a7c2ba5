"""Taps, windows and padding so far apart that their distances fit no 32 bits: right, soon, and in
little memory."""

import numpy as np
import pytest

import fastconv
from running import assert_equal_arrays, by_reference, running_on

FAR = 2**31 - 1
# Height, width, kernel, options. Where padding is copied at all, these must not be.
GEOMETRIES = {
    "dilated a million times": (4, 4, (3, 3), {"dilation_rate": 10**6, "padding": "same"}),
    "dilated, one axis": (4, 5, (3, 2), {"dilation_rate": (1, 10**7), "padding": "same"}),
    "dilated as far as can be": (1, 3, (2, 3), {"dilation_rate": (1, FAR // 2), "padding": "same"}),
    "wide strides": (5, 4, (3, 3), {"strides": FAR, "padding": "same"}),
    "wide strides over padding": (
        4,
        4,
        (3, 3),
        {"strides": 2**20, "padding": ((2**20, 2**20), (2**20, 2**20))},
    ),
    "a strip of padding": (3, 3, (3, 3), {"padding": ((0, 0), (5000, 5000))}),
    "taps beside the image": (
        40,
        3,
        (2, 2),
        {"dilation_rate": (39, 4000), "padding": ((0, 0), (2000, 2001)), "strides": (1, 500)},
    ),
}
CHANNELS = {"1 channel": (1, 3, 1), "3 channels": (3, 5, 1), "8": (8, 17, 1), "grouped": (8, 8, 4)}
CHANNELS["depthwise"] = (6, 6, 6)


def operands(height, width, kernel, options, channels):
    c, k, groups = channels
    rng = np.random.default_rng(3)
    x = rng.integers(-4, 5, (2, height, width, c)).astype(np.float32)
    w = rng.integers(-4, 5, (*kernel, c // groups, k)).astype(np.float32)
    options = {**options, "groups": groups}
    with by_reference():
        shape = fastconv.conv2d(x, w, **options).shape
    return x, w, rng.integers(-4, 5, shape).astype(np.float32), options


def everything(x, w, dy, options, **more):
    return [
        fastconv.conv2d(x, w, **options, **more),
        fastconv.conv2d_grad_input(dy, w, x.shape, **options, **more),
        fastconv.conv2d_grad_filter(x, dy, w.shape, **options, **more),
    ]


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolutions(geometry, channels, isa):
    with running_on(accuracy="strict"):
        check_convolutions(*geometry, channels)


def check_convolutions(height, width, kernel, options, channels):
    x, w, dy, options = operands(height, width, kernel, options, channels)
    with by_reference():
        right = everything(x, w, dy, options)
    assert_equal_arrays(everything(x, w, dy, options), right)  # small integers: exact in any order
    for direction, wanted in zip(("fprop", "dgrad", "wgrad"), right, strict=True):
        told = fastconv.explain(x.shape, w.shape, direction=direction, **options)
        tensors = 4 * (x.size + w.size + dy.size)
        for candidate in told["candidates"]:
            name = candidate["algorithm"]
            call = {
                "fprop": lambda name=name: fastconv.conv2d(x, w, algorithm=name, **options),
                "dgrad": lambda name=name: fastconv.conv2d_grad_input(
                    dy, w, x.shape, algorithm=name, **options
                ),
                "wgrad": lambda name=name: fastconv.conv2d_grad_filter(
                    x, dy, w.shape, algorithm=name, **options
                ),
            }[direction]
            if candidate["allowed"]:
                assert_equal_arrays([call()], [wanted])
            else:
                np.testing.assert_allclose(call(), wanted, rtol=0, atol=1e-3)
        assert told["workspace_bytes"] <= 32 * tensors + 2**21


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_convolutions_that_are_pooled(geometry, isa):
    height, width, kernel, options = geometry
    x, w, dy, options = operands(height, width, kernel, options, (3, 5, 1))
    if min(dy.shape[1:3]) < 2:
        return
    with running_on(accuracy="strict"):
        y, taps = fastconv.conv2d_max_pool2d(x, w, return_argmax=True, **options)
        gradients = fastconv.conv2d_max_pool2d_grad(x, w, y, y, taps, **options)
    with by_reference():
        right, right_taps = fastconv.conv2d_max_pool2d(x, w, return_argmax=True, **options)
        right_gradients = fastconv.conv2d_max_pool2d_grad(x, w, y, y, right_taps, **options)
    assert_equal_arrays([y, taps, *gradients], [right, right_taps, *right_gradients])


# --- pooling --------------------------------------------------------------------------------------

# Windows of up to 2**31 - 1 taps, of which an image has few; their places fit an int32 and no int16.
WINDOWS = {
    "as large as can be": ((1, 5, 7, 3), (46340, 46340)),
    "long": ((2, 1, 100, 2), (1, FAR)),
    "2**15 rows": ((1, 6, 5, 4), (2**15, 2**15)),
    "2**16 columns": ((1, 3, 200, 1), (2, 2**16 + 1)),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("strides", [1, (3, 2), FAR])
@pytest.mark.parametrize("shape, window", WINDOWS.values(), ids=WINDOWS)
def test_pooling(shape, window, strides, data_format, isa):
    rng = np.random.default_rng(3)
    x = rng.integers(-40, 41, shape).astype(np.float32)
    if data_format == "channels_first":
        x = np.ascontiguousarray(np.moveaxis(x, 3, 1))
    pool = {"pool_size": window, "padding": "same", "data_format": data_format}
    pool["strides"] = strides

    def everything():
        y, argmax = fastconv.max_pool2d(x, return_argmax=True, **pool)
        average = fastconv.avg_pool2d(x, **pool)
        dy = np.round(y)
        return (
            [y, argmax, fastconv.max_pool2d_grad(dy, argmax, x.shape, **pool)],
            [average, fastconv.avg_pool2d_grad(dy, x.shape, **pool)],
        )

    with by_reference():
        right, averages = everything()
    results, means = everything()
    assert right[1].dtype == np.int32
    assert_equal_arrays(results, right)
    for mean, wanted in zip(means, averages, strict=True):
        np.testing.assert_allclose(mean, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("window", [46341, (2**16, 2**15), (2, 2**30), (FAR, FAR)])
def test_windows_of_too_many_taps(window):
    x = np.zeros((1, 2, 2, 1), np.float32)
    for call in (fastconv.max_pool2d, fastconv.avg_pool2d):
        with pytest.raises(ValueError, match=r"window's area, must be below 2\*\*31\. Received"):
            call(x, window, padding="same")
