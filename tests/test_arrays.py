"""Arrays of every kind of memory: what is computed depends on their values alone."""

import inspect
import mmap

import numpy as np
import pytest

import fastconv
from running import assert_same_arrays

RNG = np.random.default_rng(11)


def drawn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def misaligned(array):
    """At an address that is no multiple of the element's size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    out = memory[1:].view(array.dtype).reshape(array.shape)
    out[...] = array
    assert array.itemsize == 1 or not out.flags.aligned
    return out


def read_only(array):
    out = array.copy()
    out.flags.writeable = False
    return out


def in_a_read_only_mapping(array):
    """Whose pages even the CPU refuses to write."""
    memory = mmap.mmap(-1, max(array.nbytes, 1))
    memory.write(array.tobytes())
    return np.frombuffer(memoryview(memory).toreadonly(), array.dtype).reshape(array.shape)


def reversed_along(axis):
    def view(array):
        return np.flip(np.flip(array, axis).copy(), axis)

    return view


def every_second(array):
    memory = np.full([2 * extent for extent in array.shape], 77, array.dtype)
    out = memory[tuple(np.s_[::2] for _ in array.shape)]
    out[...] = array
    return out


def fortran(array):
    return np.asfortranarray(array)


def record_field(array):
    """Elements that lie between others: every stride odd, none aligned."""
    memory = np.zeros(array.shape, np.dtype([("before", "u1"), ("value", array.dtype)]))
    memory["value"] = array
    return memory["value"]


def subclass(array):
    class Mine(np.ndarray):
        pass

    return array.view(Mine)


KINDS = {
    "misaligned": misaligned,
    "read-only": read_only,
    "read-only pages": in_a_read_only_mapping,
    **{f"reversed along {axis}": reversed_along(axis) for axis in range(4)},
    "every second": every_second,
    "Fortran order": fortran,
    "record field": record_field,
    "subclass": subclass,
}

X, W, BIAS, Y = drawn(2, 9, 8, 12), drawn(3, 3, 12, 10), drawn(10), drawn(2, 7, 6, 10)
POOLED, ARGMAX = fastconv.max_pool2d(X, 2, return_argmax=True)
W_INT8, W_SCALE = fastconv.quantize_filter(W)
FUSED, TAPS = fastconv.conv2d_max_pool2d(X, W, BIAS, return_argmax=True)
RELU = {"activation": "relu", "output": Y}
CALLS = {
    "conv2d": {"x": X, "w": W, "bias": BIAS},
    "conv2d_grad_input": {"dy": Y, "w": W, "input_shape": X.shape, **RELU},
    "conv2d_grad_filter": {"x": X, "dy": Y, "filter_shape": W.shape, **RELU},
    "conv2d_int8": {"x": X, "w": W_INT8, "w_scale": W_SCALE, "bias": BIAS},
    "conv2d_max_pool2d": {"x": X, "w": W, "bias": BIAS},
    "conv2d_max_pool2d_grad": {
        "x": X,
        "w": W,
        "dy": FUSED,
        "output": FUSED,
        "argmax": TAPS,
        "activation": "relu",
    },
    "max_pool2d": {"x": X, "pool_size": 2},
    "max_pool2d_grad": {"dy": POOLED, "argmax": ARGMAX, "input_shape": X.shape, "pool_size": 2},
    "avg_pool2d": {"x": X, "pool_size": 2},
    "avg_pool2d_grad": {"dy": POOLED, "input_shape": X.shape, "pool_size": 2},
}
ARRAYS = [
    (name, argument)
    for name, arguments in CALLS.items()
    for argument, value in arguments.items()
    if isinstance(value, np.ndarray)
]


def results(name, **changed):
    found = getattr(fastconv, name)(**{**CALLS[name], **changed})
    return found if isinstance(found, tuple) else (found,)


def test_every_function_is_here():
    """And each of its arrays."""
    assert set(CALLS) == {name for name in fastconv.__all__ if "conv2d" in name or "pool2d" in name}
    named = {"x", "w", "w_scale", "bias", "dy", "output", "argmax"}
    assert set(ARRAYS) == {
        (name, parameter)
        for name in CALLS
        for parameter in named & set(inspect.signature(getattr(fastconv, name)).parameters)
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("name", "argument"), ARRAYS)
def test_any_memory_will_do(name, argument, kind):
    array = CALLS[name][argument]
    if array.ndim == 1 and kind.__name__ == "view":
        kind = reversed_along(0)
    view = kind(array)
    np.testing.assert_array_equal(view, array)
    assert_same_arrays(results(name, **{argument: view}), results(name))
    np.testing.assert_array_equal(view, array)  # left alone


@pytest.mark.parametrize("name", CALLS)
def test_all_inputs_of_a_kind_at_once(name):
    for kind in (misaligned, every_second, fortran, read_only):
        changed = {argument: kind(CALLS[name][argument]) for n, argument in ARRAYS if n == name}
        assert_same_arrays(results(name, **changed), results(name))


def test_elements_that_share_memory():
    """Overlapping windows of one array, and one element everywhere."""
    line = drawn(60)
    windows = np.lib.stride_tricks.as_strided(line, (2, 9, 8, 12), (40, 16, 8, 4))
    assert_same_arrays([fastconv.conv2d(windows, W)], [fastconv.conv2d(windows.copy(), W)])
    one = np.broadcast_to(np.float32(3), X.shape)
    assert_same_arrays([fastconv.conv2d(one, W)], [fastconv.conv2d(one.copy(), W)])
    assert_same_arrays([fastconv.max_pool2d(one, 2)], [fastconv.max_pool2d(one.copy(), 2)])


def test_inputs_may_be_one_array():
    square = drawn(3, 3, 3, 3)
    assert_same_arrays(
        [fastconv.conv2d(square, square)], [fastconv.conv2d(square.copy(), square.copy())]
    )
    same = {"padding": "same"}
    assert_same_arrays(
        [fastconv.conv2d_grad_filter(square, square, (3, 3, 3, 3), **same)],
        [fastconv.conv2d_grad_filter(square.copy(), square.copy(), (3, 3, 3, 3), **same)],
    )


@pytest.mark.parametrize("name", [name for name in CALLS if name != "conv2d_max_pool2d_grad"])
def test_out_beside_its_inputs_and_reversed_ones(name):
    """An input that runs backwards through memory and ends where `out` begins is no overlap."""
    for _, argument in (row for row in ARRAYS if row[0] == name):
        array = CALLS[name][argument]
        right = results(name)[0]
        if array.dtype != np.float32 or argument in (
            "bias",
            "output",
            "w_scale",
        ):  # which are copied first
            continue
        memory = np.zeros(array.size + right.size + 1, np.float32)
        view = memory[: array.size].reshape(array.shape)[::-1]
        view[...] = array
        out = memory[array.size : array.size + right.size].reshape(right.shape)
        assert results(name, **{argument: view}, out=out)[0] is out
        assert_same_arrays([out], [right])
        np.testing.assert_array_equal(view, array)
        assert memory[-1] == 0
        shifted = memory[array.size - 1 : array.size - 1 + right.size].reshape(right.shape)
        with pytest.raises(ValueError, match="must not share memory"):
            results(name, **{argument: view}, out=shifted)
