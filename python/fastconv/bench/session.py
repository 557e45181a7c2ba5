"""Runs the benchmark: starts a worker for each implementation, and times them in turn.

Each case is timed in rounds. In a round every implementation has one turn, in an order drawn anew,
while all others are stopped: what disturbs the machine for a while disturbs all of them alike, and
ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.bench import adapters, reference, statistics
from fastconv.bench.problem import parse

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from numpy.typing import NDArray

    from fastconv.bench._types import Record
    from fastconv.bench.problem import Problem

FORMAT = 1
OURS = "fastconv"

# What an answer to "prepare" holds.
_SAID = ("error", "algorithm", "blocking", "workspace", "predicted")

# Its time is that of a call alone: what a library spends around a kernel.
_NEXT_TO_NOTHING = {True: "mb1ic1ih1kh1", False: "mb1ic1ih1oc1kh1"}


class BenchError(Exception):
    """The benchmark cannot report; the message says why."""


class WrongResult(BenchError):
    """An implementation computed something else than float64 does."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Under which all implementations run."""

    threads: int
    layout: str = "nhwc"
    isa: str | None = None
    algorithm: str | None = None
    accuracy: str | None = None
    filter: str = "packed"
    cold: bool = False
    rounds: int = 7
    seconds: float = 0.1  # an implementation, a case
    seed: int = 0

    @property
    def options(self) -> str:
        """The options of the command line that differ from what they are by default."""
        words = [f"--threads {self.threads}"]
        names = ("isa", "algorithm", "accuracy")
        words += [f"--{name} {value}" for name in names if (value := getattr(self, name))]
        if self.filter != "packed":
            words.append(f"--filter {self.filter}")
        if self.layout != "nhwc":
            words.append(f"--layout {self.layout}")
        if self.cold:
            words.append("--cache cold")
        for name in ("rounds", "seconds", "seed"):
            if (value := getattr(self, name)) != getattr(Conditions, name):
                words.append(f"--{name} {value}")
        return " ".join(words)


class Worker:
    """Our end of a worker process, which runs only while ``awake``."""

    def __init__(self, name: str, conditions: Conditions, log: IO[bytes]) -> None:
        self.name = name
        self.absent: str | None = None
        self.versions: dict[str, str] = {}
        self.malloc: str | None = None
        self._ours, theirs = socket.socketpair()
        self._log = log
        values = dataclasses.asdict(conditions)
        values["cpus"] = _cpus(conditions.threads)
        values["cache_bytes"] = last_level_cache()
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fastconv.bench.worker",
                    str(theirs.fileno()),
                    name,
                    json.dumps(values),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_environment(name, conditions)},
            )
        self._stream = self._ours.makefile("rwb")
        self._stopped = False

    def fileno(self) -> int:
        return self._ours.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: str, **arguments: Any) -> None:
        self.resume()
        try:
            self._stream.write((json.dumps({"request": request, **arguments}) + "\n").encode())
            self._stream.flush()
        except OSError:
            pass  # it has died, which receive() says

    def receive(self) -> Record:
        """The answer; {"failed": ...} where the process ended instead."""
        try:
            line = self._stream.readline()
        except OSError:
            line = b""
        if line:
            answer: Record = json.loads(line)
            return answer
        status = self._process.wait()
        self.absent = f"its process ended with status {status}"
        return {"failed": self.absent}

    def ask(self, request: str, **arguments: Any) -> Record:
        self.send(request, **arguments)
        answer = self.receive()
        self.stop()
        return answer

    def stop(self) -> None:
        if not self._stopped and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            self._stopped = True

    def resume(self) -> None:
        if self._stopped:
            self._process.send_signal(signal.SIGCONT)
            self._stopped = False

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stream.close()
        self._ours.close()


def _environment(name: str, conditions: Conditions) -> dict[str, str]:
    """What a worker's environment has besides ours."""
    threads = str(conditions.threads)
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_DYNAMIC": "false"}
    # Unbound, the threads of an OpenMP that was stopped at times wake on one CPU and wait for each
    # other there: measured, a turn in twenty takes ten to a hundred times as long.
    variables |= {"OPENBLAS_NUM_THREADS": threads, "OMP_PROC_BIND": "true"}
    if conditions.isa:
        isa = {"avx2": "AVX2", "avx512": "AVX512_CORE", "scalar": "SSE41"}[conditions.isa]
        # The first is oneDNN's, wherever it is built in; the second its name of old.
        variables |= {"ONEDNN_MAX_CPU_ISA": isa, "DNNL_MAX_CPU_ISA": isa}
    try:
        module = adapters.find(name)
    except ImportError:
        return variables  # the worker says so
    prepare = getattr(module, "environment", None)
    return variables | (prepare(dataclasses.asdict(conditions)) if prepare else {})


def _cpus(threads: int) -> list[int] | None:
    """As many CPUs as there are threads: some libraries count CPUs, whatever they are told."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cpus = sorted(os.sched_getaffinity(0))
    return cpus[:threads] if threads < len(cpus) else None


def last_level_cache() -> int:
    """Bytes; 64 MiB where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        found = 0
        for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = index.read_text().strip()
            found = max(found, int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
        if found:
            return found
    return 64 << 20


class Session:
    """The workers, while the ``with`` block runs."""

    def __init__(
        self,
        names: list[str],
        conditions: Conditions,
        on_note: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.conditions = conditions
        self._names = names
        self._note = on_note
        self._random = random.Random(conditions.seed)  # noqa: S311

    def __enter__(self) -> Session:
        self._directory = Path(tempfile.mkdtemp(prefix="fastconv-bench-", dir=_memory_directory()))
        self._log = tempfile.TemporaryFile()
        self._workers: list[Worker] = []
        self.absent: dict[str, str] = {}
        self.failed: list[str] = []  # cases that we could not compute, and why
        self._floors: dict[tuple[str, bool, str], float] = {}
        self.limits: dict[str, float] | None = None
        self._started = time.monotonic()
        self._busy = _busy_seconds()
        try:
            for name in self._names:
                self._workers.append(Worker(name, self.conditions, self._log))
            self._greet()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self._log.close()

    def _greet(self) -> None:
        for worker in self._workers:
            greeting = worker.receive()
            worker.versions = greeting.get("versions", {})
            worker.malloc = greeting.get("malloc")
            if reason := greeting.get("absent") or greeting.get("failed"):
                self._drop(worker, reason)
            worker.stop()
        for worker in self._workers:
            if worker.absent is not None:
                worker.close()
        self._workers = [worker for worker in self._workers if worker.absent is None]
        if not self._workers:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.absent.items())
            raise BenchError(f"No implementation can be measured. {reasons}")
        for worker in self._workers:
            if worker.name == OURS:
                self.limits = worker.ask("limits").get("limits")

    def _drop(self, worker: Worker, reason: str) -> None:
        worker.absent = reason
        self.absent[worker.name] = reason
        self._note(f"{worker.name} is left out: {reason}")

    @property
    def names(self) -> list[str]:
        return [worker.name for worker in self._workers if worker.absent is None]

    def describe(self) -> Record:
        """The conditions, for the record."""
        versions: dict[str, str] = {}
        for worker in self._workers:
            versions |= worker.versions
        return {
            **dataclasses.asdict(self.conditions),
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "cpu": cpu_model(),
            "cpus": len(_cpus(10**6) or []) or os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}, Python "
            f"{platform.python_version()}, {' '.join(platform.libc_ver())}",
            "versions": versions,
            "absent": dict(self.absent),
            "malloc": self._workers[0].malloc if self._workers else None,
            "dtype": "float32",
            "others": self._others(),
            "limits": self.limits,
        }

    def _others(self) -> float | None:
        """The share of the machine's CPU time that others took since the start; None if unknown."""
        busy = _busy_seconds()
        seconds = [_process_seconds(w.pid) for w in self._workers if w.absent is None]
        own = [second for second in seconds if second is not None]
        if busy is None or self._busy is None or len(own) < len(seconds):
            return None
        elapsed = time.monotonic() - self._started
        ours = sum(own) + time.process_time()
        return max(0.0, busy - self._busy - ours) / (elapsed * (os.cpu_count() or 1))

    # --- a case -----------------------------------------------------------------------------------

    def measure(
        self, problem: Problem, direction: str, on_turn: Callable[[], object] = lambda: None
    ) -> Record:
        """The record of one case.

        Raises
        ------
        WrongResult
            If a result is not what float64 gives; nothing is timed then.
        """
        expected = OURS in self.names
        try:
            prepared, left_out = self._prepare(problem, direction)
        except (MemoryError, OSError) as error:  # the arrays lie in a file system in memory
            prepared = []
            left_out = dict.fromkeys(self._names, f"no room for its arrays: {error}")
            left_out |= self.absent
        allowed = reference.tolerance(problem, direction, self.conditions.accuracy or "default")
        for worker, answer in prepared:
            if not answer["error"] <= allowed:
                raise WrongResult(
                    f"{worker.name} computes {direction} of {problem} wrong: its largest error is "
                    f"{answer['error']:.1e} of the largest value, and {allowed:.1e} is allowed. "
                    f"Nothing is reported. Repeat it with: {self.repeat(problem, direction)}"
                )
        samples: dict[str, dict[str, list[list[int]]]] = {worker.name: {} for worker, _ in prepared}
        rounds = self._rounds(prepared, samples, on_turn)
        for worker, _ in prepared:
            worker.ask("release")
        implementations = {}
        for worker, answer in prepared:
            kinds = samples[worker.name]
            if not kinds:
                continue
            record = {name: answer[name] for name in _SAID}
            for kind, turns in kinds.items():
                record[kind] = statistics.summary(turns)
            if "kernel" not in record:
                floor = self._floor(worker, problem, direction)
                record["framework"] = floor
                shifted = [
                    [self._without_floor(t, floor, problem) for t in turn] for turn in kinds["call"]
                ]
                record["kernel"] = {**statistics.summary(shifted), "estimated": True}
            implementations[worker.name] = record
        left_out |= {worker.name: worker.absent for worker, _ in prepared if worker.absent}
        if expected and OURS not in implementations:
            self.failed.append(f"{direction} {problem}: {left_out[OURS]}")
        return {
            "problem": str(problem),
            "name": problem.name,
            "kind": problem.kind,
            "direction": direction,
            "flops": problem.flops(),
            "read": problem.bytes(direction)[0],
            "written": problem.bytes(direction)[1],
            "rounds": rounds,
            "repeat": self.repeat(problem, direction),
            "implementations": implementations,
            "left_out": left_out,
            "ratio": statistics.ratio(implementations, OURS, "kernel"),
            "call_ratio": statistics.ratio(implementations, OURS, "call"),
        }

    def repeat(self, problem: Problem, direction: str) -> str:
        names = ",".join(self._names)
        return (
            f"fastconv bench --dir {direction} {self.conditions.options} --impl {names} {problem}"
        )

    def _prepare(
        self, problem: Problem, direction: str, floor: bool = False
    ) -> tuple[list[tuple[Worker, Record]], dict[str, str]]:
        """([(worker, its answer)], {name: why not}): all workers at once, before any is timed."""
        files = self._files(problem, direction)
        workers = [worker for worker in self._workers if worker.absent is None]
        for worker in workers:
            worker.send("prepare", problem=str(problem), direction=direction, files=files)
        prepared, left_out = [], dict(self.absent)
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker, selectors.EVENT_READ, worker)
            for _ in workers:
                while not (ready := selector.select()):
                    pass
                worker = ready[0][0].data
                selector.unregister(worker)
                answer = worker.receive()
                worker.stop()
                if reason := answer.get("unsupported") or answer.get("failed"):
                    left_out[worker.name] = reason
                    if worker.absent:
                        self._drop(worker, worker.absent)
                else:
                    prepared.append((worker, answer))
        prepared.sort(key=lambda pair: self._names.index(pair[0].name))
        return prepared, left_out

    def _files(self, problem: Problem, direction: str) -> dict[str, str]:
        """The case's arrays and its right result, by their names."""
        arrays = problem.draw(self.conditions.seed)
        right = reference.expected(problem, direction, arrays)
        everything: dict[str, NDArray[Any]] = {**arrays, "right": right}
        files = {name: self._directory / f"{name}.npy" for name in everything}
        try:
            for name, array in everything.items():
                np.save(files[name], array)
        except OSError:
            for path in files.values():
                path.unlink(missing_ok=True)
            raise
        return {name: str(path) for name, path in files.items()}

    def _rounds(
        self,
        prepared: list[tuple[Worker, Record]],
        samples: dict[str, dict[str, list[list[int]]]],
        on_turn: Callable[[], object],
    ) -> int:
        """Times all in turn, and returns how many rounds there were.

        Who takes many times what was meant for it sits out the rounds that are left.
        """
        rounds, seconds = self.conditions.rounds, self.conditions.seconds
        spent = dict.fromkeys(samples, 0.0)
        for done in range(rounds):
            order = list(prepared)
            self._random.shuffle(order)
            for worker, _ in order:
                if worker.absent or spent[worker.name] > (12 if done < 3 else 5) * seconds:
                    continue
                start = time.monotonic()
                answer = worker.ask("time", seconds=seconds / rounds)
                spent[worker.name] += time.monotonic() - start
                if "failed" in answer:
                    self._drop(worker, answer["failed"])
                    samples[worker.name] = {}
                    continue
                for kind, times in answer["times"].items():
                    samples[worker.name].setdefault(kind, []).append(times)
                on_turn()
        return rounds

    def _floor(self, worker: Worker, problem: Problem, direction: str) -> float:
        """Nanoseconds of a call with next to nothing to compute, measured once."""
        key = (worker.name, problem.is_pool, direction)
        if key not in self._floors:
            tiny = parse(_NEXT_TO_NOTHING[problem.is_pool])
            self._floors[key] = 0.0
            for other, _ in self._prepare(tiny, direction)[0]:
                turns = [other.ask("time", seconds=0.02)["times"] for _ in range(3)]
                other.ask("release")
                medians = [np.median(turn["call"]) for turn in turns if "call" in turn]
                self._floors[(other.name, problem.is_pool, direction)] = (
                    float(min(medians)) if medians else 0.0
                )
        return self._floors[key]

    def _without_floor(self, call: float, floor: float, problem: Problem) -> float:
        """An estimate of the kernel's share of a call, in nanoseconds.

        No less than half of the call, for beyond that it would say more of the floor than of the
        kernel; and no less than the operations take at the FMA peak.
        """
        at_peak = 1e9 * problem.flops() / self.limits["flops"] if self.limits else 0.0
        return min(call, max(call - floor, call / 2, at_peak))


def _busy_seconds() -> float | None:
    """CPU time that the machine has not been idle, the share of other virtual machines included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float | None:
    """CPU time of a process and all its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_directory() -> Path | None:
    """Where files are kept in memory, if there is such a place with room."""
    shared = Path("/dev/shm")  # noqa: S108
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 4 << 30:
        return shared
    return None
