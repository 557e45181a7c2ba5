"""Figures of a run, as SVG and PNG: rooflines, bars of layers, ratios and errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display is asked for
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastconv.bench.problem import DIRECTIONS, parse
from fastconv.bench.reference import tolerance
from fastconv.bench.session import OURS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from fastconv.bench._types import Record

# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker each for print.
_STYLES = {
    "fastconv": ("#0072B2", "o"),
    "onednn": ("#000000", "D"),
    "torch": ("#D55E00", "s"),
    "tensorflow": ("#E69F00", "^"),
    "onnxruntime": ("#009E73", "v"),
    "openvino": ("#CC79A7", "P"),
    "jax": ("#56B4E9", "X"),
}
_OTHER = ("#777777", "*")
_NAMES = {
    "onednn": "oneDNN",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "jax": "JAX",
}
_WIDTH = 7.0  # inches: a page's text width

_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "savefig.dpi": 200,
    "svg.hashsalt": "fastconv",  # the same file from the same data
    "svg.fonttype": "none",
}


def draw(run: Record, directory: str | Path, endings: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Draws all that the run has data for, and returns the paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(_SETTINGS):
        for name, figure in _figures(run):
            for ending in endings:
                path = directory / f"{name}.{ending}"
                # Without a date a figure of the same data is the same file.
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(path, bbox_inches="tight", metadata=metadata)
                paths.append(path)
    return paths


def _figures(run: Record) -> Iterator[tuple[str, Figure]]:
    with_flops = [r for r in run["results"] if r["flops"] and OURS in r["implementations"]]
    limits = run["conditions"]["limits"]
    if with_flops and limits:
        yield "roofline", _roofline(with_flops, run["conditions"])
    suites: dict[str, list[Record]] = {}
    for result in run["results"]:
        suites.setdefault(result["suite"], []).append(result)
    for suite, results in suites.items():
        yield f"layers-{suite.replace(':', '-')}", _layers(suite, results, run["conditions"])
    if any(r["ratio"] for r in run["results"]):
        yield "ratios", _ratios(run["results"], run["conditions"])
    if with_flops:
        yield "errors", _errors(with_flops)


def _row(count: int, height: float, sharex: bool = False) -> tuple[Figure, Any]:
    """A figure of panels side by side, and these."""
    figure = Figure((_WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, count, sharex=sharex, sharey=True, squeeze=False)


def _style(name: str) -> tuple[str, str]:
    return _STYLES.get(name, _OTHER)


def _label(name: str) -> str:
    return _NAMES.get(name, name)


def _where(conditions: Record) -> str:
    threads = conditions["threads"]
    return f"{conditions['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def _roofline(results: list[Record], conditions: Record) -> Figure:
    limits = conditions["limits"]
    peak, bandwidth = limits["flops"] / 1e9, limits["read"] / 1e9
    directions = [d for d in DIRECTIONS if any(r["direction"] == d for r in results)]
    figure, panels = _row(len(directions), 2.7, sharex=True)
    intensities = [r["flops"] / (r["read"] + r["written"]) for r in results]
    span = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    for axes, direction in zip(panels[0], directions, strict=True):
        axes.plot(span, np.minimum(peak, span * bandwidth), color="#444444", lw=1)
        for result in results:
            if result["direction"] != direction:
                continue
            x = result["flops"] / (result["read"] + result["written"])
            times = {n: r["kernel"]["median"] for n, r in result["implementations"].items()}
            ours = times.pop(OURS)
            colour, marker = _style(OURS)
            if times:
                best = min(times, key=lambda name: times[name])
                axes.plot([x, x], [result["flops"] / ours, result["flops"] / times[best]],
                          color="#bbbbbb", lw=0.5, zorder=1)  # fmt: skip
                axes.plot(x, result["flops"] / times[best], "o", ms=3.5, mfc="white",
                          mec="#555555", mew=0.7, zorder=2)  # fmt: skip
            axes.plot(x, result["flops"] / ours, marker, ms=3.5, color=colour, mew=0, zorder=3)
        axes.set(xscale="log", yscale="log", title=direction)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("operations per byte moved once")
        axes.text(0.97, 0.03, f"{peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s", fontsize=7,
                  ha="right", va="bottom", color="#444444", transform=axes.transAxes)  # fmt: skip
    rates = [
        r["flops"] / record["kernel"]["median"]
        for r in results
        for record in (r["implementations"][OURS], *_best_peer(r))
    ]
    low, high = min(rates) / 1.5, max(*rates, peak) * 1.5
    ticks = [tick * 10**power for power in range(-1, 5) for tick in (1, 2, 5)]
    panels[0][0].set_yticks([tick for tick in ticks if low <= tick <= high])
    panels[0][0].set_ylim(low, high)
    panels[0][0].set_ylabel("GFLOP/s (direct form)")
    handles = [
        Line2D([], [], ls="", marker="o", ms=4, color=_style(OURS)[0], label=_label(OURS)),
        Line2D([], [], ls="", marker="o", ms=4, mfc="white", mec="#555555", label="best peer"),
        Line2D([], [], color="#444444", lw=1, label="measured limits, FMA's for direct forms"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(_where(conditions), fontsize=7, color="#555555", x=0.99, ha="right")
    return figure


def _best_peer(result: Record) -> list[Record]:
    """The record of the fastest other one, in a list, which is empty where there is none."""
    peers = [record for name, record in result["implementations"].items() if name != OURS]
    return sorted(peers, key=lambda record: record["kernel"]["median"])[:1]


def _layers(suite: str, results: list[Record], conditions: Record) -> Figure:
    """A bar for our kernel of each layer, a mark for each peer's."""
    limits = conditions["limits"]
    batches = {parse(r["problem"]).n for r in results}
    batch = f", batch {batches.pop()}" if len(batches) == 1 else ""

    def label_of(result: Record) -> str:
        return _layer_label(result, with_batch=not batch)

    labels = list(dict.fromkeys(label_of(r) for r in results))
    directions = [d for d in DIRECTIONS if any(r["direction"] == d for r in results)]
    upright = len(labels) > 8
    # Beside one another, labels of 7.5 points need 0.07 inches a letter, and a gap.
    each = 0.17 if upright else 0.07 * (max(map(len, labels)) + 2)
    figure = Figure(
        (max(3.6, each * len(labels) + (1.6 if upright else 0.8)), 1.7 * len(directions) + 1),
        layout="constrained",
    )
    panels = figure.subplots(len(directions), 1, sharex=True, squeeze=False)
    shown = set()
    is_rate = all(r["flops"] for r in results)
    for axes, direction in zip(panels[:, 0], directions, strict=True):
        highest = 0.0
        for result in results:
            if result["direction"] != direction:
                continue
            position = labels.index(label_of(result))
            work = result["flops"] if is_rate else result["read"] + result["written"]
            for name, record in result["implementations"].items():
                kernel = record["kernel"]
                rate = work / kernel["median"]
                colour, marker = _style(name)
                shown.add(name)
                if name == OURS:
                    axes.bar(position, rate, width=0.72, color=colour, alpha=0.85, zorder=2)
                    spread = np.array(
                        [[rate - work / kernel["high"]], [work / kernel["low"] - rate]]
                    )
                    axes.errorbar(position, rate, yerr=np.maximum(spread, 0), color="#222222", lw=0.7,
                                  zorder=4)  # fmt: skip
                else:
                    axes.plot(position, rate, marker, ms=3.6, color=colour, mec="white", mew=0.4,
                              zorder=5, clip_on=True)  # fmt: skip
                highest = max(highest, rate)
        limit = limits and (limits["flops"] if is_rate else limits["read"]) / 1e9
        if limit:
            axes.axhline(limit, color="#444444", lw=0.8, ls="--", zorder=4)
            highest = max(highest, limit) if is_rate else highest
        axes.set_ylim(0, 1.12 * highest)
        axes.set_title(direction)
        axes.set_ylabel("GFLOP/s" if is_rate else "GB/s")
        axes.grid(axis="x", visible=False)
    bottom = panels[-1, 0]
    bottom.set_xticks(range(len(labels)), labels, rotation=90 if upright else 0,
                      fontsize=6.5 if upright else 7.5)  # fmt: skip
    bottom.set_xlim(-0.6, len(labels) - 0.4)
    handles = [
        Rectangle((0, 0), 1, 1, color=_style(name)[0], label=_label(name))
        if name == OURS
        else Line2D([], [], ls="", marker=_style(name)[1], ms=4, color=_style(name)[0],
                        label=_label(name))
        for name in _ordered(shown)
    ]  # fmt: skip
    if limits:
        label = "FMA peak" if is_rate else "memory, reading"
        handles.append(Line2D([], [], color="#444444", lw=0.8, ls="--", label=label))
    columns = min(len(handles), int(1.4 * figure.get_figwidth()))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7.5)
    figure.suptitle(
        f"{suite}{batch}: {_where(conditions)}", fontsize=7, color="#555555", x=0.99, ha="right"
    )
    return figure


def _layer_label(result: Record, with_batch: bool) -> str:
    problem = parse(result["problem"])
    name = result["name"]
    if not name:
        size = f"{problem.h}" if problem.h == problem.w else f"{problem.h}x{problem.w}"
        taps = f"{problem.r}x{problem.s}"
        out = "" if problem.is_pool else f"→{problem.k}"
        name = f"{size}, {problem.c}{out}, {taps}"
        if problem.strides != (1, 1):
            name += f" s{problem.strides[0]}"
    return f"{name}, b{problem.n}" if with_batch else name


def _ordered(names: Collection[str]) -> list[str]:
    known = [name for name in _STYLES if name in names]
    return known + sorted(set(names) - set(known))


def _ratios(results: list[Record], conditions: Record) -> Figure:
    """Every case's ratio to the best peer, sorted, with its interval."""
    directions = [d for d in DIRECTIONS if any(r["direction"] == d and r["ratio"] for r in results)]
    figure, panels = _row(len(directions), 2.8, sharex=False)
    shown = set()
    for axes, direction in zip(panels[0], directions, strict=True):
        ratios = sorted(
            (r["ratio"] for r in results if r["direction"] == direction and r["ratio"]),
            key=lambda ratio: ratio["median"],
        )
        middle = np.exp(np.mean([np.log(ratio["median"]) for ratio in ratios]))
        for position, ratio in enumerate(ratios):
            colour, marker = _style(ratio["peer"])
            shown.add(ratio["peer"])
            x = 100 * (position + 0.5) / len(ratios)
            axes.plot([x, x], [ratio["low"], ratio["high"]], color=colour, lw=0.6, alpha=0.6)
            axes.plot(x, ratio["median"], marker, ms=3, color=colour, mec="white", mew=0.3)
        axes.axhline(1, color="#444444", lw=0.8)
        axes.axhline(middle, color="#444444", lw=0.8, ls=":")
        axes.text(0.97, 0.03, f"geometric mean {middle:.2f}", fontsize=7, color="#444444",
                  ha="right", va="bottom", transform=axes.transAxes)  # fmt: skip
        axes.set(title=f"{direction} ({len(ratios)} cases)", yscale="log", xlim=(0, 100))
        axes.set_xlabel("cases, % (sorted)")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([0.1, 0.25, 0.5, 1, 2, 4, 10])
    panels[0][0].set_ylabel("best peer's kernel time / fastconv's")
    values = [r["ratio"]["median"] for r in results if r["ratio"]]
    panels[0][0].set_ylim(max(0.05, min(values) / 1.3), min(20, max(values) * 1.3))
    handles = [
        Line2D([], [], ls="", marker=_style(n)[1], ms=4, color=_style(n)[0], label=_label(n))
        for n in _ordered(shown)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles),
                  title="the best peer of a case", title_fontsize=7.5, fontsize=7.5)  # fmt: skip
    figure.suptitle(_where(conditions), fontsize=7, color="#555555", x=0.99, ha="right")
    return figure


def _errors(results: list[Record]) -> Figure:
    """Largest errors by the number of products of a sum."""
    directions = [d for d in DIRECTIONS if any(r["direction"] == d for r in results)]
    figure, panels = _row(len(directions), 2.8, sharex=False)
    shown = set()
    for axes, direction in zip(panels[0], directions, strict=True):
        chosen = [r for r in results if r["direction"] == direction]
        terms = [parse(r["problem"]).terms(direction) for r in chosen]
        for name in reversed(_ordered({n for r in chosen for n in r["implementations"]})):
            shown.add(name)
            colour, marker = _style(name)
            # Many have the same error: side by side, none hides another.
            shift = 1.05 ** (list(_STYLES).index(name) - 3 if name in _STYLES else 4)
            points = [
                (shift * count, max(r["implementations"][name]["error"], 1e-9))
                for count, r in zip(terms, chosen, strict=True)
                if name in r["implementations"]
            ]
            axes.plot(*zip(*points, strict=True), marker, ms=3.4, color=colour, mec="white",
                      mew=0.3, ls="", zorder=3 if name == OURS else 2)  # fmt: skip
        order = np.argsort(terms)
        allowed = [tolerance(parse(chosen[i]["problem"]), direction) for i in order]
        axes.plot(np.array(terms)[order], allowed, color="#444444", lw=0.8, ls="--")
        axes.set(xscale="log", yscale="log", title=direction)
        axes.set_xlabel("products in a sum")
    panels[0][0].set_ylabel("largest error / largest value")
    handles = [
        Line2D([], [], ls="", marker=_style(n)[1], ms=4, color=_style(n)[0], label=_label(n))
        for n in _ordered(shown)
    ]
    handles.append(Line2D([], [], color="#444444", lw=0.8, ls="--", label="refused beyond"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    return figure
