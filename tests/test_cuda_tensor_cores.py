"""tensor_core_gemm: every tile and way of copying is reached, and shared memory has no conflicts."""

import json

import numpy as np
import pytest

import cuda_builds
import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
from conv2d_problems import Problem, integers, solve_by_oracle
from cuda_support import emulating, to_device, to_host

pytestmark = cuda_support.EMULATOR_ONLY

NAME = "tensor_core_gemm"
# With one multiprocessor large tiles cost nothing, with many of them small ones win.
PROBLEMS = {
    "128x128": (1, Problem((2, 12, 10, 128), 128, kernel=(1, 2), padding="same")),
    "128x64": (1, Problem((4, 8, 8, 64), 64, kernel=(2, 2), padding="same")),
    "64x64": (64, Problem((2, 9, 8, 16), 24, padding="same")),
}


@pytest.fixture(scope="module")
def fast():
    with cuda_support.using_library(cuda_support.library("fast")):
        yield


def run(problem, direction, dtype):
    """(The result by tensor cores, the expected one, the blocking in words)."""
    data, geometry = integers(problem), problem.geometry
    expected = solve_by_oracle(problem, data)
    stored = "float32" if dtype == "tf32" else dtype
    arrays = to_device(data, stored)
    options = {**geometry, "algorithm": NAME}
    gpu_functions.set_float32_math("tf32" if dtype == "tf32" else "ieee")
    try:
        if direction == "fprop":
            found, name = fastconv.conv2d(arrays.x, arrays.w, **options), "y"
        elif direction == "dgrad":
            found = fastconv.conv2d_grad_input(arrays.dy, arrays.w, problem.x_shape, **options)
            name = "dx"
        else:
            found = fastconv.conv2d_grad_filter(arrays.x, arrays.dy, problem.w_shape, **options)
            name = "dw"
        blocking = gpu_functions.explain(
            problem.x_shape, problem.w_shape, direction=direction, dtype=stored, **options
        )[0]["blocking"]
    finally:
        gpu_functions.set_float32_math("ieee")
    return to_host(found), expected[name], blocking


@pytest.mark.parametrize("tile", PROBLEMS)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize(("dtype", "capability"), [("float16", 80), ("float16", 75), ("tf32", 80)])
def test_every_tile(fast, tile, direction, dtype, capability):
    multiprocessors, problem = PROBLEMS[tile]
    with emulating(compute_capability=capability, multiprocessors=multiprocessors):
        found, expected, blocking = run(problem, direction, dtype)
    # wgrad of TF32 turns its operands in registers.
    by_registers = capability < 80 or (dtype, direction) == ("tf32", "wgrad")
    copies = "2 slices through registers" if by_registers else "3 slices by cp.async"
    assert copies in blocking
    if tile == "64x64":
        assert blocking.startswith("64x64")
    if dtype == "float16":
        expected = expected.astype(np.float16)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("capability", [75, 80])
def test_tiles_are_chosen_by_what_there_is_to_do(fast, capability):
    """Among the problems above every tile of the kernel is reached, in every direction."""
    reached = set()
    for multiprocessors, problem in PROBLEMS.values():
        with emulating(compute_capability=capability, multiprocessors=multiprocessors):
            for direction in ("fprop", "dgrad", "wgrad"):
                found = gpu_functions.explain(
                    problem.x_shape, problem.w_shape, direction=direction, dtype="float16",
                    algorithm=NAME, **problem.geometry,
                )  # fmt: skip
                reached.add((found[0]["blocking"].split("x32")[0], direction))
    tiles = {"128x128", "64x64"} | ({"128x64"} if capability >= 80 else set())
    assert reached >= {(tile, d) for tile in tiles for d in ("fprop", "dgrad", "wgrad")}


SPLIT = {
    "fprop": Problem((1, 6, 5, 96), 24, padding="same"),
    "fprop of channels first": Problem((2, 5, 4, 67), 9, data_format="channels_first"),
    "dgrad": Problem((1, 6, 5, 24), 96, padding="same"),
    # Four classes of pixels, which see four, two, two and one taps: some parts of some are empty.
    "dgrad of stride 2": Problem((1, 8, 7, 8), 128, strides=(2, 2), padding="same"),
    "wgrad": Problem((2, 24, 23, 8), 16, padding="same"),
}


@pytest.mark.parametrize("dtype", ["float16", "tf32"])
@pytest.mark.parametrize("case", SPLIT)
def test_split_sums(fast, case, dtype):
    problem, direction = SPLIT[case], case.split()[0]
    with emulating(multiprocessors=32):
        found, expected, blocking = run(problem, direction, dtype)
    assert int(blocking.rsplit(": ", 1)[1]) > 1, blocking
    if dtype == "float16":
        expected = expected.astype(np.float16)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("case", ["fprop", "fprop of channels first"])
def test_epilogue_of_split_sums(fast, case):
    """Bias and ReLU come behind the last part."""
    problem = SPLIT[case]
    data = integers(problem)
    arrays = to_device(data, "float16")
    with emulating(multiprocessors=32):
        y = fastconv.conv2d(
            arrays.x, arrays.w, arrays.bias, activation="relu", algorithm=NAME, **problem.geometry
        )
    expected = solve_by_oracle(problem, data)["y_fused"]
    np.testing.assert_array_equal(to_host(y), expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "tf32"])
def test_shared_memory_has_no_bank_conflicts(tmp_path, dtype):
    library = cuda_builds.build("fastconv_cuda", cuda_builds.library_sources(), "check")
    profile = tmp_path / "profile.jsonl"
    with cuda_support.using_library(str(library)):
        for multiprocessors, problem in PROBLEMS.values():
            with emulating(multiprocessors=multiprocessors, profile=profile):
                for direction in ("fprop", "dgrad", "wgrad"):
                    run(problem, direction, dtype)
    counted = [json.loads(line) for line in profile.read_text().splitlines()]
    shared = [one for one in counted if one["space"] == "shared"]
    places = {one["place"].split(":")[0] for one in shared}
    assert {"mma.cuh", "tensor_core_gemm.cuh"} <= places
    conflicts = [one for one in shared if one["cost"] != one["least"]]
    assert not conflicts
