"""Winograd's algorithms: against float64, on every instruction set, with the error they promise."""

import dataclasses
import itertools

import numpy as np
import pytest

import fastconv
import oracle
from conv2d_problems import Problem, rounded_case, solve
from running import running_on

ALGORITHMS = ["winograd2", "winograd3", "winograd4", "winograd5"]

PROBLEMS = [
    Problem((2, height, width, channels), filters, padding=padding)
    for (height, width), (channels, filters), padding in itertools.product(
        [(3, 3), (4, 9), (7, 6), (12, 13)],
        [(1, 1), (5, 3), (16, 32), (33, 17), (40, 70)],
        ["valid", "same", ((1, 2), (0, 1)), ((2, 0), (3, 4))],
    )
] + [
    Problem((1, 1, 1, 17), 33, padding="same"),
    Problem((0, 8, 8, 4), 4),
    Problem((3, 1, 20, 8), 9, padding="same"),
    Problem((1, 20, 1, 8), 9, padding="same"),
    # Many blocks of tiles: inputs are transformed task by task.
    Problem((2, 70, 75, 24), 40, padding="same"),
    # Few tiles and a large filter, which is transformed by panels and chunks of channels.
    Problem((1, 10, 11, 130), 140, padding="same"),
    Problem((2, 8, 7, 600), 33, padding=((1, 0), (0, 2))),
    Problem((32, 13, 13, 32), 64),  # the article's second layer
    Problem((2, 9, 11, 48), 20, padding="same", groups=2),
    Problem((1, 13, 13, 27), 75, padding=((1, 0), (0, 2)), groups=3),
    # A last row, a last column, or both, which tiles of 4 x 4 leave to the direct sum.
    Problem((3, 9, 12, 33), 17, padding="same"),
    Problem((2, 12, 17, 16), 24, padding="same"),
    Problem((2, 13, 9, 20), 40, padding="same"),
    Problem((1, 17, 13, 48), 20, padding="same", groups=2),
    Problem((2, 15, 11, 9), 21, padding=((0, 0), (3, 1))),
]


def fits(problem, kernel):
    if problem.padding == "same":
        return True
    pads = (0, 0) if problem.padding == "valid" else map(sum, problem.padding)
    sizes = zip(problem.x[1:3], pads, kernel, strict=True)
    return all(size + pad >= taps for size, pad, taps in sizes)


# Filters that an algorithm has no tiles for are the other's.
KERNELS = {
    "winograd2": [(3, 3), (5, 5), (1, 5), (5, 1)],
    "winograd3": [(4, 4)],
    "winograd4": [(3, 3), (1, 3), (3, 1)],
    "winograd5": [(2, 2)],
}
OF_3X3 = ["winograd2", "winograd4"]
PROBLEMS_BY_ALGORITHM = list(itertools.product(OF_3X3, PROBLEMS))
for algorithm, kernels in KERNELS.items():
    for kernel in kernels:
        if kernel != (3, 3):
            PROBLEMS_BY_ALGORITHM += [
                (algorithm, dataclasses.replace(problem, kernel=kernel))
                for problem in PROBLEMS
                if fits(problem, kernel)
            ]
        # Phases of unequal numbers of tiles, of one place, and beyond the image; and two dilations at once.
        PROBLEMS_BY_ALGORITHM += [
            (algorithm, Problem(x, filters, kernel, padding=padding, dilation_rate=rate, **groups))
            for x, filters, padding, rate, groups in [
                ((2, 13, 14, 20), 24, "same", (2, 2), {}),
                ((1, 33, 17, 8), 33, "same", (4, 4), {}),
                ((1, 9, 40, 17), 5, "same", (12, 3), {}),
                ((1, 23, 22, 9), 20, ((3, 0), (1, 4)), (1, 5), {}),
                ((1, 22, 23, 9), 20, ((0, 2), (5, 1)), (5, 1), {}),
                ((2, 30, 31, 16), 24, "same", (3, 2), {"groups": 2}),
                ((1, 10, 11, 300), 140, "same", (2, 3), {}),
            ]
        ]


def largest_error(result, expected, least_scale=0.0):
    """Over the largest result, as the accuracy setting counts it."""
    scale = np.abs(expected).max(initial=least_scale)
    return np.abs(result - expected).max(initial=0) / scale if scale > 0 else 0.0


@pytest.mark.parametrize(("algorithm", "problem"), PROBLEMS_BY_ALGORITHM, ids=str)
def test_against_float64(algorithm, problem, isa):
    data, expected = rounded_case(problem)
    with running_on(algorithm=algorithm):
        results = solve(problem, data)
    # The gradient by the filters has an algorithm of tiles of 4 x 4 alone.
    by_filters = ("dw", "dw_fused", "dbias_fused") if algorithm == "winograd4" else ()
    for name in ("y", "dx", "y_fused", "dx_fused", *by_filters):
        assert results[name].dtype == np.float32
        assert results[name].shape == expected[name].shape
        # The bias of a lone channel has a lone gradient, a sum that may cancel.
        least_scale = 1 if name == "dbias_fused" else 0
        assert largest_error(results[name], expected[name], least_scale) < 1e-5, name


@pytest.mark.parametrize("algorithm", OF_3X3)
def test_large_filters_of_few_tiles_are_transformed_by_panels(algorithm):
    def blocking(shape, filters):
        with running_on(algorithm=algorithm, threads=2):
            return fastconv.explain(shape, (3, 3, shape[-1], filters), padding="same")["blocking"]

    by_panels = "filters transformed by panels"
    assert by_panels in blocking((1, 10, 11, 256), 256)
    assert by_panels not in blocking((1, 10, 11, 32), 32)
    assert by_panels not in blocking((2, 70, 75, 256), 256)
    # One panel is not enough for two threads.
    assert by_panels not in blocking((1, 10, 11, 4096), 1)


def test_a_row_left_over_at_the_padding_is_summed_directly():
    def blocking(size, direction="fprop", padding="same"):
        with running_on(algorithm="winograd4"):
            return fastconv.explain(
                (2, size, size, 32), (3, 3, 32, 32), padding=padding, direction=direction
            )["blocking"]

    directly = "the rest directly"
    assert "18 tiles of 4 x 4" in blocking(13)
    assert directly in blocking(13)
    assert directly in blocking(13, "dgrad", "valid")
    # Nothing is left over; two rows are; all taps meet the image.
    for size, padding in [(12, "same"), (14, "same"), (15, "valid")]:
        assert directly not in blocking(size, padding=padding)


@pytest.mark.parametrize("channels", [32, 128, 512])
@pytest.mark.parametrize(
    ("algorithm", "kernel", "rms"),
    [
        ("winograd2", (3, 3), 1e-6),
        ("winograd4", (3, 3), 3e-6),
        ("winograd2", (5, 5), 3e-6),
        ("winograd4", (1, 3), 1e-6),
        ("winograd2", (5, 1), 1e-6),
        ("winograd3", (4, 4), 3e-6),
        ("winograd5", (2, 2), 3e-6),
    ],
)
def test_error_is_what_the_documentation_says(algorithm, kernel, rms, channels, rng):
    """Whatever the number of channels; the direct sum's rms error is 3e-7 to 6e-7 here."""
    x = rng.standard_normal((1, 20, 20, channels)).astype(np.float32)
    w = rng.standard_normal((*kernel, channels, 32)).astype(np.float32)
    expected = oracle.conv2d(x, w, strides=(1, 1), padding="valid", dilation_rate=(1, 1))
    error = fastconv.conv2d(x, w, algorithm=algorithm) - expected
    scale = np.sqrt(np.mean(expected**2))
    assert np.sqrt(np.mean(error**2)) < rms * scale
    assert np.abs(error).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("images", [1, 30])
def test_error_of_the_gradient_by_filters(images, positive, isa, rng):
    """Whatever the number of pixels, of which some 32,000 are summed, in parts, at most."""
    x = rng.standard_normal((images, 33, 34, 20)).astype(np.float32)
    dy = rng.standard_normal((images, 33, 34, 40)).astype(np.float32)
    if positive:
        x, dy = abs(x), abs(dy)
    geometry = {"strides": (1, 1), "padding": "same", "dilation_rate": (1, 1)}
    expected, _ = oracle.conv2d_grad_filter(x, dy, (3, 3, 20, 40), **geometry)
    dw = fastconv.conv2d_grad_filter(x, dy, (3, 3, 20, 40), padding="same", algorithm="winograd4")
    assert largest_error(dw, expected) < 3e-6


def test_channels_without_a_signal_have_no_gradient(isa, rng):
    """Exactly 0, as of the direct sum: of a unit that ReLU has stopped for good."""
    x = rng.standard_normal((3, 12, 13, 20)).astype(np.float32)
    dy = rng.standard_normal((3, 12, 13, 24)).astype(np.float32)
    x[..., 5] = 0
    dy[..., 17] = 0
    dw = fastconv.conv2d_grad_filter(x, dy, (3, 3, 20, 24), padding="same", algorithm="winograd4")
    assert not dw[:, :, 5].any()
    assert not dw[..., 17].any()
    assert dw[:, :, 4, 16].all()


@pytest.mark.parametrize(
    ("algorithm", "kernel", "rate"),
    [
        *((algorithm, kernel, 1) for algorithm in ALGORITHMS for kernel in KERNELS[algorithm]),
        ("winograd2", (3, 3), 2),
        ("winograd2", (1, 5), 3),
        ("winograd4", (3, 3), 3),
    ],
)
@pytest.mark.parametrize("height", [18, 90], ids=["few_tiles", "many_tiles"])
def test_blank_parts_are_exactly_the_bias(algorithm, kernel, rate, height, isa, rng):
    """ReLU's gradient depends on whether a result is exactly 0."""
    shape = 2, height, 45, 20
    x = rng.standard_normal(shape).astype(np.float32)
    x[:, 3:15, 5:31] = 0
    x[1, :, 35:] = 0
    w = rng.standard_normal((*kernel, 20, 24)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32)
    options = {"padding": "same", "algorithm": algorithm, "dilation_rate": rate}
    y = fastconv.conv2d(x, w, bias, **options)
    down, across = (rate * (taps // 2) for taps in kernel)  # how far a filter reaches at most
    inside = slice(3 + down, 15 - down), slice(5 + across, 31 - across)
    for blank in (y[:, inside[0], inside[1]], y[1, :, 35 + across :]):
        assert blank.size
        np.testing.assert_array_equal(blank, np.broadcast_to(bias, blank.shape))
    # dgrad too, where dy is zero or ReLU has stopped it.
    dy, output = rng.standard_normal((2, *y.shape)).astype(np.float32)
    output[:, 3:15, 5:31] = -1
    dx = fastconv.conv2d_grad_input(dy, w, shape, activation="relu", output=output, **options)
    assert not dx[:, inside[0], inside[1]].any()
    assert dx[:, 0, 10].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_for_any_number_of_threads(algorithm, isa, rng):
    cases = [((1, 30, 31, 40), 72), ((3, 9, 9, 16), 160), ((1, 130, 50, 8), 8)]
    for (shape, filters), kernel in itertools.product(cases, KERNELS[algorithm]):
        rate = 2 if kernel == (3, 3) and shape[0] == 3 else 1
        options = {"padding": "same", "dilation_rate": rate, "algorithm": algorithm}
        x = rng.standard_normal(shape).astype(np.float32)
        w = rng.standard_normal((*kernel, shape[3], filters)).astype(np.float32)
        results = {}
        for threads in (1, 2, 3, 7):
            with running_on(threads=threads):
                y = fastconv.conv2d(x, w, **options)
                dx = fastconv.conv2d_grad_input(y, w, shape, **options)
                results[threads] = y.tobytes(), dx.tobytes()
                if algorithm == "winograd4":
                    dw = fastconv.conv2d_grad_filter(x, y, w.shape, **options)
                    results[threads] += (dw.tobytes(),)
        assert all(of_threads == results[1] for of_threads in results.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("shape", "filters"),
    [
        ((5, 150, 151, 24), 8),  # more than 12 MiB: tiles ask for the next one's pixels
        ((5, 229, 230, 16), 16),  # more than 32 MiB: the output is written past the caches
    ],
    ids=str,
)
def test_images_beyond_the_caches_have_the_bits_of_each_alone(algorithm, shape, filters, isa, rng):
    for kernel in KERNELS[algorithm]:
        options = {"padding": "same", "algorithm": algorithm, "activation": "relu"}
        x, output = rng.standard_normal((2, *shape)).astype(np.float32)
        w = rng.standard_normal((*kernel, shape[3], filters)).astype(np.float32)
        bias = rng.standard_normal(filters).astype(np.float32)
        y = fastconv.conv2d(x, w, bias, **options)
        # The gradient by an input of as many channels as `x`, where filters are turned.
        turned, one = np.ascontiguousarray(w.transpose(0, 1, 3, 2)), (1, *y.shape[1:])
        dx = fastconv.conv2d_grad_input(x, turned, y.shape, output=output, **options)
        for i in range(shape[0]):
            image = slice(i, i + 1)
            alone = fastconv.conv2d(x[image], w, bias, **options)
            assert y[image].tobytes() == alone.tobytes()
            alone = fastconv.conv2d_grad_input(
                x[image], turned, one, output=output[image], **options
            )
            assert dx[image].tobytes() == alone.tobytes()
        if algorithm == "winograd4":
            gradients = {
                name: fastconv.conv2d_grad_filter(
                    x, y, w.shape, output=y, **{**options, "algorithm": name}
                )
                for name in ("direct", algorithm)
            }
            assert largest_error(gradients[algorithm], gradients["direct"]) < 2e-5


@pytest.mark.parametrize(
    ("algorithm", "shape", "kernel", "rate"),
    [
        ("winograd4", (1, 33, 33, 256), (3, 3), 2),  # a network that segments images
        ("winograd2", (1, 27, 27, 96), (5, 5), 1),  # AlexNet's second layer
        ("winograd4", (8, 1, 500, 128), (1, 3), 4),  # sequences
        ("winograd2", (1, 17, 17, 192), (5, 1), 1),
        ("winograd3", (2, 31, 31, 256), (4, 4), 1),  # a discriminator of patches
        ("winograd5", (2, 40, 40, 128), (2, 2), 1),
    ],
)
def test_is_chosen_beyond_3x3(algorithm, shape, kernel, rate):
    with running_on(isa=fastconv.info()["isa_available"][0], accuracy="default"):
        for direction in ("fprop", "dgrad"):
            choice = fastconv.explain(
                shape, (*kernel, shape[3], 256), direction=direction, padding="same",
                dilation_rate=rate,
            )  # fmt: skip
            assert choice["algorithm"] == algorithm


def test_default_accuracy_chooses_it_and_strict_does_not():
    shapes = (8, 28, 28, 128), (3, 3, 128, 128)
    with running_on(isa=fastconv.info()["isa_available"][0], accuracy="default"):
        for direction in ("fprop", "dgrad", "wgrad"):
            choice = fastconv.explain(*shapes, direction=direction, padding="same")
            assert choice["algorithm"].startswith("winograd")
    with running_on(accuracy="strict"):
        for direction in ("fprop", "dgrad", "wgrad"):
            choice = fastconv.explain(*shapes, direction=direction, padding="same")
            assert choice["algorithm"] == "direct"
        choice = fastconv.explain(*shapes, padding="same")
        refused = [c for c in choice["candidates"] if not c["allowed"]]
        assert {c["algorithm"] for c in refused} == set(OF_3X3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "options",
    [{"strides": 2}, {"groups": 2}, {"kernel": (2, 3)}, {"kernel": (3, 5)}, {"kernel": (7, 7)}],
    ids=["strided", "grouped", "2x3", "3x5", "7x7"],
)
def test_refuses_what_it_does_not_serve(algorithm, options):
    options = dict(options)
    x = np.ones((1, 9, 9, 8), np.float32)
    kernel = options.pop("kernel", (3, 3))
    w = np.ones((*kernel, 8 // options.get("groups", 1), 8), np.float32)
    with pytest.raises(ValueError, match="must be one that serves this fprop"):
        fastconv.conv2d(x, w, algorithm=algorithm, **options)
