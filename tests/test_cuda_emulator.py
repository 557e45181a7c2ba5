"""The emulator that runs the CUDA kernels: what it computes, and that its detectors detect.

The kernels are those of csrc/tests/emulator_kernels.cu; ``BUGS`` are seeded errors in one of them.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import threading

import numpy as np
import pytest

import cuda_builds
import emulator_kernels
from emulator_kernels import BLOCKS, BUGS, THREADS, CudaFailure, Kernels

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the emulator switches stacks on Linux, x86-64 and AArch64",
)

# What each detector finds of each bug: a part of its text. "wrong": nothing is reported, and the
# result is wrong; None: neither (a race that happens to end well).
FINDINGS = {
    "none": {"fast": None, "asan": None, "check": None},
    "no_barrier": {"fast": "wrong", "check": "race in shared memory"},
    "shared_out_of_bounds": {"asan": "index 128 out of bounds", "check": "out of bounds: read"},
    "global_out_of_bounds": {"asan": "heap-buffer-overflow", "check": "out of bounds: write"},
    "divergent_barrier": dict.fromkeys(("fast", "asan", "check"), "divergent barrier"),
    "no_copy_wait": {"fast": "asynchronous copy", "check": "was not waited for"},
    "no_barrier_after_copy_wait": {"fast": "wrong", "check": "race in shared memory"},
    "copy_over_readers": {"fast": None, "check": "race in shared memory: write"},
    "uninitialised_shared": {"fast": "wrong", "check": "uninitialised shared memory"},
    "race_of_blocks": {"fast": "wrong", "check": "by another block"},
    "misaligned_vector": {"asan": "misaligned address", "check": "misaligned access: read of 16"},
    "divergent_warp": dict.fromkeys(("fast", "asan", "check"), "divergent warp"),
    "lane_outside_mask": dict.fromkeys(("fast", "asan", "check"), "not in its own mask"),
    "barrier_after_return": dict.fromkeys(("fast", "asan", "check"), "127 of 128 threads wait"),
    "no_warp_barrier": {"fast": "wrong", "check": "race in shared memory"},
    "race_of_bytes": {"fast": "wrong", "check": "race in shared memory: write of 1 bytes"},
    "global_overflows_int": {"fast": "wrong", "asan": "signed integer overflow"},
    "dynamic_shared_out_of_bounds": {"asan": "use-after-poison", "check": "out of bounds: write"},
    "read_behind_write": {"fast": "wrong", "check": "race in global memory"},
    "write_of_constant": {"asan": "AddressSanitizer", "check": "out of bounds: write"},
}
CASES = [(bug, kind, text) for bug, by in FINDINGS.items() for kind, text in by.items()]


@pytest.fixture(scope="module")
def libraries():
    return {
        kind: cuda_builds.build("emulator_kernels", [emulator_kernels.SOURCE], kind)
        for kind in cuda_builds.BUILDS
    }


@pytest.fixture(scope="module", params=["fast", "check"])
def kernels(request, libraries):
    return Kernels(libraries[request.param])


@pytest.fixture(params=["forward", "reverse", "random:1", "random:2"])
def order(request, monkeypatch):
    monkeypatch.setenv("FASTCONV_EMULATOR_ORDER", request.param)


def test_every_bug_has_a_detector():
    assert set(FINDINGS) == set(BUGS)
    assert all(any(by.values()) for bug, by in FINDINGS.items() if bug != "none")


@pytest.mark.parametrize(("bug", "kind", "text"), CASES)
def test_seeded_bug(libraries, bug, kind, text):
    if kind == "asan":
        run = subprocess.run(
            [sys.executable, emulator_kernels.__file__, libraries[kind], bug],
            env=os.environ | cuda_builds.asan_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode != 0) == (text is not None), run.stderr
        assert (text or "right") in run.stdout + run.stderr
    elif text in ("wrong", None):
        assert Kernels(libraries[kind]).reverse(bug) == (text is None)
    else:
        with pytest.raises(CudaFailure) as caught:
            Kernels(libraries[kind]).reverse(bug)
        assert text in str(caught.value)
        assert "emulator_kernels.cu:" in str(caught.value)
        assert Kernels(libraries[kind]).reverse("none")  # the next launch is none the worse


def test_a_race_that_ends_well_by_one_order_does_not_by_another(libraries, monkeypatch):
    kernels = Kernels(libraries["fast"])
    right = set()
    for order in ("forward", "reverse", "random:3"):
        monkeypatch.setenv("FASTCONV_EMULATOR_ORDER", order)
        right.add(kernels.reverse("copy_over_readers"))
        assert not kernels.reverse("no_barrier")
    assert right == {True}  # it writes what is there already: for the check build alone


def test_add(kernels, order, draw):
    a, b = draw(1000), draw(1000)
    result = kernels.to_device([0] * 1000)
    kernels.call("add", kernels.to_device(a), kernels.to_device(b), result, 1000, None)
    np.testing.assert_array_equal(kernels.to_host(result, 1000), a + b)


@pytest.mark.parametrize("copy", ["late", "early"])
def test_reduction_in_shared_memory(kernels, order, copy, monkeypatch, rng):
    monkeypatch.setenv("FASTCONV_EMULATOR_COPY", copy)
    values = rng.integers(-50, 50, BLOCKS * THREADS)
    sums = kernels.to_device([0] * BLOCKS)
    kernels.call("reduce", kernels.to_device(values), sums, BLOCKS)
    expected = values.reshape(BLOCKS, THREADS).sum(axis=1)
    np.testing.assert_array_equal(kernels.to_host(sums, BLOCKS), expected)


def test_warp_collective(kernels, order):
    result = kernels.to_device([0] * 32, "i")
    kernels.call("exchange", kernels.to_device(range(32), "i"), result)
    assert list(kernels.to_host(result, 32, "i")) == [i ^ 16 for i in range(32)]


def test_conversions_round_to_the_nearest_even(libraries):
    kernels = Kernels(libraries["fast"])
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    bfloats = (np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16).view(np.float32)
    values = np.concatenate([halves, bfloats, halves[1:] + np.diff(halves) / 2])
    bits = values.view(np.uint32)
    values = np.concatenate([bits, bits + 1, bits - 1]).astype(np.uint32).view(np.float32)
    n = len(values)
    half, bfloat = kernels.allocate(2 * n), kernels.allocate(2 * n)
    half_back, bfloat_back = kernels.allocate(4 * n), kernels.allocate(4 * n)
    kernels.call("convert", kernels.to_device(values), half, bfloat, half_back, bfloat_back, n)

    nan = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    found = np.array(kernels.to_host(half, n, "H")).view(np.float16)
    np.testing.assert_array_equal(found[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    assert (found[nan].view(np.uint16) == 0x7FFF).all()
    np.testing.assert_array_equal(kernels.to_host(half_back, n), expected.astype(np.float32))

    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    found = np.array(kernels.to_host(bfloat, n, "H"))
    np.testing.assert_array_equal(found[~nan], rounded[~nan])
    assert (found[nan] == 0x7FFF).all()
    back = (found.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(kernels.to_host(bfloat_back, n), back)


@pytest.mark.parametrize(
    ("grid", "block", "dynamic", "text"),
    [
        (0, 32, 0, "invalid configuration"),
        (1, 0, 0, "invalid configuration"),
        (1, 1025, 0, "invalid configuration"),
        (1, 32, 200 << 10, "invalid argument"),
    ],
)
def test_impossible_launch(kernels, grid, block, dynamic, text):
    with pytest.raises(CudaFailure, match=text):
        kernels.call("launch", grid, block, ctypes.c_size_t(dynamic))


def test_copies_know_their_bounds(kernels):
    pointer = kernels.allocate(16)
    with pytest.raises(CudaFailure, match="invalid argument"):
        kernels.to_host(pointer, 5)
    kernels.call("free", pointer)
    with pytest.raises(CudaFailure, match="invalid argument"):
        kernels.call("free", pointer)


def test_streams_work_when_somebody_waits(kernels):
    first, second = ctypes.c_void_p(), ctypes.c_void_p()
    kernels.call("stream_create", ctypes.byref(first))
    kernels.call("stream_create", ctypes.byref(second))
    one, zero = kernels.to_device([1] * 8), kernels.to_device([0] * 8)
    two, three = kernels.to_device([0] * 8), kernels.to_device([0] * 8)
    kernels.call("add", one, one, two, 8, first)
    assert list(kernels.to_host(two, 8)) == [0] * 8  # the default stream does not wait for it
    kernels.call("add", two, zero, three, 8, second)
    kernels.call("stream_synchronize", second)
    assert list(kernels.to_host(three, 8)) == [0] * 8  # nor does the other one,
    kernels.call("stream_order", first, second)
    kernels.call("add", two, one, three, 8, second)
    kernels.call("stream_synchronize", second)
    assert list(kernels.to_host(three, 8)) == [3] * 8  # unless it is told to
    kernels.call("stream_destroy", first)
    kernels.call("stream_destroy", second)
    with pytest.raises(CudaFailure, match="invalid resource handle"):
        kernels.call("stream_synchronize", first)


def test_threads_take_turns(kernels):
    def work(seed):
        values = np.random.default_rng(seed).integers(0, 9, BLOCKS * THREADS)
        source, sums = kernels.to_device(values), kernels.to_device([0] * BLOCKS)
        for _ in range(5):
            kernels.call("reduce", source, sums, BLOCKS)
            found = list(kernels.to_host(sums, BLOCKS))
            right.append(found == list(values.reshape(BLOCKS, -1).sum(axis=1)))

    right = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


@pytest.mark.parametrize(("distance", "passes"), [(4, 4), (8, 8), (32, 32), (36, 4), (20, 4)])
def test_profile_counts_bank_conflicts(libraries, tmp_path, monkeypatch, distance, passes):
    """32 lanes read 16 bytes each: at best in 4 passes of 8 lanes."""
    monkeypatch.setenv("FASTCONV_EMULATOR_PROFILE", str(tmp_path / "profile"))
    kernels = Kernels(libraries["check"])
    source, result = kernels.to_device(range(128)), kernels.to_device([0] * 128)
    kernels.call("load_rows", source, result, distance)
    found = np.array(kernels.to_host(result, 128)).reshape(16, 2, 4)
    np.testing.assert_array_equal(found[:, ::-1].ravel(), range(128))
    lines = [json.loads(line) for line in (tmp_path / "profile").read_text().splitlines()]
    rows = {(line["space"], line["operation"]): line for line in lines}
    assert len(lines) == len(rows) == 4
    assert rows["shared", "store"]["cost"] == rows["shared", "load"]["cost"] == passes
    assert rows["shared", "load"]["least"] == 4
    assert rows["global", "load"]["cost"] == rows["global", "load"]["least"] == 16
    assert all(line["bytes"] == 16 and line["requests"] == 1 for line in lines)
    assert all(line["place"].startswith("emulator_kernels.cu:") for line in lines)


def test_an_unchanged_tree_compiles_nothing(libraries, monkeypatch):
    monkeypatch.setattr(cuda_builds.subprocess, "run", None)
    for kind, path in libraries.items():
        made = cuda_builds.build("emulator_kernels", [emulator_kernels.SOURCE], kind)
        assert made == path
