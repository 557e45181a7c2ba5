"""The same bits from every run: over repetitions, numbers of threads, concurrent callers, processes
and the places of arrays in memory, for every operation and algorithm. docs/trust.md says what may
differ.
"""

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastconv
from conv2d_problems import Problem, normals
from fastconv import _core
from running import running_on

CONVOLUTIONS = [
    Problem((5, 13, 14, 20), 37, padding="same"),
    Problem((7, 26, 25, 1), 32),
    # A first layer whose filter's gradient asks for dy ahead.
    Problem((80, 28, 30, 1), 32),
    Problem((3, 2, 90, 72), 72, kernel=(1, 9), groups=72, padding="same"),
    # Whose tiles' lines are copied, by each thread to its own place.
    Problem((1, 2, 300, 512), 512, kernel=(1, 9), groups=512, padding="same"),
    Problem((1, 2, 300, 512), 512, kernel=(1, 9), strides=(1, 2), groups=512, padding="same"),
    Problem((2, 23, 20, 3), 40, kernel=(7, 5), strides=(2, 3), padding="same"),
    Problem((4, 15, 16, 40), 40, groups=40, padding="same"),
    Problem((2, 15, 16, 160), 160, groups=160, padding="same"),
    Problem((3, 15, 14, 24), 48, groups=4, dilation_rate=(2, 1), padding=((1, 3), (0, 2))),
    Problem((3, 13, 14, 72), 72, groups=9, padding="same"),
    Problem((2, 11, 14, 96), 192, groups=3, padding="same"),
    Problem((1, 41, 40, 16), 24, kernel=(1, 1), data_format="channels_first"),
    # Whose input's gradient Winograd's tiles leave a row and a column of.
    Problem((9, 13, 13, 32), 64),
    # Whose tasks pack what they read, for the filter's gradient; in parts.
    Problem((2, 19, 20, 300), 300, kernel=(1, 1)),
    Problem((9, 30, 31, 20), 500, kernel=(1, 1)),
    # So few pixels that threads share the filter's columns.
    Problem((1, 7, 7, 160), 320, kernel=(1, 1)),
    Problem((1, 5, 6, 200), 330, padding="same"),
    # And a filter that Winograd's algorithms transform by panels where threads share these evenly.
    Problem((1, 10, 11, 130), 140, padding="same"),
    Problem((9, 12, 11, 33), 18, padding="same", data_format="channels_first"),
    # Which Winograd's algorithms compute by tiles of 3 x 3 and 5 x 5; and of strides, in chunks of images.
    Problem((3, 14, 13, 40), 50, kernel=(4, 4), padding="same"),
    Problem((3, 14, 13, 40), 50, kernel=(2, 2)),
    Problem((5, 150, 141, 12), 24, kernel=(5, 5), strides=(2, 2), padding="same"),
]
# (shape, window, stride, padding, data_format)
POOLINGS = [
    ((5, 26, 25, 32), 2, 2, "valid", "channels_last"),
    ((3, 29, 30, 19), 3, 2, "same", "channels_last"),
    ((4, 7, 31, 40), 3, 1, "same", "channels_first"),
    ((6, 14, 15, 21), (14, 15), 1, "valid", "channels_last"),
    ((6, 14, 20, 19), (20, 19), 1, "valid", "channels_first"),
]
THREADS = (1, 2, 3, 4, 5, 6, 8, 11, 16)
DIRECTIONS = ("fprop", "dgrad", "wgrad")


def digest(arrays):
    """Of shapes and bits."""
    sums = {}
    for name, array in arrays.items():
        sums[name] = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
    return sums


def algorithms(problem, direction):
    return tuple(
        candidate["algorithm"]
        for candidate in fastconv.explain(
            problem.x_shape, problem.w_shape, direction=direction, **problem.geometry
        )["candidates"]
    )


def convolve(problem, place=np.copy):
    """Every result of every algorithm that serves the problem; `place` makes copies of arrays."""
    data = normals(problem)
    x, w, bias, dy, output = (
        place(array) for array in (data.x, data.w, data.bias, data.dy, data.output)
    )
    relu = {**problem.geometry, "activation": "relu"}
    results = {}
    for algorithm in algorithms(problem, "fprop"):
        options = {**relu, "algorithm": algorithm}
        results["y", algorithm] = fastconv.conv2d(x, w, bias, **options)
        pooled, argmax = fastconv.conv2d_max_pool2d(x, w, bias, return_argmax=True, **options)
        results["pooled", algorithm], results["argmax", algorithm] = pooled, argmax
    taps = np.random.default_rng(0).integers(0, 4, pooled.shape, np.uint8)
    behind = place(pooled), place(pooled), place(taps)  # dy, output, argmax
    for algorithm in algorithms(problem, "dgrad"):
        options = {**relu, "algorithm": algorithm}
        results["dx", algorithm] = fastconv.conv2d_grad_input(
            dy, w, problem.x_shape, output=output, **options
        )
        dx, dw, dbias = fastconv.conv2d_max_pool2d_grad(x, w, *behind, **options)
        results |= {("pooled dx", algorithm): dx, ("pooled dw", algorithm): dw}
        results["pooled dbias", algorithm] = dbias
    for algorithm in algorithms(problem, "wgrad"):
        options = {**relu, "algorithm": algorithm}
        results["dw", algorithm], results["dbias", algorithm] = fastconv.conv2d_grad_filter(
            x, dy, problem.w_shape, output=output, return_bias_grad=True, **options
        )
        _, dw, dbias = fastconv.conv2d_max_pool2d_grad(
            x, w, *behind, with_input_grad=False, **options
        )
        results["pooled dw alone", algorithm] = dw
        results["pooled dbias alone", algorithm] = dbias
    return digest(results)


def pool(problem, place=np.copy):
    shape, window, strides, padding, data_format = problem
    options = {"strides": strides, "padding": padding, "data_format": data_format}
    rng = np.random.default_rng(1)
    x = place(rng.standard_normal(shape).astype(np.float32))
    y, argmax = fastconv.max_pool2d(x, window, return_argmax=True, **options)
    dy = place(rng.standard_normal(y.shape).astype(np.float32))
    return digest(
        {
            "max": y,
            "argmax": argmax,
            "max alone": fastconv.max_pool2d(x, window, **options),
            "max dx": fastconv.max_pool2d_grad(dy, place(argmax), shape, window, **options),
            "average": fastconv.avg_pool2d(x, window, **options),
            "average dx": fastconv.avg_pool2d_grad(dy, shape, window, **options),
        }
    )


CASES = [functools.partial(convolve, problem) for problem in CONVOLUTIONS] + [
    functools.partial(pool, problem) for problem in POOLINGS
]
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.args[0]))


def test_every_algorithm_is_among_the_cases(isa):
    found = {
        (direction, algorithm)
        for direction in DIRECTIONS
        for problem in CONVOLUTIONS
        for algorithm in algorithms(problem, direction)
    }
    everywhere = {"direct", "small_channel", "depthwise", "grouped", "winograd_strided"}
    everywhere |= {f"winograd{edge}" for edge in (2, 3, 4, 5)}
    convolving = everywhere | {"winograd_rows"}
    assert {algorithm for _, algorithm in found} == convolving
    assert {("fprop", name) for name in convolving} <= found
    assert {("dgrad", name) for name in everywhere} <= found
    assert {("wgrad", "direct"), ("wgrad", "depthwise")} <= found


@over_cases
def test_runs_and_thread_counts(case, isa):
    with running_on(threads=1):
        first = case()
        assert case() == first  # again
    for threads in THREADS:
        with running_on(threads=threads):
            assert case() == first, f"{threads} threads"


def at_offset(floats, array):
    """A copy of it that begins so many floats behind a multiple of 64 bytes."""
    block = np.empty(array.nbytes + 256, np.uint8)
    start = -block.ctypes.data % 64 + 4 * floats
    copy = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@over_cases
def test_places_in_memory(case, isa):
    first = case()
    for floats in (0, 1, 5, 8, 15):
        assert case(place=functools.partial(at_offset, floats)) == first, floats


@pytest.mark.parametrize("callers", [2, 16])
def test_callers_at_once(callers, isa):
    with running_on(threads=4):
        expected = [case() for case in CASES]
        done = threading.Event()

        def change_threads():
            threads = 0
            while not done.wait(0.002):
                threads = threads % 16 + 1
                fastconv.set_num_threads(threads)

        def body(caller):
            each = len(CASES) * 2 // callers + 1  # any case comes twice
            for i in range(each):
                which = (caller // 2 * each + i) % len(CASES)
                assert CASES[which]() == expected[which], CASES[which].args

        with ThreadPoolExecutor(callers + 1) as executor:
            changing = executor.submit(change_threads)
            try:
                for future in [executor.submit(body, caller) for caller in range(callers)]:
                    future.result(timeout=300)
            finally:
                done.set()
            changing.result()


def test_processes(isa):
    """Other addresses, other hashes of strings."""
    script = (
        "import test_determinism as t; from fastconv import _core;"
        f"_core.set_isa({isa!r}); print([sorted(case().items()) for case in t.CASES])"
    )
    outputs = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "FASTCONV_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=os.path.dirname(__file__),
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            ).stdout
        )
    assert outputs == {f"{[sorted(case().items()) for case in CASES]}\n"}


def test_what_may_differ_between_instruction_sets_and_accuracies_is_small():
    """Measured: what docs/trust.md tells. Integers, whose sums are exact, never differ."""
    problem = CONVOLUTIONS[0]
    data = normals(problem)
    results = {}
    for isa in _core.available_isas():
        for accuracy in ("strict", "default"):
            with running_on(isa=isa, accuracy=accuracy):
                results[isa, accuracy] = fastconv.conv2d(data.x, data.w, **problem.geometry)
    exact = results[_core.available_isas()[-1], "strict"]
    scale = abs(exact).max()
    for (_, accuracy), result in results.items():
        assert abs(result - exact).max() <= (1e-6 if accuracy == "strict" else 1e-5) * scale
    whole = dataclasses.replace(
        data, x=np.rint(4 * data.x).astype("f"), w=np.rint(4 * data.w).astype("f")
    )
    bits = set()
    for isa in _core.available_isas():
        with running_on(isa=isa, accuracy="strict"):
            bits.add(fastconv.conv2d(whole.x, whole.w, **problem.geometry).tobytes())
    assert len(bits) == 1


# --- through TensorFlow ---------------------------------------------------------------------------


def network(ops, tf, keep):
    """Every op once, and all gradients."""

    def step(x, w, v, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, w, v, bias])
            y = ops.conv2d(x, w, bias, padding="same", activation="relu")
            y = ops.max_pool2d(y, 3, strides=1, padding="same", keep_argmax=keep)
            y = ops.conv2d_max_pool2d(y, v, activation="relu", keep_argmax=keep)
            y = ops.conv2d_transpose(y, v, strides=2)
            y = ops.avg_pool2d(y, 3, strides=1, padding="same")
            out = ops.global_avg_pool2d(y) + ops.global_max_pool2d(y)
            loss = tf.reduce_sum(out * out)
        return [out, *tape.gradient(loss, [x, w, v, bias])]

    return step


@pytest.fixture(scope="module")
def through_tensorflow():
    tf = pytest.importorskip("tensorflow")
    from fastconv.adapters import tensorflow as ops

    rng = np.random.default_rng(3)
    inputs = [
        tf.constant(rng.standard_normal(shape), tf.float32)
        for shape in ((6, 17, 18, 3), (3, 3, 3, 16), (3, 3, 16, 16), (16,))
    ]
    steps = {
        "eager": network(ops, tf, True),
        "graph": tf.function(network(ops, tf, True)),
        "graph without argmax": tf.function(network(ops, tf, False)),
        "xla": tf.function(network(ops, tf, True), jit_compile=True),
    }
    return {
        name: lambda step=step: [tensor.numpy().tobytes() for tensor in step(*inputs)]
        for name, step in steps.items()
    }


@pytest.mark.parametrize("how", ["eager", "graph", "graph without argmax", "xla"])
def test_tensorflow_ops(how, through_tensorflow, isa):
    step = through_tensorflow[how]
    with running_on(threads=1):
        first = step()
    for threads in THREADS:
        with running_on(threads=threads):
            assert step() == first, f"{threads} threads"
    with running_on(threads=3), ThreadPoolExecutor(16) as executor:
        for future in [executor.submit(step) for _ in range(48)]:
            assert future.result(timeout=300) == first
