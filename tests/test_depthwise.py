"""Depthwise convolutions: whatever the selector thinks, by the kernels made for them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
from conv2d_problems import (
    Problem,
    assert_exact,
    assert_same_bits,
    assert_within,
    exact_case,
    magnitudes_of_rounded,
    normals,
    rounded_case,
    solve,
)
from fastconv import _core
from running import assert_equal_arrays, by_reference, running_on


def depthwise(x, multiplier=1, **geometry):
    return Problem(x, x[3] * multiplier, groups=x[3], **geometry)


PROBLEMS = [
    # Every register tile: filter rows of 1, 2, 3, 5, 7 taps and others, strides 1, 2 and 3, every
    # remainder of pixels; channels around the widths of vectors.
    *(
        depthwise((2, 9, 11, 19), kernel=kernel, strides=strides, padding=padding)
        for kernel in [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (3, 4), (1, 6)]
        for strides in [(1, 1), (2, 2), (3, 1)]
        for padding in ["same", ((7, 0), (1, 9))]
    ),
    *(depthwise((1, 4, width, 17), padding="same") for width in range(1, 20)),
    *(depthwise((1, 6, 2 * width, 16), strides=(2, 2), padding="same") for width in range(1, 11)),
    *(depthwise((1, 5, 6, channels), padding="same") for channels in (2, 7, 8, 15, 16, 31, 33, 64)),
    *(
        depthwise((2, 8, 7, channels), multiplier, strides=strides, padding="same")
        for channels in (2, 9, 24)
        for multiplier in (2, 3, 8, 16, 19)
        for strides in [(1, 1), (2, 2)]
    ),
    *(
        depthwise((2, 12, 13, 5), multiplier, strides=strides, padding="same", dilation_rate=rate)
        for multiplier in (1, 2)
        for strides in [(1, 1), (2, 2), (2, 3)]
        for rate in [(2, 2), (1, 3), (5, 1)]
    ),
    # Pixels so far apart that AVX2 takes whole lines of channels, and neighbours for which it does not.
    *(
        depthwise(x, strides=strides, padding=padding)
        for x in [(1, 5, 18, 128), (2, 6, 7, 512), (1, 4, 3, 1024), (1, 5, 18, 64), (1, 7, 7, 136)]
        for strides in [(1, 1), (2, 2)]
        for padding in ["same", "valid", ((2, 0), (1, 3))]
    ),
    depthwise((1, 3, 33, 192), strides=(2, 2), padding="same"),
    # Images of few rows and columns: any part of a filter is all that meets them.
    *(
        depthwise(
            (1, h, w, 9), kernel=(n, n), strides=strides, padding=((t, n - 1 - t), (n - 1 - t, t))
        )
        for n in (3, 5, 7)
        for t in range(n)
        for strides in [(1, 1), (2, 2)]
        for h, w in [(1, 1), (2, 1), (1, 3), (3, 2)]
    ),
    # Larger filters on pixels so far apart that their lines are copied.
    *(
        depthwise((2, 5, width, channels), kernel=(n, n), strides=strides, padding="same")
        for n in (5, 7)
        for strides in [(1, 1), (2, 2)]
        for width, channels in [(3, 1024), (15, 512), (33, 136)]
    ),
    # Dilated: tiles take every second pixel and so on, of images with fewer pixels than that, too.
    *(
        depthwise((1, 9, 14, 19), kernel=kernel, padding=padding, dilation_rate=rate)
        for kernel in [(3, 3), (5, 5), (7, 7), (1, 5)]
        for rate, padding in [
            ((2, 2), "same"),
            ((1, 4), "same"),
            ((11, 20), "same"),
            ((2, 3), ((9, 4), (11, 16))),
        ]
    ),
    depthwise((1, 3, 40, 128), kernel=(1, 3), padding="same", dilation_rate=(1, 8)),
    # Long rows of taps go in pieces; long rows of pixels are dealt to tasks.
    *(
        depthwise((2, 2, 45, 11), kernel=(1, taps), padding=padding)
        for taps in (4, 6, 8, 9, 10, 11, 15, 17, 31)
        for padding in ["same", ((0, 1), (20, 33))]
    ),
    # One row of taps, which stay in registers; rows in the padding, and lines that crowd a cache.
    *(
        depthwise((2, 3, width, 19), kernel=(1, taps), padding=padding)
        for taps in (3, 5, 7)
        for width in (7, 8, 14, 15, 17, 70)
        for padding in ["same", "valid", ((2, 1), (9, 4))]
    ),
    *(
        depthwise((1, 5, 41, channels), kernel=(1, taps), padding="same")
        for taps in (3, 5, 7)
        for channels in (1, 8, 128, 256, 500, 512, 1024)
    ),
    depthwise((1, 3, 12, 20), kernel=(2, 31), padding="same"),
    depthwise((1, 3, 70, 20), 2, kernel=(1, 9), padding="same", dilation_rate=(1, 2)),
    depthwise((1, 1, 1500, 70), kernel=(1, 31), padding="same"),
    # Tiles of which lines are copied, whose columns are a multiple of what is in registers.
    *(
        depthwise((4, 1, width, 512), kernel=(1, taps), padding="same")
        for width, taps in [(300, 9), (37, 15), (250, 8)]
    ),
    # One row of taps with stride: cells of dgrad with one tap and more, at every place in the padding.
    *(
        depthwise((2, 3, width, 19), kernel=(1, taps), strides=(1, step), padding=padding)
        for taps, step in [(2, 2), (3, 2), (5, 2), (7, 3), (8, 4), (4, 4), (9, 2), (17, 5), (31, 2)]
        for width in (1, 9, 36, 71)
        for padding in ["same", ((1, 0), (taps - 1, taps)), ((0, 0), (0, step + taps))]
    ),
    *(
        depthwise((2, 1, width, channels), kernel=(1, taps), strides=(1, 2), padding="same")
        for width, channels, taps in [(300, 512, 9), (301, 128, 5), (64, 8, 3), (150, 1, 4)]
    ),
    depthwise((8, 1, 3000, 70), kernel=(1, 5), strides=(1, 2), padding="same"),
    # In no cache.
    depthwise((8, 1, 3000, 70), kernel=(1, 9), padding="same"),
    depthwise((8, 1, 3000, 70), kernel=(1, 4), dilation_rate=(1, 2)),
    # Pixels so far apart that wgrad copies its tiles, the last of them with less than a line.
    *(
        depthwise((1, 9, width, channels), kernel=kernel, strides=strides, padding="same")
        for width, channels in [(12, 512), (7, 1028)]
        for kernel in [(3, 3), (5, 5), (7, 7)]
        for strides in [(1, 1), (2, 2)]
    ),
    # And, of 3 x 3 taps, fprop and dgrad.
    depthwise((1, 17, 30, 256), padding="same"),
    depthwise((2, 15, 35, 128), padding=((2, 0), (0, 1))),
    depthwise((1, 13, 25, 256), padding="same", dilation_rate=(1, 2)),
    depthwise((1, 9, 1, 20), kernel=(3, 1)),  # output pixels one below the other
    depthwise((2, 7, 7, 6), strides=(6, 5), padding="same"),  # too many residue classes
    depthwise((2, 7, 9, 6), kernel=(2, 2), strides=(4, 3)),  # stride beyond the filter
    depthwise((2, 15, 15, 200), padding="same"),
    depthwise((0, 5, 5, 8), padding="same"),
]

over = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def assert_right(problem, **running):
    with running_on(algorithm="depthwise", **running):
        data, expected = exact_case(problem)
        assert_exact(solve(problem, data), expected)
        data, expected = rounded_case(problem)
        assert_within(solve(problem, data), expected, magnitudes_of_rounded(problem))


@over
def test_results(problem, isa):
    assert_right(problem)


@pytest.mark.parametrize(
    "kernel, strides, padding",
    [
        ((1, 3), 1, "same"),
        ((1, 9), 1, "same"),
        ((1, 3), 2, "same"),
        ((1, 5), 2, ((0, 0), (3, 1))),
        ((1, 11), 3, "same"),
        ((3, 3), 1, "same"),
        ((3, 3), 2, "same"),
        ((5, 5), 1, "same"),
        ((7, 7), 2, "same"),
    ],
)
@pytest.mark.parametrize("width", [9, 22])
def test_infinities_stay_where_they_belong(kernel, strides, padding, width, isa):
    """What lies beyond an edge, or no pixel of dy meets, is not multiplied by 0: that would be NaN."""
    rng = np.random.default_rng(5)
    w = rng.integers(1, 5, (*kernel, 1, 20)).astype(np.float32)
    options = {"strides": strides, "padding": padding, "groups": 20}
    for column in range(width):
        x = rng.integers(1, 5, (2, 3, width, 20)).astype(np.float32)
        dy = np.ones(fastconv.conv2d(x, w, **options).shape, np.float32)
        x[0, 1, column] = np.inf
        dy[0, 0, min(column, dy.shape[2] - 1)] = np.inf
        with by_reference():
            expected = infinities(x, w, dy, options)
        with running_on(isa=isa, algorithm="depthwise"):
            assert_equal_arrays(infinities(x, w, dy, options), expected)


def infinities(x, w, dy, options):
    return [
        np.isinf(fastconv.conv2d(x, w, **options)),
        np.isinf(fastconv.conv2d_grad_input(dy, w, x.shape, **options)),
        np.isinf(fastconv.conv2d_grad_filter(x, np.ones_like(dy), w.shape, **options)),
    ]


@settings(max_examples=60)
@given(data=st.data())
def test_any_problem(data):
    draw = data.draw
    rate = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    kernel = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    least = [(taps - 1) * step + 1 for taps, step in zip(kernel, rate, strict=True)]
    side = st.integers(0, 4)
    problem = depthwise(
        (
            draw(st.integers(1, 3)),
            draw(st.integers(least[0], least[0] + 12)),
            draw(st.integers(least[1], least[1] + 20)),
            draw(st.integers(2, 40)),
        ),
        draw(st.integers(1, 4)),
        kernel=kernel,
        strides=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=draw(
            st.sampled_from(["valid", "same"])
            | st.tuples(st.tuples(side, side), st.tuples(side, side))
        ),
        dilation_rate=rate,
        data_format=draw(st.sampled_from(["channels_last", "channels_first"])),
    )
    assert_right(problem, isa=draw(st.sampled_from(_core.available_isas())))


@pytest.mark.parametrize("multiplier", [1, 3])
def test_padding_is_no_multiplication(multiplier, isa):
    """Infinite taps and NaN pixels reach the results that they belong to, and no others."""
    problem = depthwise((1, 5, 12, 18), multiplier, padding="same")
    data = normals(problem)
    data.w[0, 0] = np.inf  # meets padding in the first row and column alone
    data.x[0, 2, 5] = np.nan
    data.dy[0, 2, 5] = np.nan
    with running_on(algorithm="depthwise"):
        y = fastconv.conv2d(data.x, data.w, **problem.geometry)
        dx = fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, **problem.geometry)
        dw = fastconv.conv2d_grad_filter(data.x, data.dy, problem.w_shape, **problem.geometry)
    assert np.isfinite(y[:, 0]).all()
    assert np.isfinite(y[:, :, 0]).all()
    assert np.isinf(y[:, 1:, 1:4]).all()
    near = np.zeros(y.shape, bool)
    near[:, 1:4, 4:7] = True
    np.testing.assert_array_equal(np.isnan(y), near)
    # dx of the last row and column meets no first tap.
    assert np.isfinite(dx[:, -1]).all()
    assert np.isfinite(dx[:, :, -1]).all()
    assert np.isnan(dw).all()


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (3, 3), "dilation_rate": (2, 2)},
        {"kernel": (1, 9)},
        {"kernel": (1, 31)},
    ],
    ids=str,
)
def test_padding_of_far_taps_is_no_multiplication(geometry, isa):
    problem = depthwise((1, 6, 40, 18), padding="same", **geometry)
    data = normals(problem)
    data.w[0, 0] = np.inf
    rate = geometry.get("dilation_rate", (1, 1))
    before = [rate[axis] * ((geometry["kernel"][axis] - 1) // 2) for axis in (0, 1)]
    with running_on(algorithm="depthwise"):
        y = fastconv.conv2d(data.x, data.w, **problem.geometry)
        dx = fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, **problem.geometry)
    meets = np.zeros(y.shape, bool)  # those under whose first tap there is a pixel
    meets[:, before[0] :, before[1] :] = True
    np.testing.assert_array_equal(np.isfinite(y), ~meets)
    met = np.zeros(dx.shape, bool)
    met[:, : dx.shape[1] - before[0], : dx.shape[2] - before[1]] = True
    np.testing.assert_array_equal(np.isfinite(dx), ~met)


@pytest.mark.parametrize(
    "problem",
    [
        depthwise((1, 30, 31, 70), padding="same"),
        depthwise((5, 14, 13, 24), 2, strides=(2, 2), padding="same"),
        depthwise((3, 28, 28, 96), kernel=(5, 5), padding="same"),
        depthwise((1, 33, 34, 70), padding="same", dilation_rate=(2, 3)),
        depthwise((1, 1, 2000, 64), kernel=(1, 31), padding="same"),
        depthwise((2, 14, 14, 512), kernel=(7, 7), padding="same"),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(problem, isa):
    data = normals(problem)
    with running_on(algorithm="depthwise", threads=1):
        expected = solve(problem, data)
    for threads in (2, 5):
        with running_on(algorithm="depthwise", threads=threads):
            assert_same_bits(solve(problem, data), expected)


@pytest.mark.parametrize("isa", [isa for isa in _core.available_isas() if isa != "scalar"])
def test_selector_takes_it(isa):
    for multiplier, direction in itertools.product((1, 2), ("fprop", "dgrad", "wgrad")):
        with running_on(isa=isa):
            explanation = fastconv.explain(
                (1, 14, 14, 64), (3, 3, 1, 64 * multiplier), direction=direction, groups=64
            )
        assert explanation["algorithm"] == "depthwise"
