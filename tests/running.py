"""Where the kernels run: a context for tests."""

import contextlib

import fastconv
from fastconv import _core


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
