"""The C door: the same bits as the Python one, errors as a status, the installed CMake package."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv

ROOT = Path(__file__).parents[1]
HEADER = (ROOT / "csrc/include/fastconv/fastconv.h").read_text()
OK, INVALID_ARGUMENT, OUT_OF_MEMORY = range(3)


def fields_of(struct):
    """Names and types of a struct of the header, in its order."""
    (body,) = re.findall(rf"typedef struct {struct} {{(.*?)}} {struct};", HEADER, re.DOTALL)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    types = {"size_t": ctypes.c_size_t, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    return [
        (name, types[kind])
        for kind, names in re.findall(r"(\w+) ([^;]+);", body)
        for name in re.split(r",\s*", names.strip())
    ]


class Conv2d(ctypes.Structure):
    _fields_ = fields_of("fastconv_conv2d")

    def __init__(self, **values):
        ones = ("stride_h", "stride_w", "dilation_h", "dilation_w", "groups")
        super().__init__(**{"struct_size": ctypes.sizeof(self), **dict.fromkeys(ones, 1), **values})


class Pool2d(ctypes.Structure):
    _fields_ = fields_of("fastconv_pool2d")

    def __init__(self, **values):
        ones = ("r", "s", "stride_h", "stride_w")
        super().__init__(**{"struct_size": ctypes.sizeof(self), **dict.fromkeys(ones, 1), **values})


@pytest.fixture(scope="module")
def library():
    library = ctypes.CDLL(str(Path(fastconv.__file__).parent / "libfastconv.so"))
    for name in ("fastconv_last_error", "fastconv_version"):
        getattr(library, name).restype = ctypes.c_char_p
    library.fastconv_max_pool2d_argmax_bytes.restype = ctypes.c_size_t
    return library


def arguments(values):
    return [
        ctypes.byref(value)
        if isinstance(value, ctypes.Structure)
        else ctypes.c_void_p(value.ctypes.data)
        if isinstance(value, np.ndarray)
        else value
        for value in values
    ]


@pytest.fixture
def call(library):
    def call(name, *values):
        status = getattr(library, f"fastconv_{name}")(*arguments(values))
        assert status == OK, library.fastconv_last_error().decode()

    return call


@pytest.fixture
def refused(library):
    def refused(name, *values):
        assert getattr(library, f"fastconv_{name}")(*arguments(values)) == INVALID_ARGUMENT
        return library.fastconv_last_error().decode()

    return refused


def output_shape(call, name, problem):
    shape = (ctypes.c_int64 * 4)()
    call(f"{name}_output_shape", problem, shape)
    return tuple(shape)


CONVOLUTIONS = {
    "plain": ({}, {}),
    "same": ({"stride_h": 2, "stride_w": 2, "padding": 1}, {"strides": 2, "padding": "same"}),
    "relu": ({"activation": 1, "padding": 1}, {"activation": "relu", "padding": "same"}),
    "explicit": (
        {"padding": 2, "pad_top": 2, "pad_bottom": 0, "pad_left": 1, "pad_right": 3},
        {"padding": ((2, 0), (1, 3))},
    ),
    "groups": ({"groups": 2, "dilation_w": 2}, {"groups": 2, "dilation_rate": (1, 2)}),
    "nchw": ({"layout": 1, "padding": 1}, {"data_format": "channels_first", "padding": "same"}),
}


@pytest.mark.parametrize("ours, python", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_are_those_of_python(library, call, draw, ours, python):
    problem = Conv2d(n=2, h=11, w=10, c=4, k=6, r=3, s=3, **ours)
    x = draw(2, 4, 11, 10) if problem.layout else draw(2, 11, 10, 4)
    w, bias = draw(3, 3, 4 // problem.groups, 6), draw(6)
    y = np.empty(output_shape(call, "conv2d", problem), "float32")
    call("conv2d_fprop", problem, x, w, bias, y)
    np.testing.assert_array_equal(y, fastconv.conv2d(x, w, bias, **python))

    packed, again = ctypes.c_void_p(), np.empty_like(y)
    call("packed_filter_create", problem, w, ctypes.byref(packed))
    for _ in range(2):  # the first one packs
        again.fill(np.nan)
        call("conv2d_packed_fprop", problem, x, packed, bias, again)
        np.testing.assert_array_equal(again, y)

    dy = draw(*y.shape)
    output = {"output": y} if problem.activation else {}
    dx, dw, dbias = np.empty_like(x), np.empty_like(w), np.empty_like(bias)
    call("conv2d_dgrad", problem, dy, w, y if output else None, dx)
    again = np.empty_like(dx)
    for _ in range(2):
        again.fill(np.nan)
        call("conv2d_packed_dgrad", problem, dy, packed, y if output else None, again)
        np.testing.assert_array_equal(again, dx)
    library.fastconv_packed_filter_destroy(packed)
    call("conv2d_wgrad", problem, x, dy, y if output else None, dw, dbias)
    right_dw, right_dbias = fastconv.conv2d_grad_filter(
        x, dy, w.shape, return_bias_grad=True, **output, **python
    )
    np.testing.assert_array_equal(
        dx, fastconv.conv2d_grad_input(dy, w, x.shape, **output, **python)
    )
    np.testing.assert_array_equal(dw, right_dw)
    np.testing.assert_array_equal(dbias, right_dbias)

    pooled = np.empty(output_shape(call, "conv2d_max_pool2d", problem), "float32")
    argmax = np.empty(pooled.shape, "uint8")
    call("conv2d_max_pool2d_fprop", problem, x, w, bias, pooled, argmax)
    right = fastconv.conv2d_max_pool2d(x, w, bias, return_argmax=True, **python)
    np.testing.assert_array_equal(pooled, right[0])
    np.testing.assert_array_equal(argmax, right[1])
    call("conv2d_max_pool2d_bprop", problem, x, w, pooled, pooled, argmax, dx, dw, dbias)
    for mine, theirs in zip(
        (dx, dw, dbias),
        fastconv.conv2d_max_pool2d_grad(x, w, pooled, pooled, argmax, **python),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("window, kind", [(3, "uint8"), (17, "int32")])
def test_pooling_is_that_of_python(call, library, draw, window, kind):
    problem = Pool2d(n=2, h=19, w=18, c=5, r=window, s=window, stride_h=2, stride_w=2, padding=1)
    python = {"strides": 2, "padding": "same"}
    x = draw(2, 19, 18, 5)
    y = np.empty(output_shape(call, "pool2d", problem), "float32")
    assert (
        library.fastconv_max_pool2d_argmax_bytes(ctypes.byref(problem)) == np.dtype(kind).itemsize
    )
    argmax, dx = np.empty(y.shape, kind), np.empty_like(x)
    call("max_pool2d_fprop", problem, x, y, argmax)
    right = fastconv.max_pool2d(x, window, return_argmax=True, **python)
    np.testing.assert_array_equal(y, right[0])
    np.testing.assert_array_equal(argmax, right[1])
    call("max_pool2d_bprop", problem, y, argmax, dx)
    np.testing.assert_array_equal(
        dx, fastconv.max_pool2d_grad(y, argmax, x.shape, window, **python)
    )
    call("avg_pool2d_fprop", problem, x, y)
    np.testing.assert_array_equal(y, fastconv.avg_pool2d(x, window, **python))
    call("avg_pool2d_bprop", problem, y, dx)
    np.testing.assert_array_equal(dx, fastconv.avg_pool2d_grad(y, x.shape, window, **python))


def test_settings(call, library):
    assert library.fastconv_version().decode() == fastconv.__version__
    threads, isa = ctypes.c_int(), ctypes.c_char_p()
    before = fastconv.get_num_threads()
    call("set_num_threads", 3)
    call("get_num_threads", ctypes.byref(threads))
    assert threads.value == fastconv.get_num_threads() == 3
    call("set_num_threads", before)
    call("get_isa", ctypes.byref(isa))
    assert isa.value.decode() == fastconv.info()["isa"]
    call("set_isa", isa.value)
    accuracy = fastconv.get_accuracy()
    call("set_accuracy", b"strict")
    assert fastconv.get_accuracy() == "strict"
    call("set_accuracy", accuracy.encode())


def good():
    return Conv2d(n=1, h=4, w=4, c=2, k=2, r=3, s=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"struct_size": 8}, "`struct_size` must be 152, as FASTCONV_CONV2D_INIT sets it. "),
        ({"stride_h": 0}, "`strides` must be positive integers"),
        ({"groups": 0}, "`groups` must be positive and divide `c`. Received: groups=0, c=2"),
        ({"groups": 3}, "`groups` must be positive and divide `c`. Received: groups=3, c=2"),
        ({"layout": 2}, "`layout` must be one of its enumeration, 0 to 1. Received: layout=2"),
        (
            {"padding": -1},
            "`padding` must be one of its enumeration, 0 to 2. Received: padding=-1",
        ),
        ({"activation": 9}, "`activation` must be one of its enumeration"),
        ({"reserved": 1}, "`reserved` must be 0"),
        ({"n": -1}, "must not be negative"),
        ({"n": 2**62}, "fewer than 2**57 elements"),
        ({"r": 5}, "must not be larger than the padded input"),
    ],
)
def test_problems_that_are_none(refused, changes, message):
    problem = good()
    for name, value in changes.items():
        setattr(problem, name, value)
    error = refused("conv2d_output_shape", problem, (ctypes.c_int64 * 4)())
    assert message in error
    assert "Received: " in error
    assert refused("conv2d_fprop", problem, None, None, None, None) == error


def test_null_pointers(refused, draw):
    x, w, y = draw(1, 4, 4, 2), draw(3, 3, 2, 2), draw(1, 2, 2, 2)
    relu = good()
    relu.activation = 1
    pool = Pool2d(n=1, h=4, w=4, c=2)
    for name, values, null in [
        ("conv2d_output_shape", (None, None), "problem"),
        ("conv2d_output_shape", (good(), None), "shape"),
        ("conv2d_fprop", (good(), None, w, None, y), "x"),
        ("conv2d_fprop", (good(), x, None, None, y), "filter"),
        ("conv2d_fprop", (good(), x, w, None, None), "y"),
        ("packed_filter_create", (good(), None, ctypes.byref(ctypes.c_void_p())), "values"),
        ("packed_filter_create", (good(), w, None), "filter"),
        ("conv2d_packed_fprop", (good(), x, None, None, y), "filter"),
        ("conv2d_dgrad", (relu, y, w, None, x), "y"),
        ("conv2d_packed_dgrad", (good(), y, None, None, x), "filter"),
        ("conv2d_wgrad", (good(), None, y, None, w, None), "x"),
        ("max_pool2d_fprop", (pool, x, None, None), "y"),
        ("max_pool2d_bprop", (pool, x, None, x), "argmax"),
        ("avg_pool2d_bprop", (pool, None, x), "dy"),
        ("conv2d_max_pool2d_fprop", (good(), None, w, None, y, None), "x"),
        ("conv2d_max_pool2d_bprop", (good(), x, w, y, None, None, x, w, None), "argmax"),
        ("set_isa", (None,), "name"),
        ("get_num_threads", (None,), "threads"),
    ]:
        assert refused(name, *values) == f"`{null}` must not be null. Received: NULL"
    assert "One of `dfilter` and `dbias`" in refused("conv2d_wgrad", good(), x, y, None, None, None)


def test_a_packed_filter_serves_its_own_shape(library, call, refused, draw):
    packed = ctypes.c_void_p()
    call("packed_filter_create", good(), draw(3, 3, 2, 2), ctypes.byref(packed))
    other = good()
    other.k = 3
    x, y = draw(1, 4, 4, 2), draw(1, 2, 2, 3)
    for function, arguments in [
        ("conv2d_packed_fprop", (x, packed, None, y)),
        ("conv2d_packed_dgrad", (y, packed, None, x)),
    ]:
        assert refused(function, other, *arguments) == (
            "The problem's filter must be of the packed one's shape, (3, 3, 2, 2). "
            "Received: filter of shape (3, 3, 2, 3)"
        )
    library.fastconv_packed_filter_destroy(packed)
    library.fastconv_packed_filter_destroy(None)


def test_an_argmax_from_outside_the_window_is_refused(refused, draw):
    dy, dx = draw(1, 2, 2, 2), draw(1, 4, 4, 2)
    pool = Pool2d(n=1, h=4, w=4, c=2, r=2, s=2, stride_h=2, stride_w=2)
    error = refused("max_pool2d_bprop", pool, dy, np.full(dy.shape, 4, "uint8"), dx)
    assert error == (
        "`argmax` must hold values from 0 to 3, the taps of the window. "
        "Received: argmax with value 4"
    )


def test_memory_that_cannot_be_had(library):
    # Padding is laid out in memory for neither; NCHW scratch is, and beyond what an address can name.
    problem = Conv2d(n=1, h=1, w=2**31 - 1, c=2**24, k=1, r=1, s=1, layout=1)
    something = np.zeros(1, "float32")
    status = library.fastconv_conv2d_fprop(*arguments((problem, *[something] * 4)))
    assert status == OUT_OF_MEMORY
    assert library.fastconv_last_error() == b"Out of memory."


def tree_of_the_wheel():
    """Of the build that made the wheel, if it is there."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    trees = sorted((ROOT / "build").glob(f"{tag}-{tag}-*/cmake_install.cmake"))
    return trees[0].parent if trees else None


def installed_package(cmake, prefix, scratch):
    """Installs the CMake package, from the tree of the build that made the wheel if it is there."""
    tree = tree_of_the_wheel()
    if tree is None:
        tree = scratch / "library"
        options = ["-DFASTCONV_DOORS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        run(cmake, "-S", ROOT, "-B", tree, *options)
        run(cmake, "--build", tree, "--parallel", "2")
    run(cmake, "--install", tree, "--prefix", prefix, "--component", "development")


def run(*command):
    environment = {k: v for k, v in os.environ.items() if k != "CMAKE_GENERATOR"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def cmake_of_the_environment():
    beside = Path(sys.executable).parent / "cmake"
    cmake = beside if beside.exists() else shutil.which("cmake")
    assert cmake, "CMake is among the test tools (the extra `test`)"
    return cmake


def test_a_libstdcxx_that_is_linked_in_is_not_exported(tmp_path):
    """Else the loader binds some of its symbols to NumPy's libstdc++: streams crash."""
    archive = subprocess.run(
        ["c++", "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(archive).is_absolute():
        pytest.skip("the compiler has no libstdc++.a")
    options = {"FASTCONV_DOORS": "OFF", "CMAKE_SHARED_LINKER_FLAGS": "-static-libstdc++"}
    tree = tree_of_the_wheel()
    if tree is None:  # what is quick to compile
        options |= {"FASTCONV_SCALAR_ONLY": "ON", "CMAKE_BUILD_TYPE": "Debug"}
        options |= {"CMAKE_CXX_FLAGS_DEBUG": ""}  # debug information is not looked at
    cmake = cmake_of_the_environment()
    options = [f"-D{name}={value}" for name, value in options.items()]
    run(cmake, "-G", "Unix Makefiles", "-S", ROOT, "-B", tmp_path, *options)
    if tree is None:
        run(cmake, "--build", tmp_path, "--target", "fastconv", "--parallel", "2")
    else:  # its objects, linked anew
        objects = Path("CMakeFiles/fastconv.dir")
        shutil.copytree(tree / objects / "csrc", tmp_path / objects / "csrc", dirs_exist_ok=True)
        run("sh", "-c", f'cd "$1" && sh {objects}/link.txt', "sh", tmp_path)
    library = next(tmp_path.glob("libfastconv.*"))
    assert "libstdc++" not in run("ldd", library)
    names = run("nm", "-DC", "--defined-only", library).splitlines()
    exported = {name.split(maxsplit=2)[2] for name in names}
    assert "fastconv_conv2d_fprop" in exported
    assert not {name for name in exported if re.match(r"std::(locale|ios_base|num_put)", name)}


def test_the_example_finds_the_package(tmp_path):
    cmake = cmake_of_the_environment()
    prefix = tmp_path / "prefix"
    installed_package(cmake, prefix, tmp_path)
    assert {path.name for path in (prefix / "include" / "fastconv").iterdir()} == {"fastconv.h"}
    example = tmp_path / "example"
    flags = "-std=c99 -Wall -Wextra -Wpedantic -Werror"
    run(
        cmake, "-G", "Unix Makefiles", "-S", ROOT / "examples/c", "-B", example,
        f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_FLAGS={flags}",
    )  # fmt: skip
    run(cmake, "--build", example)
    told = run(example / "convolution").splitlines()
    assert told[0] == f"fastconv {fastconv.__version__}"
    assert told[-2].startswith("a mistake: `strides` must be positive")
    assert told[-1] == "right"
