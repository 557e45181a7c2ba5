"""float16 and bfloat16: what is computed of them, and how it is rounded.

The sums are those of float32, which other files test; here is what is around them.
"""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import fastconv
import oracle
import pool2d_problems as pool
from conv2d_problems import BOUND, Problem, magnitudes, normals, solve, solve_by_oracle
from fastconv import _core
from running import assert_same_arrays, running_on

DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def wide(array):
    return array.astype(np.float64)


def half_an_ulp(values, dtype):
    """Of numbers near ``values``, in a type of 16 bits."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.frexp(values)[1] - 1
    return np.ldexp(0.5, np.maximum(exponent, int(info.minexp)) - info.nmant)


def assert_rounded(result, exact, error, dtype):
    """``result`` is ``exact`` but for ``error`` and a rounding to the next number."""
    assert result.dtype == dtype
    assert result.shape == exact.shape
    allowed = error + half_an_ulp(abs(exact) + error, dtype)
    np.testing.assert_array_less(abs(wide(result) - exact), allowed + 1e-300)


# --- conversion -----------------------------------------------------------------------------------


def bits(array):
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def every_value(dtype):
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def test_every_value_there_and_back(dtype, isa):
    values = every_value(dtype)
    is_nan = np.isnan(values.astype(np.float32))
    floats = _core.widened(values)
    np.testing.assert_array_equal(
        bits(floats)[~is_nan], bits(values.astype(np.float32))[~is_nan], strict=True
    )
    assert np.isnan(floats[is_nan]).all()
    again = _core.narrowed(floats, dtype)
    np.testing.assert_array_equal(bits(again)[~is_nan], bits(values)[~is_nan], strict=True)
    assert np.isnan(again[is_nan].astype(np.float32)).all()


def test_rounding(dtype, isa, rng):
    anything = rng.integers(0, 2**32, 2**18, dtype=np.uint64).astype(np.uint32)
    # Behind every value of 16 bits: a bit, just below and above a tie, a tie.
    steps = np.array([1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], np.uint32)
    near = bits(every_value(dtype).astype(np.float32))[:, None] + steps
    floats = np.concatenate([anything, near.ravel()]).view(np.float32)
    result = _core.narrowed(floats, dtype)
    is_nan = np.isnan(floats)
    with np.errstate(all="ignore"):
        expected = floats.astype(dtype)
    np.testing.assert_array_equal(bits(result)[~is_nan], bits(expected)[~is_nan])
    assert np.isnan(result[is_nan].astype(np.float32)).all()


@pytest.mark.parametrize("count", [*range(40), 16383, 16384, 16385, 50000])
def test_any_number_of_values(dtype, isa, count, rng):
    values = rng.standard_normal(count).astype(dtype)
    floats = _core.widened(values)
    np.testing.assert_array_equal(floats, values.astype(np.float32), strict=True)
    np.testing.assert_array_equal(_core.narrowed(floats, dtype), values, strict=True)


# --- convolution ----------------------------------------------------------------------------------

PROBLEMS = [
    Problem((2, 9, 11, 3), 5),
    Problem((2, 9, 11, 3), 5, data_format="channels_first"),
    Problem((2, 7, 8, 17), 33, padding="same"),
    Problem((2, 7, 8, 17), 33, padding="same", data_format="channels_first"),
    Problem((2, 8, 6, 16), 32, kernel=(1, 1)),
    Problem((3, 8, 9, 5), 7, kernel=(2, 4), strides=(2, 1), padding=((1, 0), (2, 1))),
    Problem((1, 9, 10, 4), 6, dilation_rate=(2, 3), padding="same"),
    Problem((2, 7, 6, 12), 18, groups=3, padding="same"),
    Problem((2, 7, 6, 33), 33, groups=33, padding="same"),
    Problem((2, 7, 6, 33), 33, groups=33, padding="same", data_format="channels_first"),
    Problem((2, 12, 12, 32), 32, padding="same"),  # by Winograd's algorithm
    Problem((1, 1, 1, 1), 1, kernel=(1, 1)),
    Problem((0, 5, 6, 3), 4),
    Problem((0, 5, 6, 3), 4, data_format="channels_first"),
]
# Which is computed in several parts of the batch.
IN_PARTS = [
    Problem((20, 28, 28, 48), 40, padding="same"),
    Problem((7, 56, 56, 17), 30, data_format="channels_first"),
    Problem((3, 56, 55, 48), 70, kernel=(1, 1)),  # pixel by pixel
    Problem((3, 56, 55, 3), 70, kernel=(1, 1)),
]


def rounded(data, dtype):
    return dataclasses.replace(
        data, **{name: array.astype(dtype) for name, array in vars(data).items()}
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_convolution_is_rounded_once(problem, dtype, isa):
    data = rounded(normals(problem), dtype)
    results = solve(problem, data)
    expected = solve_by_oracle(problem, data)
    magnitude = magnitudes(problem, rounded(data, np.float32))
    assert results.keys() == expected.keys()
    for name, result in results.items():
        # 8: of an algorithm other than sums of products.
        assert_rounded(result, expected[name], 8 * BOUND * magnitude[name], dtype)


@pytest.mark.parametrize("problem", IN_PARTS, ids=str)
def test_convolution_in_parts_of_the_batch(problem, dtype):
    data = rounded(normals(problem), dtype)
    results = {}
    for threads in (1, 2):
        with running_on(threads=threads):
            results[threads] = solve(problem, data)
    assert_same_arrays(results[1].values(), results[2].values())
    expected = solve(problem, rounded(data, np.float32))
    for name, result in results[1].items():
        # That a part is lost or taken twice would show; float32 sums differ by their order.
        error = 1e-5 * abs(expected[name]).max()
        assert_rounded(result, wide(expected[name]), error, dtype)


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
def test_algorithms(algorithm, dtype, rng):
    x, w = (rng.standard_normal(s).astype(dtype) for s in [(2, 12, 12, 32), (3, 3, 32, 32)])
    y = fastconv.conv2d(x, w, padding="same", algorithm=algorithm)
    floats = (array.astype(np.float32) for array in (x, w))
    np.testing.assert_array_equal(
        y, fastconv.conv2d(*floats, padding="same", algorithm=algorithm).astype(dtype), strict=True
    )


def test_values_that_float32_alone_would_keep(isa):
    def one_by_one(value, factor, dtype):
        x = np.full((1, 1, 1, 1), value, dtype)
        return fastconv.conv2d(x, np.full((1, 1, 1, 1), factor, dtype)).item()

    half, brain = DTYPES
    assert one_by_one(300, 300, half) == np.inf  # 90,000 is beyond float16's 65,504
    assert one_by_one(-300, 300, half) == -np.inf
    assert one_by_one(300, 300, brain) == 90112
    # Subnormal numbers of float16: a product, a factor.
    assert one_by_one(2.0**-12, 2.0**-12, half) == 2.0**-24
    assert one_by_one(2.0**-24, 3, half) == 3 * 2.0**-24
    assert one_by_one(2.0**-13, 2.0**-12, half) == 0  # a tie, to even
    for dtype in DTYPES:
        assert np.isnan(one_by_one(np.nan, 1, dtype))
        assert np.isnan(one_by_one(np.inf, 0, dtype))
        assert one_by_one(-np.inf, 2, dtype) == -np.inf


def test_sums_are_of_float32(dtype):
    """4,096 ones: sums of bfloat16 would stay at 256, those of float16 at 2,048."""
    ones = np.ones((1, 1, 1, 4096), dtype)
    assert fastconv.conv2d(ones, np.ones((1, 1, 4096, 1), dtype)).item() == 4096
    pixels = np.ones((1, 64, 64, 1), dtype)
    dw, dbias = fastconv.conv2d_grad_filter(pixels, pixels, (1, 1, 1, 1), return_bias_grad=True)
    assert dw.item() == dbias.item() == 4096


# --- pooling --------------------------------------------------------------------------------------

POOLINGS = [
    *[problem for problem in pool.PROBLEMS if problem.x[3] in (1, 3, 5, 17)],
    pool.Problem((6, 57, 56, 65), (3, 3), (2, 2), "same"),  # in parts
    pool.Problem((6, 57, 56, 65), data_format="channels_first"),
]


@pytest.mark.parametrize("problem", POOLINGS, ids=str)
@pytest.mark.parametrize("sample", [pool.few_values, pool.awkward_values])
def test_max_pooling(problem, sample, dtype):
    x = sample(problem).astype(dtype)
    y, argmax = fastconv.max_pool2d(x, problem.pool_size, return_argmax=True, **problem.options)
    expected = fastconv.max_pool2d(
        x.astype(np.float32), problem.pool_size, return_argmax=True, **problem.options
    )
    assert_same_values(y, expected[0], dtype)
    np.testing.assert_array_equal(argmax, expected[1], strict=True)
    assert_same_values(
        fastconv.max_pool2d(x, problem.pool_size, **problem.options), expected[0], dtype
    )
    dy = problem.seed().integers(-3, 4, y.shape).astype(dtype)
    dx = fastconv.max_pool2d_grad(dy, argmax, x.shape, problem.pool_size, **problem.options)
    exact = oracle.max_pool2d_grad(dy, argmax, x.shape, problem.pool_size, **problem.options)
    assert_same_values(dx, exact, dtype)


def assert_same_values(result, expected, dtype):
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.astype(np.float32), expected)


@pytest.mark.parametrize("problem", POOLINGS, ids=str)
def test_average_pooling(problem, dtype):
    x = pool.many_values(problem).astype(dtype)
    y = fastconv.avg_pool2d(x, problem.pool_size, **problem.options)
    exact = oracle.avg_pool2d(x, problem.pool_size, **problem.options)
    magnitude = oracle.avg_pool2d(abs(x), problem.pool_size, **problem.options)
    assert_rounded(y, exact, BOUND * magnitude, dtype)
    dy = problem.seed().standard_normal(y.shape).astype(dtype)
    dx = fastconv.avg_pool2d_grad(dy, x.shape, problem.pool_size, **problem.options)
    arguments = x.shape, problem.pool_size
    exact = oracle.avg_pool2d_grad(dy, *arguments, **problem.options)
    magnitude = oracle.avg_pool2d_grad(abs(dy), *arguments, **problem.options)
    assert_rounded(dx, exact, BOUND * magnitude, dtype)


# --- both in one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("batch", [0, 3])
def test_convolution_and_pooling(batch, activation, data_format, dtype, rng):
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    x = draw(batch, 9, 10, 6) if data_format == "channels_last" else draw(batch, 6, 9, 10)
    w, bias = draw(3, 3, 6, 8), draw(8)
    options = {"data_format": data_format, "activation": activation}
    y, argmax = fastconv.conv2d_max_pool2d(x, w, bias, return_argmax=True, **options)
    floats = [array.astype(np.float32) for array in (x, w, bias)]
    wanted_y, wanted_argmax = fastconv.conv2d_max_pool2d(*floats, return_argmax=True, **options)
    assert_same_arrays((y, argmax), (wanted_y.astype(dtype), wanted_argmax))
    dy = draw(*y.shape)
    found = fastconv.conv2d_max_pool2d_grad(x, w, dy, y, argmax, **options)
    x, w, dy, y = (array.astype(np.float32) for array in (x, w, dy, y))
    wanted = fastconv.conv2d_max_pool2d_grad(x, w, dy, y, argmax, **options)
    assert_same_arrays(found, [array.astype(dtype) for array in wanted])


# --- arrays ---------------------------------------------------------------------------------------


def test_strided_arrays_and_out(dtype, rng):
    x = rng.standard_normal((2, 18, 7, 8)).astype(dtype)[:, ::2, ::-1]
    w = rng.standard_normal((3, 4, 8, 3)).astype(dtype).transpose(1, 0, 2, 3)
    y = fastconv.conv2d(np.ascontiguousarray(x), np.ascontiguousarray(w))
    out = np.zeros_like(y)
    assert fastconv.conv2d(x, w, out=out) is out
    np.testing.assert_array_equal(out, y)


def test_one_dtype_a_call(dtype):
    x, w, dy = (np.ones(s, dtype) for s in [(1, 4, 4, 2), (2, 2, 2, 3), (1, 3, 3, 3)])
    floats = np.float32
    rule = f"must have dtype {dtype} in native byte order, as `x` has. Received: "
    for call, received in [
        (lambda: fastconv.conv2d(x, w.astype(floats)), "w.dtype=float32"),
        (lambda: fastconv.conv2d(x, w, np.ones(3, floats)), "bias.dtype=float32"),
        (lambda: fastconv.conv2d(x, w, out=np.ones_like(dy, floats)), "out.dtype=float32"),
        (
            lambda: fastconv.conv2d_grad_filter(x, dy.astype(floats), w.shape),
            "dy.dtype=float32",
        ),
        (
            lambda: fastconv.max_pool2d(x, 2, out=np.ones((1, 2, 2, 2), floats)),
            "out.dtype=float32",
        ),
    ]:
        with pytest.raises(TypeError) as raised:
            call()
        assert str(raised.value).endswith(rule + received)
    other = DTYPES[1 - DTYPES.index(dtype)]
    with pytest.raises(TypeError, match=f"as `w` has. Received: dy.dtype={other}"):
        fastconv.conv2d_grad_input(dy.astype(other), w, x.shape)


def test_other_types_of_16_bits(isa):
    x = np.ones((1, 4, 4, 2), np.float16)
    for wrong in (x.astype(x.dtype.newbyteorder()), x.view(np.int16), x.view("V2")):
        with pytest.raises(TypeError, match=r"must have dtype float32, float16 or bfloat16"):
            fastconv.max_pool2d(wrong, 2)
