"""simt_gemm: every tile, in either layout, and sums over more pixels than are described at once."""

import numpy as np
import pytest

import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
from conv2d_problems import Problem, both_layouts, integers, solve_by_oracle
from cuda_support import emulating, to_device, to_host

pytestmark = cuda_support.EMULATOR_ONLY

NAME = "simt_gemm"
# With one multiprocessor large tiles cost nothing, with many of them small ones win. Planes of a
# multiple of four pixels: wgrad in N,C,H,W reads vectors then.
LARGE = both_layouts([Problem((2, 13, 12, 56), 128, padding="same")])
SMALL = both_layouts(
    [
        Problem((3, 9, 8, 12), 20, padding="same"),
        # Many taps in the rows of a tile; padding on all sides; rows beyond the last.
        Problem((2, 10, 10, 5), 12, kernel=(5, 5), padding=((2, 2), (3, 1))),
        Problem((1, 17, 15, 16), 24, strides=(2, 2), dilation_rate=(1, 1), padding="same"),
        Problem((2, 8, 11, 16), 16, groups=2, kernel=(3, 2), dilation_rate=(2, 3), padding="same"),
    ]
)


@pytest.fixture(scope="module", params=["fast", "check"])
def emulator(request):
    with cuda_support.using_library(cuda_support.library(request.param)):
        yield


def run(problem, direction):
    """(The result by simt_gemm, the expected one, the blocking in words)."""
    data, geometry = integers(problem), problem.geometry
    arrays, expected = to_device(data), solve_by_oracle(problem, data)
    options = {**geometry, "algorithm": NAME}
    if direction == "fprop":
        found, name = fastconv.conv2d(arrays.x, arrays.w, **options), "y"
    elif direction == "dgrad":
        found = fastconv.conv2d_grad_input(arrays.dy, arrays.w, problem.x_shape, **options)
        name = "dx"
    else:
        found = fastconv.conv2d_grad_filter(arrays.x, arrays.dy, problem.w_shape, **options)
        name = "dw"
    blocking = gpu_functions.explain(
        problem.x_shape, problem.w_shape, direction=direction, dtype="float32", **options
    )[0]["blocking"]
    return to_host(found), expected[name], blocking


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_large_tiles(emulator, problem, direction):
    with emulating(multiprocessors=1):
        found, expected, blocking = run(problem, direction)
    assert "scalar" not in blocking
    if direction == "wgrad":
        assert blocking.startswith("128x128x8")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_wgrad(emulator, problem, multiprocessors):
    with emulating(multiprocessors=multiprocessors):
        found, expected, blocking = run(problem, "wgrad")
    assert ("scalar" in blocking) == (problem.x_shape[-1] == 5)
    np.testing.assert_array_equal(found, expected)
