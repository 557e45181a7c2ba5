"""Results as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastconv.bench import problem as problems

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeGuard

    from fastconv.bench._types import Record

Check: TypeAlias = "Callable[[object], bool]"

FORMAT = 1

CSV_COLUMNS = (
    "problem", "name", "direction", "implementation", "algorithm", "gflops", "peak_share",
    "bandwidth_share", "error", "workspace", "kernel_median_us", "kernel_low_us", "kernel_high_us",
    "kernel_least_us", "kernel_estimated", "call_median_us", "call_low_us", "call_high_us",
    "call_least_us", "best_peer", "ratio", "ratio_low", "ratio_high",
)  # fmt: skip


class FileError(ValueError):
    """A file that holds no results of ours; the message says why."""


def write_json(path: str | os.PathLike[str], run: Record) -> None:
    """Writes it whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"format": FORMAT, **run}, indent=1) + "\n")
    unfinished.replace(path)


def read_json(path: str | os.PathLike[str], times_alone: bool = False) -> Record:
    """A run, as ``write_json`` was given it. All that is read of one later is checked here.

    With ``times_alone``, what a comparison of times does not read may be missing.

    Raises
    ------
    FileError
        If it cannot be read or is none.
    """
    try:
        run = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}") from error
    rule = f"{path} must hold results of fastconv bench, format {FORMAT}"
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise FileError(rule)
    try:
        _check_run(run, times_alone)
    except _Wrong as wrong:
        raise FileError(f"{rule}. Received: {wrong}") from wrong
    return run


class _Wrong(Exception):
    """Where a run is wrong, in words."""


def _text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)


def _truth(value: object) -> bool:
    return isinstance(value, bool)


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _file_name(value: object) -> bool:
    """Figures are named by it."""
    return _text(value) and not set(value) & set("/\\\0")


def _direction(value: object) -> bool:
    return value in problems.DIRECTIONS


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object) -> bool:
    return _number(value) and value >= 0


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _problem(value: object) -> bool:
    try:
        return _text(value) and problems.parse(value) is not None
    except problems.ProblemError:
        return False


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_TIMES: dict[str, Check] = {"median": _positive, "low": _positive, "high": _positive}
_LIMITS: dict[str, Check] = {"flops": _positive, "read": _positive, "write": _positive}
_CONDITIONS: dict[str, Check] = {
    "cpu": _text, "cpus": _count, "threads": _count, "system": _text, "versions": _texts,
    "absent": _texts, "malloc": _or_none(_text), "cold": _truth, "layout": _text, "dtype": _text,
    "rounds": _count, "when": _text,
}  # fmt: skip
_OPTIONAL_CONDITIONS: dict[str, Check] = {"algorithm": _text, "others": _count}
_RESULT: dict[str, Check] = {
    "kind": _text, "suite": _file_name, "flops": _count, "read": _positive, "written": _positive,
    "repeat": _text, "left_out": _texts,
}  # fmt: skip
_RECORD: dict[str, Check] = {
    "algorithm": _or_none(_text),
    "error": _count,
    "workspace": _or_none(_count),
}
_RATIO: dict[str, Check] = {"peer": _text, "median": _positive, "low": _positive, "high": _positive}


def _check_run(run: Record, times_alone: bool) -> None:
    conditions = _part(run, "conditions", "the run")
    limits = conditions.get("limits")
    if limits is not None:
        wanted = {"flops": _positive} if times_alone else _LIMITS
        _check(_part(conditions, "limits", "conditions"), "limits", wanted)
    if not times_alone:
        _check(conditions, "conditions", {**_CONDITIONS, "limits": lambda _: True})
        _check(run, "the run", {"command": _text, "seconds": _count})
        for name, check in _OPTIONAL_CONDITIONS.items():
            if not _or_none(check)(conditions.get(name)):
                raise _Wrong(f"{name}={reprlib.repr(conditions[name])} in conditions")
        if run.get("complete") is False:
            _check(run, "the run", {"planned": _count})
    results = run.get("results")
    if not isinstance(results, list):
        raise _Wrong("no list `results`")
    for i, result in enumerate(results):
        _check_result(result, f"results[{i}]", times_alone)


def _check_result(result: Any, place: str, times_alone: bool) -> None:
    _check(result, place, {"problem": _problem, "name": _text, "direction": _direction})
    if not times_alone:
        _check(result, place, {**_RESULT, "ratio": lambda _: True})
        if result["ratio"] is not None:
            _check(result["ratio"], f"the ratio of {place}", _RATIO)
    for name, record in _part(result, "implementations", place).items():
        where = f"{name} in {place}"
        _check(_part(record, "kernel", where), f"the kernel's times of {where}", _TIMES)
        if times_alone:
            continue
        _check(record, where, _RECORD)
        for kind in {"kernel", "call"} & set(record):
            times = _part(record, kind, where)
            _check(times, f"the {kind}'s times of {where}", {**_TIMES, "least": _positive})


def _part(whole: Any, name: str, place: str) -> Record:
    """The dict that ``whole`` holds by this name."""
    part = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(part, dict):
        raise _Wrong(f"no object `{name}` in {place}")
    return part


def _check(part: Any, place: str, wanted: Mapping[str, Check]) -> None:
    if not isinstance(part, dict):
        raise _Wrong(f"{place} that is no object")
    for name, check in wanted.items():
        if name not in part:
            raise _Wrong(f"no `{name}` in {place}")
        if not check(part[name]):
            raise _Wrong(f"{name}={reprlib.repr(part[name])} in {place}")


def write_csv(path: str | os.PathLike[str], run: Record) -> None:
    """One line for each case and implementation."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        for result in run["results"]:
            ratio = result["ratio"] or {}
            for name, record in result["implementations"].items():
                rates = shares(result, record["kernel"]["median"], run["conditions"]["limits"])
                row = {
                    "problem": result["problem"],
                    "name": result["name"],
                    "direction": result["direction"],
                    "implementation": name,
                    "algorithm": record["algorithm"],
                    "error": record["error"],
                    "workspace": record["workspace"],
                    **{f"{key}_share" if key != "gflops" else key: rates[key] for key in rates},
                    "kernel_estimated": bool(record["kernel"].get("estimated")),
                    "best_peer": ratio.get("peer"),
                    "ratio": ratio.get("median"),
                    "ratio_low": ratio.get("low"),
                    "ratio_high": ratio.get("high"),
                }
                for kind in ("kernel", "call"):
                    for value in ("median", "low", "high", "least"):
                        if kind in record:
                            row[f"{kind}_{value}_us"] = record[kind][value] / 1e3
                writer.writerow(row)


def packed_filters(facts: Record) -> str:
    """What a line of a run's conditions adds on its filters."""
    return ", filters packed beforehand" if facts.get("filter") == "packed" else ""


def shares(result: Record, nanoseconds: float, limits: Record | None) -> dict[str, float | None]:
    """{"gflops", "peak", "bandwidth"} of a time; None for what has no meaning or is not known.

    bandwidth is the time that reading every input and writing every output once takes at the
    measured streaming speeds, as a share of the time: beyond 1 where caches hold the data.
    """
    gflops = result["flops"] / nanoseconds if result["flops"] else None
    if not limits:
        return {"gflops": gflops, "peak": None, "bandwidth": None}
    least = result["read"] / limits["read"] + result["written"] / limits["write"]
    return {
        "gflops": gflops,
        "peak": gflops * 1e9 / limits["flops"] if gflops else None,
        "bandwidth": least * 1e9 / nanoseconds,
    }
