"""Where the kernels run: a context for tests."""

import contextlib
from unittest import mock

import numpy as np

import fastconv
from fastconv import _core, functional


def by_reference():
    """Context manager within which fastconv's functions are the slow reference."""
    return mock.patch.object(functional, "_core", _core.reference)


@contextlib.contextmanager
def running_on(isa=None, threads=None, accuracy=None, algorithm=None):
    """Within it the kernels use this instruction set, this many threads, this algorithm."""
    before = (
        _core.isa(),
        fastconv.get_num_threads(),
        fastconv.get_accuracy(),
        _core.algorithm(),
    )
    try:
        if isa is not None:
            _core.set_isa(isa)
        if threads is not None:
            fastconv.set_num_threads(threads)
        if accuracy is not None:
            fastconv.set_accuracy(accuracy)
        if algorithm is not None:
            _core.set_algorithm(algorithm)
        yield
    finally:
        _core.set_isa(before[0])
        fastconv.set_num_threads(before[1])
        fastconv.set_accuracy(before[2])
        _core.set_algorithm(before[3])


def assert_same_arrays(results, expected):
    """Bit by bit."""
    for result, right in zip(results, expected, strict=True):
        assert (result.dtype, result.shape) == (right.dtype, right.shape)
        assert result.tobytes() == right.tobytes()


def assert_equal_arrays(results, expected):
    """Value by value: 0 is -0."""
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == right.dtype
        np.testing.assert_array_equal(result, right)
