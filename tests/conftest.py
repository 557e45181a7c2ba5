"""Fixtures of the kernel tests: which instruction set and how many threads they run on."""

import numpy as np
import pytest
from hypothesis import settings

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
