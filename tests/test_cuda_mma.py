"""The emulated instructions of tensor cores against plain loops.

Which lane holds what is written here a second time, from the PTX ISA ("Matrix fragments for
mma.m16n8k16", "... for mma.m16n8k8", "ldmatrix"), with g = lane // 4 and t = lane % 4.
"""

import contextlib
import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest

import cuda_builds
import emulator_kernels
from emulator_kernels import CudaFailure, Kernels

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the emulator switches stacks on Linux, x86-64 and AArch64",
)

SOURCE = Path(cuda_builds.ROOT, "csrc", "tests", "tensor_core_kernels.cu")
BUGS = ["none", "misaligned_row", "no_warp_barrier", "divergent_warp"]
LANES = range(32)


@pytest.fixture(scope="module", params=["fast", "check"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(kind):
    sources = [emulator_kernels.SOURCE, SOURCE]
    return Kernels(cuda_builds.build("tensor_core_kernels", sources, kind))


def load_matrices(kernels, rows, transpose=False, bug="none", threads=32):
    """The (32, 4) registers that 32 rows of 8 16-bit elements give, each as two elements."""
    source = kernels.to_device(rows.ravel().tolist(), "H")
    target = kernels.to_device([0] * 128, "I")
    kernels.call("load_matrices", int(transpose), source, target, BUGS.index(bug), threads)
    registers = np.array(kernels.to_host(target, 128, "I"), np.uint32).reshape(32, 4)
    kernels.call("free", source)
    kernels.call("free", target)
    return np.stack([registers & 0xFFFF, registers >> 16], axis=-1)


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(kernels, transpose):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    found = load_matrices(kernels, rows, transpose)
    for lane in LANES:
        g, t = lane // 4, lane % 4
        for j in range(4):
            matrix = rows[8 * j : 8 * j + 8]
            expected = matrix[2 * t : 2 * t + 2, g] if transpose else matrix[g, 2 * t : 2 * t + 2]
            np.testing.assert_array_equal(found[lane, j], expected, f"lane {lane}, register {j}")


@pytest.mark.parametrize(
    ("bug", "threads", "text"),
    [
        ("misaligned_row", 32, "misaligned access: a row of ldmatrix"),
        ("divergent_warp", 32, "divergent warp"),
        ("none", 16, "divergent warp"),  # an incomplete warp
    ],
)
def test_misuse_of_ldmatrix_is_found(kernels, bug, threads, text):
    with pytest.raises(CudaFailure, match=text):
        load_matrices(kernels, np.zeros((32, 8), np.uint16), bug=bug, threads=threads)


def test_ldmatrix_without_a_barrier_is_a_race(kernels, kind):
    """Each row was written by another lane than the one that names it."""
    rows = np.zeros((32, 8), np.uint16)
    found = pytest.raises(CudaFailure, match="race in shared memory: read of 16")
    with found if kind == "check" else contextlib.nullcontext():
        load_matrices(kernels, rows, bug="no_warp_barrier")


# --- mma -------------------------------------------------------------------------------------------


def bits16(values, dtype):
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return values.astype(np.float32).view(np.uint32) >> 16  # of values that bfloat16 can hold


def fragments_16(a, b, dtype):
    a, b = bits16(a, dtype), bits16(b, dtype)
    fragments_a, fragments_b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane in LANES:
        g, t = lane // 4, lane % 4
        for i in range(4):
            row, k = g + 8 * (i % 2), 2 * t + 8 * (i // 2)
            fragments_a[lane, i] = a[row, k] | a[row, k + 1] << 16
        for i in range(2):
            fragments_b[lane, i] = b[2 * t + 8 * i, g] | b[2 * t + 8 * i + 1, g] << 16
    return fragments_a, fragments_b


def fragments_tf32(a, b):
    a, b = a.astype(np.float32).view(np.uint32), b.astype(np.float32).view(np.uint32)
    fragments_a, fragments_b = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane in LANES:
        g, t = lane // 4, lane % 4
        for i in range(4):
            fragments_a[lane, i] = a[g + 8 * (i % 2), t + 4 * (i // 2)]
        for i in range(2):
            fragments_b[lane, i] = b[t + 4 * i, g]
    return fragments_a, fragments_b


def accumulators(d):
    """The (32, 4) registers of a 16 x 8 matrix."""
    return np.array(
        [[d[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)] for lane in LANES],
        np.float32,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
def test_mma(kernels, dtype):
    rng = np.random.default_rng(0)
    depth = 8 if dtype == "tf32" else 16
    a = rng.integers(-15, 16, (16, depth)) / 8
    b = rng.integers(-15, 16, (depth, 8)) / 4
    d = rng.integers(-15, 16, (16, 8)) / 2
    parts = fragments_tf32(a, b) if dtype == "tf32" else fragments_16(a, b, dtype)
    on_device = [kernels.to_device(part.ravel().tolist(), "I") for part in parts]
    sums = kernels.to_device(accumulators(d).ravel().tolist(), "f")
    kernels.call("multiply", ["float16", "bfloat16", "tf32"].index(dtype), *on_device, sums)
    found = np.array(kernels.to_host(sums, 128, "f"), np.float32).reshape(32, 4)
    expected = [[sum(a[i, k] * b[k, j] for k in range(depth)) for j in range(8)] for i in range(16)]
    np.testing.assert_array_equal(found, accumulators(d + np.array(expected)))
    for pointer in (*on_device, sums):
        kernels.call("free", pointer)


def test_round_to_tf32(kernels):
    """To 10 bits of mantissa, ties away from zero; what has no more, stays."""
    one_place = 2.0**-10
    half = one_place / 2
    values = [
        1,
        1 + half,
        1 + 0.98 * half,
        -1 - half,
        2 - half / 2,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        3e38,
    ]
    values = np.array(values, np.float32)
    expected = np.array(
        [1, 1 + one_place, 1, -1 - one_place, 2, np.inf, -np.inf, 0.0, -0.0, 3.0e38], np.float32
    )
    expected[-1] = np.float32(np.round(np.float64(values[-1]) / 2.0**117) * 2.0**117)
    source = kernels.to_device(values.view(np.uint32).tolist(), "I")
    target = kernels.to_device([0] * len(values), "I")
    kernels.call("round_to_tf32", source, target, ctypes.c_int(len(values)))
    found = np.array(kernels.to_host(target, len(values), "I"), np.uint32).view(np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    kernels.call("free", source)
    kernels.call("free", target)
