"""What a person reads: tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastconv.bench.files import packed_filters, shares
from fastconv.bench.problem import DIRECTIONS
from fastconv.bench.session import OURS
from fastconv.bench.statistics import geometric_mean

if TYPE_CHECKING:
    from fastconv.bench._types import Record
    from fastconv.bench.compare import Comparison

# The share of CPU time taken by others from which on times mean little.
BUSY = 0.05

# By the column that it is of.
_LEGEND = {
    "kernel us": "kernel: time inside the library; ~ estimated: the call, less a call with next to "
    "nothing to compute, at most by half.",
    "peak": "peak: share of the measured FMA peak, every tap counted, so that Winograd can be beyond "
    "100 %.",
    "bandw.": "bandw.: share of the time that moving every array once takes at the measured speed; "
    "beyond 100 % in a cache.",
    "error": "error: largest difference to float64 / largest value.",
    "ratio": "ratio: the best peer's kernel time / ours, median of the rounds (95 % bootstrap "
    "interval).",
}


def results(run: Record, width: int, details: bool = True) -> Group:
    """A table of all cases, and one of geometric means."""
    shown = [cases(run, width)] if details else []
    columns = _columns(width) if details else ["ratio"]
    return Group(conditions(run), *shown, means(run), _notes(run, columns))


def conditions(run: Record) -> Text:
    facts = run["conditions"]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    lines = [
        f"{facts['cpu']}, {facts['threads']} of {facts['cpus']} CPUs; {facts['system']}",
        versions,
    ]
    if limits := facts["limits"]:
        lines.append(
            f"measured limits: {limits['flops'] / 1e9:.0f} GFLOP/s, reading "
            f"{limits['read'] / 1e9:.1f} GB/s, writing {limits['write'] / 1e9:.1f} GB/s"
        )
    malloc = f"malloc: {facts['malloc']}" if facts["malloc"] else "malloc as it comes"
    cache = "cold caches" if facts["cold"] else "warm caches"
    data = f"{facts['layout'].upper()}, {facts['dtype']}{packed_filters(facts)}"
    lines.append(f"{cache}, {data}; {malloc}, for all alike")
    if facts.get("others") is not None:
        lines.append(f"other processes took {100 * facts['others']:.0f} % of the CPU time")
    for name, why in facts["absent"].items():
        lines.append(f"not measured: {name} ({why})")
    text = Text("\n".join(lines) + "\n", style="dim")
    if (facts.get("others") or 0) > BUSY:
        text.append("Warning: the machine was busy; do not trust these times.\n", "bold yellow")
    return text


# The columns that do not fit into a narrower terminal.
_WIDE = {"IQR": 150, "call us": 120, "bandw.": 110, "algorithm": 140, "error": 100}


def _columns(width: int) -> list[str]:
    titles = ["kernel us", "IQR", "GFLOP/s", "peak", "bandw.", "call us", "error", "ratio"]
    return [title for title in [*titles, "algorithm"] if width >= _WIDE.get(title, 0)]


def cases(run: Record, width: int) -> Table:
    """A row for each implementation of each case, the fastest first; ``width`` in characters."""
    limits = run["conditions"]["limits"]
    titles = _columns(width)
    table = _table("implementation")
    for title in titles:
        left = title == "algorithm"
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for result in run["results"]:
        name = f" {result['name']}" if result["name"] else ""
        # A title of its own: beside the figures, a problem would take half of the line.
        table.add_row(Text(f"{result['direction']} {result['problem']}{name}", style="italic"))
        implementations = result["implementations"]
        for name in sorted(implementations, key=lambda n: implementations[n]["kernel"]["median"]):
            cells = _cells(result, name, limits)
            table.add_row(
                f"  {name}",
                *(cells[title] for title in titles),
                style="bold" if name == OURS else None,
            )
        table.add_section()
    return table


def _cells(result: Record, name: str, limits: Record | None) -> dict[str, str]:
    record = result["implementations"][name]
    kernel = record["kernel"]
    rates = shares(result, kernel["median"], limits)
    return {
        "kernel us": ("~" if kernel.get("estimated") else "") + _microseconds(kernel["median"]),
        "IQR": _microseconds(kernel["high"] - kernel["low"]),
        "GFLOP/s": "" if rates["gflops"] is None else f"{rates['gflops']:.1f}",
        "peak": _percent(rates["peak"]),
        "bandw.": _percent(rates["bandwidth"]),
        "call us": _microseconds(record["call"]["median"]) if "call" in record else "",
        "error": f"{record['error']:.0e}",
        "ratio": _ratio(result["ratio"]) if name == OURS else "",
        "algorithm": _algorithm(record),
    }


def means(run: Record) -> Table | Text:
    """Geometric means of the ratios, by direction: to the best peer by kind, and to each peer."""
    groups: dict[tuple[str, int, str, str], list[float]] = {}
    for result in run["results"]:
        ours = result["implementations"].get(OURS)
        if not ours or not result["ratio"]:
            continue
        direction, best = result["direction"], result["ratio"]["median"]
        groups.setdefault((direction, 0, "best peer", result["kind"]), []).append(best)
        groups.setdefault((direction, 1, "best peer", "all"), []).append(best)
        for name, record in result["implementations"].items():
            if name != OURS:
                value = record["kernel"]["median"] / ours["kernel"]["median"]
                groups.setdefault((direction, 2, name, "all"), []).append(value)
    if not groups:
        return Text("")
    table = _table("", "against", "kind")
    table.title = f"Peer's kernel time / {OURS}'s"
    for title in ("geometric mean", "least", "largest", "cases"):
        table.add_column(title, justify="right")
    previous = None
    for key in sorted(groups, key=lambda key: (DIRECTIONS.index(key[0]), *key[1:])):
        direction, _, name, kind = key
        values = groups[key]
        if previous not in (None, direction):
            table.add_section()
        table.add_row(
            direction if direction != previous else "",
            name,
            kind,
            f"{geometric_mean(values):.2f}",
            f"{min(values):.2f}",
            f"{max(values):.2f}",
            str(len(values)),
            style="bold" if (name, kind) == ("best peer", "all") else None,
        )
        previous = direction
    return table


def comparison(found: Comparison, threshold: float) -> Group:
    """What ``compare`` found, the regressions by name."""
    parts: list[Text | Table] = [
        Text(f"Warning: {warning}", style="yellow") for warning in found.warnings
    ]
    if found.missing:
        parts.append(Text("Not in the new run: " + ", ".join(found.missing), style="yellow"))
    table = _table("problem", "")
    for title in ("old us", "new us", "new / old", ""):
        table.add_column(title, justify="right", no_wrap=True)
    for changes, verdict, style in (
        (found.regressions, "slower", "bold red"),
        (found.improvements, "faster", "green"),
    ):
        for change in changes:
            table.add_row(
                change.problem,
                change.direction,
                _microseconds(change.old),
                _microseconds(change.new),
                f"{change.slowdown:.2f}",
                verdict,
                style=style,
            )
    if table.row_count:
        parts.append(table)
    total = ""
    if found.changes:
        mean = geometric_mean(change.slowdown for change in found.changes)
        total = f"; geometric mean of new / old {mean:.3f}"
    parts.append(
        Text(
            f"{len(found.changes)} case{'s' if len(found.changes) != 1 else ''} of both runs: "
            f"{len(found.regressions)} slower and "
            f"{len(found.improvements)} faster by more than {100 * threshold:g} %{total}"
        )
    )
    return Group(*parts)


def _notes(run: Record, columns: list[str]) -> Text:
    lines = [text for column, text in _LEGEND.items() if column in columns]
    lines += [*_left_out(run), *_other_algorithms(run)]
    if not run.get("complete", True):
        lines.append(f"Interrupted: {len(run['results'])} of {run['planned']} cases.")
    elif run["results"]:
        lines.append(f"Repeat a case: {run['results'][0]['repeat']}")
    return Text("\n".join(lines), style="dim")


def _left_out(run: Record) -> list[str]:
    """Who is missing in which cases, and why; who is missing in all is told with the conditions."""
    counts: dict[tuple[str, str], int] = {}
    for result in run["results"]:
        for name, why in result["left_out"].items():
            if name not in run["conditions"]["absent"]:
                counts[(name, why)] = counts.get((name, why), 0) + 1
    return [
        f"{name} is left out in {_of(count, len(run['results']))}: {why}"
        for (name, why), count in counts.items()
    ]


def _other_algorithms(run: Record) -> list[str]:
    """Where what --algorithm names did not serve."""
    wanted = run["conditions"].get("algorithm")
    if wanted in (None, "auto"):
        return []
    ours = [r["implementations"][OURS] for r in run["results"] if OURS in r["implementations"]]
    others = [record["algorithm"] for record in ours if record["algorithm"] != wanted]
    if not others:
        return []
    names = ", ".join(sorted({str(name) for name in others}))
    return [f"{wanted} does not serve {_of(len(others), len(ours))}, computed by: {names}"]


def _of(count: int, total: int) -> str:
    return f"{count} of {total} cases"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_style="bold", title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _microseconds(nanoseconds: float) -> str:
    value = nanoseconds / 1e3
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _ratio(ratio: Record | None) -> str:
    if not ratio:
        return ""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _algorithm(record: Record) -> str:
    text = record["algorithm"] or ""
    if record["workspace"]:
        text += f" {record['workspace'] / 2**20:.1f} MiB"
    return text.strip()
