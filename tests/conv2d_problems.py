"""What the convolution tests share: problems, data for them, and three ways to solve them."""

import dataclasses
import functools
import zlib

import numpy as np

import fastconv
import oracle
from running import by_reference

# |error| <= BOUND * sum(|a| * |b|) over the products a * b that make up a result. A float32 sum of
# n products of random signs, even one after the other, strays by a quarter of an eps of that sum
# whatever n is, for partial sums grow as sqrt(n) only; the worst of 1e5 such sums by 2.6 eps.
# Leaving out one product of 2,304 (256 channels, 3 x 3 taps) strays 900 times the bound.
BOUND = 4 * np.finfo(np.float32).eps


@dataclasses.dataclass(frozen=True)
class Problem:
    """``x`` is always (batch, height, width, channels); the arrays are in ``data_format``."""

    x: tuple
    filters: int
    kernel: tuple = (3, 3)
    strides: tuple = (1, 1)
    padding: object = "valid"
    dilation_rate: tuple = (1, 1)
    groups: int = 1
    data_format: str = "channels_last"

    def __str__(self):
        n, h, w, c = self.x
        (r, s), (stride_h, stride_w), (rate_h, rate_w) = (
            self.kernel,
            self.strides,
            self.dilation_rate,
        )
        padding = self.padding
        if not isinstance(padding, str):
            padding = "-".join(str(side) for axis in padding for side in axis)
        layout = "nhwc" if self.data_format == "channels_last" else "nchw"
        return (
            f"mb{n}ih{h}iw{w}ic{c}oc{self.filters}kh{r}kw{s}sh{stride_h}sw{stride_w}"
            f"dh{rate_h}dw{rate_w}g{self.groups}_{padding}_{layout}"
        )

    @property
    def geometry(self):
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "data_format": self.data_format,
        }

    @property
    def x_shape(self):
        return self._activation_shape(*self.x)

    @property
    def w_shape(self):
        return (*self.kernel, self.x[3] // self.groups, self.filters)

    @functools.cached_property
    def y_shape(self):
        one_channel = oracle.conv2d(
            np.zeros((*self.x[:3], 1)),
            np.zeros((*self.kernel, 1, 1)),
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
        )
        return self._activation_shape(*one_channel.shape[:3], self.filters)

    def seed(self):
        return np.random.default_rng(zlib.crc32(str(self).encode()))

    def _activation_shape(self, n, h, w, c):
        return (n, h, w, c) if self.data_format == "channels_last" else (n, c, h, w)


def both_layouts(problems):
    return [
        dataclasses.replace(problem, data_format=data_format)
        for problem in problems
        for data_format in ("channels_last", "channels_first")
    ]


@dataclasses.dataclass(frozen=True)
class Data:
    """Inputs of one problem. ``output`` stands for fprop's result where the ReLU mask is read."""

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray
    dy: np.ndarray
    output: np.ndarray

    @classmethod
    def draw(cls, problem, sample):
        shapes = (
            problem.x_shape,
            problem.w_shape,
            (problem.filters,),
            problem.y_shape,
            problem.y_shape,
        )
        rng = problem.seed()
        return cls(*(sample(rng, shape).astype(np.float32) for shape in shapes))

    def absolute(self):
        return dataclasses.replace(
            self, x=abs(self.x), w=abs(self.w), bias=abs(self.bias), dy=abs(self.dy)
        )


def normals(problem):
    return Data.draw(problem, lambda rng, shape: rng.standard_normal(shape))


def integers(problem):
    """Every sum of products is an integer below 2**24, hence exact in float32 in any order."""
    return Data.draw(problem, lambda rng, shape: rng.integers(-4, 5, shape))


# Each solution is a dict of results: without the epilogues (y, dx, dw), and with bias and ReLU in
# all directions (the names with _fused).


def solve(problem, data):
    """By fastconv's kernels."""
    geometry = problem.geometry
    relu = {**geometry, "activation": "relu"}
    masked = {**relu, "output": data.output}
    dw_fused, dbias_fused = fastconv.conv2d_grad_filter(
        data.x, data.dy, problem.w_shape, return_bias_grad=True, **masked
    )
    return {
        "y": fastconv.conv2d(data.x, data.w, **geometry),
        "dx": fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, **geometry),
        "dw": fastconv.conv2d_grad_filter(data.x, data.dy, problem.w_shape, **geometry),
        "y_fused": fastconv.conv2d(data.x, data.w, data.bias, **relu),
        "dx_fused": fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, **masked),
        "dw_fused": dw_fused,
        "dbias_fused": dbias_fused,
    }


def solve_by_reference(problem, data):
    """By fastconv's slow reference."""
    with by_reference():
        return solve(problem, data)


def solve_by_oracle(problem, data, *, activation="relu"):
    """In float64."""
    geometry, mask = problem.geometry, data.output
    dw, _ = oracle.conv2d_grad_filter(data.x, data.dy, problem.w_shape, **geometry)
    dw_fused, dbias_fused = oracle.conv2d_grad_filter(
        data.x, data.dy, problem.w_shape, mask=mask, **geometry
    )
    return {
        "y": oracle.conv2d(data.x, data.w, **geometry),
        "dx": oracle.conv2d_grad_input(data.dy, data.w, problem.x_shape, **geometry),
        "dw": dw,
        "y_fused": oracle.conv2d(data.x, data.w, data.bias, activation=activation, **geometry),
        "dx_fused": oracle.conv2d_grad_input(
            data.dy, data.w, problem.x_shape, mask=mask, **geometry
        ),
        "dw_fused": dw_fused,
        "dbias_fused": dbias_fused,
    }


def magnitudes(problem, data):
    """sum(|a| * |b|) for every result."""
    return solve_by_oracle(problem, data.absolute(), activation=None)


# What is right of a problem, for the tests of all instruction sets and thread counts.


@functools.cache
def exact_case(problem):
    data = integers(problem)
    return data, solve_by_oracle(problem, data)


@functools.cache
def rounded_case(problem):
    data = normals(problem)
    return data, solve_by_oracle(problem, data)


@functools.cache
def magnitudes_of_rounded(problem):
    return magnitudes(problem, rounded_case(problem)[0])


def assert_exact(results, expected):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.dtype == np.float32, name
        np.testing.assert_array_equal(result, expected[name], err_msg=name, strict=False)
        assert result.shape == expected[name].shape, name


def assert_within(results, expected, magnitude, bound=BOUND):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.dtype == np.float32, name
        assert result.shape == expected[name].shape, name
        error = abs(result - expected[name])
        allowed = bound * magnitude[name]
        # `not <=` rather than `>`: an error of NaN is one too.
        wrong = np.argwhere(~(error <= allowed))
        if len(wrong):
            at = tuple(map(int, wrong[0]))
            raise AssertionError(
                f"{name}: {len(wrong)} of {result.size} results are off, the first at {at}: "
                f"{result[at]!r} instead of {expected[name][at]!r}; allowed is {allowed[at]:.3g}"
            )


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.tobytes() == expected[name].tobytes(), name
