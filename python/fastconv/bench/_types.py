"""Types of what the benchmark's modules hand to one another."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# A run, a case of it, an implementation's part in that: dicts that become JSON as they are.
Record: TypeAlias = dict[str, Any]

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Arrays: TypeAlias = dict[str, Floats]  # "x", "w" and "dy"

Shape: TypeAlias = tuple[int, int, int, int]
Sides: TypeAlias = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)
