"""Fixtures of the kernel tests: which instruction set and how many threads they run on."""

import contextlib

import numpy as np
import pytest
from hypothesis import settings

import fastconv
from fastconv import _core

# The same examples on every run: a failure in CI is one at the desk.
settings.register_profile("fastconv", derandomize=True, deadline=None)
settings.load_profile("fastconv")


@contextlib.contextmanager
def running_on(isa=None, threads=None):
    """Within it the kernels use this instruction set and this many threads."""
    before = _core.isa(), fastconv.get_num_threads()
    try:
        if isa is not None:
            _core.set_isa(isa)
        if threads is not None:
            fastconv.set_num_threads(threads)
        yield
    finally:
        _core.set_isa(before[0])
        fastconv.set_num_threads(before[1])


@pytest.fixture(params=_core.available_isas())
def isa(request):
    with running_on(isa=request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids="{}threads".format)
def threads(request):
    with running_on(threads=request.param):
        yield request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)
