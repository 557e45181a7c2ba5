"""The convolution kernels, in all three directions, on every instruction set."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
import oracle
from conv2d_problems import (
    Problem,
    assert_exact,
    assert_same_bits,
    assert_within,
    both_layouts,
    exact_case,
    integers,
    magnitudes,
    magnitudes_of_rounded,
    normals,
    rounded_case,
    solve,
    solve_by_oracle,
    solve_by_reference,
)
from fastconv import _core
from running import running_on


@pytest.fixture(autouse=True)
def sums_of_products():
    """The algorithms whose results are sums of float32 products, exact where those are integers.

    test_winograd.py tests the others.
    """
    with running_on(accuracy="strict"):
        yield


WINDOWS = both_layouts(
    Problem((2, 9, 11, 3), 5, kernel=kernel, strides=strides, padding=padding)
    for kernel in [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 5), (7, 1)]
    for strides in [(1, 1), (2, 2), (3, 1), (4, 9)]
    for padding in ["valid", "same", ((1, 2), (3, 0)), ((7, 0), (8, 9))]
)
CHANNEL_COUNTS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65]
CHANNELS = [
    Problem((1, 5, 6, channels), filters, kernel=(3, 2), padding="same")
    for channels, filters in itertools.product(CHANNEL_COUNTS, repeat=2)
] + [
    # Only some pairs: each count meets each other once in the layout above.
    Problem((2, 5, 7, channels), filters, data_format="channels_first")
    for channels, filters in zip(CHANNEL_COUNTS, reversed(CHANNEL_COUNTS), strict=True)
]
DILATIONS = both_layouts(
    Problem(
        (2, 12, 10, 4),
        6,
        kernel=kernel,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
    )
    for kernel in [(3, 3), (2, 4)]
    for dilation_rate in [(2, 2), (1, 3), (5, 2)]
    for strides in [(1, 1), (2, 2), (3, 1)]
    for padding in ["valid", "same", ((4, 1), (0, 7))]
)
GROUPS = both_layouts(
    Problem((2, 7, 6, channels), filters, groups=groups, strides=strides, padding="same")
    for channels, filters, groups in [
        (4, 4, 2),
        (6, 9, 3),
        (8, 8, 8),
        (16, 32, 16),
        (5, 15, 5),
        (1, 7, 1),
        (33, 33, 33),
        (64, 64, 2),
        (48, 32, 16),
        (34, 66, 2),
    ]
    for strides in [(1, 1), (2, 1)]
)
# Few filters of more channels: fprop's sums run along channels, wgrad takes dy for the input.
FEW_FILTERS = [
    *(
        Problem((2, 9, 15, channels), filters, kernel=kernel, strides=strides, padding=padding)
        for channels, filters in [(5, 1), (17, 2), (24, 3), (40, 4), (33, 1)]
        for kernel in [(1, 1), (3, 3), (2, 5)]
        for strides in [(1, 1), (2, 3)]
        for padding in ["valid", "same", ((1, 0), (0, 1)), ((4, 5), (6, 3))]
    ),
    *(
        Problem((1, 11, 30, 19), filters, padding=padding, dilation_rate=(2, 3))
        for filters in (1, 2, 3, 4)
        for padding in ["valid", "same"]
    ),
    Problem((3, 6, 7, 64), 3, padding="same", data_format="channels_first"),
]
EDGES = both_layouts(
    [
        Problem((0, 5, 6, 3), 4),
        Problem((5, 5, 6, 3), 4),
        Problem((1, 1, 1, 1), 1, kernel=(1, 1)),
        Problem((1, 1, 1, 17), 33, padding="same"),
        Problem((3, 3, 3, 8), 16),  # one window an image
        Problem((2, 9, 3, 8), 16),  # OW = 1
        Problem((2, 3, 9, 8), 16),  # OH = 1
        Problem((2, 40, 1, 5), 7, kernel=(3, 1)),
        Problem((2, 1, 40, 5), 7, kernel=(1, 3)),
        Problem((2, 1, 1, 6), 5, kernel=(5, 5), padding="same"),
        Problem((1, 2, 2, 3), 4, kernel=(2, 2), padding=((40, 0), (0, 40))),
        Problem((1, 4, 4, 3), 4, strides=(50, 50), padding="same"),
        Problem((1, 8, 9, 3), 4, kernel=(2, 2), strides=(3, 4), padding="same"),
        Problem((1, 3, 4, 2), 3, strides=(2, 2), padding=((9, 9), (9, 9))),
        Problem((1, 3, 4, 2), 3, kernel=(2, 2), dilation_rate=(30, 30), padding=((30, 0), (0, 28))),
        Problem((1, 6, 7, 300), 3),
        Problem((1, 6, 7, 3), 300),
        # Three products side by side in the input: a pixel's, a row's; and three that are apart.
        Problem((2, 12, 13, 3), 17, kernel=(3, 2), dilation_rate=(2, 3)),
        Problem((2, 12, 13, 2), 9, kernel=(2, 3)),
        Problem((2, 12, 13, 1), 33, kernel=(2, 3), dilation_rate=(1, 2)),
        # As many pixels as the input has, but not these.
        Problem((2, 9, 9, 64), 8, kernel=(1, 1), strides=(2, 2), padding=((4, 4), (4, 4))),
        Problem((20, 1, 9, 64), 8, kernel=(1, 1), strides=(1, 2), padding=((0, 0), (4, 4))),
        Problem((20, 3, 9, 64), 8, kernel=(1, 1), padding=((1, 0), (0, 2))),
    ]
)
# Depthwise, of one row of taps: few channels, some, and so many that lines of the cache do not stay.
ONE_ROW = [
    Problem((2, 1, 45, 30), 30, (1, taps), groups=30, padding="same") for taps in range(2, 14)
] + [
    Problem(x, x[3], (1, taps), (1, 1), padding, (1, rate), groups=x[3])
    for x in [(2, 1, 45, 12), (1, 3, 37, 40), (1, 1, 70, 512)]
    for taps, rate in [(3, 1), (3, 5), (7, 2), (9, 1), (9, 3), (31, 1)]
    for padding in ["same", ((2, 0), (6, 33))]
]
SMALL = WINDOWS + CHANNELS + DILATIONS + GROUPS + FEW_FILTERS + EDGES + ONE_ROW

# Large enough for several cache blocks, channel chunks, tiles for each thread and partial sums.
LARGE = [
    Problem((32, 28, 28, 1), 32),  # the article's first layer
    Problem((32, 13, 13, 32), 64),  # and its second
    Problem((2, 30, 31, 64), 96, padding="same"),
    Problem((2, 30, 31, 64), 96, strides=(2, 2), padding="same"),
    Problem((1, 57, 57, 33), 70, padding="same"),
    Problem((1, 57, 57, 33), 70, dilation_rate=(2, 3)),
    Problem((1, 14, 14, 256), 256, padding="same"),
    Problem((4, 14, 14, 300), 40, padding="same"),
    # Channels enough for chunks of one tap, which meet all pixels, some, or none.
    Problem((2, 9, 8, 130), 150, strides=(2, 1), padding=((1, 2), (0, 3))),
    Problem((1, 6, 7, 140), 90, kernel=(3, 2), dilation_rate=(4, 3), padding=((5, 4), (3, 3))),
    Problem((3, 2, 5, 200), 40, kernel=(5, 3), padding=((12, 3), (1, 9))),
    Problem((4, 14, 14, 40), 300, kernel=(1, 1)),
    # Whose filter's gradient is computed transposed, and tiles of one vector in strips.
    Problem((2, 30, 31, 144), 24, kernel=(1, 1)),
    Problem((1, 56, 57, 32), 16, kernel=(1, 1)),
    # Of so many pixels that the filter's gradient reads the input as it lies, part by part.
    Problem((3, 27, 31, 72), 144, kernel=(1, 1)),
    Problem((2, 29, 30, 144), 256, kernel=(1, 1), strides=(2, 3)),  # of whose input a sixth is read
    # Of so many filters that tasks pack what their tiles read: whole, with gaps, in groups, in parts.
    Problem((3, 17, 19, 200), 270, kernel=(1, 1)),
    Problem((2, 14, 15, 140), 300, kernel=(1, 1), strides=(2, 1), padding=((1, 0), (0, 2))),
    Problem((2, 15, 16, 272), 400, kernel=(1, 1), groups=2),
    Problem((9, 30, 31, 20), 500, kernel=(1, 1)),
    # So much that no cache holds it, where tiles ask for the next block; and pixels of the same few sets of a cache.
    Problem((4, 60, 61, 40), 400, kernel=(1, 1), strides=(1, 2)),
    Problem((2, 13, 14, 1024), 20, kernel=(1, 1)),
    # Most rows of the filter, or all, lie in the padding.
    Problem((3, 21, 34, 2), 30, kernel=(7, 4), padding=((6, 9), (5, 2))),
    Problem((2, 40, 41, 1), 17, kernel=(4, 4), dilation_rate=(2, 2), padding=((3, 12), (3, 3))),
    Problem((1, 112, 112, 3), 64, kernel=(7, 7), strides=(2, 2), padding="same"),
    Problem((2, 40, 41, 96), 96, groups=96, padding="same"),
    Problem((1, 16, 28, 256), 256, groups=256, padding="same"),
    Problem((2, 9, 12, 512), 512, groups=512, padding="same"),
    Problem((3, 20, 21, 128), 128, groups=4, padding=((2, 0), (1, 1))),
    Problem((2, 27, 25, 48), 40, padding="same", data_format="channels_first"),
    Problem((32, 13, 13, 32), 64, data_format="channels_first"),
    # With AVX2, tiles of the filter's gradient span taps although channels fill them; its blocks, images.
    Problem((90, 5, 4, 8), 32),
    Problem((3, 29, 30, 13), 40, padding="same"),
    Problem((2, 30, 31, 40), 48, strides=(2, 2), padding=((1, 0), (0, 2))),
    Problem((7, 13, 9, 24), 17, kernel=(2, 5), strides=(3, 2), dilation_rate=(2, 1)),
    # So few channels and so many pixels that a filter's gradient asks for the next ones.
    Problem((3, 70, 61, 24), 40, kernel=(1, 1)),
    # Batches in chunks, the last of which has fewer pixels than a filter's gradient has parts.
    Problem((5462, 2, 2, 3), 8, padding="same"),
    Problem((1311, 3, 3, 8), 16, padding="same"),
    Problem((1537, 3, 3, 64), 64),
    Problem((2101, 300, 2, 1), 3, kernel=(3, 3), strides=(299, 1), padding=((1, 1), (1, 1))),
    # Beyond the caches, where tiles ask for what the next ones read: under a stride, and of many channels.
    Problem((11, 130, 131, 17), 9, strides=(2, 2), padding="same"),
    Problem((13, 40, 41, 97), 64, kernel=(1, 3), padding="same", dilation_rate=(1, 2)),
    Problem((7, 61, 180, 40), 40, kernel=(3, 2), strides=(3, 2), padding=((1, 0), (0, 2))),
    # First layers whose output is so large that the filter's gradient asks for it ahead.
    Problem((80, 28, 30, 1), 32),
    Problem((61, 30, 31, 3), 40, padding="same"),
]

over = functools.partial(pytest.mark.parametrize, "problem", ids=str)


@functools.cache
def reference_case(problem):
    return solve_by_reference(problem, rounded_case(problem)[0])


def dot(a, b):
    return np.dot(a.astype(np.float64).ravel(), b.astype(np.float64).ravel())


@over(SMALL)
def test_reference_agrees_with_oracle(problem):
    """The reference sums in float64 and rounds once."""
    data, expected = exact_case(problem)
    assert_exact(solve_by_reference(problem, data), expected)
    expected, magnitude = rounded_case(problem)[1], magnitudes_of_rounded(problem)
    assert_within(reference_case(problem), expected, magnitude, np.finfo(np.float32).eps / 2)


@over(SMALL)
def test_integers_are_exact(problem, isa, threads):
    data, expected = exact_case(problem)
    assert_exact(solve(problem, data), expected)


@over(SMALL)
def test_rounding_is_bounded(problem, isa, threads):
    (data, expected), magnitude = rounded_case(problem), magnitudes_of_rounded(problem)
    results = solve(problem, data)
    assert_within(results, expected, magnitude)
    assert_within(results, reference_case(problem), magnitude)


@over(LARGE)
def test_large_integers_are_exact(problem, isa, threads):
    data, expected = exact_case(problem)
    assert_exact(solve(problem, data), expected)


@over(LARGE)
def test_large_rounding_is_bounded(problem, isa, threads):
    (data, expected), magnitude = rounded_case(problem), magnitudes_of_rounded(problem)
    assert_within(solve(problem, data), expected, magnitude)


sides = st.integers(0, 4)


@st.composite
def problems(draw):
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation_rate = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(
        st.sampled_from(["valid", "same"])
        | st.tuples(st.tuples(sides, sides), st.tuples(sides, sides))
    )
    least = [1, 1]
    if padding != "same":
        pads = [0, 0] if padding == "valid" else [sum(axis) for axis in padding]
        least = [
            max((taps - 1) * rate + 1 - pad, 1)
            for taps, rate, pad in zip(kernel, dilation_rate, pads, strict=True)
        ]
    groups = draw(st.integers(1, 4))
    return Problem(
        (
            draw(st.integers(0, 3)),
            draw(st.integers(least[0], least[0] + 12)),
            draw(st.integers(least[1], least[1] + 20)),
            groups * draw(st.integers(1, 20)),
        ),
        groups * draw(st.integers(1, 40)),
        kernel=kernel,
        strides=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=padding,
        dilation_rate=dilation_rate,
        groups=groups,
        data_format=draw(st.sampled_from(["channels_last", "channels_first"])),
    )


@settings(max_examples=300)
@given(problems(), st.sampled_from(_core.available_isas()), st.integers(1, 3))
def test_drawn_problems(problem, isa, threads):
    with running_on(isa, threads):
        data = integers(problem)
        assert_exact(solve(problem, data), solve_by_oracle(problem, data))
        data = normals(problem)
        expected, magnitude = solve_by_oracle(problem, data), magnitudes(problem, data)
        assert_within(solve(problem, data), expected, magnitude)


VARIED = [
    Problem((2, 9, 11, 3), 5, padding="same"),
    Problem((2, 9, 11, 1), 32, strides=(2, 1)),
    Problem((2, 9, 11, 16), 33, kernel=(5, 5), padding=((1, 2), (3, 0)), dilation_rate=(2, 1)),
    Problem((2, 9, 11, 8), 16, groups=8, padding="same"),
    Problem((2, 9, 11, 20), 40, kernel=(1, 1), data_format="channels_first"),
    Problem((2, 9, 31, 20), 2),
    Problem((2, 9, 11, 20), 1, padding="same"),
]


@over(VARIED + LARGE[:4])
def test_gradients_are_adjoints(problem, isa):
    """<conv(x, w), dy> = <x, dx> = <w, dw>, and with integers exactly."""
    data = integers(problem)
    results = solve(problem, data)
    product = dot(results["y"], data.dy)
    assert product != 0
    assert dot(data.x, results["dx"]) == product
    assert dot(data.w, results["dw"]) == product

    seen = dataclasses.replace(data, dy=np.where(data.output > 0, data.dy, np.float32(0)))
    product = dot(results["y"], seen.dy)
    assert dot(data.x, results["dx_fused"]) == product
    assert dot(data.w, results["dw_fused"]) == product


@over(VARIED)
@pytest.mark.parametrize("activation", [None, "linear", "relu"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_epilogue(problem, activation, with_bias, isa):
    data = integers(problem)
    bias = data.bias if with_bias else None
    y = fastconv.conv2d(data.x, data.w, bias, activation=activation, **problem.geometry)
    expected = oracle.conv2d(data.x, data.w, bias, activation=activation, **problem.geometry)
    np.testing.assert_array_equal(y, expected)

    # The bias gradient without a mask: solve() takes it with one.
    dw, dbias = fastconv.conv2d_grad_filter(
        data.x, data.dy, problem.w_shape, return_bias_grad=True, **problem.geometry
    )
    expected_dw, expected_dbias = oracle.conv2d_grad_filter(
        data.x, data.dy, problem.w_shape, **problem.geometry
    )
    np.testing.assert_array_equal(dw, expected_dw)
    np.testing.assert_array_equal(dbias, expected_dbias)


@over(VARIED + LARGE)
def test_runs_and_thread_counts_agree_bit_for_bit(problem, isa):
    data, _ = rounded_case(problem)
    with running_on(threads=1):
        first = solve(problem, data)
    for threads in (1, 2, 3, 5):
        with running_on(threads=threads):
            assert_same_bits(solve(problem, data), first)


# --- memory ---------------------------------------------------------------------------------------


@over(VARIED)
def test_outputs_are_fully_written(problem, isa):
    data = integers(problem)
    expected = solve_by_oracle(problem, data)
    for fill in (np.nan, 1e30):
        y, dx, dw = (
            np.full(shape, fill, np.float32)
            for shape in (problem.y_shape, problem.x_shape, problem.w_shape)
        )
        fastconv.conv2d(data.x, data.w, out=y, **problem.geometry)
        np.testing.assert_array_equal(y, expected["y"])
        fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, out=dx, **problem.geometry)
        np.testing.assert_array_equal(dx, expected["dx"])
        fastconv.conv2d_grad_filter(data.x, data.dy, problem.w_shape, out=dw, **problem.geometry)
        np.testing.assert_array_equal(dw, expected["dw"])


@over(VARIED)
def test_inputs_are_only_read(problem, isa):
    data = normals(problem)
    before = {name: array.copy() for name, array in vars(data).items()}
    for array in vars(data).values():
        array.flags.writeable = False
    solve(problem, data)
    for name, array in vars(data).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def every_other(array):
    """A view with gaps between the elements of every axis."""
    spaced = np.full([2 * extent for extent in array.shape], np.nan, array.dtype)
    view = spaced[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def backwards(array):
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


@over(VARIED)
@pytest.mark.parametrize("view", [every_other, backwards, np.asfortranarray, misaligned])
def test_strides_and_alignment_change_nothing(problem, view):
    data = normals(problem)
    views = type(data)(**{name: view(array) for name, array in vars(data).items()})
    assert_same_bits(solve(problem, views), solve(problem, data))


def test_broadcast_arrays_are_taken():
    x = np.broadcast_to(np.float32(2), (2, 5, 6, 3))
    w = np.broadcast_to(np.float32(3), (3, 3, 3, 4))
    np.testing.assert_array_equal(fastconv.conv2d(x, w), np.full((2, 3, 4, 4), 2 * 3 * 27.0))


# --- values that are no numbers -------------------------------------------------------------------

NOT_FINITE = [np.nan, np.inf, -np.inf]


@over([*VARIED, Problem((1, 30, 31, 64), 96, padding="same")])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_non_finite_input_reaches_its_windows_and_no_others(problem, value, isa, threads):
    data = integers(problem)
    x = data.x.copy()
    x[tuple(extent // 2 for extent in x.shape)] = value
    y = fastconv.conv2d(x, data.w, **problem.geometry)
    with np.errstate(invalid="ignore"):
        expected = oracle.conv2d(x, data.w, **problem.geometry)
        assert not np.isfinite(expected).all()
        np.testing.assert_array_equal(y, expected)

        y = fastconv.conv2d(x, data.w, data.bias, activation="relu", **problem.geometry)
        expected = oracle.conv2d(x, data.w, data.bias, activation="relu", **problem.geometry)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("filters", [1, 16, 33])
def test_relu_of_nan_is_nan(filters, isa):
    x = np.ones((1, 4, 4, 2), np.float32)
    w = np.ones((3, 3, 2, filters), np.float32)
    bias = np.full(filters, -100, np.float32)
    bias[filters // 2] = np.nan
    y = fastconv.conv2d(x, w, bias, activation="relu")
    expected = np.zeros((1, 2, 2, filters))
    expected[..., filters // 2] = np.nan
    np.testing.assert_array_equal(y, expected)


@over([problem for problem in VARIED if problem.padding == "valid"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_non_finite_gradient_goes_where_its_window_was(problem, value, isa):
    # Without padding: whether NaN times the zeros around the input counts is nobody's promise.
    data = integers(problem)
    dy = data.dy.copy()
    dy[tuple(extent // 2 for extent in dy.shape)] = value
    data = dataclasses.replace(data, dy=dy, output=np.ones_like(data.output))
    results = solve(problem, data)
    with np.errstate(invalid="ignore"):
        expected = solve_by_oracle(problem, data)
    for name in ("dx", "dw", "dx_fused", "dw_fused", "dbias_fused"):
        assert not np.isfinite(expected[name]).all(), name
        np.testing.assert_array_equal(results[name], expected[name], err_msg=name)


@pytest.mark.parametrize("filters", [1, 3, 32])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_non_finite_corner_reaches_its_tap_alone(filters, value, isa):
    data = integers(Problem((2, 9, 11, 20), filters))
    x = data.x.copy()
    x[0, 0, 0, 7] = value
    dy = np.abs(data.dy) + 1
    dw = fastconv.conv2d_grad_filter(x, dy, data.w.shape)
    reached = np.zeros(dw.shape, bool)
    reached[0, 0, 7] = True
    np.testing.assert_array_equal(np.isfinite(dw), ~reached)


@over(VARIED)
@pytest.mark.parametrize("blocked", [0.0, -0.0, -1.0, np.nan])
def test_mask_blocks_nan(problem, blocked, isa):
    """Where the output is not positive, dy does not count; not even as NaN times zero."""
    data = integers(problem)
    dead = data.output <= 0
    data = dataclasses.replace(
        data,
        dy=np.where(dead, np.float32(np.nan), data.dy),
        output=np.where(dead, np.float32(blocked), data.output),
    )
    results, expected = solve(problem, data), solve_by_oracle(problem, data)
    for name in ("dx_fused", "dw_fused", "dbias_fused"):
        assert np.isfinite(expected[name]).all(), name
        np.testing.assert_array_equal(results[name], expected[name], err_msg=name)


# --- spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        ({"strides": 2}, {"strides": (2, 2)}),
        ({"strides": [2, 1]}, {"strides": (2, 1)}),
        ({"strides": np.int8(2)}, {"strides": (2, 2)}),
        ({"strides": np.array([2, 1])}, {"strides": (2, 1)}),
        ({"strides": np.array(2)}, {"strides": (2, 2)}),
        ({"dilation_rate": 2}, {"dilation_rate": (2, 2)}),
        ({"groups": np.uint16(2)}, {"groups": 2}),
        ({"padding": "SAME"}, {"padding": "same"}),
        ({"padding": "Valid"}, {"padding": ((0, 0), (0, 0))}),
        ({"padding": [[1, 2], (np.int64(3), 0)]}, {"padding": ((1, 2), (3, 0))}),
        ({"padding": np.array([[1, 2], [3, 0]])}, {"padding": ((1, 2), (3, 0))}),
        ({"activation": "linear"}, {"activation": None}),
    ],
)
def test_options_may_be_spelled_in_several_ways(spelling, meaning, rng):
    x = rng.standard_normal((2, 9, 8, 4)).astype(np.float32)
    w = rng.standard_normal((3, 2, 2, 6)).astype(np.float32)
    options = {"groups": 2}
    spelled = fastconv.conv2d(x, w, **{**options, **spelling})
    meant = fastconv.conv2d(x, w, **{**options, **meaning})
    assert spelled.tobytes() == meant.tobytes()
    assert spelled.shape == meant.shape


def test_shapes_may_be_any_sequence_of_integers(rng):
    x = rng.standard_normal((2, 9, 8, 4)).astype(np.float32)
    w = rng.standard_normal((3, 2, 4, 6)).astype(np.float32)
    y = fastconv.conv2d(x, w)
    for spell in (list, np.array):
        assert fastconv.conv2d_grad_input(y, w, spell(x.shape)).shape == x.shape
        assert fastconv.conv2d_grad_filter(x, y, spell(w.shape)).shape == w.shape


def test_layouts_hold_the_same_results(rng):
    x = rng.integers(-4, 5, (2, 9, 8, 4)).astype(np.float32)
    w = rng.integers(-4, 5, (3, 2, 4, 6)).astype(np.float32)
    last = fastconv.conv2d(x, w)
    first = fastconv.conv2d(x.transpose(0, 3, 1, 2), w, data_format="channels_first")
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), last)
