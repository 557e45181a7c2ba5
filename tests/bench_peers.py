"""Implementations for the benchmark's tests: right, wrong, dying, absent.

``fastconv bench`` imports them by these names; each is a module of its own to it.
"""

import os
import sys
import time

from fastconv.bench import reference
from fastconv.bench.adapters import FunctionCase, Unsupported


def install(monkeypatch, directory):
    """Makes ``right_peer``, ``wrong_peer`` ... importable, here and in the workers."""
    for name in BEHAVIOURS:
        source = f"from bench_peers import make\nImplementation = make({name!r})\n"
        (directory / f"{name}.py").write_text(source)
    here = os.path.dirname(__file__)
    paths = [str(directory), here, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.syspath_prepend(here)
    for name in BEHAVIOURS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def right(result):
    return result


def wrong(result):
    """One value of the last image is off by what a single lost product makes."""
    result[-1, -1, -1, -1] += 0.3
    return result


def slow(result):
    time.sleep(0.05)
    return result


def dying(result):
    os._exit(7)


def fprop_only(result):
    return result


BEHAVIOURS = {
    "right_peer": right,
    "wrong_peer": wrong,
    "slow_peer": slow,
    "dying_peer": dying,
    "fprop_peer": fprop_only,
}


def make(name):
    behaviour = BEHAVIOURS[name]

    class Implementation:
        def __init__(self, conditions):
            self.versions = {name: "1"}

        def prepare(self, problem, direction, arrays):
            if name == "fprop_peer" and direction != "fprop":
                raise Unsupported("fprop alone")
            result = reference.expected(problem, direction, arrays).astype("float32")
            if marker := os.environ.get("BENCH_PEER_MARKER"):
                with open(marker, "a") as file:
                    file.write(f"{direction} {problem}\n")
            return FunctionCase(lambda: behaviour(result), lambda value: value)

    return Implementation
