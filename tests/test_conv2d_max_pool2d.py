"""Convolution with max-pooling behind it in one operation, beside the two and the reference."""

import functools

import numpy as np
import pytest

import fastconv
from conv2d_problems import Problem, both_layouts, integers, normals
from running import by_reference, running_on

PROBLEMS = both_layouts(
    [
        Problem((2, 8, 9, channels), filters)
        for channels, filters in ((1, 32), (1, 5), (2, 33), (3, 16), (4, 17), (5, 40), (17, 15))
    ]
    + [
        Problem((2, 9, 11, 3), 20, padding="same"),
        Problem((1, 9, 12, 24), 33, padding="same"),
        Problem((3, 7, 7, 16), 16, kernel=(1, 1)),
        Problem((2, 13, 11, 6), 18, kernel=(2, 3), strides=(2, 1), padding="same"),
        Problem((2, 17, 15, 3), 18, kernel=(3, 2), strides=(2, 3), padding=((2, 1), (0, 1))),
        Problem((2, 15, 14, 8), 9, dilation_rate=(2, 3), padding=((1, 2), (3, 0))),
        Problem((2, 9, 10, 16), 16, groups=16, padding="same"),
        Problem((2, 9, 10, 16), 24, groups=4, padding="same"),
        Problem((0, 6, 6, 3), 8),
        Problem((1, 4, 4, 9), 7),  # one window
        Problem((1, 4, 70, 1), 3),  # one row of windows
    ]
)
# Several strips and tasks.
LARGE = [
    Problem((32, 28, 28, 1), 32),
    Problem((32, 13, 13, 32), 64),
    Problem((1, 96, 95, 24), 64, padding="same"),
    Problem((1, 224, 224, 3), 64, padding="same"),
    # A batch in chunks, the last of which has fewer pixels than the filter's gradient has parts.
    Problem((2428, 4, 4, 3), 8, padding="same"),
]
# Whose gradients may be computed from lists of what is not zero.
SPARSE = [
    Problem((3, 9, 8, 1), 5),
    Problem((2, 13, 13, 32), 64),
    Problem((5, 7, 8, 33), 18, padding="same"),  # several images a block; three vectors of channels
    Problem((1, 40, 45, 70), 17, padding="same"),  # several blocks, groups of channels
    Problem((19, 4, 4, 16), 3),  # one window an image; more images than parts
    Problem((2, 4, 60, 7), 9),  # one row of windows
    Problem((2, 12, 12, 20), 50, (5, 5)),
    Problem((1, 30, 29, 34), 21, (5, 5), padding="same"),
    Problem((2, 15, 12, 8), 16, (1, 3), padding="same"),
    Problem((2, 15, 12, 18), 16, (2, 5)),
    Problem((2, 15, 12, 18), 16, (7, 3), padding="same"),  # several passes over the filter's rows
    Problem((2, 21, 19, 9), 11, (3, 3), (2, 1), ((2, 0), (1, 2))),
    Problem((2, 33, 19, 40), 10, (4, 3), (2, 2), ((2, 3), (1, 2))),
    Problem((1, 12, 12, 300), 270),  # groups of several tasks
]
over = functools.partial(pytest.mark.parametrize, "problem", ids=str)


def fused(problem, data, activation, **options):
    return fastconv.conv2d_max_pool2d(
        data.x, data.w, data.bias, activation=activation, **problem.geometry, **options
    )


def apart(problem, data, activation):
    y = fastconv.conv2d(data.x, data.w, data.bias, activation=activation, **problem.geometry)
    data_format = problem.geometry["data_format"]
    pooled, argmax = fastconv.max_pool2d(y, 2, return_argmax=True, data_format=data_format)
    return y, pooled, argmax


def gradient(problem, data, dy, output, argmax, activation, **options):
    return fastconv.conv2d_max_pool2d_grad(
        data.x, data.w, dy, output, argmax, activation=activation, **problem.geometry, **options
    )


def exact_algorithms(problem, data):
    """Those that make the sums of products themselves: exact for small integers."""
    names = ["direct", "small_channel", "depthwise", "grouped"]
    return [name for name in names if serves(problem, data, name)]


def serves(problem, data, algorithm):
    try:
        fused(problem, data, "linear", algorithm=algorithm)
    except ValueError:
        return algorithm == "direct"  # which serves everything
    return True


@over(PROBLEMS)
@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_exact(problem, activation, isa, threads):
    data = integers(problem)  # windows are full of ties
    with by_reference():
        expected, expected_argmax = fused(problem, data, activation, return_argmax=True)
    for algorithm in exact_algorithms(problem, data):
        out = np.full(expected.shape, np.nan, np.float32)
        options = {"algorithm": algorithm}
        y, argmax = fused(problem, data, activation, return_argmax=True, out=out, **options)
        assert y is out
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(argmax, expected_argmax)
        np.testing.assert_array_equal(fused(problem, data, activation, **options), expected)


@pytest.mark.parametrize(
    ("problem", "algorithm"),
    [(problem, "direct") for problem in PROBLEMS] + [(problem, "sparse") for problem in SPARSE],
    ids=str,
)
@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("with_input_grad", [True, False], ids=["dx", "no dx"])
def test_exact_gradients(problem, algorithm, activation, with_input_grad, isa, threads):
    data = integers(problem)
    _, output, argmax = apart(problem, data, activation)
    dy = problem.seed().integers(-3, 4, output.shape).astype(np.float32)
    arguments = (problem, data, dy, output, argmax, activation)
    with running_on(accuracy="strict"):  # for the gradient that `algorithm` does not name
        actual = gradient(*arguments, with_input_grad=with_input_grad, algorithm=algorithm)
    with by_reference():
        expected = gradient(*arguments, with_input_grad=with_input_grad)
    assert (actual[0] is None) == (not with_input_grad)
    for one, other in zip(actual, expected, strict=True):
        if other is not None:
            np.testing.assert_array_equal(one, other)


def test_sparse_gradients_of_what_relu_stops(isa):
    """Nothing is listed, a NaN is, and so is where y is NaN: not positive, for the others alike."""
    problem = Problem((2, 8, 8, 17), 6)
    data = normals(problem)
    y, argmax = fused(problem, data, "relu", return_argmax=True)
    for one in gradient(problem, data, y, 0 * y, argmax, "relu", algorithm="sparse"):
        assert not one.any()
    dy, output = np.ones_like(y), np.ones_like(y)
    dy[1, 0, 2, 3] = np.nan
    output[0, 0, 0, 1] = np.nan
    results = [
        gradient(problem, data, dy, output, argmax, "relu", algorithm=algorithm)
        for algorithm in ("sparse", "direct")
    ]
    for sparse, direct in zip(*results, strict=True):
        np.testing.assert_allclose(sparse, direct, rtol=0, atol=1e-4)  # NaN where NaN is
    dx, dw, dbias = results[0]
    assert np.isnan(dw[..., 3]).all()
    assert np.isnan(dbias).tolist() == [False, False, False, True, False, False]
    assert not np.isnan(dx[0]).any()


@pytest.mark.parametrize(
    "problem",
    [
        Problem((2, 8, 8, 16), 16, (1, 1)),
        Problem((2, 8, 8, 16), 16, dilation_rate=(1, 2)),
        Problem((2, 8, 8, 16), 16, groups=2),
        Problem((2, 14, 8, 16), 16, strides=(3, 1)),
        Problem((2, 8, 8, 16), 16, data_format="channels_first"),
    ],
    ids=str,
)
def test_sparse_refuses_what_it_does_not_serve(problem, isa):
    data = normals(problem)
    y, argmax = fused(problem, data, "relu", return_argmax=True)
    for with_input_grad, direction in ((True, "dgrad"), (False, "wgrad")):
        options = {"with_input_grad": with_input_grad, "algorithm": "sparse"}
        with pytest.raises(ValueError, match=rf"serves this {direction}.*algorithm='sparse'"):
            gradient(problem, data, y, y, argmax, "relu", **options)


def test_choice_of_sparse_gradients(isa):
    """Lists serve the article's second layer, not its first where one channel fills no vector.

    A preferred algorithm comes before.
    """

    def gradients(problem, data, y, argmax, algorithm=None):
        results = gradient(problem, data, y, y, argmax, "relu", algorithm=algorithm)
        return [one.tobytes() for one in results]

    for problem, sparse in ((LARGE[1], True), (LARGE[0], isa == "scalar")):
        data = normals(problem)
        y, argmax = fused(problem, data, "relu", return_argmax=True)
        named = gradients(problem, data, y, argmax, "sparse")
        assert (gradients(problem, data, y, argmax) == named) == sparse
        with running_on(algorithm="direct"):
            assert gradients(problem, data, y, argmax) != named


def test_sparse_filter_gradient_beside_another_input_gradient(isa):
    """Many channels: Winograd's dgrad and the listed wgrad."""
    problem = Problem((8, 34, 32, 128), 128, padding="same")
    data = normals(problem)
    y, argmax = fused(problem, data, "relu", return_argmax=True)
    dx, dw, dbias = gradient(problem, data, y, y, argmax, "relu")
    right = gradient(problem, data, y, y, argmax, "relu", algorithm="sparse")
    for one, other in zip((dx, dw, dbias), right, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * abs(other).max())


@over([*PROBLEMS, *LARGE])
def test_beside_the_two_operations(problem, isa, threads):
    """With the algorithms that the selector chooses, Winograd's roundings included."""
    data = normals(problem)
    whole, expected, _ = apart(problem, data, "relu")
    y, argmax = fused(problem, data, "relu", return_argmax=True)
    scale = abs(whole).max(initial=1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * scale)
    assert fused(problem, data, "relu").tobytes() == y.tobytes()

    dy = problem.seed().standard_normal(y.shape).astype(np.float32)
    data_format = problem.geometry["data_format"]
    dz = fastconv.max_pool2d_grad(dy * (y > 0), argmax, whole.shape, 2, data_format=data_format)
    dw, dbias = fastconv.conv2d_grad_filter(
        data.x, dz, problem.w_shape, return_bias_grad=True, **problem.geometry
    )
    dx = fastconv.conv2d_grad_input(dz, data.w, problem.x_shape, **problem.geometry)
    for with_input_grad in (True, False):
        actual = gradient(problem, data, dy, y, argmax, "relu", with_input_grad=with_input_grad)
        for one, other in zip(actual, (dx, dw, dbias), strict=True):
            if one is not None:
                atol = 1e-5 * abs(other).max(initial=1)
                np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_parts_of_an_image(isa):
    """An algorithm that does not pool itself does a few rows at a time of an image this large."""
    for problem in (
        Problem((1, 101, 127, 7), 61, padding="same"),
        Problem((1, 203, 100, 2), 64, (4, 3), (2, 1), ((3, 2), (1, 1)), (3, 1)),
    ):
        data = normals(problem)
        y, argmax = fused(problem, data, "relu", return_argmax=True, algorithm="direct")
        whole = fastconv.conv2d(
            data.x, data.w, data.bias, activation="relu", algorithm="direct", **problem.geometry
        )
        expected, expected_argmax = fastconv.max_pool2d(whole, 2, return_argmax=True)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
        assert np.mean(argmax == expected_argmax) > 0.999  # roundings may decide near ties


@over([
    Problem((1, 128, 64, 24), 80, (3, 1), padding="same"),
    Problem((1, 128, 64, 24), 80, padding="same", dilation_rate=(2, 2)),
])  # fmt: skip
def test_strips_begin_where_tiles_do(problem, isa):
    """Where a convolution does not pool by itself, its parts have the bits of the whole."""
    data = normals(problem)
    with running_on(algorithm="winograd4"):
        _, expected, _ = apart(problem, data, "relu")
        np.testing.assert_array_equal(fused(problem, data, "relu"), expected)


@over([*PROBLEMS[:8], *LARGE[:3], *SPARSE[1:5], Problem((37, 13, 13, 32), 64)])
def test_thread_counts_agree_bit_for_bit(problem, isa):
    data = normals(problem)
    results = set()
    for threads in (1, 2, 3, 5):
        with running_on(threads=threads):
            y, argmax = fused(problem, data, "relu", return_argmax=True)
            gradients = gradient(problem, data, y, y, argmax, "relu")
            first_layer = gradient(problem, data, y, y, argmax, "relu", with_input_grad=False)[1:]
            arrays = [y, argmax, *gradients, *first_layer]
            if problem in SPARSE:
                arrays += gradient(problem, data, y, y, argmax, "relu", algorithm="sparse")
            results.add(tuple(array.tobytes() for array in arrays))
    assert len(results) == 1


def test_nan_comes_through(isa):
    x = np.zeros((1, 8, 8, 1), np.float32)
    x[0, 3, 3, 0] = np.nan
    y = fastconv.conv2d_max_pool2d(x, np.ones((1, 1, 1, 20), np.float32), activation="relu")
    assert np.isnan(y[0, 1, 1]).all()
    y[0, 1, 1] = 0
    assert (y == 0).all()


def test_outputs_without_a_window_are_refused():
    x, w = np.ones((1, 3, 8, 2), np.float32), np.ones((2, 3, 2, 4), np.float32)
    assert fastconv.conv2d_max_pool2d(x, w).shape == (1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"at least 2 x 2.*Received: an output of 1 x 6"):
        fastconv.conv2d_max_pool2d(x[:, :2], w)


def test_foreign_argmax_is_refused():
    x, w = np.ones((1, 4, 4, 2), np.float32), np.ones((1, 1, 2, 4), np.float32)
    y, argmax = fastconv.conv2d_max_pool2d(x, w, return_argmax=True)
    argmax[0, 1, 1, 2] = 4
    with pytest.raises(ValueError, match=r"from 0 to 3.*with value 4"):
        fastconv.conv2d_max_pool2d_grad(x, w, y, y, argmax)
    with pytest.raises(TypeError, match="uint8"):
        fastconv.conv2d_max_pool2d_grad(x, w, y, y, argmax.astype(np.int32))


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
def test_algorithm_of_the_gradient_of_no_images(algorithm):
    """It names that of the gradient by x, which is empty; the others are zero."""
    x, w = np.ones((0, 6, 6, 2), np.float32), np.ones((3, 3, 2, 4), np.float32)
    y, argmax = fastconv.conv2d_max_pool2d(x, w, return_argmax=True, algorithm=algorithm)
    dx, dw, dbias = fastconv.conv2d_max_pool2d_grad(x, w, y, y, argmax, algorithm=algorithm)
    assert dx.shape == x.shape
    assert (dw == 0).all()
    assert (dbias == 0).all()
    with pytest.raises(ValueError, match="must be one that serves this dgrad"):
        fastconv.conv2d_max_pool2d_grad(x, w, y, y, argmax, algorithm="depthwise")
