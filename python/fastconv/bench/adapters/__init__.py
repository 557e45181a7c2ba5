"""The implementations that can be measured, one module each.

A module has a class ``Implementation``:

- ``Implementation(conditions)`` imports the library and sets its threads. It runs in a process that
  belongs to this implementation alone, whose environment ``environment(conditions)`` of the module
  has prepared, if there is such a function. ImportError means: not installed.
- ``versions`` says what was found.
- ``prepare(problem, direction, arrays)`` gives a ``Case``; ``Unsupported`` means that the library
  has no such operation.

``--impl`` takes the names below, or the name of any importable module of this form.
"""

from __future__ import annotations

import importlib
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import DTypeLike, NDArray

    from fastconv.bench._types import Floats, Shape

NAMES = ("fastconv", "tensorflow", "torch", "onnxruntime", "openvino", "onednn", "jax")


class Unsupported(Exception):
    """An implementation cannot do this; the message says why."""


class Case:
    """One operation on one set of arrays, ready to run again and again."""

    algorithm: str | None = None  # what the implementation says it runs, if it says so
    blocking: str | None = None  # and how it splits the work
    workspace: int | None = None  # bytes of scratch memory, if it says so
    kept: object = None  # what must live as long as the case
    predicted: float | None = None  # seconds that a cost model expects, if there is one

    def call(self) -> Any:
        """Runs it once, as a user of the library would, and waits for the result."""
        raise NotImplementedError

    def result(self) -> NDArray[Any]:
        """Runs it once; what it computed, as a NumPy array, NHWC or HWIO."""
        raise NotImplementedError

    def call_times(self, count: int) -> list[int] | None:
        """Nanoseconds of each of ``count`` calls; None where only the kernel can be called."""
        return _timed(self.call, count)

    def kernel_times(self, count: int) -> list[int] | None:
        """The same for the bare kernel, measured inside; None where that cannot be had."""


def _timed(function: Callable[[], Any], count: int) -> list[int]:
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - start)
    return times


class FunctionCase(Case):
    """A case from two functions: one that runs it, one that turns its value to a NumPy array."""

    def __init__(
        self, function: Callable[[], Any], to_numpy: Callable[[Any], NDArray[Any]]
    ) -> None:
        self._function = function
        self._to_numpy = to_numpy

    def call(self) -> Any:
        return self._function()

    def result(self) -> NDArray[Any]:
        return self._to_numpy(self._function())

    def call_times(self, count: int) -> list[int] | None:
        return _timed(self._function, count)


def find(name: str) -> ModuleType:
    """The module of an implementation."""
    return importlib.import_module(f"fastconv.bench.adapters.{name}" if name in NAMES else name)


def empty(shape: Shape, dtype: DTypeLike = "float32") -> NDArray[Any]:
    """A new array at a multiple of 64 bytes, where every framework puts its own.

    NumPy's large arrays begin 16 bytes behind one, and there each vector of 64 bytes lies in two
    lines of the cache: a library that is handed such arrays is up to 1.6 times as slow as one that
    copies them to memory of its own.
    """
    import numpy as np

    line = 64
    memory = np.empty(math.prod(shape) * np.dtype(dtype).itemsize + line, np.uint8)
    begin = -memory.ctypes.data % line
    return memory[begin : memory.size - line + begin].view(dtype).reshape(shape)


def dense(array: NDArray[Any]) -> NDArray[Any]:
    """A dense copy, aligned as ``empty`` says."""
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def to_nchw(array: Floats) -> Floats:
    """NHWC to NCHW, or HWIO to OIHW (``to_oihw``), a dense copy."""
    return dense(array.transpose(0, 3, 1, 2))


def to_nhwc(array: NDArray[Any]) -> NDArray[Any]:
    nhwc: NDArray[Any] = array.transpose(0, 2, 3, 1)
    return nhwc


def to_oihw(array: Floats) -> Floats:
    return dense(array.transpose(3, 2, 0, 1))


def to_hwio(array: Floats) -> Floats:
    hwio: Floats = array.transpose(2, 3, 1, 0)
    return hwio
