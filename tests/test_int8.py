"""Convolutions of int8: every algorithm on every instruction set, to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
from fastconv import _core
from running import running_on

MOST_PRODUCTS = 2**17


def scales_of(x):
    """Of each image, as fastconv.conv2d_int8 says."""
    largest = np.abs(x).max(axis=(1, 2, 3))
    return np.float32(127) / (largest + np.float32(1e-7))


def quantized(x):
    return np.rint(x * scales_of(x)[:, None, None, None]).astype(np.int64)


def sums_of(x, w, strides, sides, rate, groups):
    """The convolution of integers, NHWC, tap by tap in 64 bits."""
    x = np.pad(x, ((0, 0), *sides, (0, 0)))
    rows, columns, channels, filters = w.shape
    oh, ow = (
        (size - (taps - 1) * r - 1) // s + 1
        for size, taps, r, s in zip(x.shape[1:3], (rows, columns), rate, strides, strict=True)
    )
    y = np.zeros((len(x), oh, ow, filters), np.int64)
    per_group = filters // groups
    for i in range(rows):
        for j in range(columns):
            top, left = i * rate[0], j * rate[1]
            part = x[:, top:, left:][:, :: strides[0], :: strides[1]][:, :oh, :ow]
            for g in range(groups):
                to = np.s_[g * per_group : (g + 1) * per_group]
                tap = w[i, j, :, to].astype(np.int64)
                y[..., to] += part[..., g * channels : (g + 1) * channels] @ tap
    return y


def reference(x, w, w_scale, bias, strides, sides, rate, groups, activation):
    sums = sums_of(quantized(x), w, strides, sides, rate, groups)
    multipliers = np.float32(1) / (w_scale * scales_of(x)[:, None])
    y = sums.astype(np.float32) * multipliers[:, None, None]
    if bias is not None:
        y += bias
    return np.maximum(y, 0) if activation == "relu" else y


def algorithms(serving=("madd", "plain")):
    """The names of those that this instruction set has here."""
    one, byte = np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.int8)
    names = [None, *serving]
    try:
        fastconv.conv2d_int8(one, byte, one[0, 0, 0], algorithm="vnni")
    except ValueError:
        return names
    return [*names, "vnni"]


def assert_all_agree(x, w, w_scale, bias=None, **options):
    """Every algorithm here, by one thread and by two, with the reference; in both layouts."""
    strides = options.get("strides", (1, 1))
    sides = options.get("padding", ((0, 0), (0, 0)))
    rate = options.get("dilation_rate", (1, 1))
    groups, activation = options.get("groups", 1), options.get("activation")
    expected = reference(x, w, w_scale, bias, strides, sides, rate, groups, activation)
    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    for algorithm in algorithms():
        for threads in (1, 2):
            with running_on(threads=threads):
                y = fastconv.conv2d_int8(x, w, w_scale, bias, algorithm=algorithm, **options)
            assert y.tobytes() == expected.tobytes(), (algorithm, threads)
        y = fastconv.conv2d_int8(
            first, w, w_scale, bias, algorithm=algorithm, data_format="channels_first", **options
        )
        np.testing.assert_array_equal(y.transpose(0, 2, 3, 1), expected)


def drawn(seed, shape, filters, kernel=(3, 3), groups=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.integers(-128, 128, (*kernel, shape[3] // groups, filters)).astype(np.int8)
    w_scale = rng.uniform(50, 500, filters).astype(np.float32)
    return x, w, w_scale, rng.standard_normal(filters).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("filters", [1, 3, 15, 16, 17, 48, 64, 83, 130])
def test_channels_and_filters(channels, filters, isa):
    case = drawn(channels * filters, (2, 6, 7, channels), filters)
    assert_all_agree(*case, padding=((1, 1), (1, 1)), activation="relu")


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 1), (5, 5)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("rate", [(1, 1), (2, 1), (1, 2)])
def test_windows(kernel, strides, rate, isa):
    x, w, w_scale, _ = drawn(3, (2, 11, 12, 6), 20, kernel)
    options = {"strides": strides, "dilation_rate": rate}
    assert_all_agree(x, w, w_scale, padding=((2, 0), (1, 3)), **options)


@pytest.mark.parametrize("groups, channels, filters", [(2, 8, 6), (3, 15, 51), (7, 7, 7)])
def test_groups(groups, channels, filters, isa):
    case = drawn(4, (2, 7, 6, channels), filters, groups=groups)
    assert_all_agree(*case, groups=groups, padding=((1, 0), (0, 1)))


@pytest.mark.parametrize("shape", [(1, 20, 3, 8), (5, 3, 3, 4), (1, 3, 30, 5), (3, 9, 9, 200)])
def test_shapes_of_the_output(shape, isa):
    """One column, one pixel an image, one row; a filter of more than one panel in one task."""
    assert_all_agree(*drawn(5, shape, 70))


@given(
    shape=st.tuples(st.integers(1, 3), *[st.integers(5, 13)] * 2, st.integers(1, 9)),
    filters=st.integers(1, 80),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rate=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sides=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    groups=st.integers(1, 3),
    activation=st.sampled_from([None, "relu"]),
)
@settings(max_examples=60)
def test_any_problem(shape, filters, kernel, strides, rate, sides, groups, activation):
    shape = (*shape[:3], shape[3] * groups)
    case = drawn(filters, shape, filters * groups, kernel, groups)
    options = {"strides": strides, "dilation_rate": rate, "padding": sides}
    for isa in _core.available_isas():
        with running_on(isa=isa):
            assert_all_agree(*case, groups=groups, activation=activation, **options)


@pytest.mark.parametrize("signs", ["equal", "alternating", "opposite"])
def test_extremes_do_not_saturate(signs, isa):
    """As many products as are allowed, all of them the largest: where VPMADDUBSW would fail."""
    x = np.full((2, 1, 2, MOST_PRODUCTS // 2), 127, np.float32)
    w = np.full((1, 2, MOST_PRODUCTS // 2, 5), -128, np.int8)
    w[..., 1] = 127
    w[..., 2] = 0
    w[..., ::2, 3] = 127
    if signs == "alternating":
        x[..., ::2] = -127
    if signs == "opposite":
        x = -x
    ones = np.ones(5, np.float32)
    expected = sums_of(x.astype(np.int64), w, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    assert np.abs(expected).max() < 2**31
    assert signs == "alternating" or np.abs(expected).max() == 127 * 128 * MOST_PRODUCTS
    for algorithm in algorithms():
        y = fastconv.conv2d_int8(x, w, ones, algorithm=algorithm)
        np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_mostly_padding(isa):
    """Whose copy with the padding would be large, and little of it the image."""
    x, w, w_scale, bias = drawn(6, (1, 5, 5, 6), 4)
    options = {"padding": ((1000, 900), (800, 900)), "strides": (100, 90)}
    expected = reference(
        x, w, w_scale, bias, options["strides"], options["padding"], (1, 1), 1, None
    )
    for algorithm in (None, "plain"):
        y = fastconv.conv2d_int8(x, w, w_scale, bias, algorithm=algorithm, **options)
        assert y.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"'plain'. Received: algorithm='madd'"):
        fastconv.conv2d_int8(x, w, w_scale, algorithm="madd", **options)


def test_images_do_not_depend_on_one_another(isa):
    x, w, w_scale, bias = drawn(7, (9, 20, 20, 12), 24)  # large enough for several tasks an image
    x *= np.float32(10) ** np.arange(-4, 5, dtype=np.float32)[:, None, None, None]
    for algorithm in algorithms():
        together = fastconv.conv2d_int8(x, w, w_scale, bias, algorithm=algorithm)
        alone = [fastconv.conv2d_int8(image[None], w, w_scale, bias) for image in x]
        assert together.tobytes() == np.concatenate(alone).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [6, 60])
def test_an_image_that_is_not_finite_gives_nan(value, size, isa):
    x, w, w_scale, bias = drawn(8, (3, size, 60, 12), 9)
    clean = fastconv.conv2d_int8(x, w, w_scale, bias, activation="relu")
    x[1, 2, 3, 4] = value
    for algorithm in algorithms():
        y = fastconv.conv2d_int8(x, w, w_scale, bias, activation="relu", algorithm=algorithm)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[::2], clean[::2])


def test_values_at_the_ends_of_float32(isa):
    _, w, w_scale, _ = drawn(9, (1, 5, 5, 4), 6)
    x = np.zeros((4, 5, 5, 4), np.float32)
    x[1] = np.finfo(np.float32).max
    x[2] = np.finfo(np.float32).smallest_subnormal
    x[3, 0, 0, 0] = -np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        assert_all_agree(x, w, w_scale)


def test_empty_batch(isa):
    x, w, w_scale, bias = drawn(10, (0, 5, 5, 4), 6)
    assert fastconv.conv2d_int8(x, w, w_scale, bias).shape == (0, 3, 3, 6)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_error_is_that_of_quantisation(padding, activation, isa):
    """At most half a step of each factor."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((2, 10, 9, 20)).astype(np.float32)
    w = rng.standard_normal((3, 3, 20, 30)).astype(np.float32)
    w_int8, w_scale = fastconv.quantize_filter(w)
    y = fastconv.conv2d_int8(x, w_int8, w_scale, padding=padding, activation=activation)
    exact = fastconv.conv2d(x, w, padding=padding, activation=activation)
    ones_x, ones_w = np.ones_like(x), np.ones_like(w)
    half_x = (0.5 / scales_of(x))[:, None, None, None] * ones_x
    half_w = 0.5 / w_scale * ones_w
    bound = (
        fastconv.conv2d(np.abs(x), half_w, padding=padding)
        + fastconv.conv2d(half_x, np.abs(w), padding=padding)
        + fastconv.conv2d(half_x, half_w, padding=padding)
    )
    assert (np.abs(y - exact) <= 1.001 * bound).all()
    assert np.abs(y - exact).max() < 0.02 * np.abs(exact).max()


def test_vnni_is_what_serves_where_it_is(isa):
    if "vnni" not in algorithms():
        # Not every compiler knows AVX-VNNI.
        assert isa != "avx512" or "avx512_vnni" not in cpu_flags()


def cpu_flags():
    try:
        with open("/proc/cpuinfo", encoding="ascii") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()


def test_filters():
    rng = np.random.default_rng(12)
    w = rng.standard_normal((3, 2, 5, 7)).astype(np.float32)
    w[..., 3] = 0
    w[..., 4] *= 1e-4
    w_int8, w_scale = fastconv.quantize_filter(w)
    assert (w_int8.dtype, w_scale.dtype, w_scale.shape) == (np.int8, np.float32, (7,))
    assert np.abs(w_int8).max(axis=(0, 1, 2)).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert (np.abs(w - w_int8 / w_scale) <= 0.5001 / w_scale).all()
