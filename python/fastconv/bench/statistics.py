"""What is said of a set of times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fastconv.bench._types import Record

_RESAMPLES = 1000


def summary(turns: Sequence[Sequence[float]]) -> Record:
    """Of nanoseconds, a list for each turn: median, quartiles, least, and the median of each turn.

    The numbers are over the medians of turns: a turn with many short calls counts no more than one
    with few, and an outlier counts once.
    """
    medians = np.array([np.median(turn) for turn in turns])
    low, median, high = np.percentile(medians, (25, 50, 75))
    return {
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "least": float(min(min(turn) for turn in turns)),
        "samples": int(sum(len(turn) for turn in turns)),
        "turns": [float(value) for value in medians],
    }


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, median, high): the median and its bootstrap confidence interval; the same each time."""
    sample = np.asarray(values, float)
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(sample, (_RESAMPLES, len(sample))), axis=1)
    low, high = np.percentile(draws, (50 - 50 * confidence, 50 + 50 * confidence))
    return float(low), float(np.median(sample)), float(high)


def ratio(implementations: dict[str, Record], ours: str, kind: str) -> Record | None:
    """The best peer's time to ours, round by round; None where one of the two is missing."""
    times = {name: record[kind] for name, record in implementations.items() if kind in record}
    peers: dict[str, float] = {
        name: record["median"] for name, record in times.items() if name != ours
    }
    if ours not in times or not peers:
        return None
    best = min(peers, key=lambda name: peers[name])
    # One that is slow has sat out the last rounds.
    pairs = zip(times[best]["turns"], times[ours]["turns"], strict=False)
    low, median, high = interval([theirs / our for theirs, our in pairs])
    return {
        "peer": best,
        "median": median,
        "low": low,
        "high": high,
        "estimated": bool(times[best].get("estimated")),
    }


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    logarithms = np.log(np.asarray(list(values), float))
    return float(np.exp(logarithms.mean())) if logarithms.size else float("nan")
