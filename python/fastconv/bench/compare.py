"""Two runs of the benchmark held against each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fastconv.bench.session import OURS

if TYPE_CHECKING:
    from fastconv.bench._types import Record

# What must agree for times to be comparable.
_SAME = ("cpu", "threads", "layout", "cold", "dtype", "filter")


@dataclasses.dataclass(frozen=True)
class Change:
    """A case of both runs. ``slowdown`` is new / old: above 1 is slower."""

    problem: str
    name: str
    direction: str
    old: float  # nanoseconds
    new: float
    clear: bool  # whether the quartiles of the two do not overlap

    @property
    def slowdown(self) -> float:
        return self.new / self.old


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; ``regressions`` and ``improvements`` worst and best first."""

    changes: list[Change]
    regressions: list[Change]
    improvements: list[Change]
    missing: list[str]  # cases of the old run that the new one lacks
    warnings: list[str]


def compare(old: Record, new: Record, threshold: float = 0.1) -> Comparison:
    """Our kernels' times of two runs.

    A case has regressed where its median is more than ``threshold`` above the old one's and the
    quartiles do not overlap: noise widens them.
    """
    before, after = _times(old), _times(new)
    changes = []
    for key, record in after.items():
        if key not in before:
            continue
        was = before[key]
        changes.append(
            Change(
                *key,
                old=was["median"],
                new=record["median"],
                clear=record["low"] > was["high"] or record["high"] < was["low"],
            )
        )
    beyond = 1 + threshold
    regressions = [c for c in changes if c.clear and c.slowdown > beyond]
    improvements = [c for c in changes if c.clear and c.slowdown < 1 / beyond]
    return Comparison(
        changes=changes,
        regressions=sorted(regressions, key=lambda c: -c.slowdown),
        improvements=sorted(improvements, key=lambda c: c.slowdown),
        missing=[f"{key[2]} {key[0]}" for key in before if key not in after],
        warnings=_warnings(old["conditions"], new["conditions"]),
    )


def _times(run: Record) -> dict[tuple[str, str, str], Record]:
    """{(problem, name, direction): our kernel's times}"""
    return {
        (result["problem"], result["name"], result["direction"]): result["implementations"][OURS][
            "kernel"
        ]
        for result in run["results"]
        if OURS in result["implementations"]
    }


def _warnings(old: Record, new: Record) -> list[str]:
    found = [
        f"{name} differs: {old.get(name)!r} and {new.get(name)!r}"
        for name in _SAME
        if old.get(name) != new.get(name)
    ]
    if old.get("limits") and new.get("limits"):
        ratio = new["limits"]["flops"] / old["limits"]["flops"]
        if not 0.95 <= ratio <= 1.05:
            found.append(f"the machine's measured FMA peak is {ratio:.2f} times the old run's")
    return found
