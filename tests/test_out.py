"""``out=``: results written to an array of the caller's."""

import pickle

import numpy as np
import pytest

import fastconv

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 6, 7, 4)).astype(np.float32)
W = RNG.standard_normal((3, 2, 4, 5)).astype(np.float32)
Y = RNG.standard_normal((2, 4, 6, 5)).astype(np.float32)
POOLED, ARGMAX = fastconv.max_pool2d(X, 2, return_argmax=True)

# Each function with its arguments; the one whose memory `out` must not share.
CALLS = {
    "conv2d": (fastconv.conv2d, {"x": X, "w": W}),
    "conv2d_grad_input": (
        fastconv.conv2d_grad_input,
        {"dy": Y, "w": W, "input_shape": X.shape},
    ),
    "conv2d_grad_filter": (
        fastconv.conv2d_grad_filter,
        {"x": X, "dy": Y, "filter_shape": W.shape},
    ),
    "conv2d_int8": (
        fastconv.conv2d_int8,
        dict(zip(("x", "w", "w_scale"), (X, *fastconv.quantize_filter(W)), strict=True)),
    ),
    "max_pool2d": (fastconv.max_pool2d, {"x": X, "pool_size": 2}),
    "max_pool2d_grad": (
        fastconv.max_pool2d_grad,
        {"dy": POOLED, "argmax": ARGMAX, "input_shape": X.shape, "pool_size": 2},
    ),
    "avg_pool2d": (fastconv.avg_pool2d, {"x": X, "pool_size": 2}),
    "avg_pool2d_grad": (
        fastconv.avg_pool2d_grad,
        {"dy": POOLED, "input_shape": X.shape, "pool_size": 2},
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def test_result_is_written_to_it_and_returned(call):
    function, arguments = call
    expected = function(**arguments)
    out = np.full_like(expected, np.nan)
    assert function(**arguments, out=out) is out
    np.testing.assert_array_equal(out, expected)
    # A part of a larger array will do, if it is dense.
    block = np.full((3, *expected.shape), np.nan, np.float32)
    function(**arguments, out=block[1])
    np.testing.assert_array_equal(block[1], expected)
    assert np.isnan(block[[0, 2]]).all()


def test_with_further_results():
    dw, dbias = fastconv.conv2d_grad_filter(X, Y, W.shape, return_bias_grad=True)
    out = np.empty_like(dw)
    first, second = fastconv.conv2d_grad_filter(X, Y, W.shape, return_bias_grad=True, out=out)
    assert first is out
    np.testing.assert_array_equal(out, dw)
    np.testing.assert_array_equal(second, dbias)
    out = np.empty_like(POOLED)
    first, second = fastconv.max_pool2d(X, 2, return_argmax=True, out=out)
    assert first is out
    np.testing.assert_array_equal(second, ARGMAX)


def test_what_does_not_fit_is_refused_and_left_alone(call):
    function, arguments = call
    shape = function(**arguments).shape
    spread = np.zeros((*shape[:3], 2 * shape[3]), np.float32)[..., ::2]
    unwriteable = np.zeros(shape, np.float32)
    unwriteable.flags.writeable = False
    bytes_ = np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)
    misaligned = bytes_[1:].view(np.float32).reshape(shape)
    for out, exception, received in (
        ([1.0], TypeError, "out of type list"),
        (np.zeros(shape), TypeError, "out.dtype=float64"),
        (np.zeros(shape, ">f4"), TypeError, "out.dtype=>f4"),
        (np.zeros(shape[1:], np.float32), ValueError, "out.shape="),
        (np.zeros((1, *shape[1:]), np.float32), ValueError, "out.shape="),
        (spread, ValueError, "out with strides"),
        (np.zeros(shape[::-1], np.float32).T, ValueError, "out with strides"),
        (misaligned, ValueError, "out with strides"),
        (unwriteable, ValueError, "not writeable"),
    ):
        with pytest.raises(exception, match=rf"\. Received: .*{received}"):
            function(**arguments, out=out)
        assert not np.any(np.asarray(out) != (1 if isinstance(out, list) else 0))


def test_memory_of_an_input_is_refused(call):
    function, arguments = call
    shape = function(**arguments).shape
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:
            continue
        memory = np.zeros(array.size + int(np.prod(shape)), np.float32)
        shared = memory[: array.size].reshape(array.shape)
        shared[...] = array
        last = memory[array.size - 1 :][: int(np.prod(shape))].reshape(shape)
        beside = memory[array.size :].reshape(shape)
        with pytest.raises(ValueError, match="must not share memory"):
            function(**{**arguments, name: shared}, out=last)
        np.testing.assert_array_equal(shared, array)
        assert function(**{**arguments, name: shared}, out=beside) is beside


def test_reversed_input_is_known_to_share_memory():
    memory = np.zeros(X.size, np.float32).reshape(X.shape)
    with pytest.raises(ValueError, match="must not share memory"):
        fastconv.max_pool2d(memory[::-1], 1, out=memory)


def test_empty_batch():
    x = X[:0]
    out = np.empty((0, 4, 6, 5), np.float32)
    assert fastconv.conv2d(x, W, out=out) is out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_results_begin_at_a_line_of_the_cache(dtype):
    """Behind which stores of whole vectors would meet two lines each."""
    x = np.ones((2, 40, 30, 24), dtype)
    y, argmax = fastconv.max_pool2d(x, 2, strides=1, return_argmax=True)
    w = np.ones((3, 3, 24, 20), dtype)
    results = [
        y,
        argmax,
        fastconv.max_pool2d_grad(y, argmax, x.shape, 2, strides=1),
        fastconv.conv2d(x, w),
        *fastconv.conv2d_max_pool2d(x, w, return_argmax=True)[:1],
    ]
    for result in results:
        assert result.ctypes.data % 64 == 0
        assert result.flags.c_contiguous
        assert result.flags.writeable
        assert result.flags.aligned
    assert results[3].shape == (2, 38, 28, 20)
    again = pickle.loads(pickle.dumps(y))
    np.testing.assert_array_equal(again, y)
