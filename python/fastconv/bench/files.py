"""Results as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

FORMAT = 1

CSV_COLUMNS = (
    "problem", "name", "direction", "implementation", "algorithm", "gflops", "peak_share",
    "bandwidth_share", "error", "workspace", "kernel_median_us", "kernel_low_us", "kernel_high_us",
    "kernel_least_us", "kernel_estimated", "call_median_us", "call_low_us", "call_high_us",
    "call_least_us", "best_peer", "ratio", "ratio_low", "ratio_high",
)  # fmt: skip


class FileError(ValueError):
    """A file that holds no results of ours; the message says why."""


def write_json(path, run):
    """Writes it whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"format": FORMAT, **run}, indent=1) + "\n")
    unfinished.replace(path)


def read_json(path):
    """A run, as ``write_json`` was given it.

    Raises
    ------
    FileError
        If it cannot be read or is none.
    """
    try:
        run = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT or "results" not in run:
        raise FileError(f"{path} must hold results of fastconv bench, format {FORMAT}")
    return run


def write_csv(path, run):
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


def shares(result, nanoseconds, limits):
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
