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
import time

NAMES = ("fastconv", "tensorflow", "torch", "onnxruntime", "openvino", "onednn", "jax")

# What to install for each, where its own name does not say it.
PACKAGES = {"onednn": "onednn-devel-cpu-gomp", "onnxruntime": "onnxruntime onnx"}


class Unsupported(Exception):
    """An implementation cannot do this; the message says why."""


class Case:
    """One operation on one set of arrays, ready to run again and again."""

    algorithm = None  # what the implementation says it runs, if it says so
    blocking = None  # and how it splits the work
    workspace = None  # bytes of scratch memory, if it says so
    predicted = None  # seconds that a cost model expects, if there is one

    def call(self):
        """Runs it once, as a user of the library would, and waits for the result."""
        raise NotImplementedError

    def result(self):
        """Runs it once; what it computed, as a NumPy array, NHWC or HWIO."""
        raise NotImplementedError

    def call_times(self, count):
        """Nanoseconds of each of ``count`` calls; None where only the kernel can be called."""
        times = []
        for _ in range(count):
            start = time.perf_counter_ns()
            self.call()
            times.append(time.perf_counter_ns() - start)
        return times

    def kernel_times(self, count):
        """The same for the bare kernel, measured inside; None where that cannot be had."""


class FunctionCase(Case):
    """A case from two functions: one that runs it, one that turns its value to a NumPy array."""

    def __init__(self, function, to_numpy):
        self.call = function
        self._to_numpy = to_numpy

    def result(self):
        return self._to_numpy(self.call())


def find(name):
    """The module of an implementation."""
    return importlib.import_module(f"fastconv.bench.adapters.{name}" if name in NAMES else name)


def to_nchw(array):
    """NHWC to NCHW, or HWIO to OIHW (``to_oihw``), dense."""
    import numpy as np

    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def to_nhwc(array):
    return array.transpose(0, 2, 3, 1)


def to_oihw(array):
    import numpy as np

    return np.ascontiguousarray(array.transpose(3, 2, 0, 1))


def to_hwio(array):
    return array.transpose(2, 3, 1, 0)
