"""A differential fuzzer: random problems through every algorithm, instruction set and layout.

``make fuzz`` runs 100,000 of them. Each is drawn from (seed, index) alone, so that a run can be
divided, repeated and gone on with. Results are compared with float64 (oracle.py), and bit for bit
between numbers of threads. Every array lies against a page that cannot be touched, once at its end
and once at its start, with NaN on the other side: a read or a write beyond it ends the worker or
spoils the result, whatever the vector width. So does the library's scratch memory
(FASTCONV_GUARD_PAGES), which also holds NaN where nobody has written. The case that a worker died of
is known to the parent.

A failing case is made smaller while it still fails, and printed as a line in the manner of benchdnn
that ``make fuzz ARGS='--case "LINE"'`` takes again.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import cached_property

import numpy as np

import fastconv
import oracle
from conv2d_problems import BOUND
from fastconv import _core
from running import running_on

EPS = float(np.finfo(np.float32).eps)
LEAST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)

CONVOLUTIONS = ("fprop", "dgrad", "wgrad")
OPERATIONS = ("conv", "conv_pool", "max_pool", "avg_pool")
VALUES = ("integers", "normals", "mixed", "huge", "tiny", "denormals", "sparse", "x_not_finite",
          "dy_not_finite", "w_not_finite", "bias_not_finite")  # fmt: skip
SMALL = ("denormals", "tiny", "mixed")  # values of which some are, or give, denormals
ALGORITHMS = ("direct", "small_channel", "depthwise", "grouped", "winograd2", "winograd3", "winograd4",
              "winograd5", "winograd_rows", "winograd_strided")  # fmt: skip
WINOGRAD_TAPS = ((3, 3), (1, 3), (3, 1), (5, 5), (1, 5), (5, 1), (4, 4), (2, 2))


class Wrong(Exception):
    """A result that is not what it must be; the message says where."""


# --- cases ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem with its data. Empty ``isa``, ``algorithm`` and ``direction`` mean all."""

    operation: str
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    strides: tuple = (1, 1)
    dilations: tuple = (1, 1)
    pads: tuple | None = (0, 0, 0, 0)  # top, bottom, left, right; None for "same"
    groups: int = 1
    nchw: bool = False
    relu: bool = False
    values: str = "integers"
    threads: int = 1
    seed: int = 0
    isa: str = ""
    algorithm: str = ""
    direction: str = ""

    # Tokens are benchdnn's; it has no names for the padding at the bottom (pb) and right (pr).
    def __str__(self):
        numbers = {
            "mb": self.n, "g": self.groups, "ic": self.c, "ih": self.h, "iw": self.w,
            "oc": self.k, "kh": self.r, "kw": self.s, "sh": self.strides[0], "sw": self.strides[1],
            "dh": self.dilations[0] - 1, "dw": self.dilations[1] - 1,
        }  # fmt: skip
        if self.pads is not None:
            numbers |= dict(zip(("ph", "pb", "pw", "pr"), self.pads, strict=True))
        if not self.is_conv:
            del numbers["oc"], numbers["g"], numbers["dh"], numbers["dw"]
        defaults = {"g": 1, "sh": 1, "sw": 1, "dh": 0, "dw": 0, "ph": 0, "pb": 0, "pw": 0, "pr": 0}
        problem = "".join(
            f"{name}{value}" for name, value in numbers.items() if defaults.get(name) != value
        )
        options = {
            "pad": "same" if self.pads is None else "",
            "tag": "nchw" if self.nchw else "",
            "act": "relu" if self.relu else "",
            "values": self.values,
            "threads": self.threads,
            "seed": self.seed,
            "isa": self.isa,
            "alg": self.algorithm,
            "dir": self.direction,
        }
        words = [f"--{name}={value}" for name, value in options.items() if value != ""]
        return " ".join([self.operation, problem, *words])

    @property
    def is_conv(self):
        return self.operation in ("conv", "conv_pool")

    @property
    def padding(self):
        if self.pads is None:
            return "same"
        top, bottom, left, right = self.pads
        return ((top, bottom), (left, right))

    @property
    def may_be_winograd(self):
        """Whether one of Winograd's algorithms serves it."""
        taps = tuple(
            -(-k // stride) for k, stride in zip((self.r, self.s), self.strides, strict=True)
        )
        if self.strides == (1, 1):
            return taps in WINOGRAD_TAPS and self.groups == 1
        return taps in ((2, 2), (3, 3), (4, 4)) and self.groups == 1

    @property
    def data_format(self):
        return "channels_first" if self.nchw else "channels_last"

    @property
    def geometry(self):
        common = {
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
        }
        if not self.is_conv:
            return common
        return {**common, "dilation_rate": self.dilations, "groups": self.groups}

    @property
    def windows(self):
        """The extents of the dilated filter."""
        return tuple(
            (taps - 1) * rate + 1
            for taps, rate in zip((self.r, self.s), self.dilations, strict=True)
        )

    @cached_property
    def out(self):
        """(OH, OW), below 1 where there is no such problem."""
        if self.pads is None:
            return tuple(
                -(-size // step) for size, step in zip((self.h, self.w), self.strides, strict=True)
            )
        sums = (sum(self.pads[:2]), sum(self.pads[2:]))
        return tuple(
            (size + pad - window) // step + 1
            for size, pad, window, step in zip(
                (self.h, self.w), sums, self.windows, self.strides, strict=True
            )
        )

    @property
    def is_problem(self):
        small = min(self.c, self.h, self.w, self.k, self.r, self.s, self.groups, *self.out)
        if small < 1 or self.n < 0 or self.c % self.groups or self.k % self.groups:
            return False
        if self.operation == "conv_pool" and min(self.out) < 2:
            return False
        if self.is_conv or self.pads is None:
            return True
        return max(self.pads[:2]) < self.r and max(self.pads[2:]) < self.s

    def activation_shape(self, h, w, c):
        return (self.n, c, h, w) if self.nchw else (self.n, h, w, c)

    @property
    def x_shape(self):
        return self.activation_shape(self.h, self.w, self.c)

    @property
    def y_shape(self):
        """Of the convolution's output where a pooling is behind it."""
        return self.activation_shape(*self.out, self.k if self.is_conv else self.c)

    @property
    def pooled_shape(self):
        return self.activation_shape(self.out[0] // 2, self.out[1] // 2, self.k)

    @property
    def w_shape(self):
        return (self.r, self.s, self.c // self.groups, self.k)

    @property
    def pads_anything(self):
        return self.pads is None or any(self.pads)


_TOKEN = re.compile(r"(mb|g|ic|oc|pb|pr|[ikspd][hw])(\d+)")


def parse(line):
    """The case of such a line."""
    operation, problem, *words = line.split()
    options = dict(word.removeprefix("--").split("=", 1) for word in words)
    numbers = {name: int(value) for name, value in _TOKEN.findall(problem)}
    if operation not in OPERATIONS or "".join(map("".join, _TOKEN.findall(problem))) != problem:
        raise ValueError(f"A case must be a line that the fuzzer has printed. Received: {line!r}")
    pads = tuple(numbers.get(name, 0) for name in ("ph", "pb", "pw", "pr"))
    case = Case(
        operation,
        numbers.get("mb", 1),
        numbers["ic"],
        numbers["ih"],
        numbers["iw"],
        numbers.get("oc", 1),
        numbers["kh"],
        numbers["kw"],
        (numbers.get("sh", 1), numbers.get("sw", 1)),
        (numbers.get("dh", 0) + 1, numbers.get("dw", 0) + 1),
        None if options.get("pad") == "same" else pads,
        numbers.get("g", 1),
        options.get("tag") == "nchw",
        options.get("act") == "relu",
        options.get("values", "integers"),
        int(options.get("threads", 1)),
        int(options.get("seed", 0)),
        options.get("isa", ""),
        options.get("alg", ""),
        options.get("dir", ""),
    )
    if not case.is_problem:
        raise ValueError(f"The shapes of a case must fit each other. Received: {line!r}")
    return case


# Around the widths of vectors and of register tiles.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97)
MOST_PRODUCTS = (1e5, 3e5, 3e6)  # edges are in small problems, partitions among threads in large


def draw(seed, index):
    """Case ``index`` of the run with this seed."""
    rng = np.random.default_rng([seed, index])
    most = MOST_PRODUCTS[rng.choice(3, p=(0.5, 0.4, 0.1))]
    while not (case := _draw(rng)).is_problem or _products(case) > most:
        pass
    return case


def _products(case):
    taps = case.r * case.s * max(case.n, 1) * np.prod(case.out)
    channels = case.c // case.groups * case.k if case.is_conv else case.c
    return float(taps) * channels


def _draw(rng):
    def pick(*choices):
        return choices[rng.integers(len(choices))]

    def up_to(most, least=1):
        return int(rng.integers(least, most + 1))

    operation = pick("conv", "conv", "conv", "conv_pool", "max_pool", "avg_pool")
    is_conv = operation.startswith("conv")
    kind = pick(
        "any", "any", "winograd", "strided", "pointwise",
        "depthwise", "first", "far", "batch", "shifted",
    )  # fmt: skip
    n = pick(1, 1, 2, 3, up_to(8), 0)
    c, k = int(pick(*CHANNELS)), int(pick(*CHANNELS))
    if rng.random() < 0.3:
        c, k = up_to(20), up_to(40)
    r, s = pick((1, 1), (2, 2), (3, 3), (3, 3), (5, 5), (7, 7), (up_to(5), up_to(7)))
    h, w = up_to(14), up_to(24)
    strides = pick((1, 1), (1, 1), (2, 2), (up_to(3), up_to(3)), (up_to(9), up_to(9)))
    dilations = pick((1, 1), (1, 1), (1, 1), (2, 2), (up_to(4), up_to(4)))
    groups = pick(1, 1, 1, 1, up_to(4))
    most = pick(0, 1, 2, 4)
    pads = pick(None, (0, 0, 0, 0), tuple(up_to(most, 0) for _ in range(4)))
    if kind == "winograd":
        r, s = pick((3, 3), *WINOGRAD_TAPS)
        strides, groups = (1, 1), 1
        dilations = pick((1, 1), (up_to(4), up_to(4)))
    elif kind == "strided":  # of two to four pixels taken together
        strides = (up_to(4), up_to(4))
        taps = pick(2, 3, 4)
        r, s = (taps * stride - up_to(stride - 1, 0) for stride in strides)
        dilations, groups = (1, 1), 1
        h, w = h + r, w + s
    elif kind == "pointwise":
        r = s = 1
    elif kind == "first":
        c, groups = up_to(4), 1
    elif kind == "depthwise":
        c = pick(c, c, c, 128, 512)  # whole lines of channels a tile
        if rng.random() < 0.2:  # rows that are cut into pieces
            r, s, w = up_to(2), up_to(33), up_to(pick(90, 350))
        groups = c
        k = c * pick(1, 1, 2, 3)
    elif kind == "far":  # windows in the padding alone, strides beyond the window, one column
        pads = tuple(up_to(pick(3, 20), 0) for _ in range(4))
        strides = (up_to(12), up_to(12))
        dilations = pick((1, 1), (up_to(9), up_to(9)))
        w = pick(w, 1, s)
    elif kind == "batch":  # in chunks, of which the last may be small
        n, h, w, c, k, groups = up_to(6000), up_to(4), up_to(4), up_to(12), up_to(20), 1
    elif kind == "shifted":  # by single taps, as many pixels as there are, but others
        r = s = 1
        strides, dilations = (up_to(4), up_to(4)), (1, 1)
        down, across = (strides[0] - 1) * (h - 1), (strides[1] - 1) * (w - 1)
        top, left = up_to(down, 0), up_to(across, 0)
        pads = (top, down - top, left, across - left)
    if not is_conv:
        dilations, groups, k = (1, 1), 1, 1
        if pick(False, False, False, True):  # all of an image
            r, s, strides = h, w, pick((1, 1), (h, w))
        if pads is not None:
            pads = (min(pads[0], r - 1), min(pads[1], r - 1), min(pads[2], s - 1),
                    min(pads[3], s - 1))  # fmt: skip
    if groups > 1 and kind != "depthwise":
        c, k = -(-c // groups) * groups, -(-k // groups) * groups
    values = pick("integers", "normals", *VALUES)
    if not is_conv and values in ("w_not_finite", "bias_not_finite"):
        values = "x_not_finite"
    return Case(
        operation,
        n,
        c,
        h,
        w,
        k,
        r,
        s,
        strides,
        dilations,
        pads,
        groups,
        bool(rng.integers(2)),
        is_conv and bool(rng.integers(2)),
        values,
        pick(1, 2, 2, 3, up_to(16)),
        up_to(2**31 - 1, 0),
    )


# --- data -----------------------------------------------------------------------------------------


def _sample(rng, shape, values, name, is_conv):
    if values == "integers":
        return rng.integers(-4, 5, shape).astype(np.float32)
    normals = rng.standard_normal(shape)
    if values == "mixed":
        normals *= 10.0 ** rng.integers(-6, 7, shape)
    elif values == "huge":
        normals *= 1e16 if is_conv else 1e35  # no sum of products, no sum of a window overflows
    elif values == "tiny":
        normals *= 1e-19
    elif values == "denormals":
        scale = {"x": 1e-39, "dy": 1e-39, "w": 1, "bias": 1e-38}.get(name, 1)
        normals *= scale
    elif values == "sparse":
        normals *= rng.random(shape) < 0.1
    array = normals.astype(np.float32)
    if values == f"{name}_not_finite" and array.size:
        flat = array.reshape(-1)
        for value in rng.choice((np.nan, np.inf, -np.inf), rng.integers(1, 4)):
            flat[rng.integers(flat.size)] = value
    return array


class Data:
    def __init__(self, case):
        rng = np.random.default_rng(case.seed)
        y_shape = case.pooled_shape if case.operation == "conv_pool" else case.y_shape
        shapes = {"x": case.x_shape, "dy": y_shape}
        if case.is_conv:
            shapes |= {"w": case.w_shape, "bias": (case.k,), "output": y_shape}
        for name, shape in shapes.items():
            values = "normals" if name == "output" else case.values
            setattr(self, name, _sample(rng, shape, values, name, case.is_conv))
        if case.operation == "conv_pool":
            self.argmax = rng.integers(0, 4, y_shape, np.uint8)


# --- memory ---------------------------------------------------------------------------------------

_PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
MARGIN = 256  # floats of NaN on the side that no page guards
_POISON = np.uint32(0x7FC0DEAD)  # a quiet NaN that no computation makes


class Guarded:
    """Memory between two pages that cannot be touched, for one array at a time."""

    def __init__(self, nbytes=1 << 16):
        self._reserve(nbytes)

    def _reserve(self, nbytes):
        self._size = -(-nbytes // _PAGE) * _PAGE
        self._map = mmap.mmap(-1, self._size + 2 * _PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        for offset in (0, _PAGE + self._size):
            if _LIBC.mprotect(whole.ctypes.data + offset, _PAGE, _PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._bytes = whole[_PAGE : _PAGE + self._size]

    def place(self, shape, at_end, dtype=np.float32):
        """An array of this shape against the page behind it, or the one before it."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if nbytes + 4 * MARGIN + 8 > self._size:
            self._reserve(2 * nbytes + 4 * MARGIN + 8)
        if at_end:
            view = self._bytes[self._size - nbytes :]
            edge = (self._size - nbytes) // 4 * 4
            self._margin = self._bytes[edge - 4 * MARGIN : edge]
        else:
            view = self._bytes[:nbytes]
            edge = -(-nbytes // 4) * 4
            self._margin = self._bytes[edge : edge + 4 * MARGIN]
        self._margin = self._margin.view(np.uint32)
        self._margin[:] = _POISON
        return view.view(dtype).reshape(shape)

    def copy(self, array, at_end):
        view = self.place(array.shape, at_end, array.dtype)
        view[...] = array
        return view

    def untouched(self):
        return bool((self._margin == _POISON).all())


class Memory:
    """The guarded places of one process, by the names of arrays."""

    def __init__(self):
        self._places = {}

    def __getitem__(self, name):
        if name not in self._places:
            self._places[name] = Guarded()
        return self._places[name]

    def assert_untouched(self, names):
        for name in names:
            if not self[name].untouched():
                raise Wrong(f"memory beside `{name}` was written")


# --- comparisons ----------------------------------------------------------------------------------


def _assert_close(name, result, expected, allowed):
    if result.shape != expected.shape or result.dtype != np.float32:
        raise Wrong(f"{name}: {result.dtype} of shape {result.shape}, not {expected.shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        good = abs(result - expected) <= allowed
        if good.all():
            return
        # What overflows float32 may do so in any order; elsewhere infinity is one of our making.
        good |= ~np.isfinite(expected) & (
            (result == expected) | (np.isnan(result) & np.isnan(expected))
        )
        good |= np.isinf(allowed)
    wrong = np.argwhere(~good)
    if len(wrong):
        at = tuple(map(int, wrong[0]))
        raise Wrong(
            f"{name}: {len(wrong)} of {result.size} results are off, the first at {at}: "
            f"{result[at]!r} instead of {expected[at]!r}; allowed is "
            f"{np.broadcast_to(allowed, result.shape)[at]:.3g}"
        )


def _same_bits(one, other):
    """Which NaN it is, its sign and its payload, is no part of a result."""
    same = one.view(f"u{one.itemsize}") == other.view(f"u{one.itemsize}")
    return bool((same | (np.isnan(one) & np.isnan(other))).all())


def _finite(array):
    return np.nan_to_num(abs(array), nan=0.0, posinf=0.0)


class Expected:
    """What float64 says of one case, and how far a result may stray; each direction on demand."""

    def __init__(self, case, data):
        self._case = case
        self._factors = {name: getattr(data, name) for name in ("x", "w", "dy", "bias")}
        self._mask = data.output if case.relu else None
        if case.operation == "conv_pool":
            dy = data.dy if self._mask is None else np.where(self._mask > 0, data.dy, 0)
            self._factors["dy"] = oracle.max_pool2d_grad(
                dy, data.argmax, case.y_shape, (2, 2), **_pooling_behind(case)
            )
            self._mask = None
        self._known = {}

    def _solve(self, direction, x, w, dy, bias, activation=None):
        case, mask = self._case, self._mask
        if direction == "fprop":
            return {"y": oracle.conv2d(x, w, bias, activation=activation, **case.geometry)}
        if direction == "dgrad":
            dx = oracle.conv2d_grad_input(dy, w, case.x_shape, mask=mask, **case.geometry)
            return {"dx": dx}
        dw, dbias = oracle.conv2d_grad_filter(x, dy, case.w_shape, mask=mask, **case.geometry)
        return {"dw": dw, "dbias": dbias}

    def _direction(self, direction):
        """({name: result}, {name: sum(|a| * |b|)}, {name: what flushing denormals may cost})."""
        if direction in self._known:
            return self._known[direction]
        case = self._case
        activation = "relu" if case.relu else None
        with np.errstate(invalid="ignore"):
            results = self._solve(direction, **self._factors, activation=activation)
        sizes = {name: _finite(factor) for name, factor in self._factors.items()}
        magnitudes = self._solve(direction, **sizes)
        flushed = dict.fromkeys(results, 0.0)
        if case.values in SMALL:
            # A denormal factor counts as 0, and a product or a sum that is one may too.
            lost = {name: np.where(size < LEAST_NORMAL, size, 0) for name, size in sizes.items()}
            for factor in {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}[
                direction
            ]:
                bias = lost["bias"] if factor == "x" else 0 * sizes["bias"]
                costs = self._solve(direction, **{**sizes, "bias": bias, factor: lost[factor]})
                for name, cost in costs.items():
                    if name != "dbias" or factor == "dy":
                        flushed[name] = flushed[name] + cost
            least = (2 * self._terms(direction) + 2) * LEAST_NORMAL
            flushed = {name: cost + least for name, cost in flushed.items()}
        self._known[direction] = results, magnitudes, flushed
        return self._known[direction]

    def _terms(self, direction):
        """How many products a result is the sum of."""
        case = self._case
        return {
            "fprop": case.r * case.s * case.c // case.groups,
            "dgrad": case.r * case.s * case.k // case.groups,
            "wgrad": case.n * case.out[0] * case.out[1],
        }[direction]

    def _allowed(self, direction, algorithm, name):
        """How far each element of this result may be off."""
        case = self._case
        _, magnitudes, flushed = self._direction(direction)
        magnitude = magnitudes[name]
        if algorithm.startswith("winograd") and name != "dbias":
            largest = max(magnitude.max(initial=0), self._largest_of_tiles(direction))
            allowed = np.full_like(magnitude, WINOGRAD_BOUND * largest) + 100 * flushed[name]
            overflow = LARGEST / 1e4
        else:
            bound = BOUND
            if case.values == "mixed":
                # One product outweighs all: each sum after it strays by as much.
                bound *= 1 + math.sqrt(self._terms(direction))
            allowed = bound * magnitude + flushed[name]
            if case.values == "integers":
                allowed = np.zeros_like(magnitude)
            largest, overflow = magnitude, LARGEST / 2
        return np.where(largest > overflow, np.inf, allowed)

    def _largest_of_tiles(self, direction):
        """The largest of what Winograd's tiles add up and take away again.

        Their transforms bring together pixels, and taps, that no result does. Counted as if a tile
        were a whole image.
        """
        case = self._case
        pixels = (2, 3) if case.nchw else (1, 2)
        x, dy = (_finite(self._factors[name]) for name in ("x", "dy"))
        if direction == "wgrad":
            return float(x.max(initial=0)) * float(dy.max(initial=0))
        source = (x if direction == "fprop" else dy).max(pixels, initial=0)  # [n, channel]
        taps = _finite(self._factors["w"]).max((0, 1))  # [channel of a group, filter]
        sources = np.split(source.astype(np.float64), case.groups, 1)
        products = [
            one @ (group if direction == "fprop" else group.T)
            for one, group in zip(sources, np.split(taps, case.groups, 1), strict=True)
        ]
        return np.max(products, initial=0)

    def check(self, direction, algorithm, results):
        case = self._case
        if case.operation == "conv":
            parts = [direction]
        elif direction == "fprop":
            return self._check_pooled(algorithm, results)
        else:
            parts = ["dgrad", "wgrad"] if direction == "dgrad" else ["wgrad"]
            if case.values == "dy_not_finite" and case.pads_anything:
                parts.remove("wgrad")  # see _directions
        for part in parts:
            if part != direction:  # by the algorithm that the selector chooses
                algorithm = "winograd4" if case.may_be_winograd else "direct"
            for name, expected in self._direction(part)[0].items():
                allowed = self._allowed(part, algorithm, name)
                self._compare(part, algorithm, name, results[name], expected, allowed)
        return None

    def _compare(self, direction, algorithm, name, result, expected, allowed):
        values = self._case.values
        spoiled = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("x", "dy")}[direction]
        if (
            not algorithm.startswith("winograd")
            or name == "dbias"
            or values not in [f"{n}_not_finite" for n in spoiled]
        ):
            _assert_close(name, result, expected, allowed)
        elif direction == "wgrad":
            self._assert_spread_over_taps(name, result, expected, allowed)
        else:
            source = self._factors["x" if direction == "fprop" else "dy"]
            if values == "w_not_finite":
                source = np.full((self._case.n, 1), np.nan)
            _assert_spread(name, source, result, expected, allowed)

    def _assert_spread_over_taps(self, name, result, expected, allowed):
        """Likewise, of a pair of channels: over the taps of all its filters."""
        if np.isfinite(result[~np.isfinite(expected)]).any():
            raise Wrong(f"{name}: a finite result where NaN or infinity belongs")
        dy = self._factors["dy"]
        if self._mask is not None:
            dy = np.where(self._mask > 0, dy, 0)
        axes = (0, 2, 3) if self._case.nchw else (0, 1, 2)
        of_x, of_dy = (
            np.isfinite(array).all(axes).reshape(self._case.groups, -1)
            for array in (self._factors["x"], dy)
        )
        sound = (of_x.T[:, :, None] & of_dy).reshape(result.shape[2:])  # of each channel and filter
        sound = np.broadcast_to(sound, result.shape)
        _assert_close(name, result[sound], expected[sound], allowed[sound])

    def _check_pooled(self, algorithm, results):
        case, pooling = self._case, _pooling_behind(self._case)
        whole = self._direction("fprop")[0]["y"]
        expected, argmax = oracle.max_pool2d(whole, (2, 2), **pooling)
        allowed, _ = oracle.max_pool2d(self._allowed("fprop", algorithm, "y"), (2, 2), **pooling)
        self._compare("fprop", algorithm, "y", results["y"], expected, allowed)
        got = results["argmax"]
        if got.dtype != np.uint8 or got.shape != expected.shape or (got > 3).any():
            raise Wrong(f"argmax: {got.dtype} of shape {got.shape}, or above 3")
        exact = not algorithm.startswith("winograd")
        if case.values == "integers" and exact:
            if (got != argmax).any():
                raise Wrong("argmax: not that of the first maximum")
            return
        if case.values.endswith("_not_finite") and not exact:
            return
        # Roundings may decide between taps that are as large, but for what they are allowed.
        chosen = np.take_along_axis(_taps(whole, case.nchw), got[None].astype(int), 0)[0]
        with np.errstate(invalid="ignore"):
            good = (chosen >= expected - 2 * allowed) | (chosen == expected) | np.isinf(allowed)
        good |= np.isnan(chosen) & np.isnan(expected)
        if not good.all():
            at = tuple(map(int, np.argwhere(~good)[0]))
            raise Wrong(f"argmax: that of {chosen[at]!r}, not of {expected[at]!r}, at {at}")


def _pooling_behind(case):
    return {"strides": (2, 2), "padding": "valid", "data_format": case.data_format}


def _taps(whole, nchw):
    """The four values of each 2 x 2 window, the first axis that of the taps."""
    rows, columns = whole.shape[2:] if nchw else whole.shape[1:3]
    at = [
        (slice(i, rows // 2 * 2, 2), slice(j, columns // 2 * 2, 2)) for i in (0, 1) for j in (0, 1)
    ]
    before = (slice(None),) * (2 if nchw else 1)
    return np.stack([whole[(*before, *tap)] for tap in at])


# Largest error over the largest sum of |a| * |b|: stays below 1e-5 of the largest result for
# networks' data; here results may cancel.
WINOGRAD_BOUND = 1e-5


def _assert_spread(name, source, result, expected, allowed):
    """Winograd spreads what is not finite over its tile, and makes NaN of infinity."""
    if np.isfinite(result[~np.isfinite(expected)]).any():
        raise Wrong(f"{name}: a finite result where NaN or infinity belongs")
    # Of an image without any, all is as ever.
    for image in range(len(source)):
        if np.isfinite(source[image]).all():
            _assert_close(f"{name}[{image}]", result[image], expected[image], allowed[image])


# --- running a case -------------------------------------------------------------------------------


@dataclasses.dataclass
class Runner:
    """Runs cases in this process. ``kernels`` are the functions under test."""

    kernels: object = _core
    note: object = None  # called with the line of what is about to run
    calls: int = 0
    memory: Memory = dataclasses.field(default_factory=Memory)

    def run(self, case):
        """Raises Wrong if any result of the case is, or is refused."""
        data = Data(case)
        with running_on(threads=case.threads):
            try:
                if case.is_conv:
                    self._convolution(case, data)
                else:
                    self._pooling(case, data)
            except (ValueError, TypeError, MemoryError, RuntimeError) as error:
                raise Wrong(f"{type(error).__name__}: {error}") from error

    def _about_to(self, case, **what):
        if self.note is not None:
            self.note(str(dataclasses.replace(case, **what)))

    def _isas(self, case):
        return [case.isa] if case.isa else _core.available_isas()

    def _place(self, data, names, at_end):
        return [
            None if name is None else self.memory[name].copy(getattr(data, name), at_end)
            for name in names
        ]

    # Convolutions.

    def _convolution(self, case, data):
        expected = Expected(case, data)
        padding = ("same", (0, 0, 0, 0)) if case.pads is None else ("explicit", case.pads)
        options = {
            "strides": case.strides,
            "padding": padding,
            "dilation_rate": case.dilations,
            "groups": case.groups,
            "activation": "relu" if case.relu else "linear",
            "data_format": case.data_format,
        }
        for isa in self._isas(case):
            _core.set_isa(isa)
            for direction in [case.direction] if case.direction else _directions(case):
                serving = _serving(case, direction, options)
                for algorithm in [case.algorithm] if case.algorithm else serving:
                    if algorithm not in serving:
                        continue
                    self._about_to(case, isa=isa, algorithm=algorithm, direction=direction)
                    try:
                        results = self._conv(case, data, direction, algorithm, options)
                        expected.check(direction, algorithm, results)
                    except Wrong as wrong:
                        raise Wrong(f"{isa}, {algorithm}, {direction}: {wrong}") from None

    def _conv(self, case, data, direction, algorithm, options):
        first = None
        # Against the page behind, and the page before; with other numbers of threads.
        for at_end, threads in ((True, case.threads), (False, 1)):
            fastconv.set_num_threads(threads)
            results = self._conv_once(case, data, direction, algorithm, options, at_end)
            if first is None:
                first = {name: array.copy() for name, array in results.items()}
                continue
            for name, array in results.items():
                if not _same_bits(array, first[name]):
                    raise Wrong(f"{name}: not the same bits on {case.threads} threads and 1")
        return first

    def _conv_once(self, case, data, direction, algorithm, options, at_end):
        memory = self.memory
        self.calls += 1
        options = {**options, "algorithm": algorithm}
        mask = "output" if case.relu else None
        if case.operation == "conv":
            names = {
                "fprop": ("x", "w", "bias"),
                "dgrad": ("dy", "w", mask),
                "wgrad": ("x", "dy", mask),
            }[direction]
            compute = self._conv_alone
        else:
            names = ("x", "w", "bias")
            if direction != "fprop":
                names = ("x", "w", "dy", "output", "argmax")
            compute = self._conv_pool
        arrays = self._place(data, names, at_end)
        results = compute(case, direction, arrays, options, at_end)
        memory.assert_untouched(filter(None, names))
        for name, array in zip(names, arrays, strict=True):
            if name and array.tobytes() != getattr(data, name).tobytes():
                raise Wrong(f"`{name}`, an input, was written")
        return results

    def _out(self, name, shape, at_end):
        out = self.memory[name].place(shape, at_end)
        out.view(np.uint32)[...] = _POISON
        return out

    def _conv_alone(self, case, direction, arrays, options, at_end):
        k = self.kernels
        name, shape = {
            "fprop": ("y", case.y_shape),
            "dgrad": ("dx", case.x_shape),
            "wgrad": ("dw", case.w_shape),
        }[direction]
        results = {name: self._out(name, shape, at_end)}
        out = results[name]
        if direction == "fprop":
            k.conv2d(*arrays, out=out, **options)
        elif direction == "dgrad":
            k.conv2d_grad_input(*arrays[:2], case.x_shape, arrays[2], out=out, **options)
        else:
            _, results["dbias"] = k.conv2d_grad_filter(
                *arrays[:2], case.w_shape, arrays[2], True, out=out, **options
            )
        self.memory.assert_untouched([name])
        return results

    def _conv_pool(self, case, direction, arrays, options, at_end):
        k = self.kernels
        if direction != "fprop":
            dx, dw, dbias = k.conv2d_max_pool2d_grad(*arrays, direction == "dgrad", **options)
            results = {"dw": dw, "dbias": dbias}
            return {"dx": dx, **results} if direction == "dgrad" else results
        out = self._out("y", case.pooled_shape, at_end)
        _, argmax = k.conv2d_max_pool2d(*arrays, True, out=out, **options)
        self.memory.assert_untouched(["y"])
        if at_end:
            alone = k.conv2d_max_pool2d(*arrays, False, **options)
            _assert_close("y without argmax", alone, out, _flushed_maximum(case))
        return {"y": out, "argmax": argmax}

    # Poolings.

    def _pooling(self, case, data):
        with np.errstate(invalid="ignore"):
            expected = _expected_pooling(case, data)
        padding = ("same", (0, 0, 0, 0)) if case.pads is None else ("explicit", case.pads)
        options = {
            "pool_size": (case.r, case.s),
            "strides": case.strides,
            "padding": padding,
            "data_format": case.data_format,
        }
        for isa in self._isas(case):
            _core.set_isa(isa)
            for direction in [case.direction] if case.direction else ("fprop", "dgrad"):
                self._about_to(case, isa=isa, direction=direction)
                try:
                    self._pool(case, data, direction, options, expected)
                except Wrong as wrong:
                    raise Wrong(f"{isa}, {direction}: {wrong}") from None

    def _pool(self, case, data, direction, options, expected):
        first = None
        for at_end, threads in ((True, case.threads), (False, 1)):
            fastconv.set_num_threads(threads)
            results = self._pool_once(case, data, direction, options, expected, at_end)
            if first is None:
                first = {name: array.copy() for name, array in results.items()}
            for name, array in results.items():
                if not _same_bits(array, first[name]):
                    raise Wrong(f"{name}: not the same bits on {case.threads} threads and 1")
        _check_pooling(case, direction, first, expected)

    def _pool_once(self, case, data, direction, options, expected, at_end):
        self.calls += 1
        memory, k = self.memory, self.kernels
        in_name, out_name, shape = {
            "fprop": ("x", "y", case.y_shape),
            "dgrad": ("dy", "dx", case.x_shape),
        }[direction]
        [array] = self._place(data, [in_name], at_end)
        out = self._out(out_name, shape, at_end)
        results = {out_name: out}
        if case.operation == "avg_pool":
            if direction == "fprop":
                k.avg_pool2d(array, out=out, **options)
            else:
                k.avg_pool2d_grad(array, case.x_shape, out=out, **options)
        elif direction == "fprop":
            _, results["argmax"] = k.max_pool2d(array, True, out=out, **options)
            alone = k.max_pool2d(array, False, **options)
            _assert_close("y without argmax", alone, out, _flushed_maximum(case))
        else:
            argmax = memory["argmax"].copy(expected["argmax"], at_end)
            k.max_pool2d_grad(array, argmax, case.x_shape, out=out, **options)
        memory.assert_untouched([in_name, out_name])
        return results


def _directions(case):
    # Whether NaN times the zeros around the input counts is nobody's promise.
    if case.values == "w_not_finite":
        return () if case.pads_anything else ("fprop",)
    if case.values == "dy_not_finite":
        return ("dgrad",) if case.pads_anything else ("dgrad", "wgrad")
    if case.values == "x_not_finite":
        # Nor whether it counts times the gradient of what was no maximum.
        return ("fprop", "wgrad") if case.operation == "conv" else ("fprop",)
    if case.values == "bias_not_finite":
        return ("fprop",)
    return CONVOLUTIONS


def _serving(case, direction, options):
    x_shape = (max(case.n, 1), *case.x_shape[1:])
    explanation = _core.explain(x_shape, case.w_shape, direction, dtype="float32", **options)
    serving = [candidate["algorithm"] for candidate in explanation["candidates"]]
    if case.operation == "conv_pool" and direction != "fprop" and serves_sparse(case):
        serving.append("sparse")
    return serving


def serves_sparse(case):
    """Whether the gradients of a pooled convolution may be computed from lists of what is not zero."""
    simple = case.groups == 1 and tuple(case.dilations) == (1, 1) and not case.nchw
    return simple and case.w_shape[1] in (3, 5) and max(case.strides) <= 2 and case.n > 0


def _expected_pooling(case, data):
    window = (case.r, case.s)
    if case.operation == "avg_pool":
        return {
            "y": oracle.avg_pool2d(data.x, window, **case.geometry),
            "dx": oracle.avg_pool2d_grad(data.dy, case.x_shape, window, **case.geometry),
            "y_magnitude": oracle.avg_pool2d(_finite(data.x), window, **case.geometry),
            "dx_magnitude": oracle.avg_pool2d_grad(
                _finite(data.dy), case.x_shape, window, **case.geometry
            ),
        }
    y, argmax = oracle.max_pool2d(data.x, window, **case.geometry)
    argmax = argmax.astype(np.uint8 if case.r * case.s <= 256 else np.int32)

    def scatter(dy):
        return oracle.max_pool2d_grad(dy, argmax, case.x_shape, window, **case.geometry)

    return {
        "y": y,
        "argmax": argmax,
        "dx": scatter(data.dy),
        "y_magnitude": np.zeros(y.shape),
        "dx_magnitude": scatter(_finite(data.dy)),
    }


def _flushed_maximum(case):
    """A denormal counts as 0: of several, any may come out, or 0."""
    return LEAST_NORMAL if case.values in SMALL else 0.0


def _check_pooling(case, direction, results, expected):
    name = "y" if direction == "fprop" else "dx"
    bound = BOUND
    if case.values == "mixed":  # as for convolutions
        bound *= 1 + math.sqrt(case.r * case.s)
    allowed = bound * expected[f"{name}_magnitude"]
    small = case.values in SMALL
    if small:
        allowed = allowed + 2 * case.r * case.s * LEAST_NORMAL
    if case.values == "integers" and case.operation == "max_pool":
        allowed = np.zeros(expected[name].shape)
    _assert_close(name, results[name], expected[name], allowed)
    # Denormals all count as 0: which of them is the maximum is not said.
    if "argmax" in results and not (small and case.values != "mixed"):
        argmax = results["argmax"]
        if argmax.dtype != expected["argmax"].dtype or (argmax != expected["argmax"]).any():
            raise Wrong("argmax: not that of the first maximum")


# --- shrinking ------------------------------------------------------------------------------------


def _simpler(case):
    """Cases that differ from this one in one thing and are simpler for it, the boldest first."""

    def replace(**what):
        return dataclasses.replace(case, **what)

    if case.threads != 1:
        yield replace(threads=1)
    if case.nchw:
        yield replace(nchw=False)
    if case.relu:
        yield replace(relu=False)
    if case.values != "integers":
        yield replace(values="integers")
        yield replace(values="normals")
    if case.pads is None:
        yield replace(pads=(0, 0, 0, 0))
    else:
        for i, pad in enumerate(case.pads):
            for less in _less(pad, 0):
                yield replace(pads=(*case.pads[:i], less, *case.pads[i + 1 :]))
    for name, least in (("n", 1), ("h", 1), ("w", 1), ("r", 1), ("s", 1)):
        for less in _less(getattr(case, name), least):
            yield replace(**{name: less})
    if case.groups > 1:
        of_each = case.c // case.groups, case.k // case.groups
        for groups in _less(case.groups, 1):
            yield replace(groups=groups, c=of_each[0] * groups, k=of_each[1] * groups)
    for name in ("c", "k"):
        steps = getattr(case, name) // case.groups
        for less in _less(steps, 1):
            yield replace(**{name: less * case.groups})
    for name in ("strides", "dilations"):
        pair = getattr(case, name)
        for less in _less(pair[0], 1):
            yield replace(**{name: (less, pair[1])})
        for less in _less(pair[1], 1):
            yield replace(**{name: (pair[0], less)})


def _less(value, least):
    return sorted({least, value // 2, value - 1} & set(range(least, value)))


def shrink(case, fails, seconds=60.0):
    """A case as simple as can be found in this time for which ``fails`` is true."""
    end = time.monotonic() + seconds
    shrunk = True
    while shrunk:
        shrunk = False
        for simpler in _simpler(case):
            if time.monotonic() > end:
                return case
            if simpler.is_problem and fails(simpler):
                case, shrunk = simpler, True
                break
    return case


# --- the command ----------------------------------------------------------------------------------


# Scratch memory between pages that cannot be touched; the oracle's products on one thread.
ENVIRONMENT = {"FASTCONV_GUARD_PAGES": "1", "OPENBLAS_NUM_THREADS": "1"}


def run_alone(line):
    """What is wrong with a case, run in a process of its own; "" if nothing."""
    result = subprocess.run(
        [sys.executable, __file__, "--case", line],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if result.returncode < 0:
        return f"the process ended by {signal.Signals(-result.returncode).name}"
    return result.stdout.strip() if result.returncode else ""


def _work(seed, start, stop, step, notes):
    """A worker's life: its cases, their number told to the parent twice a second."""
    with open(notes, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:

        def note(line):
            text = line.encode()
            shared[: len(text) + 1] = text + b"\n"

        runner = Runner(note=note)
        told = time.monotonic()
        for index in range(start, stop, step):
            case = draw(seed, index)
            try:
                runner.run(case)
            except Wrong as wrong:
                line = bytes(shared[:]).split(b"\n", 1)[0].decode()
                _tell(failure=line, why=str(wrong), index=index, next=index + step)
                return 1
            if time.monotonic() > told + 0.5:
                told = time.monotonic()
                _tell(next=index + step, calls=runner.calls)
        _tell(next=stop, calls=runner.calls)
    return 0


def _tell(**facts):
    print(json.dumps(facts), flush=True)


@dataclasses.dataclass
class Failure:
    line: str
    why: str
    index: int | None = None


def fuzz(seed, start, stop, jobs, progress=lambda done, calls: None, python=None):
    """(number of calls, failures) of these cases, on ``jobs`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            _Worker(seed, start + job, stop, jobs, os.path.join(folder, str(job)), python)
            for job in range(jobs)
        ]
        try:
            while any(not worker.ended for worker in workers):
                for worker in workers:
                    worker.listen()
                progress(sum(w.done for w in workers), sum(w.calls for w in workers))
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
        progress(sum(w.done for w in workers), sum(w.calls for w in workers))
    failures = [worker.failure for worker in workers if worker.failure]
    return sum(worker.calls for worker in workers), failures


class _Worker:
    def __init__(self, seed, start, stop, step, notes, python):
        with open(notes, "wb") as file:
            file.write(b"\n" + bytes(_PAGE - 1))
        self._start, self._stop, self._step, self._notes = start, stop, step, notes
        command = [*(python or [sys.executable, __file__]), "--seed", str(seed)]
        command += ["--worker", notes, "--from", str(start), "--step", str(step)]
        self.process = subprocess.Popen(
            [*command, "--problems", str(max(stop - start, 0))],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self._text = b""
        self.done = self.calls = 0
        self.ended, self.failure = False, None

    def listen(self):
        code = self.process.poll()
        self._text += self.process.stdout.read() or b""
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            self._hear(json.loads(line))
        if code is None or self.ended:
            return
        self.ended = True
        if code == 0 or self.failure:
            return
        with open(self._notes, "rb") as file:
            line = file.read().split(b"\n", 1)[0].decode()
        why = f"the process ended by signal {-code}" if code < 0 else f"exit status {code}"
        self.failure = Failure(line, why)

    def _hear(self, facts):
        count = len(range(self._start, min(facts["next"], self._stop), self._step))
        self.done = max(self.done, count)
        self.calls = facts.get("calls", self.calls)
        if "failure" in facts:
            self.failure = Failure(facts["failure"], facts["why"], facts["index"])


def _report(failures):
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for failure in failures:
        console.print(f"[bold red]Wrong[/]: {failure.line}", f"  {failure.why}", sep="\n")
        if not run_alone(failure.line):
            console.print("  It passes when run alone.")
            continue
        with console.status("Looking for a simpler case"):
            simplest = shrink(parse(failure.line), lambda case: bool(run_alone(str(case))))
        console.print(
            f"  The simplest found, {run_alone(str(simplest))}:", f"  {simplest}", sep="\n"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--problems", type=int, default=100_000, help="how many")
    parser.add_argument("--seed", type=int, default=None, help="of the run; else drawn")
    parser.add_argument("--from", type=int, default=0, dest="start", help="go on at this problem")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", help="run one case: a line that the fuzzer has printed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        os.environ.update(ENVIRONMENT)  # before the library is first called
        try:
            Runner().run(parse(options.case))
        except Wrong as wrong:
            print(wrong)
            return 1
        return 0
    stop = options.start + options.problems
    if options.worker:
        return _work(options.seed, options.start, stop, options.step, options.worker)

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(highlight=False)
    seed = options.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    console.print(f"seed {seed}, instruction sets {', '.join(_core.available_isas())}")
    begun = time.monotonic()
    columns = (TextColumn("problems"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[calls]:,} calls"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    done = 0
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=options.problems, calls=0)

            def update(completed, calls):
                nonlocal done
                done = completed
                progress.update(task, completed=completed, calls=calls)

            calls, failures = fuzz(seed, options.start, stop, options.jobs, update)
    except KeyboardInterrupt:
        go_on = options.start + max(done - options.jobs, 0)
        console.print(f"Interrupted. Go on with --seed {seed} --from {go_on}")
        return 130
    minutes = (time.monotonic() - begun) / 60
    console.print(
        f"{done:,} problems, {calls:,} calls, {len(failures)} wrong, in {minutes:.1f} minutes"
    )
    _report(failures)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
