"""The poolings that the tests of max- and average-pooling share."""

import dataclasses
import functools
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Problem:
    """``x`` is always (batch, height, width, channels); the arrays are in ``data_format``."""

    x: tuple
    pool_size: tuple = (2, 2)
    strides: tuple = (2, 2)
    padding: object = "valid"
    data_format: str = "channels_last"

    def __str__(self):
        n, h, w, c = self.x
        (r, s), (stride_h, stride_w) = self.pool_size, self.strides
        padding = self.padding
        if not isinstance(padding, str):
            padding = "-".join(str(side) for axis in padding for side in axis)
        layout = "nhwc" if self.data_format == "channels_last" else "nchw"
        return f"mb{n}ih{h}iw{w}ic{c}kh{r}kw{s}sh{stride_h}sw{stride_w}_{padding}_{layout}"

    @property
    def options(self):
        return {
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
        }

    @property
    def x_shape(self):
        n, h, w, c = self.x
        return (n, h, w, c) if self.data_format == "channels_last" else (n, c, h, w)

    @property
    def argmax_dtype(self):
        return np.uint8 if self.pool_size[0] * self.pool_size[1] <= 256 else np.int32

    def seed(self):
        return np.random.default_rng(zlib.crc32(str(self).encode()))


def both_layouts(problems):
    return [
        dataclasses.replace(problem, data_format=data_format)
        for problem in problems
        for data_format in ("channels_last", "channels_first")
    ]


PROBLEMS = both_layouts(
    [
        Problem((2, 9, 11, channels), (2, 2))
        for channels in (1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65)
    ]
    + [
        Problem((2, 12, 13, 5), pool_size, strides, padding)
        for pool_size in [(2, 2), (3, 3), (1, 3), (4, 2)]
        for strides in [(1, 1), (2, 2), (3, 1), (5, 7)]
        for padding in ["valid", "same"]
    ]
    + [
        Problem((2, 12, 13, 17), (3, 3), (2, 2), ((1, 1), (1, 1))),
        Problem((2, 12, 13, 17), (3, 4), (1, 2), ((2, 0), (0, 3))),
        Problem((1, 20, 21, 18), (17, 17), (2, 3)),  # 289 taps: int32
        Problem((1, 20, 21, 18), (16, 16), (2, 3)),  # 256 taps: the last that fit uint8
        Problem((1, 20, 21, 3), (17, 17), (4, 4), "same"),
        Problem((1, 5, 6, 3), (1, 257), (1, 1), "same"),
        Problem((0, 5, 6, 3)),
        Problem((5, 5, 6, 3)),
        Problem((1, 1, 1, 1), (1, 1), (1, 1)),
        Problem((1, 1, 1, 19), (3, 3), (1, 1), "same"),
        Problem((2, 2, 2, 9)),  # one window an image
        Problem((2, 9, 2, 9)),  # OW = 1
        Problem((2, 2, 9, 9)),  # OH = 1
        Problem((1, 3, 3, 2), (2, 2), (40, 40), "same"),
        # Rows longer than any vector, for vectors along columns.
        Problem((1, 7, 71, 3)),
        Problem((1, 7, 72, 2), (3, 3)),
        Problem((1, 7, 71, 2), (3, 3), padding="same"),
        Problem((1, 7, 70, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
        Problem((1, 7, 71, 2), (3, 2), (1, 1), "same"),
        Problem((1, 7, 71, 2), (2, 3), (3, 3)),
        # All of an image; beyond 256 taps too.
        Problem((3, 7, 9, 20), (7, 9), (1, 1)),
        Problem((2, 23, 19, 5), (23, 19), (23, 19)),
        Problem((2, 23, 19, 5), (23, 19), (1, 1), "same"),
    ]
)
# The article's layers, and one whose windows overlap; enough work for several threads.
LARGE = both_layouts(
    [
        Problem((32, 26, 26, 32)),
        Problem((32, 11, 11, 64)),
        Problem((4, 56, 57, 65), (3, 3), (2, 2), "same"),
    ]
)

over = functools.partial(pytest.mark.parametrize, "problem", ids=str)


def few_values(problem):
    """Integers, five of them: windows are full of ties."""
    return problem.seed().integers(-2, 3, problem.x_shape).astype(np.float32)


def many_values(problem):
    return problem.seed().standard_normal(problem.x_shape).astype(np.float32)


def awkward_values(problem):
    """Ties, NaN, infinities and both zeros; some windows hold nothing but -inf or NaN."""
    values = np.array([-np.inf, -np.inf, -np.inf, np.inf, np.nan, 0.0, -0.0, -1.0], np.float32)
    x = problem.seed().choice(values, problem.x_shape)
    x[: len(x) // 2] = -np.inf
    return x


@st.composite
def problems(draw):
    rows, columns = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = draw(
        st.sampled_from(["valid", "same"])
        | st.tuples(
            st.tuples(st.integers(0, rows - 1), st.integers(0, rows - 1)),
            st.tuples(st.integers(0, columns - 1), st.integers(0, columns - 1)),
        )
    )
    least = [1, 1]
    if padding != "same":
        pads = [0, 0] if padding == "valid" else [sum(axis) for axis in padding]
        least = [max(window - pad, 1) for window, pad in zip((rows, columns), pads, strict=True)]
    return Problem(
        (
            draw(st.integers(0, 3)),
            draw(st.integers(least[0], least[0] + 12)),
            draw(st.integers(least[1], least[1] + 20)),
            draw(st.integers(1, 40)),
        ),
        (rows, columns),
        draw(st.tuples(st.integers(1, 6), st.integers(1, 6))),
        padding,
        draw(st.sampled_from(["channels_last", "channels_first"])),
    )
