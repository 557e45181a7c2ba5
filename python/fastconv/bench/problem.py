"""What is benchmarked: problems in the notation of oneDNN's benchdnn, and their data.

``mb32ic64ih56oc64oh56kh3ph1`` is a convolution of 32 images of 56 x 56 pixels and 64 channels with
64 filters of 3 x 3 taps and a padding of 1. The letters: mb images, g groups, ic and oc channels
and filters (of all groups together), ih, oh, kh, sh, ph, dh the height of input, output and filter,
the stride, the padding at the top and the dilation (dh0, benchdnn's default, is none), and iw to dw
the same for the width, equal to the height's where absent. Of oh and ph one may be absent; the
padding at the bottom follows from oh. ``n"name"`` at the end names the problem; underscores mean
nothing. A problem without oc is a max-pooling.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastconv.bench._types import Arrays, Floats, Shape, Sides

DIRECTIONS = ("fprop", "dgrad", "wgrad")
# benchdnn's names for them.
_DIRECTION_NAMES = {
    **{name: name for name in DIRECTIONS},
    "fwd_d": "fprop",
    "fwd_i": "fprop",
    "bwd_d": "dgrad",
    "bwd_w": "wgrad",
}

_TOKEN = re.compile(r"(mb|g|ic|oc|[iokspd][hw])(\d+)")
_NAME = re.compile(r'n"([^"]*)"$')


class ProblemError(ValueError):
    """A string that is no problem; the message says why."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution (``k`` filters) or a max-pooling (``k`` is None). Dilations count from 1."""

    n: int
    c: int
    h: int
    w: int
    k: int | None
    r: int
    s: int
    oh: int
    ow: int
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)  # top, left
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1
    name: str = dataclasses.field(default="", compare=False)

    @property
    def is_pool(self) -> bool:
        return self.k is None

    @property
    def channels_out(self) -> int:
        return self.c if self.k is None else self.k

    @property
    def kind(self) -> str:
        """What it has in common with others, for means."""
        if self.is_pool:
            return "max-pooling"
        if self.groups == self.c and self.c > 1:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        if self.c <= 4:
            return "first layer (C <= 4)"
        if (self.r, self.s) == (1, 1):
            return "1x1"
        if (self.r, self.s, *self.strides, *self.dilations) == (3, 3, 1, 1, 1, 1):
            return "3x3, stride 1"
        return "other"

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS[:2] if self.is_pool else DIRECTIONS

    @cached_property
    def sides(self) -> Sides:
        """Padding as ((top, bottom), (left, right)), no more than the windows reach."""
        pairs = []
        for size, taps, out, stride, pad, dilation in zip(
            (self.h, self.w),
            (self.r, self.s),
            (self.oh, self.ow),
            self.strides,
            self.pads,
            self.dilations,
            strict=True,
        ):
            reach = (out - 1) * stride + (taps - 1) * dilation + 1
            pairs.append((pad, max(0, reach - size - pad)))
        height, width = pairs
        return height, width

    @property
    def x_shape(self) -> Shape:
        return (self.n, self.h, self.w, self.c)

    @property
    def w_shape(self) -> Shape:
        return (self.r, self.s, self.c // self.groups, self.channels_out)

    @property
    def y_shape(self) -> Shape:
        return (self.n, self.oh, self.ow, self.channels_out)

    def flops(self) -> int:
        """Operations of the direct form, every tap counted, those on padding too; 0 for pooling."""
        if self.is_pool:
            return 0
        return 2 * math.prod(self.y_shape) * self.r * self.s * self.c // self.groups

    def bytes(self, direction: str) -> tuple[int, int]:
        """(read, written): what must move at least, each array once, float32."""
        x, y = 4 * math.prod(self.x_shape), 4 * math.prod(self.y_shape)
        if self.is_pool:
            argmax = math.prod(self.y_shape) * (1 if self.r * self.s <= 256 else 4)
            return (x, y) if direction == "fprop" else (y + argmax, x)
        w = 4 * math.prod(self.w_shape)
        return {"fprop": (x + w, y), "dgrad": (y + w, x), "wgrad": (x + y, w)}[direction]

    def terms(self, direction: str) -> int:
        """How many products the longest sum has."""
        if self.is_pool:
            return self.r * self.s
        if direction == "wgrad":
            return self.n * self.oh * self.ow
        channels = self.c if direction == "fprop" else self.channels_out
        return self.r * self.s * channels // self.groups

    def with_batch(self, n: int) -> Problem:
        return dataclasses.replace(self, n=n)

    def __str__(self) -> str:
        def axis(letter: str, values: tuple[int, int], absent: int | None = None) -> str:
            height, width = values
            text = "" if height == width == absent else f"{letter}h{height}"
            return text + (f"{letter}w{width}" if width != height else "")

        return "".join(
            (
                f"mb{self.n}",
                f"g{self.groups}" if self.groups != 1 else "",
                f"ic{self.c}",
                axis("i", (self.h, self.w)),
                "" if self.is_pool else f"oc{self.k}",
                axis("o", (self.oh, self.ow)),
                axis("k", (self.r, self.s)),
                axis("s", self.strides, 1),
                axis("p", self.pads, 0),
                axis("d", (self.dilations[0] - 1, self.dilations[1] - 1), 0),
            )
        )

    # --- data -------------------------------------------------------------------------------------

    def draw(self, seed: int = 0) -> Arrays:
        """{"x", "w", "dy"}, NHWC and HWIO.

        Magnitudes lie between 1/2 and 1: no product is so small that its loss would pass the check,
        and no value is a denormal. Pooling's inputs differ within every window, so that there is
        but one maximum.
        """
        rng = np.random.default_rng(seed)
        arrays = {"dy": _signed(rng, self.y_shape)}
        if self.is_pool:
            row = np.arange(self.h, dtype=np.float32)[:, None, None] % 8
            column = np.arange(self.w, dtype=np.float32)[:, None] % 8
            coarse = rng.integers(-(2**15), 2**15, self.x_shape, np.int32).astype(np.float32)
            arrays["x"] = (coarse * 64 + row * 8 + column) / np.float32(2**21)
        else:
            arrays["x"] = _signed(rng, self.x_shape)
            arrays["w"] = _signed(rng, self.w_shape)
        return arrays


def _signed(rng: np.random.Generator, shape: Shape) -> Floats:
    values = rng.random(shape, np.float32)
    # From 0 .. 1 to -1 .. -1/2 and 1/2 .. 1.
    values -= np.float32(0.5)
    values += np.copysign(np.float32(0.5), values)
    return values


def parse(text: str) -> Problem:
    """The problem ``text`` names.

    Raises
    ------
    ProblemError
        If it names none.
    """
    body, name = text.strip(), ""
    if match := _NAME.search(body):
        body, name = body[: match.start()], match.group(1)
    body = body.replace("_", "")
    values = {}
    position = 0
    while position < len(body):
        match = _TOKEN.match(body, position)
        if match is None or match.group(1) in values:
            why = "twice" if match else "not understood"
            raise _wrong(text, f"{body[position:]!r} is {why}")
        digits = match.group(2).lstrip("0") or "0"
        if len(digits) > 10 or int(digits) >= 2**31:
            raise _wrong(text, f"{match.group(1)} must be below 2**31")
        values[match.group(1)] = int(digits)
        position = match.end()
    for required in ("ic", "ih", "kh"):
        if required not in values:
            raise _wrong(text, f"{required} is missing")
    is_pool = "oc" not in values

    def pair(letter: str, default: int | None) -> tuple[Any, Any]:
        height = values.get(letter + "h", default)
        return height, values.get(letter + "w", height)

    size, taps, strides = pair("i", None), pair("k", None), pair("s", 1)
    dilations = tuple(d + 1 for d in pair("d", 0))
    out, pads = pair("o", None), pair("p", None)
    axes = [
        _axis(text, *arguments)
        for arguments in zip(size, taps, strides, dilations, out, pads, strict=True)
    ]
    groups = values.get("g", 1)
    k = values.get("oc")
    numbers = [values.get("mb", 1), groups, values["ic"], *size, *taps, *strides]
    if min(numbers + ([] if is_pool else [k])) < 1:
        raise _wrong(text, "a size is 0")
    if values["ic"] % groups or (k or 0) % groups:
        raise _wrong(text, "ic and oc must be multiples of g")
    if is_pool and (groups != 1 or dilations != (1, 1)):
        raise _wrong(text, "a max-pooling (no oc) has neither groups nor a dilation")
    return Problem(
        n=values.get("mb", 1),
        c=values["ic"],
        h=size[0],
        w=size[1],
        k=k,
        r=taps[0],
        s=taps[1],
        oh=axes[0][0],
        ow=axes[1][0],
        strides=strides,
        pads=(axes[0][1], axes[1][1]),
        dilations=dilations,
        groups=groups,
        name=name,
    )


def _axis(
    text: str, size: int, taps: int, stride: int, dilation: int, out: int | None, pad: int | None
) -> tuple[int, int]:
    """(out, pad) of one axis, whichever of the two was given."""
    if stride < 1 or taps < 1 or size < 1:
        raise _wrong(text, "a size is 0")
    extent = (taps - 1) * dilation + 1
    if out is None:
        pad = pad or 0
        out = (size + 2 * pad - extent) // stride + 1
    elif pad is None:
        pad = max(0, (out - 1) * stride + extent - size) // 2
    if out < 1:
        raise _wrong(text, "the filter is larger than the padded input")
    if pad >= extent or (out - 1) * stride + extent - size - pad >= extent:
        raise _wrong(text, "a window lies in the padding alone")
    return out, pad


def _wrong(text: str, why: str) -> ProblemError:
    return ProblemError(
        "A problem must be written as benchdnn does it, such as mb32ic64ih56oc64oh56kh3ph1: "
        f"{why}. Received: {text.strip()!r}"
    )


def parse_direction(text: str) -> str:
    """``fprop``, ``dgrad`` or ``wgrad``, from these names or benchdnn's."""
    try:
        return _DIRECTION_NAMES[text.strip().lower()]
    except KeyError:
        raise ProblemError(
            f"A direction must be one of {', '.join(_DIRECTION_NAMES)}. Received: {text!r}"
        ) from None


def parse_lines(lines: Iterable[str]) -> list[tuple[Problem, tuple[str, ...] | None]]:
    """[(problem, directions or None)] of a benchdnn batch file.

    A line is a problem, after options of which ``--dir=A,B`` counts, for this line and those after
    it; a line of options alone sets them. ``#`` begins a comment.
    """
    found = []
    directions = None
    for line in lines:
        for word in line.partition("#")[0].split():
            if word.startswith("--dir="):
                names = word.removeprefix("--dir=").split(",")
                directions = tuple(parse_direction(name) for name in names)
            elif not word.startswith("--"):
                found.append((parse(word), directions))
    return found
