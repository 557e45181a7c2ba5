"""Fixtures: which instruction set and how many threads kernels run on, and which kernels ran."""

import os

# Before TensorFlow is loaded: on processors where it leaves oneDNN out unless asked, its convolutions
# have no gradient with a dilation, and stock layers are what ours are compared with.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import pytest
from hypothesis import settings

import cuda_support
from fastconv import _core
from running import running_on

# The same examples on every run: a failure in CI is one at the desk.
settings.register_profile("fastconv", derandomize=True, deadline=None)
settings.load_profile("fastconv")


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


@pytest.fixture
def draw(rng):
    return lambda *shape: rng.standard_normal(shape).astype("float32")


def _counter(counts):
    before = counts()
    return lambda: {op: count - before[op] for op, count in counts().items() if count > before[op]}


@pytest.fixture
def executed():
    """How often each op has run since the test began; those that have not are left out."""
    from fastconv.adapters.tensorflow import ops_executed

    return _counter(ops_executed)


@pytest.fixture
def executed_in_xla():
    """The same inside XLA."""
    from fastconv.adapters import xla

    xla.available()  # which runs a kernel the first time
    return _counter(xla.ops_executed)


@pytest.fixture(scope="module", params=cuda_support.BACKENDS)
def gpu(request):
    """The name of the module that computes for ``fastconv.cuda``."""
    with cuda_support.using_library(cuda_support.library(request.param)):
        yield request.param
