"""The average-pooling kernels, both directions, on every instruction set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
import oracle
from fastconv import _core
from pool2d_problems import LARGE, PROBLEMS, Problem, few_values, many_values, over, problems
from running import by_reference, running_on

EPS = np.finfo(np.float32).eps


def pool(problem, x, **options):
    return fastconv.avg_pool2d(x, problem.pool_size, **problem.options, **options)


def share_out(problem, dy, **options):
    return fastconv.avg_pool2d_grad(
        dy, problem.x_shape, problem.pool_size, **problem.options, **options
    )


def check(problem):
    # Sums of small integers are exact: what is left is one division.
    x = few_values(problem)
    y = pool(problem, x, out=nans(pool(problem, x).shape))
    expected = oracle.avg_pool2d(x, problem.pool_size, **problem.options)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y, expected.astype(np.float32))
    with by_reference():
        np.testing.assert_array_equal(y, pool(problem, x))

    x = many_values(problem)
    expected = oracle.avg_pool2d(x, problem.pool_size, **problem.options)
    # A window's rows are summed, then their sums, then comes the division.
    rounds = sum(problem.pool_size) + 1
    allowed = rounds * EPS / 2 * oracle.avg_pool2d(abs(x), problem.pool_size, **problem.options)
    assert (abs(pool(problem, x) - expected) <= allowed).all()


def check_grad(problem):
    rng = problem.seed()
    shape = pool(problem, few_values(problem)).shape
    dy = rng.standard_normal(shape).astype(np.float32)
    dx = share_out(problem, dy, out=nans(problem.x_shape))
    assert dx.dtype == np.float32
    expected, size = (
        oracle.avg_pool2d_grad(values, problem.x_shape, problem.pool_size, **problem.options)
        for values in (dy, abs(dy))
    )
    # A reciprocal, a product and, where t windows share a pixel, t - 1 sums.
    taps = -(-problem.pool_size[0] // problem.strides[0]) * -(
        -problem.pool_size[1] // problem.strides[1]
    )
    assert (abs(dx - expected) <= (taps + 1) * EPS / 2 * size * (1 + 4 * EPS)).all()
    with by_reference():
        np.testing.assert_allclose(share_out(problem, dy), expected, rtol=2 * EPS, atol=1e-12)


def nans(shape):
    return np.full(shape, np.nan, np.float32)


@over(PROBLEMS)
def test_averages(problem, isa, threads):
    check(problem)


@over(PROBLEMS)
def test_gradients(problem, isa, threads):
    check_grad(problem)


@over(LARGE)
def test_large(problem, isa, threads):
    check(problem)
    check_grad(problem)


@settings(max_examples=200)
@given(problems(), st.sampled_from(_core.available_isas()), st.integers(1, 3))
def test_drawn_problems(problem, isa, threads):
    with running_on(isa, threads):
        check(problem)
        check_grad(problem)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_windows(value, data_format, isa):
    problem = Problem((1, 4, 40, 19), data_format=data_format)
    x = many_values(problem)
    at = (0, 1, 5, 3) if data_format == "channels_last" else (0, 3, 1, 5)
    x[at] = value
    y = pool(problem, x)
    where = (0, 0, 2, 3) if data_format == "channels_last" else (0, 3, 0, 2)
    np.testing.assert_array_equal(y[where], np.float32(value))
    y[where] = 0
    assert np.isfinite(y).all()


def test_padding_is_not_counted(isa):
    y = fastconv.avg_pool2d(np.full((1, 5, 5, 17), 3, np.float32), 3, strides=1, padding="same")
    assert (y == 3).all()


@over(PROBLEMS[:6] + LARGE)
def test_runs_and_thread_counts_agree_bit_for_bit(problem, isa):
    x = many_values(problem)
    results = set()
    for threads in (1, 1, 2, 3, 5):
        with running_on(threads=threads):
            y = pool(problem, x)
            results.add((y.tobytes(), share_out(problem, y).tobytes()))
    assert len(results) == 1
