"""Drives csrc/tests/emulator_kernels.cu by ctypes alone.

As a program, ``emulator_kernels.py LIBRARY BUG`` runs one of the seeded bugs, so that a build whose
finding ends the process has one to end.
"""

import array
import ctypes
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "tests" / "emulator_kernels.cu"
THREADS = 128
BLOCKS = 4

# In the order of the enumeration in the source.
BUGS = [
    re.sub(r"(?<!^)(?=[A-Z])", "_", name.strip()[1:]).lower()
    for name in re.search(r"enum Bug : int \{(.*?)\}", SOURCE.read_text(), re.DOTALL)[1].split(",")
    if name.strip()
]


class CudaFailure(Exception):
    pass


class Kernels:
    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.test_error_text.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        error = getattr(self._library, "test_" + name)(*arguments)
        if error:
            raise CudaFailure(self._library.test_error_text(error).decode())

    def to_device(self, values, typecode="f"):
        host = array.array(typecode, values)
        pointer = self.allocate(len(host) * host.itemsize)
        data = (ctypes.c_char * (len(host) * host.itemsize)).from_buffer(host)
        self.call("to_device", pointer, data, ctypes.c_size_t(len(data)))
        return pointer

    def allocate(self, size):
        pointer = ctypes.c_void_p()
        self.call("malloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def to_host(self, pointer, count, typecode="f"):
        host = array.array(typecode, [0]) * count
        data = (ctypes.c_char * (count * host.itemsize)).from_buffer(host)
        self.call("to_host", data, pointer, ctypes.c_size_t(len(data)))
        return host

    def reverse(self, bug):
        """Whether a block's values came out reversed; raises CudaFailure with the findings."""
        count = BLOCKS * THREADS
        values = array.array("f", [i % 17 + 1 for i in range(count)])
        source, result = self.to_device(values), self.to_device([0] * count)
        limit = 2**31 - 1 if bug == "global_overflows_int" else count
        self.call("reverse", BUGS.index(bug), source, result, BLOCKS, limit)
        found = self.to_host(result, count)
        self.call("free", source)
        self.call("free", result)
        blocks = [values[i : i + THREADS] for i in range(0, count, THREADS)]
        return list(found) == [v for block in blocks for v in reversed(block)]


if __name__ == "__main__":
    print("right" if Kernels(sys.argv[1]).reverse(sys.argv[2]) else "wrong")
