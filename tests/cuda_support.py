"""Where the tests of the CUDA kernels run: the builds of the emulator, and a device if there is one.

Each backend is a module fastconv_cuda. Those of the emulator are built when they are first asked for
(cuda_builds.py). ``asan`` needs a process that was started for it: test_cuda_asan.py starts one, which
has ASAN_PROCESS in its environment and runs nothing else.
"""

import contextlib
import dataclasses
import functools
import os
import platform

import numpy as np
import pytest

import cuda_builds
import fastconv.cuda
from conv2d_problems import solve
from fastconv import _core

ASAN_PROCESS = "FASTCONV_TESTS_UNDER_ASAN"
BACKENDS = (
    ["asan"]
    if ASAN_PROCESS in os.environ
    else os.environ.get("FASTCONV_TEST_BACKENDS", "fast check cuda").split()
)

EMULATOR_ONLY = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the emulator switches stacks on Linux, x86-64 and AArch64",
)


@functools.cache
def library(backend):
    """The path of the backend's module; skips the test where it cannot run here."""
    if backend == "cuda":
        facts = default_availability()
        if not facts["available"]:
            pytest.skip(f"no GPU: {facts['reason']}")
        return ""
    return str(cuda_builds.build("fastconv_cuda", cuda_builds.library_sources(), backend))


@functools.cache
def default_availability():
    with using_library(""):
        return _core.cuda.availability()


@contextlib.contextmanager
def using_library(path):
    _core.cuda.use_library(path)
    try:
        yield
    finally:
        _core.cuda.use_library("")


@contextlib.contextmanager
def emulating(**settings):
    """Within it the emulator has these settings: order, copy, streams, compute_capability, ..."""
    names = {f"FASTCONV_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def to_device(data, dtype="float32"):
    """``data`` (conv2d_problems.Data) with its arrays on the device."""
    arrays = {
        field.name: fastconv.cuda.array(getattr(data, field.name), dtype)
        for field in dataclasses.fields(data)
    }
    return dataclasses.replace(data, **arrays)


def to_host(array):
    """As float32."""
    return array.numpy().astype(np.float32)


def solve_on_device(problem, data, dtype="float32"):
    """``solve`` of conv2d_problems on the device; results as float32."""
    results = solve(problem, to_device(data, dtype))
    return {name: to_host(result) for name, result in results.items()}
