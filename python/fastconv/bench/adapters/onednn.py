"""oneDNN's bare primitives, by a small C++ driver that is compiled at the first use.

Needs the headers and the library of a oneDNN with OpenMP: the package ``onednn-devel-cpu-gomp``,
or a directory with ``include`` and ``lib`` named by ``FASTCONV_ONEDNN_ROOT``. The compiled driver is
kept in the user's cache directory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.bench.adapters import Case, Unsupported, to_nchw, to_nhwc
from fastconv.bench.problem import DIRECTIONS

if TYPE_CHECKING:
    from fastconv.bench._types import Arrays, Floats, Record
    from fastconv.bench.problem import Problem

_SOURCE = Path(__file__).with_name("onednn_driver.cpp")
_PACKAGE = "onednn-devel-cpu-gomp"


class Implementation:
    def __init__(self, conditions: Record) -> None:
        self._nchw = conditions["layout"] == "nchw"
        self._library = _load(_build(*_find()))
        version = ctypes.create_string_buffer(64)
        self._library.fastconv_onednn_version(version, len(version))
        self.versions = {"onednn": version.value.decode()}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        return _OneDnnCase(self._library, problem, direction, arrays, self._nchw)


class _OneDnnCase(Case):
    def __init__(
        self, library: ctypes.CDLL, problem: Problem, direction: str, arrays: Arrays, nchw: bool
    ) -> None:
        lay = to_nchw if nchw else np.ascontiguousarray
        self._unlay = to_nhwc if nchw and direction != "wgrad" else np.asarray
        x, dy = lay(arrays["x"]), lay(arrays["dy"])
        w = None if problem.is_pool else np.ascontiguousarray(arrays["w"])
        (top, bottom), (left, right) = problem.sides
        fields = (
            problem.n, problem.c, problem.h, problem.w, problem.channels_out, problem.r, problem.s,
            problem.oh, problem.ow, *problem.strides, top, bottom, left, right,
            *problem.dilations, problem.groups, DIRECTIONS.index(direction), problem.is_pool, nchw,
        )  # fmt: skip
        message = ctypes.create_string_buffer(256)
        handle = library.fastconv_onednn_create(
            (ctypes.c_int64 * len(fields))(*map(int, fields)),
            _pointer(x),
            _pointer(w),
            _pointer(dy),
            message,
            len(message),
        )
        if not handle:
            raise Unsupported(message.value.decode())
        self._library, self._handle = library, handle
        self.algorithm = library.fastconv_onednn_algorithm(handle).decode()
        self.workspace = library.fastconv_onednn_workspace(handle)
        self._result = np.empty_like({"fprop": dy, "dgrad": x, "wgrad": w}[direction])

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._library.fastconv_onednn_destroy(handle)

    def call(self) -> None:
        self.kernel_times(1)

    def call_times(self, count: int) -> None:
        return None  # a bare primitive has no caller

    def kernel_times(self, count: int) -> list[int]:
        times = np.empty(count, np.int64)
        failed = self._library.fastconv_onednn_run(
            self._handle, count, times.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        )
        if failed:
            raise RuntimeError("oneDNN could not execute the primitive")
        return [int(time) for time in times]

    def result(self) -> Floats:
        self.call()
        if self._library.fastconv_onednn_result(self._handle, _pointer(self._result)):
            raise RuntimeError("oneDNN could not reorder the result")
        return self._unlay(self._result)


def _pointer(array: Floats | None) -> Any:
    return None if array is None else array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def _find() -> tuple[Path, Path]:
    """(include directory, library). ImportError where there is none."""
    if root := os.environ.get("FASTCONV_ONEDNN_ROOT"):
        include = Path(root, "include")
        libraries = [*Path(root).glob("lib*/libdnnl.so*")]
    else:
        try:
            files = importlib.metadata.files(_PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"install {_PACKAGE} or set FASTCONV_ONEDNN_ROOT") from None
        headers = [f for f in files if f.name == "dnnl.hpp" and f.parent.name == "include"]
        include = Path(headers[0].locate()).resolve().parent if headers else Path("missing")
        libraries = [*include.parent.glob("lib*/libdnnl.so*")]
    if not (include / "dnnl.hpp").exists() or not libraries:
        raise ImportError(f"no dnnl.hpp and libdnnl.so in {include.parent}")
    return include, min(libraries, key=lambda path: len(path.name))


def _build(include: Path, library: Path) -> Path:
    """The driver's shared library, compiled unless that was done before."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise ImportError("a C++ compiler is needed for the driver, and none was found")
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + f"{include}{library}{compiler}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastconv"
    built = cache / f"onednn_driver_{key}.so"
    if built.exists():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = built.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{include}", str(_SOURCE)]
    command += ["-o", str(unfinished), str(library), f"-Wl,-rpath,{library.parent}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImportError(f"the driver does not compile: {done.stderr.strip().splitlines()[-1]}")
    unfinished.replace(built)  # at once: others may be building it too
    return built


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    floats = ctypes.POINTER(ctypes.c_float)
    integers = ctypes.POINTER(ctypes.c_int64)
    handle = ctypes.c_void_p
    text, count = ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("create", handle, (integers, floats, floats, floats, text, count)),
        ("run", count, (handle, count, integers)),
        ("result", count, (handle, floats)),
        ("algorithm", text, (handle,)),
        ("workspace", ctypes.c_int64, (handle,)),
        ("destroy", None, (handle,)),
        ("version", None, (text, count)),
    ):
        function = getattr(library, f"fastconv_onednn_{name}")
        function.restype, function.argtypes = result, arguments
    return library
