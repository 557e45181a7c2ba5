"""The library ``libfastconv_xla``: our kernels as handlers of XLA's foreign function interface."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

__all__ = ["gpu_is_available", "handlers", "load", "ops_executed"]

_PATH = Path(__file__).parent.parent / (
    "libfastconv_xla.so" if sys.platform != "darwin" else "libfastconv_xla.dylib"
)


@functools.cache
def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_PATH))
    for function in (library.fastconv_xla_register, library.fastconv_xla_register_cuda):
        function.restype = ctypes.c_char_p
    library.fastconv_xla_op_name.restype = ctypes.c_char_p
    library.fastconv_xla_op_name.argtypes = [ctypes.c_size_t]
    library.fastconv_xla_op_executions.restype = ctypes.c_uint64
    library.fastconv_xla_op_executions.argtypes = [ctypes.c_size_t]
    library.fastconv_xla_handler.restype = ctypes.c_void_p
    library.fastconv_xla_handler.argtypes = [ctypes.c_size_t, ctypes.c_int]
    return library


def _names() -> list[str]:
    names: list[str] = []
    while (name := load().fastconv_xla_op_name(len(names))) is not None:
        names.append(name.decode())
    return names


def handlers(*, on_gpu: bool) -> dict[str, int]:
    """The address of each operation's handler, for the host or for NVIDIA GPUs."""
    return {
        name: load().fastconv_xla_handler(index, int(on_gpu)) for index, name in enumerate(_names())
    }


def ops_executed() -> dict[str, int]:
    """How often each of our kernels has run inside XLA in this process, by the operation's name."""
    return {name: load().fastconv_xla_op_executions(index) for index, name in enumerate(_names())}


def gpu_is_available() -> bool:
    """Whether the CUDA kernels are there and see a GPU."""
    import fastconv.cuda

    return fastconv.cuda.is_available()
