"""The TensorFlow ops against tf.nn: values and gradients of both orders, eager and in graphs."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import fastconv
import tensorflow_oracle as oracle
from fastconv.adapters import tensorflow as ops
from tensorflow_oracle import assert_all_close, orders

CONV2D_OPS = {"FastconvConv2D", "FastconvConv2DGradInput", "FastconvConv2DGradFilter"}

in_eager_mode_and_graphs = pytest.mark.parametrize(
    "wrap", [pytest.param(lambda f: f, id="eager"), pytest.param(tf.function, id="graph")]
)


@pytest.fixture
def draw(rng):
    return lambda *shape: tf.constant(rng.standard_normal(shape), tf.float32)


@pytest.fixture
def executed():
    """How often each op has run since the test began; those that have not are left out."""
    before = ops.ops_executed()
    return lambda: {
        op: count - before[op] for op, count in ops.ops_executed().items() if count > before[op]
    }


def layout(data_format, n, h, w, c):
    return (n, c, h, w) if data_format == "channels_first" else (n, h, w, c)


@in_eager_mode_and_graphs
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    "strides, padding, dilation, groups",
    [
        (1, "valid", 1, 1),
        (1, "same", 1, 2),
        (2, "same", 1, 1),
        ((1, 3), "valid", 1, 4),
        (1, "same", (2, 1), 1),
        (2, "valid", 2, 1),
    ],
)
def test_conv2d(strides, padding, dilation, groups, activation, data_format, wrap, draw, executed):
    x = draw(*layout(data_format, 2, 9, 10, 4))
    w, bias = draw(3, 2, 4 // groups, 8), draw(8)

    def fast(x, w, bias):
        return ops.conv2d(
            x,
            w,
            bias,
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
            activation=activation,
            data_format=data_format,
        )

    def stock(x, w, bias):
        return oracle.conv2d(
            x,
            w,
            bias,
            strides=strides,
            padding=padding.upper(),
            dilations=dilation,
            activation=activation,
            data_format=data_format,
        )

    actual = wrap(lambda *inputs: orders(fast, inputs))(x, w, bias)
    assert set(executed()) == CONV2D_OPS
    assert_all_close(actual, orders(stock, (x, w, bias)))


@in_eager_mode_and_graphs
def test_conv2d_without_bias(wrap, draw):
    inputs = draw(2, 7, 6, 3), draw(3, 3, 3, 5)
    actual = wrap(lambda *xw: orders(lambda x, w: ops.conv2d(x, w, activation="relu"), xw))(*inputs)
    wanted = orders(
        lambda x, w: oracle.conv2d(x, w, strides=1, padding="VALID", activation="relu"), inputs
    )
    assert_all_close(actual, wanted)


def test_conv2d_with_explicit_padding(draw):
    inputs = draw(1, 6, 7, 2), draw(3, 3, 2, 4)
    padding = ((1, 0), (2, 1))
    wanted = orders(lambda x, w: tf.nn.conv2d(x, w, 2, [[0, 0], *padding, [0, 0]]), inputs)
    assert_all_close(
        orders(lambda x, w: ops.conv2d(x, w, padding=padding, strides=2), inputs), wanted
    )


@in_eager_mode_and_graphs
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("keep_argmax", [False, True])
@pytest.mark.parametrize(
    "pool_size, strides, padding",
    [
        (2, None, "valid"),
        ((3, 2), 2, "same"),
        (2, 3, "valid"),
        (3, 1, "same"),
        (17, 3, "same"),  # an argmax too large for one byte
    ],
)
def test_max_pool2d(pool_size, strides, padding, keep_argmax, data_format, wrap, draw, executed):
    size = 25 if pool_size == 17 else 9
    x = draw(*layout(data_format, 2, size, size + 1, 5))

    def fast(x):
        return ops.max_pool2d(
            x,
            pool_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            keep_argmax=keep_argmax,
        )

    def stock(x):
        return oracle.max_pool2d(
            x,
            ksize=pool_size,
            strides=strides or pool_size,
            padding=padding.upper(),
            data_format=data_format,
        )

    actual = wrap(lambda x: orders(fast, [x]))(x)
    assert {"FastconvMaxPool2DWithArgmax", "FastconvMaxPool2DGrad"} <= set(executed())
    assert ("FastconvMaxPool2D" in executed()) == (not keep_argmax)
    assert_all_close(actual, orders(stock, [x]))


def test_third_order_gradients(draw):
    x, w = draw(1, 6, 6, 2), draw(2, 2, 2, 3)

    def fast(x, w):
        return ops.max_pool2d(ops.conv2d(x, w, activation="relu"), 2, keep_argmax=True)

    def stock(x, w):
        return tf.nn.max_pool2d(tf.nn.relu(tf.nn.conv2d(x, w, 1, "VALID")), 2, 2, "VALID")

    assert_all_close(orders(fast, (x, w), 3), orders(stock, (x, w), 3), 1e-3)


def test_a_tie_goes_to_the_first_maximum():
    x = tf.ones((1, 4, 4, 1))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ops.max_pool2d(x, 2, keep_argmax=True)
    wanted = np.zeros((4, 4))
    wanted[::2, ::2] = 1
    np.testing.assert_array_equal(tape.gradient(y, x)[0, :, :, 0], wanted)


@pytest.mark.parametrize(
    "data_format, signature, conv_shape, pool_shape",
    [
        ("channels_last", [None, 8, 10, 3], [None, 4, 5, 7], [None, 2, 2, 7]),
        ("channels_last", [None, None, 10, 3], [None, None, 5, 7], [None, None, 2, 7]),
        ("channels_first", [None, 3, 8, None], [None, 7, 4, None], [None, 7, 2, None]),
        ("channels_last", [None] * 4, [None, None, None, 7], [None, None, None, 7]),
        ("channels_last", None, None, None),
    ],
)
def test_unknown_dimensions(data_format, signature, conv_shape, pool_shape, draw):
    w, bias = draw(3, 3, 3, 7), draw(7)
    seen = []

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch([x, w, bias])
            y = ops.conv2d(
                x, w, bias, strides=2, padding="same", activation="relu", data_format=data_format
            )
            z = ops.max_pool2d(y, 2, data_format=data_format, keep_argmax=True)
            loss = tf.reduce_sum(z * z)
        gradients = tape.gradient(loss, [x, w, bias])
        seen.append([tensor.shape for tensor in (y, z, *gradients)])
        return [z, *gradients]

    x = draw(*layout(data_format, 2, 8, 10, 3))
    actual = tf.function(step, input_signature=[tf.TensorSpec(signature)])(x)
    assert_all_close(actual, step(x), 0)
    for shape, wanted in zip(
        seen[0], (conv_shape, pool_shape, signature, w.shape, bias.shape), strict=True
    ):
        wanted = tf.TensorShape(wanted)
        assert (shape.rank, list(shape or [])) == (wanted.rank, list(wanted or []))


def test_empty_batch(draw):
    x, w, bias = draw(0, 6, 7, 2), draw(3, 3, 2, 4), draw(4)
    with tf.GradientTape() as tape:
        tape.watch([x, w, bias])
        y = ops.conv2d(x, w, bias, activation="relu")
        z = ops.max_pool2d(y, 2, keep_argmax=True)
    dx, dw, dbias = tape.gradient(z, [x, w, bias])
    assert z.shape == (0, 2, 2, 4)
    assert dx.shape == x.shape
    np.testing.assert_array_equal(dw, np.zeros(w.shape))
    np.testing.assert_array_equal(dbias, np.zeros(4))


@in_eager_mode_and_graphs
@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (
            [(5, 5, 3), (3, 3, 3, 4)],
            {},
            "`x` must have 4 dimensions. Received: x.shape=(5, 5, 3)",
        ),
        (
            [(1, 5, 5, 3), (3, 3, 4)],
            {},
            "`w` must have 4 dimensions. Received: w.shape=(3, 3, 4)",
        ),
        (
            [(1, 5, 5, 3), (3, 3, 2, 4)],
            {},
            (
                "The filter's third dimension must be the number of input channels divided by "
                "`groups`, 3. Received: x.shape=(1, 5, 5, 3), w.shape=(3, 3, 2, 4), groups=1"
            ),
        ),
        (
            [(1, 5, 5, 3), (3, 3, 3, 4), (5,)],
            {},
            "`bias` must have the shape (4,). Received: bias.shape=(5,)",
        ),
        (
            [(1, 5, 5, 3), (7, 7, 3, 4)],
            {},
            (
                "The dilated filter, 7 x 7, must not be larger than the padded input. Received: "
                "x.shape=(1, 5, 5, 3), w.shape=(7, 7, 3, 4)"
            ),
        ),
        (
            [(1, 5, 5, 3), (3, 3, 3, 4)],
            {"strides": (1, 0)},
            "`strides` must be positive integers below 2**31. Received: strides=(1, 0)",
        ),
    ],
)
def test_shapes_that_do_not_fit(shapes, options, message, wrap):
    inputs = [tf.zeros(shape) for shape in shapes]
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        wrap(lambda *inputs: ops.conv2d(*inputs, **options))(*inputs)
    assert message in str(raised.value)


@in_eager_mode_and_graphs
def test_window_larger_than_the_input(wrap):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        wrap(lambda x: ops.max_pool2d(x, 7))(tf.zeros((1, 5, 5, 3)))
    assert (
        "`pool_size` must not be larger than the padded input. Received: x.shape=(1, 5, 5, 3), "
        "pool_size=(7, 7)" in str(raised.value)
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"strides": 1.5}, TypeError, "`strides` must be .* Received: strides=1.5"),
        ({"strides": (1, 2, 3)}, ValueError, r"`strides` must be .* Received: strides=\(1, 2, 3\)"),
        ({"padding": "full"}, ValueError, "`padding` must be .* Received: padding='full'"),
        ({"activation": "gelu"}, ValueError, "`activation` must be .* Received: activation='gelu'"),
        ({"data_format": "NHWC"}, ValueError, "`data_format` must be .* Received: data_format="),
    ],
)
def test_options_that_do_not_exist(options, error, message):
    with pytest.raises(error, match=message):
        ops.conv2d(tf.zeros((1, 5, 5, 3)), tf.zeros((3, 3, 3, 4)), **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda raw, x, w: raw.fastconv_conv2d_grad_input(x, w, tf.zeros((1, 2, 2, 4)), []),
            "`dy` must have the shape (1, 3, 3, 4). Received: dy.shape=(1, 2, 2, 4)",
        ),
        (
            lambda raw, x, w: raw.fastconv_conv2d_grad_input(
                x, w, tf.zeros((1, 3, 3, 4)), [], activation="RELU"
            ),
            "With activation 'RELU', `output` must be given. Received: 3 inputs",
        ),
        (
            lambda raw, x, w: raw.fastconv_conv2d(x, w, [tf.zeros(4)] * 2),
            "There must be at most 3 inputs. Received: 4",
        ),
        (
            lambda raw, x, w: raw.fastconv_conv2d(x, w, [], strides=[1]),
            "`strides` must be a list of 2 integers. Received: a list of 1",
        ),
        (
            lambda raw, x, w: raw.fastconv_max_pool2d_with_argmax(
                x, pool_size=[2, 2], strides=[2, 2], Targmax=tf.int32
            ),
            (
                "`argmax` must be uint8 for windows of up to 256 taps and int32 beyond. "
                "Received: int32 for pool_size=(2, 2)"
            ),
        ),
    ],
)
def test_ops_called_in_the_raw(call, message):
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        call(ops._ops, tf.zeros((1, 5, 5, 3)), tf.zeros((3, 3, 3, 4)))
    assert message in str(raised.value)


@pytest.mark.parametrize("shape, filters", [((2, 13, 13, 32), 64), ((3, 9, 8, 1), 5)], ids=str)
def test_an_argmax_that_names_no_pixel(shape, filters, rng):
    """It is data, which may be anything: such a maximum has no pixel for its gradient to go to."""
    x, w = rng.standard_normal(shape, "f"), rng.standard_normal((3, 3, shape[3], filters), "f")
    y, argmax = fastconv.conv2d_max_pool2d(x, w, activation="relu", return_argmax=True)
    dy, lost = rng.standard_normal(y.shape, "f"), rng.random(y.shape) < 0.2
    wrong = np.where(lost, rng.integers(4, 256, y.shape), argmax).astype(np.uint8)

    def gradients(dy, argmax):
        return ops._ops.fastconv_conv2d_max_pool2d_grad(
            x, w, dy, y, argmax, wanted=[1, 0], num_dx=1, num_bias=0, activation="RELU"
        )

    found, wanted = gradients(dy, wrong), gradients(np.where(lost, 0, dy), argmax)
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@in_eager_mode_and_graphs
def test_gradients_nobody_asks_for_are_not_computed(wrap, draw, executed):
    x, w, bias = draw(2, 6, 6, 1), draw(3, 3, 1, 4), draw(4)

    @wrap
    def step(x, w, bias, *, by):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            wanted = {"x": [x], "parameters": [w, bias]}[by]
            tape.watch(wanted)
            y = ops.conv2d(x, w, bias, activation="relu")
        return tape.gradient(y, wanted)

    step(x, w, bias, by="parameters")
    assert executed() == {"FastconvConv2D": 1, "FastconvConv2DGradFilter": 1}
    step(x, w, bias, by="x")
    assert executed() == {
        "FastconvConv2D": 2,
        "FastconvConv2DGradFilter": 1,
        "FastconvConv2DGradInput": 1,
    }


def test_jacobian_and_vectorized_map(draw):
    x, w = draw(1, 5, 5, 2), draw(3, 3, 2, 3)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(w)
        y = ops.conv2d(x, w)
        wanted = tf.nn.conv2d(x, w, 1, "VALID")
    assert_all_close([tape.jacobian(y, w)], [tape.jacobian(wanted, w)])
    images = draw(3, 1, 5, 5, 2)
    actual = tf.vectorized_map(lambda image: ops.conv2d(image, w), images)
    assert_all_close([actual], [tf.stack([ops.conv2d(image, w) for image in images])], 0)


def test_callers_on_many_threads(draw):
    x, w = draw(4, 12, 12, 8), draw(3, 3, 8, 16)
    wanted = ops.conv2d(x, w)
    equal = []

    def call():
        equal.append(all(np.array_equal(ops.conv2d(x, w), wanted) for _ in range(20)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4


def python(program, **variables):
    """The output of a Python that runs ``program`` in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


@pytest.mark.parametrize(
    "variable, told, threads",
    [("", "", "1"), ("2", "", "2"), ("", "fastconv.set_num_threads(3)", "3")],
    ids=["followed", "FASTCONV_NUM_THREADS", "set_num_threads"],
)
def test_tensorflows_threads_are_followed_unless_told_otherwise(variable, told, threads):
    program = f"""
import tensorflow as tf
import fastconv
from fastconv.adapters.tensorflow import conv2d
tf.config.threading.set_intra_op_parallelism_threads(1)
{told}
conv2d(tf.zeros((1, 3, 3, 1)), tf.zeros((3, 3, 1, 1)))
print(fastconv.get_num_threads())
"""
    assert python(program, FASTCONV_NUM_THREADS=variable) == threads


def test_ops_without_tensorflow_say_so():
    program = f"""
import ctypes
library = ctypes.CDLL({str(ops._LIBRARY)!r})
library.fastconv_tensorflow_load_error.restype = ctypes.c_char_p
print(library.fastconv_tensorflow_load_error().decode())
"""
    assert "TensorFlow must be imported before fastconv's ops are loaded" in python(program)
