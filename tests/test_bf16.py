"""Convolutions of bfloat16 by units that multiply bfloat16, those in C++ that stand for them included.

Of small integers every sum is exact, whatever its order: results are equal to the last bit.
"""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
from conv2d_problems import BOUND, Problem, integers, magnitudes, normals, solve, solve_by_oracle
from fastconv import _core
from running import assert_same_arrays, running_on

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DIRECTIONS = ("fprop", "dgrad", "wgrad")


def present(name):
    with running_on():
        try:
            _core.set_algorithm(name)
        except ValueError:
            return False
    return True


# On any processor, and where it has AVX512-BF16 or AMX.
EVERYWHERE = ["bf16_portable", "bf16_emulated_tiles"]
NATIVE = [name for name in ("bf16_dot", "bf16_tiles") if present(name)]
ALGORITHMS = EVERYWHERE + NATIVE


def rounded(data):
    return dataclasses.replace(data, **{k: v.astype(BFLOAT16) for k, v in vars(data).items()})


def explanation(problem, direction):
    return fastconv.explain(
        problem.x_shape, problem.w_shape, direction=direction, dtype="bfloat16", **problem.geometry
    )


def assert_exact(problem, algorithm):
    data = rounded(integers(problem))
    expected = solve_by_oracle(problem, data)
    with running_on(algorithm=algorithm):
        for direction in DIRECTIONS:
            assert explanation(problem, direction)["algorithm"] == algorithm
        results = solve(problem, data)
    for name, result in results.items():
        np.testing.assert_array_equal(
            result.astype(np.float64),
            expected[name].astype(BFLOAT16).astype(np.float64),
            err_msg=name,
        )


PROBLEMS = [
    Problem((1, 1, 1, 1), 1, kernel=(1, 1)),
    Problem((2, 9, 11, 16), 32),
    Problem((2, 9, 11, 17), 33, padding="same"),
    Problem((2, 6, 5, 32), 64, kernel=(1, 1)),  # in place
    Problem((2, 6, 5, 33), 64, kernel=(1, 1)),
    Problem((3, 9, 11, 40), 24, kernel=(1, 1), strides=(2, 3)),
    Problem((2, 7, 6, 70), 20, kernel=(2, 2)),  # slices of 24 channels, tiles in place
    Problem((2, 13, 12, 20), 24, strides=(2, 2), padding="same"),
    Problem((2, 13, 12, 20), 24, kernel=(3, 2), strides=(3, 2), padding=((2, 0), (1, 3))),
    # A filter smaller than the stride: pixels of dx that nothing reaches.
    Problem((2, 13, 12, 20), 24, kernel=(1, 2), strides=(3, 3)),
    Problem((1, 2, 2, 3), 2, kernel=(1, 1), strides=(3, 3), padding=((1, 0), (1, 0))),  # none of it
    Problem((2, 13, 14, 18), 20, kernel=(3, 2), dilation_rate=(2, 3), padding="same"),
    Problem((2, 15, 14, 18), 20, strides=(2, 2), dilation_rate=(3, 2), padding=((3, 3), (2, 2))),
    Problem((2, 9, 8, 24), 36, groups=3, padding="same", strides=(2, 1)),
    Problem((2, 5, 6, 9), 6, groups=3, padding=((4, 4), (5, 4))),
    Problem((2, 5, 4, 150), 16, kernel=(5, 4)),  # one pixel
    Problem((2, 33, 1, 20), 150, kernel=(2, 1)),  # more than one panel
    # More pixels than are taken at a time; parts that are added.
    Problem((5, 30, 29, 16), 16, kernel=(1, 1)),
    Problem((3, 8, 9, 8), 8, padding="same"),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_sums_of_integers(problem, algorithm):
    assert_exact(problem, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [1, 2, 15, 31, 32, 34, 63, 65, 96])
@pytest.mark.parametrize("filters", [1, 15, 16, 17, 31, 49, 64, 66, 130])
def test_channels_and_filters(channels, filters, algorithm):
    assert_exact(Problem((2, 4, 5, channels), filters, kernel=(2, 2)), algorithm)


@given(
    size=st.tuples(st.integers(1, 3), *[st.integers(5, 14)] * 2),
    channels=st.integers(1, 40),
    filters=st.integers(1, 50),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rate=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    sides=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
)
@settings(max_examples=60)
def test_any_problem(size, channels, filters, groups, kernel, strides, rate, sides):
    problem = Problem(
        (*size, channels * groups), filters * groups, kernel=kernel, strides=strides,
        dilation_rate=rate, padding=sides, groups=groups,
    )  # fmt: skip
    for algorithm in ALGORITHMS:
        assert_exact(problem, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("problem", PROBLEMS[1::3], ids=str)
def test_results_are_rounded_once(problem, algorithm):
    data = rounded(normals(problem))
    expected = solve_by_oracle(problem, data)
    floats = dataclasses.replace(
        data, **{name: array.astype(np.float32) for name, array in vars(data).items()}
    )
    magnitude = magnitudes(problem, floats)
    with running_on(algorithm=algorithm):
        results = solve(problem, data)
    for name, result in results.items():
        error = BOUND * magnitude[name]
        exponent = np.frexp(abs(expected[name]) + error)[1] - 1
        half_an_ulp = np.ldexp(0.5, exponent - 7)
        difference = abs(result.astype(np.float64) - expected[name])
        np.testing.assert_array_less(difference, error + half_an_ulp + 1e-300, err_msg=name)


MANY = [
    Problem((20, 28, 28, 48), 40, padding="same"),
    Problem((3, 15, 14, 32), 64, strides=(2, 2), padding="same"),
    Problem((9, 20, 20, 64), 64, kernel=(1, 1)),
    Problem((400, 40, 40, 16), 16, kernel=(1, 1)),  # in parts of the batch
]


@pytest.mark.parametrize("algorithm", ["bf16_portable", *NATIVE])
@pytest.mark.parametrize("problem", MANY, ids=str)
def test_same_bits_for_any_number_of_threads(problem, algorithm):
    data = rounded(normals(problem))
    results = {}
    for threads in (1, 2, 5):
        with running_on(threads=threads, algorithm=algorithm):
            results[threads] = solve(problem, data)
    for threads in (2, 5):
        assert_same_arrays(results[1].values(), results[threads].values())


@pytest.mark.parametrize("problem", MANY[1:3], ids=str)
def test_emulated_tiles_for_any_number_of_threads(problem):
    data = rounded(normals(problem))
    with running_on(threads=1, algorithm="bf16_emulated_tiles"):
        alone = solve(problem, data)
    with running_on(threads=3, algorithm="bf16_emulated_tiles"):
        assert_same_arrays(alone.values(), solve(problem, data).values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parts_of_the_batch_are_all_there(algorithm):
    """Each counts once: ones, whose sums are exact."""
    images = 2 if algorithm == "bf16_emulated_tiles" else 40
    x = np.ones((images, 512, 512, 16 if images == 2 else 1), BFLOAT16)
    dy = np.ones((*x.shape[:3], 2), BFLOAT16)
    dw, dbias = fastconv.conv2d_grad_filter(
        x, dy, (1, 1, x.shape[3], 2), return_bias_grad=True, algorithm=algorithm
    )
    assert (dw == images * 2**18).all()
    assert (dbias == images * 2**18).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_that_are_not_finite(algorithm):
    """They reach the results whose windows hold them, and no others."""
    x, w = np.ones((2, 7, 8, 17), BFLOAT16), np.ones((3, 3, 17, 18), BFLOAT16)
    x[0, 3, 4, 16] = np.nan
    x[1, 0, 7, 0] = np.inf
    y = fastconv.conv2d(x, w, padding="same", algorithm=algorithm).astype(np.float32)
    expected = fastconv.conv2d(
        x.astype(np.float32), w.astype(np.float32), padding="same", algorithm="direct"
    )
    np.testing.assert_array_equal(y, expected)
    dx = fastconv.conv2d_grad_input(x, w.transpose(0, 1, 3, 2), (2, 9, 10, 18), algorithm=algorithm)
    expected = fastconv.conv2d_grad_input(
        x.astype(np.float32), w.astype(np.float32).transpose(0, 1, 3, 2), (2, 9, 10, 18),
        algorithm="direct",
    )  # fmt: skip
    np.testing.assert_array_equal(dx.astype(np.float32), expected)
    relu = fastconv.conv2d(x, w, activation="relu", algorithm=algorithm)
    assert np.isnan(relu.astype(np.float32)).any()


def test_strict_accuracy_lets_no_value_reach_another_tap():
    """wgrad's grid multiplies x by zeros where dy has no pixel, unless there are none of these."""
    with running_on(accuracy="strict"):
        for algorithm in ALGORITHMS:
            with running_on(algorithm=algorithm):
                found = fastconv.explain(
                    (2, 9, 9, 32), (3, 3, 32, 32), direction="wgrad", dtype="bfloat16"
                )
            allowed = {each["algorithm"]: each["allowed"] for each in found["candidates"]}
            assert not allowed[algorithm]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_other_type(dtype):
    ones = np.ones((1, 3, 3, 16), dtype)
    for name in ALGORITHMS:
        with pytest.raises(ValueError, match=f"serves this fprop.*Received: algorithm='{name}'"):
            fastconv.conv2d(ones, np.ones((1, 1, 16, 16), dtype), algorithm=name)
        with running_on(algorithm=name):
            assert (fastconv.conv2d(ones, np.ones((1, 1, 16, 16), dtype)) == 16).all()


@pytest.mark.parametrize("problem", [
    Problem((1, 5, 5, 16), 16, data_format="channels_first"),
    Problem((1, 70, 1, 2), 2, kernel=(65, 1)),
    Problem((1, 40, 3, 2), 2, kernel=(1, 1), strides=(17, 1)),
    Problem((1, 3, 3, 2), 2, kernel=(2, 2), dilation_rate=(300, 300), padding=((299, 299),) * 2),
], ids=str)  # fmt: skip
def test_problems_that_are_not_served(problem):
    x, w = (np.ones(shape, BFLOAT16) for shape in (problem.x_shape, problem.w_shape))
    y = fastconv.conv2d(x, w, **problem.geometry)
    for name in ALGORITHMS:
        rule = f"serves this fprop.*Received: algorithm='{name}'"
        with pytest.raises(ValueError, match=rule):
            fastconv.conv2d(x, w, algorithm=name, **problem.geometry)
        with running_on(algorithm=name):  # one that is only preferred leaves it to others
            np.testing.assert_array_equal(fastconv.conv2d(x, w, **problem.geometry), y)


def test_empty_batch():
    for name in ALGORITHMS:
        x, w = np.zeros((0, 5, 6, 16), BFLOAT16), np.ones((3, 3, 16, 8), BFLOAT16)
        y = fastconv.conv2d(x, w, algorithm=name)
        assert y.shape == (0, 3, 4, 8)
        assert fastconv.conv2d_grad_input(y, w, x.shape, algorithm=name).shape == x.shape
        assert (fastconv.conv2d_grad_filter(x, y, w.shape, algorithm=name) == 0).all()


def test_choice():
    """What stands for a processor's tiles is not chosen; of many channels, tiles are, and on AMD's processors,
    which take dot products as often as multiply-adds of float32, these."""
    problem = Problem((8, 14, 14, 256), 256, kernel=(1, 1))
    by_dots = "bf16_dot" in NATIVE and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    for direction in DIRECTIONS:
        found = explanation(problem, direction)
        allowed = {each["algorithm"]: each["allowed"] for each in found["candidates"]}
        assert not any(allowed[name] for name in EVERYWHERE)
        assert all(allowed[name] for name in NATIVE)
        assert (found["algorithm"] == "bf16_tiles") == ("bf16_tiles" in NATIVE)
        assert (found["algorithm"] == "bf16_dot") == (by_dots and "bf16_tiles" not in NATIVE)
        with running_on(algorithm="direct"):
            assert explanation(problem, direction)["algorithm"] == "direct"


def test_explanation(isa):
    with running_on(algorithm="bf16_emulated_tiles"):
        found = fastconv.explain(
            (2, 9, 9, 70), (3, 3, 70, 40), strides=2, padding="same", dtype="bfloat16"
        )
    assert found["blocking"] == (
        "32x32 pixels x channels, slices of 24 source channels, the source copied with its padding"
    )
    # 4 planes of 5 x 6 or so pixels of 72 channels; the filter.
    assert found["workspace_bytes"] > 2 * 9 * 72 * 48


def test_types_that_explain_does_not_know():
    shapes = (1, 3, 3, 16), (1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"`dtype` must be one of.*Received: dtype='float64'"):
        fastconv.explain(*shapes, dtype="float64")
    with pytest.raises(TypeError, match=r"`dtype` must be one of"):
        fastconv.explain(*shapes, dtype=np.float32)
