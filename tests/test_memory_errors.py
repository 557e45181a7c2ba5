"""Memory that is refused: a MemoryError, nothing lost, and all is well once there is memory again.

Each script limits its own address space (RLIMIT_AS), below what a call needs. The refusal of every
single allocation in turn is csrc/tests/stress.cpp's: `make sanitize`.
"""

import os
import re
import subprocess
import sys
import textwrap

import pytest

import fastconv

pytest.importorskip("resource", reason="the system has no limits of its processes")

PREPARE = """
    import gc, os, resource, sys
    import numpy as np
    import fastconv

    MIB = 2**20

    def mapped():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    def limit(headroom):
        gc.collect()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        bytes_ = resource.RLIM_INFINITY if headroom is None else mapped() + headroom
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, hard))

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 96, 96, 32)).astype(np.float32)
    w = rng.standard_normal((3, 3, 32, 32)).astype(np.float32)
    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    y = fastconv.conv2d(x, w, padding="same", activation="relu")
    pooled, argmax = fastconv.max_pool2d(x, 2, return_argmax=True)
    fused, taps = fastconv.conv2d_max_pool2d(x, w, padding="same", return_argmax=True)
    small, scale = fastconv.quantize_filter(w)
    relu = {"padding": "same", "activation": "relu"}
    nchw = {"padding": "same", "data_format": "channels_first"}
    calls = {
        "conv2d": lambda: fastconv.conv2d(x, w, padding="same"),
        "conv2d channels_first": lambda: fastconv.conv2d(first, w, **nchw),
        "conv2d of a view": lambda: fastconv.conv2d(x[:, ::-1], w, padding="same"),
        "conv2d_grad_input": lambda: fastconv.conv2d_grad_input(y, w, x.shape, output=y, **relu),
        "conv2d_grad_filter": lambda: fastconv.conv2d_grad_filter(
            x[:, ::-1], y, w.shape, output=y, **relu
        ),
        "conv2d_int8": lambda: fastconv.conv2d_int8(x, small, scale, padding="same"),
        "conv2d_max_pool2d": lambda: fastconv.conv2d_max_pool2d(x, w, padding="same"),
        "conv2d_max_pool2d_grad": lambda: fastconv.conv2d_max_pool2d_grad(
            x, w, fused, fused, taps, padding="same"
        )[0],
        "max_pool2d": lambda: fastconv.max_pool2d(x, 2, return_argmax=True)[0],
        "max_pool2d_grad": lambda: fastconv.max_pool2d_grad(pooled, argmax, x.shape, 2),
        "avg_pool2d": lambda: fastconv.avg_pool2d(x, 2),
        "avg_pool2d_grad": lambda: fastconv.avg_pool2d_grad(pooled, x.shape, 2),
    }
"""


def run_python(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARE) + textwrap.dedent(script)],
        # What is freed goes back to the system at once: it is granted anew, or refused.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_refused_memory():
    script = """
        fastconv.set_num_threads(2)
        expected = {name: call().tobytes() for name, call in calls.items()}
        refused = granted = 0
        before = None
        for turn in range(2):
            for name, call in calls.items():
                for headroom in [0, MIB, 5 * MIB, 10 * MIB, 20 * MIB, 40 * MIB, 80 * MIB]:
                    limit(headroom)
                    try:
                        result = call()
                    except MemoryError:
                        refused += 1
                        result = None
                    finally:
                        limit(None)
                    if result is not None:
                        granted += 1
                        assert result.tobytes() == expected[name], name
                    del result
                # As good as before, and no byte less.
                assert call().tobytes() == expected[name], name
            gc.collect()
            if turn == 0:
                before = mapped()
        assert mapped() - before < 4 * MIB, mapped() - before
        print(refused, granted)
    """
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    refused, granted = map(int, result.stdout.split())
    assert refused > 25
    assert granted > 20


def test_every_function_is_refused_memory():
    called = set(re.findall(r"fastconv\.((?:conv|max_pool|avg_pool)\w*)\(", PREPARE))
    assert called == {name for name in fastconv.__all__ if re.match("conv|max_pool|avg_pool", name)}


def test_refused_threads():
    """The caller works alone, and with others once they can be had."""
    script = """
        fastconv.set_num_threads(1)
        expected = calls["conv2d"]().tobytes()
        out = np.empty_like(y)
        fastconv.set_num_threads(16)
        limit(2 * MIB)  # a thread's stack is larger
        for _ in range(3):
            fastconv.conv2d(x, w, padding="same", algorithm="direct", out=out)
        alone = len(os.listdir("/proc/self/task"))
        limit(None)
        fastconv.conv2d(x, w, padding="same", algorithm="direct", out=out)
        print(alone, len(os.listdir("/proc/self/task")))
        assert calls["conv2d"]().tobytes() == expected
    """
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    alone, afterwards = map(int, result.stdout.split())
    assert afterwards - alone >= 14


def test_what_fits_no_machine():
    """Sizes that overflow nothing, of more bytes than there are."""
    script = """
        one = np.ones((1, 1, 1, 1), np.float32)
        def huge(*shape):
            return np.broadcast_to(np.float32(0), shape)
        n = 2**48
        same = {"padding": "same"}
        calls = [
            lambda: fastconv.conv2d(huge(n, 1, 1, 1), one),
            lambda: fastconv.conv2d(one, huge(1, 1, 1, 2**30 * 2 - 1), padding=((99, 99), (99, 99))),
            lambda: fastconv.conv2d_grad_input(huge(n, 1, 1, 1), one, (n, 1, 1, 1)),
            lambda: fastconv.conv2d_grad_filter(huge(n, 1, 1, 1), huge(n, 1, 1, 1), (1, 1, 1, 1)),
            lambda: fastconv.conv2d_max_pool2d(huge(n, 2, 2, 1), one),
            lambda: fastconv.max_pool2d(huge(n, 1, 1, 1), 1),
            lambda: fastconv.avg_pool2d(huge(n, 1, 1, 1), 1),
            lambda: fastconv.avg_pool2d_grad(huge(n, 1, 1, 1), (n, 1, 1, 1), 1),
        ]
        for i, call in enumerate(calls):
            try:
                call()
            except MemoryError:
                continue
            raise SystemExit(f"call {i} had the memory")
        print(len(calls))
    """
    result = run_python(script)
    assert (result.returncode, result.stdout) == (0, "8\n"), result.stderr
