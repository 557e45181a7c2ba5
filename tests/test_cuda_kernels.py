"""The CUDA kernels' results: every algorithm, type and direction against float64.

The same problems as on the CPU, fewer and smaller: emulated time is precious. Integers make every
sum exact in float32, in whatever order; results in float16 and bfloat16 are that sum, rounded once.
"""

import functools
import itertools

import numpy as np
import pytest

import conv2d_problems
import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
import oracle
import pool2d_problems
from conv2d_problems import (
    Problem,
    assert_same_bits,
    assert_within,
    both_layouts,
    exact_case,
    integers,
    magnitudes,
    normals,
    solve_by_oracle,
)
from cuda_support import emulating, solve_on_device, to_device, to_host
from fastconv import _core

pytestmark = [cuda_support.EMULATOR_ONLY, pytest.mark.usefixtures("gpu")]

TYPES = ["float32", "float16", "bfloat16"]
if cuda_support.BACKENDS == ["asan"]:
    TYPES.remove("bfloat16")  # which lies in memory as float16 does
# Bits of mantissa, the hidden one included.
BITS = {"float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}

PROBLEMS = both_layouts(
    [
        # Windows, strides, padding, dilation, with channels that are no multiple of anything.
        Problem((2, 7, 9, 3), 5, kernel=(3, 2), padding="same"),
        Problem((1, 9, 8, 5), 7, kernel=(2, 3), strides=(2, 1), padding=((1, 2), (3, 0))),
        Problem((2, 8, 9, 2), 9, kernel=(3, 3), strides=(2, 2), padding="same"),
        Problem((1, 9, 10, 4), 6, kernel=(2, 2), strides=(3, 4)),
        Problem((1, 12, 10, 4), 6, dilation_rate=(5, 2), padding=((4, 1), (0, 7))),
        Problem((1, 12, 10, 4), 6, strides=(2, 2), dilation_rate=(2, 3), padding="same"),
        # Channels that make whole vectors, and more of them than a tile has.
        Problem((1, 6, 7, 16), 24, padding="same"),
        Problem((1, 5, 5, 64), 40, padding="same"),
        Problem((1, 6, 6, 8), 136, kernel=(1, 1)),
        Problem((1, 5, 6, 72), 8, kernel=(1, 3), strides=(1, 2)),
        # Groups; depthwise with and without a multiplier.
        Problem((2, 5, 6, 6), 9, groups=3, padding="same"),
        Problem((1, 6, 5, 32), 16, groups=2, padding="same", strides=(2, 1)),
        Problem((2, 7, 6, 8), 8, groups=8, padding="same"),
        Problem((1, 9, 8, 12), 12, groups=12, kernel=(5, 3), strides=(2, 2), padding="same"),
        Problem((1, 6, 7, 5), 15, groups=5),
        Problem((1, 7, 7, 33), 33, groups=33, padding="same"),
        # First layers.
        Problem((2, 10, 10, 1), 32),
        Problem((1, 17, 19, 3), 16, kernel=(7, 7), strides=(2, 2), padding="same"),
        # Edges.
        Problem((1, 1, 1, 1), 1, kernel=(1, 1)),
        Problem((3, 3, 3, 8), 16),
        Problem((1, 4, 4, 3), 4, strides=(50, 50), padding="same"),
        Problem((1, 3, 4, 2), 3, strides=(2, 2), padding=((9, 9), (9, 9))),
    ]
)
# Tiles by the dozen, and sums over pixels that are split.
LARGE = [
    Problem((1, 14, 15, 32), 72, padding="same"),
    Problem((1, 20, 21, 16), 136, strides=(2, 2), padding="same"),
    Problem((1, 24, 24, 3), 40, padding="same"),
    Problem((1, 13, 14, 20), 20, groups=20, padding="same"),
    Problem((1, 13, 13, 24), 40, padding="same", data_format="channels_first"),
]

over = functools.partial(pytest.mark.parametrize, "problem", ids=str)


def rounded(values, dtype):
    """float64 to the nearest number of the type, ties to even, as float64."""
    if dtype == "float32":
        return values.astype(np.float32).astype(np.float64)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def type_of(values, dtype):
    """``values`` (float32) as the type's numbers, in float32."""
    return rounded(values.astype(np.float64), dtype).astype(np.float32)


def algorithms(problem, dtype, direction):
    """The names of those that serve a direction of the problem, the chosen one first."""
    candidates = gpu_functions.explain(
        problem.x_shape, problem.w_shape, direction=direction, dtype=dtype, **problem.geometry
    )
    return [candidate["algorithm"] for candidate in candidates]


def solve_one_by_one(problem, data, dtype):
    """Results of every algorithm that serves a direction: {(name of the result, algorithm): ...}."""
    arrays, geometry = to_device(data, dtype), problem.geometry
    relu = {**geometry, "activation": "relu"}
    masked = {**relu, "output": arrays.output}
    results = {}
    for name in algorithms(problem, dtype, "fprop"):
        options = {"algorithm": name}
        y = fastconv.conv2d(arrays.x, arrays.w, **geometry, **options)
        fused = fastconv.conv2d(arrays.x, arrays.w, arrays.bias, **relu, **options)
        results["y", name], results["y_fused", name] = y, fused
    for name in algorithms(problem, dtype, "dgrad"):
        results["dx", name] = fastconv.conv2d_grad_input(
            arrays.dy, arrays.w, problem.x_shape, **geometry, algorithm=name
        )
        results["dx_fused", name] = fastconv.conv2d_grad_input(
            arrays.dy, arrays.w, problem.x_shape, **masked, algorithm=name
        )
    for name in algorithms(problem, dtype, "wgrad"):
        results["dw", name] = fastconv.conv2d_grad_filter(
            arrays.x, arrays.dy, problem.w_shape, **geometry, algorithm=name
        )
        dw, dbias = fastconv.conv2d_grad_filter(
            arrays.x,
            arrays.dy,
            problem.w_shape,
            return_bias_grad=True,
            **masked,
            algorithm=name,
        )
        results["dw_fused", name], results["dbias_fused", name] = dw, dbias
    assert {name for name, _ in results} == set(solve_by_oracle(problem, data))
    return {key: to_host(result) for key, result in results.items()}


def assert_exact(results, expected, dtype):
    for (name, algorithm), result in results.items():
        np.testing.assert_array_equal(
            result, rounded(expected[name], dtype), err_msg=f"{name} by {algorithm}"
        )
        assert result.shape == expected[name].shape


# bfloat16 is float16 but for how a number is read and rounded: every third problem shows that.
@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        pytest.param(problem, dtype, id=f"{dtype}-{problem}")
        for i, problem in enumerate(PROBLEMS)
        for dtype in TYPES
        if dtype != "bfloat16" or i % 3 == 0
    ],
)
def test_exact(problem, dtype):
    data, expected = exact_case(problem)
    assert_exact(solve_one_by_one(problem, data, dtype), expected, dtype)


@over(LARGE)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_large(problem, dtype):
    data, expected = exact_case(problem)
    assert_exact(solve_one_by_one(problem, data, dtype), expected, dtype)


@over(PROBLEMS[::3])
def test_tf32_is_exact_where_it_can_be(problem):
    data, expected = exact_case(problem)
    gpu_functions.set_float32_math("tf32")
    try:
        results = solve_one_by_one(problem, data, "float32")
        assert any(algorithm == "tensor_core_gemm" for _, algorithm in results)
    finally:
        gpu_functions.set_float32_math("ieee")
    assert_exact(results, expected, "float32")


@over([*PROBLEMS[:4], LARGE[0]])
@pytest.mark.parametrize("dtype", [*TYPES, "tf32"])
def test_rounding(problem, dtype):
    """Sums are of float32; factors of TF32, and results of 16 bits, have their own precision."""
    stored = "float32" if dtype == "tf32" else dtype
    data = normals(problem)
    data = type(data)(*(type_of(values, stored) for values in vars(data).values()))
    gpu_functions.set_float32_math("tf32" if dtype == "tf32" else "ieee")
    try:
        results = solve_on_device(problem, data, stored)
    finally:
        gpu_functions.set_float32_math("ieee")
    bound = conv2d_problems.BOUND
    if dtype != "float32":
        # A result's last place; of TF32, two factors of half a place each (one where they are cut
        # off), of which the largest may add up.
        bound += 2.0 ** (-BITS[dtype] + (2 if dtype == "tf32" else 0))
    assert_within(results, solve_by_oracle(problem, data), magnitudes(problem, data), bound)


@over([PROBLEMS[0], PROBLEMS[6], LARGE[0]])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_same_bits_run_to_run(gpu, problem, dtype):
    """Whatever the order of blocks and threads, and however late copies arrive."""
    data = normals(problem)
    expected = solve_on_device(problem, data, dtype)
    settings = [{"order": "reverse"}, {"order": "random:1"}, {"copy": "early"}]
    for setting in settings if gpu != "cuda" else [{}]:
        with emulating(**setting):
            assert_same_bits(solve_on_device(problem, data, dtype), expected)


@pytest.mark.parametrize("capability", [75, 86, 90, 100, 120])
@over([PROBLEMS[12], PROBLEMS[0], PROBLEMS[1], LARGE[4]])
def test_other_devices(gpu, problem, capability):
    """What is chosen by compute capability and by the number of multiprocessors."""
    if gpu == "cuda":
        pytest.skip("a device is what it is")
    data, expected = exact_case(problem)
    with emulating(compute_capability=capability, multiprocessors=capability):
        for dtype in ("float32", "float16"):
            assert_exact(solve_one_by_one(problem, data, dtype), expected, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_nan_and_infinity(dtype):
    problem = Problem((1, 6, 6, 8), 16, padding="same")
    data = integers(problem)
    data.x[0, 2, 3, 1], data.x[0, 5, 5, 0] = np.nan, np.inf
    arrays = to_device(data, dtype)
    y = to_host(fastconv.conv2d(arrays.x, arrays.w, activation="relu", padding="same"))
    with np.errstate(invalid="ignore"):
        expected = oracle.conv2d(data.x, data.w, activation="relu", **problem.geometry)
    np.testing.assert_array_equal(y, rounded(expected, "float32"))


@over([p for p in PROBLEMS if p.x[3] % 8 == 0][:4])
def test_misaligned_arrays(problem):
    """Views that begin where no vector may."""
    data, expected = exact_case(problem)
    for dtype, offset in itertools.product(("float32", "float16"), (1, 2)):
        arrays = {}
        for name, values in vars(data).items():
            size = 2 if dtype == "float16" else 4
            whole = gpu_functions.array(np.pad(values.ravel(), (offset, 0)), dtype)
            arrays[name] = View(whole, values.shape, offset * size)
        y = fastconv.conv2d(arrays["x"], arrays["w"], **problem.geometry)
        np.testing.assert_array_equal(to_host(y), rounded(expected["y"], dtype))
        dx = fastconv.conv2d_grad_input(
            arrays["dy"], arrays["w"], problem.x_shape, **problem.geometry
        )
        np.testing.assert_array_equal(to_host(dx), rounded(expected["dx"], dtype))
        dw = fastconv.conv2d_grad_filter(
            arrays["x"], arrays["dy"], problem.w_shape, **problem.geometry
        )
        np.testing.assert_array_equal(to_host(dw), rounded(expected["dw"], dtype))


class View:
    """Part of an array on the device, from some byte on."""

    def __init__(self, whole, shape, offset):
        self.whole = whole
        data, read_only = whole.__cuda_array_interface__["data"]
        self.__cuda_array_interface__ = {
            **whole.__cuda_array_interface__,
            "shape": shape,
            "data": (data + offset, read_only),
        }


# --- pooling

POOLINGS = pool2d_problems.both_layouts(
    [
        pool2d_problems.Problem((2, 9, 11, 3)),
        pool2d_problems.Problem((1, 8, 8, 16)),
        pool2d_problems.Problem((1, 12, 13, 8), (3, 3), (2, 2), "same"),
        pool2d_problems.Problem((2, 6, 7, 5), (3, 2), (1, 1), "same"),
        pool2d_problems.Problem((1, 12, 13, 4), (2, 2), (5, 7)),
        pool2d_problems.Problem((1, 12, 13, 17), (3, 4), (1, 2), ((2, 0), (0, 3))),
        pool2d_problems.Problem((1, 20, 21, 3), (17, 17), (4, 4), "same"),  # 289 taps: int32
        pool2d_problems.Problem((0, 5, 6, 3)),
        pool2d_problems.Problem((1, 1, 1, 1), (1, 1), (1, 1)),
        pool2d_problems.Problem((3, 7, 9, 20), (7, 9), (1, 1)),
    ]
)


def pooling(problem):
    return problem.pool_size, problem.options


@over(POOLINGS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("values", [pool2d_problems.few_values, pool2d_problems.awkward_values])
def test_max_pool2d(problem, dtype, values):
    host = values(problem)
    window, options = pooling(problem)
    y_expected, argmax_expected = oracle.max_pool2d(host, window, **options)
    x = gpu_functions.array(host, dtype)
    y, argmax = fastconv.max_pool2d(x, window, **options, return_argmax=True)
    np.testing.assert_array_equal(to_host(y), y_expected)
    assert argmax.dtype == problem.argmax_dtype
    np.testing.assert_array_equal(argmax.numpy(), argmax_expected)
    np.testing.assert_array_equal(to_host(fastconv.max_pool2d(x, window, **options)), y_expected)
    dy = problem.seed().integers(-3, 4, y_expected.shape).astype(np.float32)
    dx = fastconv.max_pool2d_grad(
        gpu_functions.array(dy, dtype), argmax, problem.x_shape, window, **options
    )
    expected = oracle.max_pool2d_grad(dy, argmax_expected, problem.x_shape, window, **options)
    np.testing.assert_array_equal(to_host(dx), rounded(expected, dtype))


@over(POOLINGS)
@pytest.mark.parametrize("dtype", TYPES)
def test_avg_pool2d(problem, dtype):
    host = type_of(pool2d_problems.many_values(problem), dtype)
    window, options = pooling(problem)
    y = to_host(fastconv.avg_pool2d(gpu_functions.array(host, dtype), window, **options))
    expected = oracle.avg_pool2d(host, window, **options)
    magnitude = oracle.avg_pool2d(abs(host), window, **options)
    bound = conv2d_problems.BOUND + (0 if dtype == "float32" else 2.0 ** -BITS[dtype])
    assert_within({"y": y}, {"y": expected}, {"y": magnitude}, bound)
    dy = type_of(problem.seed().standard_normal(expected.shape).astype(np.float32), dtype)
    dx = to_host(
        fastconv.avg_pool2d_grad(gpu_functions.array(dy, dtype), problem.x_shape, window, **options)
    )
    expected = oracle.avg_pool2d_grad(dy, problem.x_shape, window, **options)
    magnitude = oracle.avg_pool2d_grad(abs(dy), problem.x_shape, window, **options)
    assert_within({"dx": dx}, {"dx": expected}, {"dx": magnitude}, bound)


def test_an_argmax_of_another_pooling_is_harmless():
    """Its values cannot be looked at without waiting: what names no pixel is skipped."""
    problem = pool2d_problems.Problem((1, 6, 6, 8), (3, 3), (2, 2), "same")
    argmax = gpu_functions.array(np.full((1, 3, 3, 8), 255, np.uint8))
    dy = gpu_functions.array(np.ones((1, 3, 3, 8), np.float32))
    dx = fastconv.max_pool2d_grad(dy, argmax, problem.x_shape, (3, 3), **problem.options)
    assert not to_host(dx).any()


def test_the_backends_are_different_libraries(gpu):
    assert gpu in _core.cuda.availability()["library"] or gpu == "cuda"


# --- convolution with pooling behind it

FUSED = both_layouts(
    [
        Problem((2, 8, 9, 4), 8, padding="same"),
        Problem((1, 12, 11, 16), 24, strides=(1, 2), padding="same", groups=2),
        Problem((1, 7, 8, 3), 5, kernel=(2, 3)),
        Problem((0, 6, 6, 3), 4),
    ]
)


@over(FUSED)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_convolution_with_pooling(problem, dtype, activation):
    data, options = integers(problem), {**problem.geometry, "activation": activation}
    pooled = {"strides": (2, 2), "padding": "valid", "data_format": problem.data_format}
    unpooled = oracle.conv2d(data.x, data.w, data.bias, **options)
    y_expected, argmax_expected = oracle.max_pool2d(unpooled, (2, 2), **pooled)
    arrays = to_device(data, dtype)
    inputs = arrays.x, arrays.w
    alone = fastconv.conv2d_max_pool2d(*inputs, arrays.bias, **options)
    y, argmax = gpu_functions.conv2d_max_pool2d(*inputs, arrays.bias, **options, return_argmax=True)
    np.testing.assert_array_equal(to_host(y), rounded(y_expected, dtype))
    np.testing.assert_array_equal(to_host(alone), to_host(y))
    if dtype == "float32":  # else two may be the same when they are rounded
        np.testing.assert_array_equal(argmax.numpy(), argmax_expected)

    dy = problem.seed().integers(-3, 4, y_expected.shape).astype(np.float32)
    taps = argmax.numpy()
    dz = oracle.max_pool2d_grad(dy * (to_host(y) > 0) if activation else dy, taps,
                                problem.y_shape, (2, 2), **pooled)  # fmt: skip
    plain = {**problem.geometry}
    dw_expected, dbias_expected = oracle.conv2d_grad_filter(data.x, dz, problem.w_shape, **plain)
    expected = {
        "dx": oracle.conv2d_grad_input(dz, data.w, problem.x_shape, **plain),
        "dw": dw_expected,
        "dbias": dbias_expected,
    }
    behind = gpu_functions.array(dy, dtype), y, argmax
    found = fastconv.conv2d_max_pool2d_grad(*inputs, *behind, **options)
    for (name, values), result in zip(expected.items(), found, strict=True):
        np.testing.assert_array_equal(to_host(result), rounded(values, dtype), err_msg=name)
    first = gpu_functions.conv2d_max_pool2d_grad(*inputs, *behind, **options, with_input_grad=False)
    assert first[0] is None
    for one, other in zip(first[1:], found[1:], strict=True):
        np.testing.assert_array_equal(to_host(one), to_host(other))


def test_errors_of_convolution_with_pooling():
    problem = FUSED[0]
    arrays = to_device(integers(problem))
    y, argmax = fastconv.conv2d_max_pool2d(
        arrays.x, arrays.w, **problem.geometry, return_argmax=True
    )
    options = {**problem.geometry}
    with pytest.raises(ValueError, match="`dy` must have shape"):
        fastconv.conv2d_max_pool2d_grad(arrays.x, arrays.w, arrays.dy, y, argmax, **options)
    with pytest.raises(TypeError, match="`argmax` must have dtype uint8"):
        fastconv.conv2d_max_pool2d_grad(arrays.x, arrays.w, y, y, y, **options)
    with pytest.raises(ValueError, match="Received: algorithm='winograd'"):
        fastconv.conv2d_max_pool2d(arrays.x, arrays.w, **options, algorithm="winograd")
    one = gpu_functions.array(np.ones((1, 1, 1, 1), np.float32))
    with pytest.raises(ValueError, match="window"):
        fastconv.conv2d_max_pool2d(one, one)
