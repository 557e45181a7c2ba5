"""Winograd's algorithm along rows, of few channels: against float64, on every instruction set."""

import itertools

import numpy as np
import pytest

import fastconv
import oracle
from fastconv import PackedFilter
from running import running_on

ROWS = "winograd_rows"
ERROR = 2e-6  # over the largest result, as the documentation says

# Image, filters, taps, strides, dilation of the rows, padding.
PROBLEMS = [
    ((2, 20, 23, 3), 32, (7, 7), (2, 2), 1, "same"),  # as a ResNet's first layer
    ((1, 51, 47, 3), 96, (11, 11), (4, 4), 1, "valid"),  # as AlexNet's
    ((2, 16, 61, 3), 64, (3, 3), (1, 1), 1, "same"),  # as VGG's
    ((1, 21, 75, 1), 32, (5, 20), (2, 2), 1, "valid"),  # as a network's for speech
    ((1, 13, 14, 7), 48, (3, 5), (2, 2), 1, "valid"),
    ((2, 9, 40, 16), 20, (2, 9), (3, 3), 1, ((1, 0), (2, 5))),
    ((1, 3, 3, 4), 8, (3, 3), (1, 1), 1, "valid"),  # one output
    ((2, 7, 4, 1), 1, (3, 3), (1, 1), 1, "same"),
    ((1, 5, 90, 2), 17, (1, 3), (1, 1), 1, "same"),
    ((1, 30, 11, 5), 40, (4, 6), (3, 1), 1, ((2, 1), (0, 3))),
    ((2, 25, 18, 3), 47, (3, 4), (1, 1), 5, "same"),
    ((1, 12, 30, 4), 72, (3, 7), (2, 2), 3, ((6, 6), (9, 9))),  # windows in the padding alone
    ((3, 40, 9, 64), 33, (1, 3), (2, 1), 1, "valid"),
    ((0, 9, 9, 3), 8, (3, 3), (1, 1), 1, "same"),
]


def draw(rng, shape, filters, kernel):
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.standard_normal((*kernel, shape[3], filters)).astype(np.float32)
    return x, w, rng.standard_normal(filters).astype(np.float32)


def assert_close(y, expected):
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    largest = np.abs(expected).max(initial=0)
    assert np.abs(y - expected).max(initial=0) <= ERROR * largest


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_float64(problem, isa, rng):
    shape, filters, kernel, strides, rate, padding = problem
    x, w, bias = draw(rng, shape, filters, kernel)
    geometry = {"strides": strides, "padding": padding, "dilation_rate": (rate, 1)}
    linear = oracle.conv2d(x, w, **geometry)
    for activation, expected in {None: linear + bias, "relu": np.maximum(linear + bias, 0)}.items():
        y = fastconv.conv2d(x, w, bias, activation=activation, algorithm=ROWS, **geometry)
        assert_close(y, expected)
    assert_close(fastconv.conv2d(x, w, algorithm=ROWS, **geometry), linear)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_rows_of_any_number_of_taps(stride, isa, rng):
    """Of pieces, the last of which may be partly zeros; and of widths that leave part of a tile."""
    for taps, columns in itertools.product(range(2 * stride + 1, 23), [0, 1, 2, 3, 11]):
        width = taps + columns * stride + (taps + columns) % stride
        x, w, bias = draw(rng, (1, 3, width, 2), 9, (2, taps))
        y = fastconv.conv2d(x, w, bias, strides=stride, algorithm=ROWS)
        geometry = {"strides": (stride, stride), "padding": "valid", "dilation_rate": (1, 1)}
        assert_close(y, oracle.conv2d(x, w, **geometry) + bias)


def test_one_tap_at_a_time(isa, rng):
    """Each moves the image, and no other tap or channel takes part: but for rounding, of sums that are 0 else."""
    x = rng.standard_normal((1, 6, 40, 3)).astype(np.float32)
    for row, tap, channel in itertools.product(range(2), range(7), range(3)):
        w = np.zeros((2, 7, 3, 5), np.float32)
        w[row, tap, channel, 3] = 1
        y = fastconv.conv2d(x, w, strides=(1, 2), algorithm=ROWS)
        assert not np.delete(y, 3, 3).any()
        np.testing.assert_allclose(
            y[0, :, :, 3], x[0, row : row + 5, tap : tap + 34 : 2, channel], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("kernel", "strides", "rate", "padding"),
    [
        ((3, 3), (1, 1), 1, "same"),
        ((5, 7), (2, 2), 1, "same"),
        ((2, 5), (1, 1), 3, ((0, 0), (7, 6))),
        ((3, 11), (3, 4), 1, ((4, 3), (11, 12))),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_blank_parts_are_exactly_the_bias(kernel, strides, rate, padding, activation, isa, rng):
    """ReLU's gradient depends on whether a result is exactly 0."""
    x, w, bias = draw(rng, (2, 40, 61, 3), 24, kernel)
    x[:, 3:25, 5:51] = 0
    x[1, :, 35:] = -0.0
    x[0, 30] = 0
    x[..., 1] *= 0  # one channel of a pixel does not make it blank, nor keep it from being so
    options = {"strides": strides, "padding": padding, "dilation_rate": (rate, 1)}
    y = fastconv.conv2d(x, w, bias, activation=activation, algorithm=ROWS, **options)
    # How many of the pixels under a filter are not zero.
    live = (x != 0).any(3, keepdims=True).astype(np.float64)
    live = oracle.conv2d(live, np.ones((*kernel, 1, 1)), **options)[..., 0]
    expected = np.maximum(bias, 0) if activation else bias
    blank = y[live == 0]
    assert len(blank) > 50
    np.testing.assert_array_equal(blank, np.broadcast_to(expected, blank.shape))
    assert (y[live > 0] != expected).any(1).mean() > 0.9


def test_what_is_not_finite_stays_in_its_tile(isa, rng):
    x, w, bias = draw(rng, (1, 12, 40, 3), 8, (3, 3))
    sound = fastconv.conv2d(x, w, bias, algorithm=ROWS)
    for value in (np.nan, np.inf):
        x[0, 5, 17, 1] = value
        y = fastconv.conv2d(x, w, bias, algorithm=ROWS)
        assert not np.isfinite(y[0, 3:6, 15:18]).any()  # the windows that hold it
        spoiled = ~np.isfinite(y).all(3)
        rows, columns = np.nonzero(spoiled[0])
        assert set(rows) == {3, 4, 5}
        assert columns.min() >= 12
        assert columns.max() < 20  # two tiles of four
        np.testing.assert_array_equal(y[~spoiled], sound[~spoiled])


def test_same_bits_for_any_number_of_threads(isa, rng):
    for shape, filters, kernel, strides, rate, padding in PROBLEMS:
        x, w, bias = draw(rng, shape, filters, kernel)
        options = {"strides": strides, "padding": padding, "dilation_rate": (rate, 1)}
        results = {}
        for threads in (1, 2, 3, 7):
            with running_on(threads=threads):
                y = fastconv.conv2d(x, w, bias, algorithm=ROWS, **options)
            results[threads] = y.tobytes()
        assert all(of_threads == results[1] for of_threads in results.values())


@pytest.mark.parametrize("filters", [40, 48])  # whole lines of a pixel are written past the caches
def test_images_beyond_the_caches_have_the_bits_of_each_alone(filters, isa, rng):
    x, w, bias = draw(rng, (7, 114, 113, 3), filters, (3, 3))
    options = {"padding": "same", "activation": "relu", "algorithm": ROWS}
    y = fastconv.conv2d(x, w, bias, **options)
    assert y.nbytes > 12 << 20
    for i in range(len(x)):
        alone = fastconv.conv2d(x[i : i + 1], w, bias, **options)
        assert y[i].tobytes() == alone.tobytes()
    # Lines of an output that does not begin with one are not whole.
    block = np.empty(y.size + 32, np.float32)
    at = -block.ctypes.data % 64 // 4 + 5
    elsewhere = block[at : at + y.size].reshape(y.shape)
    fastconv.conv2d(x, w, bias, out=elsewhere, **options)
    assert elsewhere.tobytes() == y.tobytes()
    with running_on(threads=2):
        assert fastconv.conv2d(x, w, bias, **options).tobytes() == y.tobytes()


def test_kept_filters(isa, rng):
    x, w, bias = draw(rng, (1, 20, 31, 3), 40, (5, 7))
    packed = PackedFilter(w)
    for strides in ((1, 1), (2, 2), (1, 1), (1, 2), (3, 2)):
        expected = fastconv.conv2d(x, w, bias, strides=strides, algorithm=ROWS)
        for _ in range(2):
            y = fastconv.conv2d(x, packed, bias, strides=strides, algorithm=ROWS)
            assert y.tobytes() == expected.tobytes()
    # One form for each stride along the row.
    forms = packed.nbytes - w.nbytes
    fastconv.conv2d(x, packed, bias, strides=(3, 1), algorithm=ROWS)
    assert packed.nbytes - w.nbytes == forms


def test_pooling_behind_it(isa, rng):
    x, w, bias = draw(rng, (2, 21, 30, 3), 24, (3, 5))
    y = fastconv.conv2d(x, w, bias, activation="relu", algorithm=ROWS)
    pooled = fastconv.conv2d_max_pool2d(x, w, bias, activation="relu", algorithm=ROWS)
    np.testing.assert_array_equal(pooled, fastconv.max_pool2d(y, 2))


@pytest.mark.parametrize(
    ("shape", "kernel", "filters", "strides", "padding"),
    [
        ((1, 224, 224, 3), (7, 7), 64, 2, "same"),
        ((1, 224, 224, 3), (9, 9), 64, 2, "same"),
        ((4, 161, 700, 1), (5, 20), 32, 2, "valid"),
    ],
)
def test_default_accuracy_chooses_it_and_strict_does_not(shape, kernel, filters, strides, padding):
    def choice():
        w = (*kernel, shape[3], filters)
        return fastconv.explain(shape, w, strides=strides, padding=padding)

    with running_on(isa=fastconv.info()["isa_available"][0], accuracy="default"):
        assert choice()["algorithm"] == ROWS
        for direction in ("dgrad", "wgrad"):
            other = fastconv.explain(
                shape,
                (*kernel, shape[3], filters),
                direction=direction,
                strides=strides,
                padding=padding,
            )
            assert other["algorithm"] != ROWS
    with running_on(accuracy="strict"):
        strict = choice()
        assert strict["algorithm"] == "small_channel"
        assert ROWS in {c["algorithm"] for c in strict["candidates"] if not c["allowed"]}


@pytest.mark.parametrize(
    "options",
    [
        {"dilation_rate": (1, 2)},
        {"groups": 2},
        {"strides": (1, 2)},  # two taps of pixels taken together
        {"kernel": (3, 2)},
        {"channels": 66},
    ],
    ids=str,
)
def test_refuses_what_it_does_not_serve(options):
    options = dict(options)
    kernel, channels = options.pop("kernel", (3, 3)), options.pop("channels", 4)
    x = np.ones((1, 9, 9, channels), np.float32)
    w = np.ones((*kernel, channels // options.get("groups", 1), 8), np.float32)
    with pytest.raises(ValueError, match="must be one that serves this fprop"):
        fastconv.conv2d(x, w, algorithm=ROWS, **options)
