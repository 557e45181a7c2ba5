"""Winograd's algorithms of strides, taken as images of more channels: against float64, on every instruction set."""

import itertools

import numpy as np
import pytest

import fastconv
import oracle
from conv2d_problems import Problem, rounded_case, solve
from fastconv import PackedFilter
from running import running_on

STRIDED = "winograd_strided"
ERROR = 1e-5  # over the largest result

PROBLEMS = [
    Problem((2, 13, 14, 20), 24, (5, 5), (2, 2), "same"),
    Problem((1, 51, 47, 3), 96, (11, 11), (4, 4), "valid"),  # as AlexNet's first layer
    Problem((2, 20, 23, 3), 32, (7, 7), (2, 2), "same"),  # as a ResNet's
    Problem((2, 32, 33, 16), 40, (4, 4), (2, 2), "same"),  # no tap is zero
    Problem((2, 21, 26, 17), 33, (3, 3), (2, 2), "same"),
    Problem((1, 19, 18, 33), 16, (5, 3), (2, 1), "same"),
    Problem((1, 18, 19, 9), 20, (3, 6), (1, 2), ((1, 1), (2, 3))),
    Problem((2, 25, 24, 5), 7, (7, 8), (3, 3), ((4, 1), (0, 5))),
    Problem((1, 26, 27, 4), 130, (12, 11), (3, 3), "valid"),
    Problem((1, 40, 37, 2), 8, (17, 19), (9, 10), "same"),  # more rows than are told apart
    Problem((1, 9, 8, 8), 8, (5, 5), (2, 2), ((11, 4), (12, 5))),  # windows in the padding alone
    Problem((2, 11, 12, 6), 9, (5, 6), (2, 2), "valid"),  # pixels that no window meets
    Problem((1, 5, 5, 1), 1, (5, 5), (2, 2), "valid"),  # one output
    Problem((0, 9, 9, 8), 8, (5, 5), (2, 2), "same"),
    # Many blocks of tiles, in chunks of images; few, and a large filter.
    Problem((9, 150, 141, 12), 24, (5, 5), (2, 2), "same"),
    Problem((2, 15, 14, 130), 140, (4, 4), (2, 2), "same"),
    Problem((1, 16, 15, 72), 80, (5, 5), (2, 2), "same", data_format="channels_first"),
]


def has_wgrad(problem):
    """The gradient by the filters has tiles of 3 x 3 taps alone."""
    return -(-problem.kernel[0] // problem.strides[0]) == 3


def largest_error(result, expected, least_scale=0.0):
    scale = np.abs(expected).max(initial=least_scale)
    return np.abs(result - expected).max(initial=0) / scale if scale > 0 else 0.0


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_against_float64(problem, isa):
    data, expected = rounded_case(problem)
    directions = ("fprop", "dgrad", "wgrad") if has_wgrad(problem) else ("fprop", "dgrad")
    for direction in directions:
        choice = fastconv.explain(
            problem.x_shape, problem.w_shape, direction=direction, **problem.geometry
        )
        assert STRIDED in {candidate["algorithm"] for candidate in choice["candidates"]}
    with running_on(algorithm=STRIDED):
        results = solve(problem, data)
    by_filters = ("dw", "dw_fused", "dbias_fused") if has_wgrad(problem) else ()
    for name in ("y", "dx", "y_fused", "dx_fused", *by_filters):
        assert results[name].dtype == np.float32
        assert results[name].shape == expected[name].shape
        # The bias of a lone channel has a lone gradient, a sum that may cancel.
        least_scale = 1 if name == "dbias_fused" else 0
        assert largest_error(results[name], expected[name], least_scale) < ERROR, name


def test_every_number_of_taps_and_stride(isa, rng):
    """Taps that are zeros, of which some rows and columns of pixels taken together have more than others."""
    for stride_h, stride_w, taps in itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4)):
        if stride_h == stride_w == 1:
            continue
        for less_h, less_w in itertools.product(range(stride_h), range(stride_w)):
            r, s = taps * stride_h - less_h, taps * stride_w - less_w
            x = rng.standard_normal((1, r + 2 * stride_h, s + 3 * stride_w, 5)).astype(np.float32)
            w = rng.standard_normal((r, s, 5, 18)).astype(np.float32)
            geometry = {"strides": (stride_h, stride_w), "padding": "valid"}
            y = fastconv.conv2d(x, w, algorithm=STRIDED, **geometry)
            assert largest_error(y, oracle.conv2d(x, w, dilation_rate=(1, 1), **geometry)) < ERROR
            dx = fastconv.conv2d_grad_input(y, w, x.shape, algorithm=STRIDED, **geometry)
            right = fastconv.conv2d_grad_input(y, w, x.shape, algorithm="direct", **geometry)
            assert largest_error(dx, right) < ERROR
            if taps == 3:
                dw = fastconv.conv2d_grad_filter(x, y, w.shape, algorithm=STRIDED, **geometry)
                right = fastconv.conv2d_grad_filter(x, y, w.shape, algorithm="direct", **geometry)
                assert largest_error(dw, right) < ERROR


@pytest.mark.parametrize(
    ("kernel", "strides", "padding"),
    [
        ((5, 5), (2, 2), "same"),
        ((4, 4), (2, 2), "same"),
        ((3, 3), (2, 2), ((0, 1), (1, 0))),
        ((7, 6), (3, 2), "same"),
        ((10, 9), (4, 3), ((11, 0), (3, 10))),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_blank_parts_are_exactly_the_bias(kernel, strides, padding, activation, isa, rng):
    """ReLU's gradient depends on whether a result is exactly 0."""
    shape = 2, 50, 61, 9
    x = rng.standard_normal(shape).astype(np.float32)
    x[:, 3:29, 5:51] = 0
    x[1, :, 35:] = -0.0
    x[0, 30] = 0
    x[..., 4] *= 0  # one channel of a pixel does not make it blank, nor keep it from being so
    w = rng.standard_normal((*kernel, 9, 24)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32)
    geometry = {"strides": strides, "padding": padding}
    y = fastconv.conv2d(x, w, bias, activation=activation, algorithm=STRIDED, **geometry)
    # How many of the pixels under a filter are not zero.
    ones = np.ones((*kernel, 1, 1))
    live = (x != 0).any(3, keepdims=True).astype(np.float64)
    met = oracle.conv2d(live, ones, dilation_rate=(1, 1), **geometry)[..., 0]
    expected = np.maximum(bias, 0) if activation else bias
    blank = y[met == 0]
    assert len(blank) > 20
    np.testing.assert_array_equal(blank, np.broadcast_to(expected, blank.shape))
    assert (y[met > 0] != expected).any(1).mean() > 0.9

    # dgrad too, where dy is zero or ReLU has stopped it.
    dy, output = rng.standard_normal((2, *y.shape)).astype(np.float32)
    dy[:, :3] = 0
    output[:, 2:8, 4:12] = -1
    options = {"activation": activation, "output": output} if activation else {}
    dx = fastconv.conv2d_grad_input(dy, w, shape, algorithm=STRIDED, **options, **geometry)
    masked = dy * (output > 0) if activation else dy
    live = (masked != 0).any(3, keepdims=True).astype(np.float32)
    met = fastconv.conv2d_grad_input(
        live, ones.astype(np.float32), (*shape[:3], 1), algorithm="direct", **geometry
    )[..., 0]
    assert (met == 0).sum() > 20
    assert not dx[met == 0].any()
    assert (dx[met > 0] != 0).all()


def test_same_bits_for_any_number_of_threads(isa, rng):
    for problem in PROBLEMS:
        x = rng.standard_normal(problem.x_shape).astype(np.float32)
        w = rng.standard_normal(problem.w_shape).astype(np.float32)
        options = {"algorithm": STRIDED, **problem.geometry}
        results = {}
        for threads in (1, 2, 3, 7):
            with running_on(threads=threads):
                y = fastconv.conv2d(x, w, **options)
                dx = fastconv.conv2d_grad_input(y, w, x.shape, **options)
                results[threads] = y.tobytes(), dx.tobytes()
                if has_wgrad(problem):
                    dw, dbias = fastconv.conv2d_grad_filter(
                        x, y, w.shape, return_bias_grad=True, **options
                    )
                    results[threads] += (dw.tobytes(), dbias.tobytes())
        assert all(of_threads == results[1] for of_threads in results.values())


@pytest.mark.parametrize(
    ("kernel", "shape"), [((5, 5), (5, 150, 141, 12)), ((3, 3), (9, 90, 80, 24))]
)
def test_images_in_chunks_have_the_bits_of_each_alone(kernel, shape, isa, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    w = rng.standard_normal((*kernel, shape[3], 40)).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32)
    options = {"strides": 2, "padding": "same", "activation": "relu", "algorithm": STRIDED}
    y = fastconv.conv2d(x, w, bias, **options)
    output = rng.standard_normal(y.shape).astype(np.float32)
    dx = fastconv.conv2d_grad_input(y, w, shape, output=output, **options)
    for i in range(shape[0]):
        image = slice(i, i + 1)
        alone = fastconv.conv2d(x[image], w, bias, **options)
        assert y[image].tobytes() == alone.tobytes()
        alone = fastconv.conv2d_grad_input(
            y[image], w, (1, *shape[1:]), output=output[image], **options
        )
        assert dx[image].tobytes() == alone.tobytes()


def test_kept_filters(isa, rng):
    x = rng.standard_normal((3, 40, 41, 20)).astype(np.float32)
    w = rng.standard_normal((6, 6, 20, 40)).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32)
    packed = PackedFilter(w)
    for strides in ((2, 2), (3, 3), (2, 2)):
        options = {"strides": strides, "algorithm": STRIDED}
        expected = fastconv.conv2d(x, w, bias, **options)
        right = fastconv.conv2d_grad_input(expected, w, x.shape, **options)
        for _ in range(2):
            assert fastconv.conv2d(x, packed, bias, **options).tobytes() == expected.tobytes()
            dx = fastconv.conv2d_grad_input(expected, packed, x.shape, **options)
            assert dx.tobytes() == right.tobytes()
    # One form for each stride and direction.
    forms = packed.nbytes
    fastconv.conv2d(x, packed, bias, strides=(3, 3), algorithm=STRIDED)
    assert packed.nbytes == forms


def test_pooling_behind_it(isa, rng):
    x = rng.standard_normal((2, 43, 40, 12)).astype(np.float32)
    w = rng.standard_normal((5, 5, 12, 24)).astype(np.float32)
    options = {"strides": 2, "activation": "relu", "algorithm": STRIDED}
    y = fastconv.conv2d(x, w, **options)
    pooled = fastconv.conv2d_max_pool2d(x, w, **options)
    np.testing.assert_array_equal(pooled, fastconv.max_pool2d(y, 2))


@pytest.mark.parametrize(
    ("shape", "kernel", "filters", "strides", "padding"),
    [
        ((8, 64, 64, 64), (5, 5), 128, 2, "same"),
        ((8, 64, 64, 64), (4, 4), 128, 2, "same"),
        ((1, 227, 227, 3), (11, 11), 96, 4, "valid"),
    ],
)
def test_default_accuracy_chooses_it_and_strict_does_not(shape, kernel, filters, strides, padding):
    def choice(direction):
        w = (*kernel, shape[3], filters)
        return fastconv.explain(shape, w, direction=direction, strides=strides, padding=padding)

    with running_on(isa=fastconv.info()["isa_available"][0], accuracy="default"):
        for direction in ("fprop", "dgrad"):
            assert choice(direction)["algorithm"] == STRIDED
        if kernel != (11, 11):
            assert (choice("wgrad")["algorithm"] == STRIDED) == (kernel == (5, 5))
    with running_on(accuracy="strict"):
        for direction in ("fprop", "dgrad"):
            strict = choice(direction)
            assert not strict["algorithm"].startswith("winograd")
            assert STRIDED in {c["algorithm"] for c in strict["candidates"] if not c["allowed"]}


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 1},
        {"dilation_rate": 2, "strides": 1},
        {"groups": 2},
        {"kernel": (2, 2)},  # one tap
        {"kernel": (9, 9)},  # five
        {"kernel": (5, 3)},  # three by two
    ],
    ids=str,
)
def test_refuses_what_it_does_not_serve(options):
    options = {"strides": 2, **options}
    kernel = options.pop("kernel", (5, 5))
    x = np.ones((1, 19, 19, 8), np.float32)
    w = np.ones((*kernel, 8 // options.get("groups", 1), 8), np.float32)
    with pytest.raises(ValueError, match="must be one that serves this fprop"):
        fastconv.conv2d(x, w, algorithm=STRIDED, **options)
