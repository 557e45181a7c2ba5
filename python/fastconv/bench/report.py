"""A page of results for people: what was measured, how, and how to measure it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastconv.bench.files import packed_filters, shares
from fastconv.bench.problem import DIRECTIONS
from fastconv.bench.session import OURS
from fastconv.bench.statistics import geometric_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fastconv.bench._types import Record

_ISAS = {"avx512": "AVX-512", "avx2": "AVX2"}
_INTRODUCTION = """\
# Performance, {isa}

fastconv's kernels beside those of other libraries, on one machine. This page and its figures are
written by one command:

```sh
{command}
```

It needs the libraries compared with: `pip install '.[bench,tensorflow]'`; those that are not
installed are left out and named. Any case can be repeated alone by the line that `fastconv bench`
ends with, for example

```sh
{repeat}
```

Kernels alone are on this page. A training step of a network op by op, its inference and its peak memory are in
`docs/profile.md`, written by `bench/profile_step.py`.

## Conditions

{conditions}
"""

_METHOD = """\
## How it is measured

- Every result is compared with float64 before anything is timed; an implementation that computes
  something else ends the run without a report.
- Each library runs in a process of its own. For each case there are {rounds} rounds, in each of
  which every library has a turn, in random order, while the others stand still: libraries' threads
  spin after their work and would slow the next one down. Ratios are taken within a round.
- The same threads, CPUs and malloc settings for all, and arrays that begin at multiples of 64 bytes;
  OpenMP's threads are bound to CPUs, without which some turns take ten times as long. Results go to
  memory allocated before, for fastconv, oneDNN, ONNX Runtime and OpenVINO; TensorFlow, PyTorch and JAX
  allocate theirs in a call, from memory that malloc keeps.
- *Kernel time* is taken inside fastconv and oneDNN. Of the others only whole calls can be timed: the
  time of a call with next to nothing to compute is subtracted, but at most half of the call, and no
  more than leaves the time at the FMA peak. Calls and kernels are both in the JSON.
- oneDNN is its own library, called as its best user would: weights in the format it asks for,
  reordered beforehand; activations NHWC. PyTorch computes in channels_last; ONNX Runtime and OpenVINO
  take NCHW and compute `fprop` alone; TensorFlow runs a compiled graph of one operation.
- Filters of `fprop` and `dgrad` are packed beforehand where a library can: by oneDNN, ONNX Runtime, OpenVINO
  and, with a `PackedFilter`, fastconv (`--filter plain` packs ours in each call, as in training).
- GFLOP/s count every tap of the direct form, those on padding too.
- *peak* is a loop of multiply-adds in registers; *memory* streams 256 MiB. Both are measured at the
  start of the run, on the same threads.
- A ratio is the time of the best peer of the case divided by fastconv's: above 1, fastconv is faster.
"""


def write(run: Record, path: str | Path, plot: Callable[..., list[Path]]) -> None:
    """Writes the page and, beside it, its figures, drawn by ``plot``."""
    path = Path(path)
    figures = path.parent / path.stem
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = {drawn.stem: drawn.name for drawn in plot(run, figures, endings=("svg",))}
    sections = [
        _INTRODUCTION.format(
            isa=_ISAS.get(run["conditions"]["versions"].get("isa", ""), "portable kernels"),
            command=run["command"],
            repeat=run["results"][0]["repeat"],
            conditions=_conditions(run),
        ),
        _overview(run, drawn, figures.name),
        _suites(run, drawn, figures.name),
        _METHOD.format(rounds=run["conditions"]["rounds"]),
    ]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text("\n".join(sections))
    unfinished.replace(path)


def _conditions(run: Record) -> str:
    facts = run["conditions"]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    threads = facts["threads"]
    rows = [
        ("machine", f"{facts['cpu']}, {facts['cpus']} CPUs"),
        ("threads", f"{threads}, the same for all"),
        ("system", facts["system"]),
        ("versions", versions),
        (
            "data",
            f"{facts['dtype']}, {facts['layout'].upper()}{packed_filters(facts)}, {_cache(facts)}",
        ),
        ("malloc", facts["malloc"] or "as it comes"),
    ]
    if limits := facts["limits"]:
        speeds = f"{limits['read'] / 1e9:.1f} GB/s read, {limits['write'] / 1e9:.1f} GB/s written"
        rows.append(("measured limits", f"{limits['flops'] / 1e9:.0f} GFLOP/s; {speeds}"))
    if facts.get("others") is not None:
        rows.append(("other processes", f"{100 * facts['others']:.0f} % of the CPU time"))
    if facts["absent"]:
        left_out = ", ".join(f"{name} ({why})" for name, why in facts["absent"].items())
        rows.append(("not measured", left_out))
    rows.append(("measured", f"{facts['when'][:10]}, in {run['seconds'] / 60:.0f} minutes"))
    return _table(("", ""), rows, "--")


def _cache(facts: Record) -> str:
    return "caches emptied before each call" if facts["cold"] else "caches as the calls leave them"


def _overview(run: Record, drawn: dict[str, str], directory: str) -> str:
    parts = ["## In short\n", "The best peer's kernel time divided by fastconv's:\n"]
    for key in ("kind", "suite"):
        rows = [
            (direction, group, *_spread(values))
            for direction in DIRECTIONS
            for group, values in _ratios(run, direction, key).items()
        ]
        header = ("", key, "geometric mean", "least", "largest", "cases")
        parts.append(_table(header, rows, "ll") + "\n")
    for name, caption in (
        ("ratios", "Ratio to the best peer, every case"),
        ("roofline", "Speed by arithmetic intensity"),
        ("errors", "Largest error against float64"),
    ):
        if name in drawn:
            parts.append(f"![{caption}]({directory}/{drawn[name]})\n")
    return "\n".join(parts)


def _ratios(run: Record, direction: str, key: str) -> dict[str, list[float]]:
    """{group: ratios}, and of all together."""
    groups: dict[str, list[float]] = {}
    for result in run["results"]:
        if result["direction"] == direction and result["ratio"]:
            groups.setdefault(result[key], []).append(result["ratio"]["median"])
    together = [value for values in groups.values() for value in values]
    return groups | ({"**all**": together} if together else {})


def _spread(values: Sequence[float]) -> tuple[str, str, str, str]:
    return (
        f"{geometric_mean(values):.2f}",
        f"{min(values):.2f}",
        f"{max(values):.2f}",
        str(len(values)),
    )


def _suites(run: Record, drawn: dict[str, str], directory: str) -> str:
    suites: dict[str, list[Record]] = {}
    for result in run["results"]:
        suites.setdefault(result["suite"], []).append(result)
    parts = ["## Layers\n"]
    for suite, results in suites.items():
        parts.append(f"### {suite}\n")
        name = f"layers-{suite.replace(':', '-')}"
        if name in drawn:
            parts.append(f"![{suite}]({directory}/{drawn[name]})\n")
        parts.append("<details><summary>Figures</summary>\n")
        parts.append(_cases(results, run["conditions"]["limits"]))
        parts.append("\n</details>\n")
    return "\n".join(parts)


def _cases(results: list[Record], limits: Record | None) -> str:
    rows = []
    for result in results:
        ours = result["implementations"].get(OURS)
        if not ours:
            continue
        rates = shares(result, ours["kernel"]["median"], limits)
        ratio = result["ratio"]
        rows.append(
            (
                f"{result['name']} `{result['problem']}`".strip(),
                result["direction"],
                f"{ours['kernel']['median'] / 1e3:,.1f}",
                f"{rates['gflops']:.0f}" if rates["gflops"] else "",
                f"{100 * rates['peak']:.0f} %" if rates["peak"] else "",
                f"{100 * rates['bandwidth']:.0f} %" if rates["bandwidth"] else "",
                f"{ours['error']:.0e}",
                ours["algorithm"] or "",
                ratio["peer"] if ratio else "",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
                if ratio
                else "",
            )
        )
    header = (
        "problem", "", "us", "GFLOP/s", "of peak", "of memory", "error", "algorithm", "best peer",
        "ratio",
    )  # fmt: skip
    return _table(header, rows, "llrrrrrllr")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], alignment: str) -> str:
    alignment = alignment.ljust(len(header), "r")
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
