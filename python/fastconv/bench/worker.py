"""The process that belongs to one implementation: prepares cases, checks them, times them.

One process each, because the libraries cannot share one without harm: each brings threads of its
own that spin after a call and take the next library's CPU, three of them bring an OpenMP runtime,
and some settings (threads, instruction set, malloc) are read once from the environment. While one
works, the parent keeps all others stopped (SIGSTOP), so that whatever they spin on, they do not run.
Measured on two CPUs, five libraries, MNIST's layers of 0.1 to 1 ms: called one after the other in
one process, each takes twice as long, oneDNN at times a hundredfold; in processes of their own that
are not stopped, oneDNN takes ten to ninety times as long (another's threads spin for ever) and
TensorFlow up to 1.7 times.

Requests and answers are JSON, one on a line, over the file descriptor given as argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedRWPair

    from fastconv.bench._types import Record
    from fastconv.bench.adapters import Case

# glibc's mallopt: its parameters and what is set. By default glibc gives large blocks back to the
# kernel at once, and a library that allocates its result at every call pays page faults that one
# with results preallocated does not.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_KEEP = 2**31 - 1

# Nanoseconds: how long threads are given to wake, and calls that need no warm-up.
_WARM_UP = 2_000_000
_SLOW = 20_000_000


def keep_memory() -> str | None:
    """Makes malloc keep what is freed; says how, or None where it cannot be done."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
    done = mallopt(_M_TRIM_THRESHOLD, _KEEP) and mallopt(_M_MMAP_THRESHOLD, _KEEP)
    # Older glibc refuses a threshold beyond 32 MiB; no mapping at all is the same for our purpose.
    done = done or (mallopt(_M_TRIM_THRESHOLD, _KEEP) and mallopt(_M_MMAP_MAX, 0))
    mallopt(_M_TOP_PAD, 64 << 20)
    return "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at 2 GiB" if done else None


def die_with_parent() -> None:
    """A stopped process would outlive a parent that was killed."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Sweeper:
    """Empties the caches of all CPUs of this process by reading through memory on each of them."""

    def __init__(self, cache_bytes: int) -> None:
        import numpy as np

        self._memory = np.ones(2 * cache_bytes // 8, np.int64)
        # Now, before an OpenMP binds this thread to one of them.
        self._cpus = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else ()

    def __call__(self) -> None:
        if not self._cpus:
            self._memory.sum()
            return
        before = os.sched_getaffinity(0)
        try:
            for cpu in self._cpus:
                os.sched_setaffinity(0, {cpu})
                self._memory.sum()
        finally:
            os.sched_setaffinity(0, before)


class Worker:
    def __init__(self, name: str, conditions: Record) -> None:
        from fastconv.bench import adapters

        self._case: Case | None = None
        self._sweep = Sweeper(conditions["cache_bytes"]) if conditions["cold"] else None
        self._implementation = adapters.find(name).Implementation(conditions)

    def limits(self, **_: Any) -> Record:
        return {"limits": self._implementation.limits()}

    def prepare(self, problem: str, direction: str, files: dict[str, str]) -> Record:
        """Makes the case, runs it once and checks what it computed."""
        import numpy as np

        from fastconv.bench import adapters, reference
        from fastconv.bench import problem as problems

        self._case = None
        parsed = problems.parse(problem)
        # Copies: aligned memory that this process owns. Adapters that take NHWC use it as it is.
        arrays = {
            name: adapters.dense(np.load(path, mmap_mode="r", allow_pickle=False))
            for name, path in files.items()
        }
        right = arrays.pop("right")
        case = self._implementation.prepare(parsed, direction, arrays)
        result = case.result()
        self._case = case
        return {
            "error": reference.error(result, right),
            "algorithm": case.algorithm,
            "blocking": case.blocking,
            "workspace": case.workspace,
            "predicted": case.predicted,
        }

    def time(self, seconds: float) -> Record:
        """Calls for about ``seconds``, at least one of each kind, after untimed ones.

        Those bring the data back into the caches and wake the threads; where a call takes so long
        that this does not show, its first one counts.
        """
        if (case := self._case) is None:
            raise RuntimeError("nothing is prepared")
        found = {}
        for kind, measure in (("kernel", case.kernel_times), ("call", case.call_times)):
            last = self._warm_up(measure)
            if last is None:
                continue
            times = last if last[0] > _SLOW else []
            if self._sweep is not None:
                times = []
                begin = time.perf_counter()
                while not times or time.perf_counter() - begin < seconds:
                    self._sweep()
                    times += measure(1) or []
            else:
                left = seconds * 1e9 - sum(times)
                count = min(2000, int(left / max(last[0], 1)))
                if count > 0 or not times:
                    times = times + (measure(max(1, count)) or [])
            found[kind] = times
        return {"times": found}

    @staticmethod
    def _warm_up(measure: Callable[[int], list[int] | None]) -> list[int] | None:
        """The last of some milliseconds of untimed calls."""
        begin = time.perf_counter_ns()
        while (last := measure(1)) is not None and time.perf_counter_ns() - begin < _WARM_UP:
            pass
        return last

    def release(self) -> Record:
        self._case = None
        return {}


def serve(connection: BufferedRWPair, name: str, conditions: Record) -> None:
    from fastconv.bench.adapters import Unsupported

    def answer(**message: Any) -> None:
        connection.write((json.dumps(message) + "\n").encode())
        connection.flush()

    try:
        worker = Worker(name, conditions)
    except (Unsupported, ImportError) as error:
        answer(absent=f"{error}".splitlines()[0])
        return
    except Exception as error:  # noqa: BLE001 - the answer is why
        answer(absent=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    answer(versions=worker._implementation.versions, malloc=conditions["malloc"])
    for line in connection:
        request = json.loads(line)
        try:
            answer(**getattr(worker, request.pop("request"))(**request))
        except Unsupported as error:
            answer(unsupported=str(error))
        except MemoryError:
            answer(unsupported="not enough memory")
        except Exception as error:  # noqa: BLE001 - as above
            traceback.print_exc()
            answer(failed=f"{type(error).__name__}: {error}".splitlines()[0])


def main(descriptor: str, name: str, conditions_text: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    die_with_parent()
    conditions = json.loads(conditions_text)
    conditions["malloc"] = keep_memory()
    cpus = conditions.get("cpus")
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    with socket.socket(fileno=int(descriptor)) as end, end.makefile("rwb") as connection:
        serve(connection, name, conditions)


if __name__ == "__main__":
    main(*sys.argv[1:])
