"""The TensorFlow ops against tf.nn: values and gradients of both orders, eager and in graphs."""

import numpy as np
import pytest
import tensorflow as tf

from fastconv.adapters import tensorflow as ops

RNG = np.random.default_rng(11)


def draw(*shape):
    return tf.constant(RNG.standard_normal(shape), tf.float32)


def close(actual, wanted):
    scale = float(tf.reduce_max(tf.abs(wanted))) + 1e-30
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-5 * scale)


def both_orders(function, *inputs):
    """function(*inputs), its gradients, and the gradients of their squared norm."""
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            y = function(*inputs)
            loss = tf.reduce_sum(tf.sin(y))
        first = inner.gradient(loss, inputs)
        norm = tf.add_n([tf.reduce_sum(g * g) for g in first])
    return [y, *first, *outer.gradient(norm, inputs)]


CASES = [
    {"strides": 1, "padding": "SAME"},
    {"strides": 2, "padding": "SAME"},
    {"strides": 2, "padding": "VALID"},
    {"strides": 1, "padding": "SAME", "dilations": 2},
    {"strides": 1, "padding": "VALID", "dilations": 2},
    {"strides": [1, 3], "padding": "SAME"},
]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d(case, activation, graph):
    x, w, b = draw(2, 9, 10, 3), draw(3, 3, 3, 5), draw(5)

    def fast(x, w, b):
        return ops.conv2d(
            x, w, b, strides=case["strides"], padding=case["padding"].lower(),
            dilation_rate=case.get("dilations", 1), activation=activation,
        )  # fmt: skip

    def stock(x, w, b):
        y = tf.nn.conv2d(x, w, **case) + b
        return tf.nn.relu(y) if activation else y

    wrap = tf.function if graph else (lambda f: f)
    before = ops.ops_executed()
    actual = wrap(lambda *a: both_orders(fast, *a))(x, w, b)
    ran = {op for op, n in ops.ops_executed().items() if n > before[op]}
    assert {"FastconvConv2D", "FastconvConv2DGradInput", "FastconvConv2DGradFilter"} <= ran
    for a, e in zip(actual, both_orders(stock, x, w, b), strict=True):
        close(a, e)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("keep_argmax", [False, True])
@pytest.mark.parametrize("pool, strides", [(2, 2), (3, 2), (2, 3)])
def test_max_pool2d(pool, strides, keep_argmax, padding):
    x = draw(2, 9, 10, 5)
    actual = both_orders(
        lambda x: ops.max_pool2d(
            x, pool, strides=strides, padding=padding, keep_argmax=keep_argmax
        ),
        x,
    )
    wanted = both_orders(lambda x: tf.nn.max_pool2d(x, pool, strides, padding.upper()), x)
    for a, e in zip(actual, wanted, strict=True):
        close(a, e)


def test_static_shapes_with_unknown_dimensions():
    @tf.function(input_signature=[tf.TensorSpec([None, None, 10, 3])])
    def convolve(x):
        y = ops.conv2d(x, tf.ones((3, 3, 3, 5)), strides=2, padding="same")
        assert y.shape.as_list() == [None, None, 5, 5]
        z = ops.max_pool2d(y, 2)
        assert z.shape.as_list() == [None, None, 2, 5]
        return z

    assert convolve(tf.ones((2, 8, 10, 3))).shape == (2, 2, 2, 5)


def test_explicit_padding():
    x, w = draw(1, 6, 7, 2), draw(3, 3, 2, 4)
    padding = ((1, 0), (2, 1))
    wanted = tf.nn.conv2d(x, w, 1, [[0, 0], *padding, [0, 0]])
    close(ops.conv2d(x, w, padding=padding), wanted)


def test_empty_batch():
    x, w, b = draw(0, 6, 7, 2), draw(3, 3, 2, 4), draw(4)
    with tf.GradientTape() as tape:
        tape.watch([x, w, b])
        y = ops.conv2d(x, w, b, activation="relu")
        y = ops.max_pool2d(y, 2, keep_argmax=True)
    dx, dw, db = tape.gradient(y, [x, w, b])
    assert y.shape == (0, 2, 2, 4)
    assert dx.shape == x.shape
    assert not np.any(dw) and not np.any(db)


def test_bad_shapes_are_errors():
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="Received: "):
        ops.conv2d(draw(1, 2, 2, 3), draw(3, 3, 2, 4), padding="same")
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        ops.conv2d(draw(1, 2, 2, 3), draw(3, 3, 3, 4))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        ops.conv2d(draw(1, 5, 5, 3), draw(3, 3, 3, 4), draw(5))


def test_first_layer_skips_the_input_gradient_in_eager_mode():
    x, w = draw(2, 6, 6, 1), tf.Variable(draw(3, 3, 1, 4))
    before = ops.ops_executed()["FastconvConv2DGradInput"]
    with tf.GradientTape() as tape:
        y = ops.conv2d(x, w)
    assert tape.gradient(y, w) is not None
    assert ops.ops_executed()["FastconvConv2DGradInput"] == before
