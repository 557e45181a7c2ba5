"""Sixteen threads on every function of a Python without a global lock: `make free-threaded`.

Needs NumPy and fastconv alone. Every result is compared bit for bit with that of a thread by itself,
while other threads change settings, raise errors and ask for information. Then processes whose very
first import, and whose very first calls, come from all threads at once.
"""

import argparse
import itertools
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

THREADS = 16


def gil_is_off():
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED")) and not sys._is_gil_enabled()


def calls():
    """{name: call}: every function that computes, in both layouts, by every algorithm."""
    import fastconv

    rng = np.random.default_rng(7)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    found = {}
    for n, size, c, k, kernel, options in [
        (3, 17, 8, 20, 3, {"padding": "same"}),
        (2, 21, 3, 17, 5, {"strides": 2}),
        (2, 15, 24, 24, 3, {"groups": 24, "padding": "same"}),
        (2, 15, 16, 24, 3, {"groups": 4}),
        (5, 14, 33, 9, 1, {}),
        (1, 30, 16, 16, 3, {"dilation_rate": 2, "padding": "same"}),
    ]:
        for layout in ("channels_last", "channels_first"):
            x = draw(n, size, size + 2, c) if layout == "channels_last" else draw(n, c, size, size)
            w = draw(kernel, kernel, c // options.get("groups", 1), k)
            bias = draw(k)
            options = {**options, "data_format": layout}
            y = fastconv.conv2d(x, w, bias, activation="relu", **options)
            relu = {**options, "activation": "relu", "output": y}
            fused, taps = fastconv.conv2d_max_pool2d(x, w, bias, return_argmax=True, **options)
            key = f"{x.shape} {w.shape} {options}"
            for direction, call in {
                "fprop": lambda a, x=x, w=w, b=bias, o=options: fastconv.conv2d(
                    x, w, b, algorithm=a, **o
                ),
                "dgrad": lambda a, y=y, w=w, s=x.shape, o=relu: fastconv.conv2d_grad_input(
                    y, w, s, algorithm=a, **o
                ),
                "wgrad": lambda a, x=x, y=y, s=w.shape, o=relu: fastconv.conv2d_grad_filter(
                    x, y, s, algorithm=a, return_bias_grad=True, **o
                ),
            }.items():
                told = fastconv.explain(x.shape, w.shape, direction=direction, **options)
                for candidate in told["candidates"]:
                    name = candidate["algorithm"]
                    found[f"{direction} {name} {key}"] = lambda c=call, a=name: c(a)
            found[f"pooled {key}"] = lambda x=x, w=w, b=bias, o=options: fastconv.conv2d_max_pool2d(
                x, w, b, return_argmax=True, **o
            )
            found[f"pooled gradient {key}"] = lambda x=x, w=w, f=fused, t=taps, o=options: (
                fastconv.conv2d_max_pool2d_grad(x, w, f, f, t, **o)
            )
            for size_of_pool, strides in ((2, 2), (3, 2), (17 if size > 17 else 5, 1)):
                pool = {"pool_size": size_of_pool, "strides": strides, "data_format": layout}
                top, argmax = fastconv.max_pool2d(x, return_argmax=True, **pool)
                key = f"{x.shape} {pool}"
                found[f"max {key}"] = lambda x=x, o=pool: fastconv.max_pool2d(
                    x, return_argmax=True, **o
                )
                found[f"max gradient {key}"] = lambda d=top, a=argmax, s=x.shape, o=pool: (
                    fastconv.max_pool2d_grad(d, a, s, **o)
                )
                found[f"average {key}"] = lambda x=x, o=pool: fastconv.avg_pool2d(x, **o)
                found[f"average gradient {key}"] = lambda d=top, s=x.shape, o=pool: (
                    fastconv.avg_pool2d_grad(d, s, **o)
                )
    return found


def bits(results):
    return [a.tobytes() for a in (results if isinstance(results, (tuple, list)) else [results])]


def refuses(x, w, options):
    import fastconv

    try:
        fastconv.conv2d(x, w, **options)
    except ValueError as error:
        return "Received" in str(error)
    return False


def change_settings(stop, turns):
    """Everything about the process that other threads read while they compute."""
    import fastconv

    x, w = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 4, 4), np.float32)
    for turn in itertools.count():
        if stop.is_set():
            return
        fastconv.set_num_threads(turn % 5 + 1)
        fastconv.set_accuracy("default")
        fastconv.explain(x.shape, w.shape)
        fastconv.info()
        for wrong in ({"strides": 0}, {"padding": "full"}, {"algorithm": "none"}):
            assert refuses(x, w, wrong), wrong
        turns.append(turn)


def at_once(functions, seconds):
    """Calls of 16 threads, each in an order of its own."""
    expected = {name: bits(call()) for name, call in functions.items()}
    names = list(functions)
    start, stop, turns = threading.Barrier(THREADS), threading.Event(), []
    end = time.monotonic() + seconds

    def body(worker):
        order = np.random.default_rng(worker).permutation(len(names))
        start.wait(timeout=120)
        count = 0
        # Once over all, however slow the machine.
        while count < len(names) or time.monotonic() < end:
            name = names[order[count % len(names)]]
            assert bits(functions[name]()) == expected[name], name
            count += 1
        return count

    with ThreadPoolExecutor(THREADS + 1) as executor:
        changing = executor.submit(change_settings, stop, turns)
        try:
            counts = [f.result() for f in [executor.submit(body, w) for w in range(THREADS)]]
        finally:
            stop.set()
        changing.result()
    return sum(counts), len(turns)


FIRST = """
import threading, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
start = threading.Barrier(16)
x, w = np.ones((2, 9, 9, 8), np.float32), np.ones((3, 3, 8, 16), np.float32)
def body(worker):
    start.wait(timeout=60)
    import fastconv
    if worker % 4 == 3:
        return fastconv.info()["isa"] and fastconv.conv2d(x, w).sum()
    if worker % 4 == 2:
        fastconv.set_num_threads(worker % 3 + 1)
    return fastconv.conv2d(x, w).sum()
with ThreadPoolExecutor(16) as executor:
    results = [future.result() for future in [executor.submit(body, i) for i in range(16)]]
assert results == [2 * 7 * 7 * 16 * 72] * 16, results
assert not sys._is_gil_enabled()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each instruction set")
    parser.add_argument("--processes", type=int, default=20, help="that begin with 16 threads")
    options = parser.parse_args()

    import fastconv
    from fastconv import _core

    if not gil_is_off():
        sys.exit("error: this Python has a global lock, or importing fastconv switched it on")
    functions = calls()
    for isa in _core.available_isas():
        _core.set_isa(isa)
        count, turns = at_once(functions, options.seconds)
        print(
            f"free-threaded: {isa}: {len(functions)} calls of {THREADS} threads at once, "
            f"{count} results, {turns} changes of the settings, none wrong",
            flush=True,
        )
    assert fastconv.get_num_threads() > 0
    for _ in range(options.processes):
        subprocess.run([sys.executable, "-c", FIRST], check=True, timeout=300)
    print(f"free-threaded: {options.processes} processes whose first calls were 16 at once")
    if not gil_is_off():
        sys.exit("error: the global lock was switched on")


if __name__ == "__main__":
    main()
