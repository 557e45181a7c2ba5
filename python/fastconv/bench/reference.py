"""What results must be: convolution and max-pooling in float64 by NumPy, slow in its own way.

Patches are written out as a matrix, chunk by chunk, and multiplied by BLAS.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastconv.bench._types import Arrays, Doubles, Floats
    from fastconv.bench.problem import Problem

# float64 elements of a chunk of patches.
_CHUNK = 1 << 24


def expected(problem: Problem, direction: str, arrays: Arrays) -> Doubles:
    """The right result, float64, of the shape that ``direction`` gives."""
    if problem.is_pool:
        return _pool(problem, direction, arrays)
    return _conv(problem, direction, arrays)


def tolerance(problem: Problem, direction: str, accuracy: str = "default") -> float:
    """How far a float32 result may be off, relative to the largest value of the right one.

    Rounding errors of a sum of n products grow with sqrt(n) relative to its value, where signs
    are random as in ``Problem.draw``; a lost product is off by 1 / sqrt(n). The limit lies between,
    an order of magnitude above what direct convolutions and Winograd's show.
    """
    if problem.is_pool:
        return 0.0 if direction == "fprop" else 1e-6
    factor = {"strict": 1, "default": 1, "fast": 10}[accuracy]
    return factor * max(2e-5, 4 * 2**-24 * math.sqrt(problem.terms(direction)))


def _chunks(problem: Problem) -> list[slice]:
    """Slices of the batch whose patches fit a chunk."""
    each = problem.oh * problem.ow * problem.r * problem.s * problem.c
    step = max(1, _CHUNK // each)
    return [slice(i, min(i + step, problem.n)) for i in range(0, problem.n, step)]


def _taps(problem: Problem) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """(row of the filter, its column, index of the padded input's pixels that they meet)."""
    for i in range(problem.r):
        for j in range(problem.s):
            top, left = i * problem.dilations[0], j * problem.dilations[1]
            yield (
                i,
                j,
                (
                    slice(None),
                    slice(top, top + (problem.oh - 1) * problem.strides[0] + 1, problem.strides[0]),
                    slice(
                        left, left + (problem.ow - 1) * problem.strides[1] + 1, problem.strides[1]
                    ),
                ),
            )


def _padded(problem: Problem, x: Floats, value: float = 0.0) -> Doubles:
    (top, bottom), (left, right) = problem.sides
    pads = ((0, 0), (top, bottom), (left, right), (0, 0))
    return np.pad(x.astype(np.float64), pads, constant_values=value)


def _patches(problem: Problem, x: Floats) -> Doubles:
    """(groups, pixels, taps * channels of a group)"""
    p, g = problem, problem.groups
    padded = _padded(p, x)
    out = np.empty((g, len(x), p.oh, p.ow, p.r, p.s, p.c // g))
    for i, j, index in _taps(p):
        values = padded[index].reshape(len(x), p.oh, p.ow, g, p.c // g)
        out[:, :, :, :, i, j] = np.moveaxis(values, 3, 0)
    return out.reshape(g, len(x) * p.oh * p.ow, -1)


def _by_group(array: Floats, groups: int) -> Doubles:
    """(..., groups * a) as (groups, product of ..., a), float64."""
    split = array.reshape(-1, groups, array.shape[-1] // groups)
    return np.ascontiguousarray(np.moveaxis(split, 1, 0), np.float64)


def _conv(p: Problem, direction: str, arrays: Arrays) -> Doubles:
    x, w, dy = arrays["x"], arrays["w"], arrays["dy"]
    g = p.groups
    filters = _by_group(w, g)  # (g, taps * channels, filters of a group)
    (top, _), (left, _) = p.sides
    if direction == "wgrad":
        total = np.zeros(filters.shape)
        for part in _chunks(p):
            total += np.swapaxes(_patches(p, x[part]), 1, 2) @ _by_group(dy[part], g)
        return np.moveaxis(total, 0, 1).reshape(p.w_shape)
    result = np.empty(p.y_shape if direction == "fprop" else p.x_shape)
    for part in _chunks(p):
        images = part.stop - part.start
        if direction == "fprop":
            y = _patches(p, x[part]) @ filters
            result[part] = np.moveaxis(y, 0, 1).reshape(images, p.oh, p.ow, p.channels_out)
        else:
            patches = _by_group(dy[part], g) @ np.swapaxes(filters, 1, 2)
            patches = patches.reshape(g, images, p.oh, p.ow, p.r, p.s, p.c // g)
            padded = _padded(p, np.zeros((images, p.h, p.w, p.c), np.float32))
            for i, j, index in _taps(p):
                values = np.moveaxis(patches[:, :, :, :, i, j], 0, 3)
                padded[index] += values.reshape(images, p.oh, p.ow, p.c)
            result[part] = padded[:, top : top + p.h, left : left + p.w]
    return result


def _pool(p: Problem, direction: str, arrays: Arrays) -> Doubles:
    padded = _padded(p, arrays["x"], -np.inf)
    y = np.full(p.y_shape, -np.inf)
    for _, _, index in _taps(p):
        np.maximum(y, padded[index], out=y)
    if direction == "fprop":
        return y
    dx = np.zeros(padded.shape)
    for _, _, index in _taps(p):
        dx[index] += np.where(padded[index] == y, arrays["dy"], 0.0)
    (top, _), (left, _) = p.sides
    return dx[:, top : top + p.h, left : left + p.w]


def error(result: NDArray[Any], right: Doubles) -> float:
    """The largest difference relative to the largest right value; inf where NaN, or misshapen."""
    result = np.asarray(result)
    if result.shape != right.shape:
        return float("inf")
    scale = float(np.abs(right).max())
    largest = 0.0
    step = max(1, _CHUNK // max(1, right[:1].size))
    for i in range(0, len(right), step):
        difference = np.abs(result[i : i + step] - right[i : i + step])
        largest = (
            max(largest, float(difference.max()))
            if not np.isnan(difference).any()
            else (float("inf"))
        )
        if largest == float("inf"):
            return largest
    return largest / scale if scale else largest
