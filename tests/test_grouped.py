"""Grouped convolutions: whatever the selector thinks, by the kernels made for them."""

import itertools

import numpy as np
import pytest

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
from running import running_on


def grouped(n, h, w, groups, channels, filters, **geometry):
    """``channels`` and ``filters`` are those of one group."""
    return Problem((n, h, w, groups * channels), groups * filters, groups=groups, **geometry)


# Vectors of one group, of several within one vector of the source, within two, within more, and
# groups that straddle vectors.
PER_GROUP = [
    *itertools.product((2, 3, 4, 8, 16), repeat=2),
    (5, 7), (6, 24), (24, 6), (12, 24), (32, 32), (1, 1), (33, 2), (2, 33),
]  # fmt: skip

PROBLEMS = [
    *(
        grouped(2, 5, 11, groups, max(channels, 2), filters, strides=strides, padding="same")
        for channels, filters in PER_GROUP
        for groups, strides in [(2, (1, 1)), (9, (2, 2))]
    ),
    *(
        grouped(1, 10, 12, 4, 4, 8, kernel=kernel, strides=strides, dilation_rate=rate,
                padding=((1, 3), (4, 2)))
        for kernel, rate in [((3, 3), (2, 2)), ((5, 5), (1, 1)), ((2, 3), (1, 3)), ((1, 1), (1, 1))]
        for strides in [(1, 1), (2, 2), (1, 3)]
    ),
    *(grouped(1, 3, width, 4, 4, 4, padding="same") for width in range(1, 18)),
    *(grouped(1, 3, width, 2, 16, 16, padding="same") for width in range(1, 34)),
    *(grouped(1, 5, width, 2, 16, 16, strides=(2, 2)) for width in range(3, 36)),
    *(grouped(1, 3, width, 2, 5, 40, padding="same") for width in range(1, 18)),
    grouped(2, 14, 14, 32, 8, 8, padding="same"),
    grouped(2, 9, 9, 3, 4, 4, strides=(5, 5), padding="same"),  # too many residue classes
    grouped(0, 9, 9, 3, 4, 4),
]  # fmt: skip

over = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


@over
def test_results(problem, isa):
    with running_on(algorithm="grouped"):
        data, expected = exact_case(problem)
        assert_exact(solve(problem, data), expected)
        data, expected = rounded_case(problem)
        assert_within(solve(problem, data), expected, magnitudes_of_rounded(problem))


@pytest.mark.parametrize(
    ("channels", "filters"), [(4, 4), (8, 4), (16, 16), (24, 6), (3, 3), (5, 7)]
)
def test_groups_and_padding_keep_apart(channels, filters, isa):
    problem = grouped(1, 5, 12, 6, channels, filters, padding="same")
    data = normals(problem)
    data.w[0, 0] = np.inf  # meets padding in the first row and column alone
    data.x[0, 2, 5, 2 * channels : 3 * channels] = np.nan
    with running_on(algorithm="grouped"):
        y = fastconv.conv2d(data.x, data.w, **problem.geometry)
    assert np.isfinite(y[:, 0]).all()
    assert np.isfinite(y[:, :, 0]).all()
    of_group = slice(2 * filters, 3 * filters)
    assert np.isnan(y[0, 1:4, 4:7, of_group]).all()
    data.w[0, 0] = 0
    with running_on(algorithm="grouped"):
        y = fastconv.conv2d(data.x, data.w, **problem.geometry)
    near = np.zeros(y.shape, bool)
    near[:, 1:4, 4:7, of_group] = True
    np.testing.assert_array_equal(np.isnan(y), near)


@pytest.mark.parametrize(
    "problem",
    [
        grouped(1, 28, 27, 32, 4, 4, padding="same"),
        grouped(5, 14, 13, 8, 8, 16, strides=(2, 2), padding="same"),
        grouped(3, 14, 14, 16, 24, 24, padding="same"),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(problem, isa):
    data = normals(problem)
    with running_on(algorithm="grouped", threads=1):
        expected = solve(problem, data)
    for threads in (2, 5):
        with running_on(algorithm="grouped", threads=threads):
            assert_same_bits(solve(problem, data), expected)


def test_selector_takes_it():
    if "avx512" not in _core.available_isas():
        pytest.skip("The widths below are those of AVX-512.")
    with running_on(isa="avx512"):
        for per_group, direction in itertools.product((4, 8), ("fprop", "dgrad", "wgrad")):
            channels = 32 * per_group
            explanation = fastconv.explain(
                (1, 28, 28, channels), (3, 3, per_group, channels), direction=direction, groups=32
            )
            assert explanation["algorithm"] == "grouped"


@pytest.mark.parametrize(
    ("batch", "pixels", "groups", "direction", "wanted"),
    [
        (1, 28, 8, "fprop", "winograd4"),
        (1, 28, 8, "dgrad", "winograd4"),
        (1, 28, 8, "wgrad", "winograd4"),
        (32, 14, 32, "wgrad", "grouped"),
    ],
)
def test_selector_minds_the_caches(batch, pixels, groups, direction, wanted):
    """Winograd's goes group by group: of a batch that no cache holds, it reads lines again and again."""
    if "avx2" not in _core.available_isas():
        pytest.skip("The widths below are those of AVX2.")
    x, w = (batch, pixels, pixels, 16 * groups), (3, 3, 16, 16 * groups)
    with running_on(isa="avx2"):
        told = fastconv.explain(x, w, direction=direction, groups=groups, padding="same")
    assert told["algorithm"] == wanted
