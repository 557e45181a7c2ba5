"""The max-pooling kernels, both directions, on every instruction set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
import oracle
from fastconv import _core
from pool2d_problems import (
    LARGE,
    PROBLEMS,
    Problem,
    awkward_values,
    few_values,
    many_values,
    over,
    problems,
)
from running import by_reference, running_on


def pool(problem, x):
    return fastconv.max_pool2d(x, problem.pool_size, return_argmax=True, **problem.options)


def scatter(problem, dy, argmax):
    return fastconv.max_pool2d_grad(
        dy, argmax, problem.x_shape, problem.pool_size, **problem.options
    )


def pool_by_oracle(problem, x):
    return oracle.max_pool2d(x, problem.pool_size, **problem.options)


def scatter_by_oracle(problem, dy, argmax):
    return oracle.max_pool2d_grad(dy, argmax, problem.x_shape, problem.pool_size, **problem.options)


def check(problem, x):
    y, argmax = pool(problem, x)
    assert y.dtype == np.float32
    assert argmax.dtype == problem.argmax_dtype
    expected, expected_argmax = pool_by_oracle(problem, x)
    assert y.shape == argmax.shape == expected.shape
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(argmax, expected_argmax)

    alone = fastconv.max_pool2d(x, problem.pool_size, **problem.options)
    np.testing.assert_array_equal(alone, expected)

    with by_reference():
        y_of_reference, argmax_of_reference = pool(problem, x)
    assert y.tobytes() == y_of_reference.tobytes()
    assert argmax.tobytes() == argmax_of_reference.tobytes()


def check_grad(problem, argmax):
    rng = problem.seed()
    dy = rng.integers(-9, 10, argmax.shape).astype(np.float32)
    dx = scatter(problem, dy, argmax)
    assert dx.dtype == np.float32
    assert dx.shape == problem.x_shape
    np.testing.assert_array_equal(dx, scatter_by_oracle(problem, dy, argmax))
    with by_reference():
        np.testing.assert_array_equal(dx, scatter(problem, dy, argmax))

    dy = rng.standard_normal(argmax.shape).astype(np.float32)
    # Of t windows that share a pixel, each of t - 1 float32 sums strays by half an eps at most.
    taps = -(-problem.pool_size[0] // problem.strides[0]) * -(
        -problem.pool_size[1] // problem.strides[1]
    )
    allowed = taps * np.finfo(np.float32).eps / 2 * scatter_by_oracle(problem, abs(dy), argmax)
    error = abs(scatter(problem, dy, argmax) - scatter_by_oracle(problem, dy, argmax))
    assert (error <= allowed).all()


@over(PROBLEMS)
@pytest.mark.parametrize("values", [few_values, many_values, awkward_values])
def test_maxima(problem, values, isa, threads):
    check(problem, values(problem))


@over(PROBLEMS)
def test_gradients(problem, isa, threads):
    _, argmax = pool_by_oracle(problem, few_values(problem))
    check_grad(problem, argmax.astype(problem.argmax_dtype))


@over(PROBLEMS)
def test_gradients_at_any_tap(problem, isa, threads):
    """Not only at maxima; a tap in the padding contributes nothing."""
    shape = pool_by_oracle(problem, few_values(problem))[0].shape
    taps = problem.pool_size[0] * problem.pool_size[1]
    check_grad(problem, problem.seed().integers(0, taps, shape).astype(problem.argmax_dtype))


@over(LARGE)
def test_large(problem, isa, threads):
    check(problem, few_values(problem))
    check(problem, many_values(problem))
    _, argmax = pool(problem, few_values(problem))
    check_grad(problem, argmax)


@settings(max_examples=300)
@given(problems(), st.sampled_from(_core.available_isas()), st.integers(1, 3))
def test_drawn_problems(problem, isa, threads):
    with running_on(isa, threads):
        check(problem, few_values(problem))
        check(problem, awkward_values(problem))
        _, argmax = pool(problem, few_values(problem))
        check_grad(problem, argmax)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("channels", [1, 16, 19])
def test_rules_of_the_maximum(channels, data_format, isa):
    """The rules in numbers that can be read: first of equals, first NaN, -inf before padding."""
    nan, inf = np.nan, np.inf
    windows = [
        # values,           maximum, tap
        ([1, 2, 2, 1], 2, 1),
        ([3, 3, 3, 3], 3, 0),
        ([0.0, -0.0, 0.0, -0.0], 0, 0),
        ([-inf, -inf, -inf, -inf], -inf, 0),
        ([1, nan, 5, nan], nan, 1),
        ([inf, 1, nan, inf], nan, 2),
        ([-inf, -inf, inf, inf], inf, 2),
    ]
    values = np.array([values for values, _, _ in windows], np.float32)
    x = values.reshape(len(windows), 2, 2, 1).repeat(channels, axis=3)
    if data_format == "channels_first":
        x = x.transpose(0, 3, 1, 2)
    y, argmax = fastconv.max_pool2d(x, 2, return_argmax=True, data_format=data_format)
    for i, (_, maximum, tap) in enumerate(windows):
        np.testing.assert_array_equal(y[i], np.full(y[i].shape, maximum))
        np.testing.assert_array_equal(argmax[i], np.full(y[i].shape, tap))


def test_padding_never_wins(isa):
    x = np.full((1, 3, 3, 17), -np.inf, np.float32)
    y, argmax = fastconv.max_pool2d(x, 3, strides=1, padding="same", return_argmax=True)
    assert (y == -np.inf).all()
    # The first tap inside: below and right of the centre's row and column only at the border.
    np.testing.assert_array_equal(argmax[0, :, :, 0], [[4, 3, 3], [1, 0, 0], [1, 0, 0]])


@over(PROBLEMS[:6] + LARGE)
def test_runs_and_thread_counts_agree_bit_for_bit(problem, isa):
    x = many_values(problem)
    results = set()
    for threads in (1, 1, 2, 3, 5):
        with running_on(threads=threads):
            y, argmax = pool(problem, x)
            dx = scatter(problem, y, argmax)
            results.add((y.tobytes(), argmax.tobytes(), dx.tobytes()))
    assert len(results) == 1


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_inputs_are_only_read_and_may_be_strided(data_format, isa):
    problem = Problem((2, 9, 8, 19), data_format=data_format)
    spaced = np.repeat(many_values(problem), 2, axis=2)
    x = spaced[:, :, ::2]
    before = spaced.copy()
    y, argmax = pool(problem, np.ascontiguousarray(x))
    spaced.flags.writeable = False
    y_of_view, argmax_of_view = pool(problem, x)
    np.testing.assert_array_equal(y_of_view, y)
    np.testing.assert_array_equal(argmax_of_view, argmax)
    np.testing.assert_array_equal(spaced, before)

    dx = scatter(problem, y, argmax)
    np.testing.assert_array_equal(
        scatter(problem, np.asfortranarray(y), np.asfortranarray(argmax)), dx
    )


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_gradient_of_pixels_no_window_sees_is_zero(padding, isa):
    problem = Problem((2, 9, 8, 19), (2, 2), (3, 3), padding)
    y, argmax = pool(problem, few_values(problem))
    expected = scatter_by_oracle(problem, y, argmax)
    dx = np.full(problem.x_shape, np.nan, np.float32)
    fastconv.max_pool2d_grad(
        y, argmax, problem.x_shape, problem.pool_size, out=dx, **problem.options
    )
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        ({}, {"strides": (2, 3)}),
        ({"strides": 1}, {"strides": (1, 1)}),
        ({"strides": [np.int32(1), 2]}, {"strides": (1, 2)}),
        ({"padding": "Same"}, {"padding": "same"}),
        ({"padding": ((0, 0), (0, 0))}, {"padding": "VALID"}),
    ],
)
def test_options_may_be_spelled_in_several_ways(spelling, meaning, rng):
    x = rng.standard_normal((2, 9, 8, 4)).astype(np.float32)
    spelled = fastconv.max_pool2d(x, (2, 3), **spelling)
    meant = fastconv.max_pool2d(x, [2, np.int64(3)], **meaning)
    np.testing.assert_array_equal(spelled, meant)
