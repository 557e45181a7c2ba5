"""Filters that are kept: the same bits as of the array, from whichever layout a call asks for."""

import copy
import itertools
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastconv
from conv2d_problems import Problem, normals
from fastconv import PackedFilter, _core
from running import by_reference, running_on

ISAS = fastconv.info()["isa_available"]

# Filters packed as a whole and by chunks, of one tap and of several; few pixels and many; Winograd by blocks,
# with filters of each core's own, by groups and by panels; and what has no form of its own to keep.
PROBLEMS = [
    Problem((1, 7, 7, 160), 200, kernel=(1, 1)),
    Problem((8, 14, 14, 48), 72, kernel=(1, 1)),
    Problem((1, 7, 7, 512), 40, kernel=(1, 1)),
    Problem((1, 9, 9, 136), 33, strides=(2, 2), padding="same"),
    Problem((1, 5, 6, 20), 40, padding=((0, 3), (2, 1)), dilation_rate=(2, 1)),
    Problem((1, 6, 6, 130), 64, padding="same", dilation_rate=(3, 3)),
    Problem((2, 15, 15, 24), 24, kernel=(5, 3), strides=(3, 1)),
    Problem((1, 12, 12, 64), 64, padding="same"),
    Problem((4, 28, 28, 32), 48, padding="same"),
    Problem((1, 14, 14, 256), 256, padding="same"),
    Problem((2, 10, 10, 32), 32, padding="same", groups=2),
    Problem((1, 13, 13, 96), 80, padding="same"),  # of tiles, but for a row and a column
    Problem((1, 9, 9, 256), 256, padding="same", groups=32),
    Problem((2, 20, 20, 3), 16),
    Problem((2, 8, 8, 24), 24, padding="same", groups=24),
    Problem((0, 8, 8, 16), 16),
    Problem((3, 11, 10, 20), 36, padding="same", data_format="channels_first"),
    # dgrad: residues without taps, with fewer taps than others, and without pixels
    Problem((2, 9, 8, 40), 24, kernel=(1, 1), strides=(2, 2)),
    Problem((1, 13, 17, 20), 130, kernel=(3, 4), strides=(3, 2), padding=((1, 2), (3, 0))),
    Problem((1, 2, 9, 24), 40, kernel=(2, 2), strides=(3, 4), padding=((0, 1), (0, 0))),
    Problem((1, 15, 15, 16), 48, strides=(2, 3), padding="same", dilation_rate=(3, 2)),
    Problem((2, 9, 8, 16), 24, strides=(1_000_000, 2**31 - 1), padding="same"),
]


def algorithms_of(problem, direction="fprop"):
    plan = fastconv.explain(
        problem.x_shape, problem.w_shape, direction=direction, **problem.geometry
    )
    return [candidate["algorithm"] for candidate in plan["candidates"]]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_same_bits_as_of_the_array(problem, isa, threads):
    data = normals(problem)
    packed = PackedFilter(data.w)
    with running_on(isa=isa, threads=threads):
        for algorithm in [None, *algorithms_of(problem)]:
            options = {**problem.geometry, "activation": "relu", "algorithm": algorithm}
            right = fastconv.conv2d(data.x, data.w, data.bias, **options)
            for _ in range(2):  # the first one packs
                y = fastconv.conv2d(data.x, packed, data.bias, **options)
                assert y.tobytes() == right.tobytes(), algorithm


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_same_gradient_as_of_the_array(problem, isa, threads):
    data = normals(problem)
    packed = PackedFilter(data.w)
    with running_on(isa=isa, threads=threads):
        for algorithm in [None, *algorithms_of(problem, "dgrad")]:
            options = {**problem.geometry, "activation": "relu", "algorithm": algorithm}
            arguments = {"input_shape": problem.x_shape, "output": data.output, **options}
            right = fastconv.conv2d_grad_input(data.dy, data.w, **arguments)
            for _ in range(2):  # the first one packs
                dx = fastconv.conv2d_grad_input(data.dy, packed, **arguments)
                assert dx.tobytes() == right.tobytes(), algorithm


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(*[st.integers(1, most) for most in (3, 12, 12, 5, 80)]),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.sampled_from(["valid", "same"]),
    st.integers(1, 3),
)
def test_any_shape(sizes, kernel, strides, rates, padding, groups):
    n, h, w, channels, filters = sizes
    problem = Problem(
        (n, h + 4, w + 4, channels * 7 * groups), filters * groups, kernel, strides, padding,
        rates, groups,
    )  # fmt: skip
    data = normals(problem)
    right = fastconv.conv2d(data.x, data.w, **problem.geometry)
    right_dx = fastconv.conv2d_grad_input(data.dy, data.w, problem.x_shape, **problem.geometry)
    packed = PackedFilter(data.w)
    for _ in range(2):
        y = fastconv.conv2d(data.x, packed, **problem.geometry)
        assert y.tobytes() == right.tobytes()
        dx = fastconv.conv2d_grad_input(data.dy, packed, problem.x_shape, **problem.geometry)
        assert dx.tobytes() == right_dx.tobytes()


def test_one_filter_for_images_of_any_size_and_number():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((3, 3, 48, 96), np.float32)
    packed = PackedFilter(w)
    for n, size in [(1, 3), (1, 40), (5, 7), (1, 3), (2, 20)]:
        x = rng.standard_normal((n, size, size, 48), np.float32)
        y = fastconv.conv2d(x, packed, padding="same")
        assert y.tobytes() == fastconv.conv2d(x, w, padding="same").tobytes()
        dx = fastconv.conv2d_grad_input(y, packed, x.shape, padding="same")
        right = fastconv.conv2d_grad_input(y, w, x.shape, padding="same")
        assert dx.tobytes() == right.tobytes()


def test_one_filter_for_strides_paddings_and_dilations_in_turn():
    """The taps that meet a pixel's gradient lie together, and which these are depends on all of them."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((4, 3, 24, 40), np.float32)
    packed = PackedFilter(w)
    shape = (1, 14, 15, 24)
    for _ in range(2):
        for strides, padding, rate in itertools.product(
            [1, 2, (2, 3), (3, 2)], ["valid", "same", ((2, 1), (1, 2))], [1, 2]
        ):
            options = {"strides": strides, "padding": padding, "dilation_rate": rate}
            y = fastconv.conv2d(np.ones(shape, np.float32), w, **options)
            dy = rng.standard_normal(y.shape, np.float32)
            dx = fastconv.conv2d_grad_input(dy, packed, shape, algorithm="direct", **options)
            right = fastconv.conv2d_grad_input(dy, w, shape, algorithm="direct", **options)
            assert dx.tobytes() == right.tobytes(), options


def test_against_the_reference():
    problem = Problem((1, 6, 6, 24), 40)
    data = normals(problem)
    packed = PackedFilter(data.w)
    with by_reference():
        right = fastconv.conv2d(data.x, packed, data.bias)
        right_dx = fastconv.conv2d_grad_input(data.dy, packed, problem.x_shape)
    y = fastconv.conv2d(data.x, packed, data.bias)
    np.testing.assert_allclose(y, right, rtol=1e-4, atol=1e-4)
    dx = fastconv.conv2d_grad_input(data.dy, packed, problem.x_shape)
    np.testing.assert_allclose(dx, right_dx, rtol=1e-4, atol=1e-4)


def test_the_array_is_copied():
    w = np.ones((1, 1, 8, 8), np.float32)
    packed = PackedFilter(w)
    w[:] = 2
    x = np.ones((1, 2, 2, 8), np.float32)
    assert fastconv.conv2d(x, packed).max() == 8


def test_copies_and_pickles():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 3, 64, 64), "float32")
    x = rng.standard_normal((1, 9, 9, 64), "float32")
    packed = PackedFilter(w)
    wanted = fastconv.conv2d(x, packed)
    for twin in (copy.copy(packed), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert twin.shape == packed.shape
        assert twin.nbytes == w.nbytes
        np.testing.assert_array_equal(fastconv.conv2d(x, twin), wanted)
    assert packed.nbytes > w.nbytes


def test_strided_arrays_are_taken():
    w = np.arange(3 * 3 * 16 * 16, dtype=np.float32).reshape(3, 3, 16, 16)[:, ::-1, :, ::2]
    x = np.ones((1, 5, 5, 16), np.float32)
    packed = fastconv.conv2d(x, PackedFilter(w))
    np.testing.assert_array_equal(packed, fastconv.conv2d(x, w))


def test_out():
    packed = PackedFilter(np.ones((1, 1, 4, 4), np.float32))
    x, out = np.ones((1, 2, 2, 4), np.float32), np.empty((1, 2, 2, 4), np.float32)
    assert fastconv.conv2d(x, packed, out=out) is out
    assert (out == 4).all()
    with pytest.raises(ValueError, match="`out` must not share memory"):
        fastconv.conv2d(x, packed, out=x)
    assert fastconv.conv2d_grad_input(x, packed, x.shape, out=out) is out
    assert (out == 4).all()
    with pytest.raises(ValueError, match="`out` must not share memory"):
        fastconv.conv2d_grad_input(x, packed, x.shape, out=x)


def test_what_is_held_is_told_and_bounded():
    """A layout each for the array's algorithms and instruction sets, four at most."""
    w = np.ones((3, 3, 32, 64), np.float32)
    packed = PackedFilter(w)
    assert packed.shape == w.shape
    assert packed.nbytes == w.nbytes
    assert repr(packed) == f"PackedFilter(shape=(3, 3, 32, 64), nbytes={w.nbytes})"
    x = np.ones((1, 12, 12, 32), np.float32)
    fastconv.conv2d(x, packed, algorithm="direct")
    once = packed.nbytes
    assert once == 2 * w.nbytes
    fastconv.conv2d(x, packed, algorithm="direct")
    assert packed.nbytes == once
    dy = np.ones((1, 10, 10, 64), np.float32)
    fastconv.conv2d_grad_input(dy, packed, x.shape, algorithm="direct")
    assert packed.nbytes == 3 * w.nbytes
    transformed = w.nbytes * 36 // 9
    for isa in ISAS:
        with running_on(isa=isa):
            for algorithm in ("winograd4", "direct", "winograd2"):
                fastconv.conv2d(x, packed, algorithm=algorithm)
                fastconv.conv2d_grad_input(dy, packed, x.shape, algorithm=algorithm)
    assert packed.nbytes <= w.nbytes + 4 * 1.1 * transformed


def test_threads_share_one():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((3, 3, 64, 64), np.float32)
    x = rng.standard_normal((1, 10, 10, 64), np.float32)
    names = ["direct", "winograd2", "winograd4"]
    right = {name: fastconv.conv2d(x, w, algorithm=name).tobytes() for name in names}
    for _ in range(5):
        packed = PackedFilter(w)
        start = threading.Barrier(6)
        wrong = []

        def work(name, packed=packed, start=start, wrong=wrong):
            start.wait()
            for _ in range(5):
                if fastconv.conv2d(x, packed, algorithm=name).tobytes() != right[name]:
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(names[i % 3],)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


X = np.ones((1, 4, 4, 2), np.float32)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "`w` must be a NumPy array", lambda: PackedFilter([[[[1.0]]]])),
        (TypeError, "`w` must have dtype float32", lambda: PackedFilter(np.ones((1, 1, 2, 2)))),
        (
            TypeError,
            "`w` must have dtype float32",
            lambda: PackedFilter(np.ones((1, 1, 2, 2), np.float16)),
        ),
        (ValueError, "`w` must have 4 dimensions", lambda: PackedFilter(np.ones(3, np.float32))),
        (
            ValueError,
            "dimensions must be positive.*w.shape=",
            lambda: PackedFilter(np.ones((1, 1, 0, 2), np.float32)),
        ),
        (
            TypeError,
            "`x` must have dtype float32, as a PackedFilter has. Received: x.dtype=float16",
            lambda: fastconv.conv2d(X.astype(np.float16), PackedFilter(X[:1])),
        ),
        (
            ValueError,
            "number of input channels.*w.shape=",
            lambda: fastconv.conv2d(X, PackedFilter(np.ones((1, 1, 3, 2), np.float32))),
        ),
        (
            ValueError,
            "`bias` must have shape",
            lambda: fastconv.conv2d(
                X, PackedFilter(np.ones((1, 1, 2, 3), np.float32)), np.ones(2, np.float32)
            ),
        ),
        (
            TypeError,
            "`dy` must have dtype float32, as a PackedFilter has. Received: dy.dtype=float16",
            lambda: fastconv.conv2d_grad_input(
                X.astype(np.float16), PackedFilter(np.ones((1, 1, 2, 2), np.float32)), X.shape
            ),
        ),
        (
            TypeError,
            "`dy` must be a NumPy array",
            lambda: fastconv.conv2d_grad_input(
                [1.0], PackedFilter(np.ones((1, 1, 2, 2), np.float32)), X.shape
            ),
        ),
        (
            ValueError,
            "`dy` must have shape",
            lambda: fastconv.conv2d_grad_input(
                X, PackedFilter(np.ones((1, 1, 2, 3), np.float32)), X.shape
            ),
        ),
        (
            ValueError,
            "`output`, the result of conv2d, is required",
            lambda: fastconv.conv2d_grad_input(
                X, PackedFilter(np.ones((1, 1, 2, 2), np.float32)), X.shape, activation="relu"
            ),
        ),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "Received: " in str(caught.value)


def test_a_name_that_does_not_serve_is_refused():
    packed = PackedFilter(np.ones((1, 1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="winograd4"):
        fastconv.conv2d(X, packed, algorithm="winograd4")
    with pytest.raises(ValueError, match="winograd4"):
        fastconv.conv2d_grad_input(X, packed, X.shape, algorithm="winograd4")


def test_the_timed_kernels_take_it():
    packed = _core.PackedFilter(np.ones((1, 1, 2, 2), np.float32))
    _core.timed.set_calls(3)
    try:
        geometry = ((1, 1), ("valid", (0, 0, 0, 0)), (1, 1), 1, "linear", "channels_last")
        for result in (
            _core.timed.conv2d(X, packed, None, *geometry),
            _core.timed.conv2d_grad_input(X, packed, X.shape, None, *geometry),
        ):
            assert (result == 2).all()
            assert len(_core.timed.nanoseconds()) == 3
    finally:
        _core.timed.set_calls(1)
