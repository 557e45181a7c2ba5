"""The article's convolutions: fastconv's NumPy functions next to stock TensorFlow."""

import pytest

import fastconv
from problems import CONV2D_LAYERS, assert_right

CASES = [(layer, direction) for layer in CONV2D_LAYERS for direction in layer.directions]


def fastconv_call(direction, x, w, bias, dy):
    return {
        "fprop": lambda: fastconv.conv2d(x, w, bias, activation="relu"),
        "dgrad": lambda: fastconv.conv2d_grad_input(dy, w, x.shape),
        "wgrad": lambda: fastconv.conv2d_grad_filter(x, dy, w.shape, return_bias_grad=True),
    }[direction]


def tensorflow_call(direction, x, w, bias, dy):
    import tensorflow as tf

    options = {"strides": [1, 1, 1, 1], "padding": "VALID"}
    x_sizes, w_sizes = x.shape, w.shape
    x, w, bias, dy = map(tf.constant, (x, w, bias, dy))

    @tf.function
    def fprop(x, w, bias):
        return tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w, **options), bias))

    @tf.function
    def dgrad(w, dy):
        return tf.raw_ops.Conv2DBackpropInput(
            input_sizes=x_sizes, filter=w, out_backprop=dy, **options
        )

    @tf.function
    def wgrad(x, dy):
        dw = tf.raw_ops.Conv2DBackpropFilter(
            input=x, filter_sizes=w_sizes, out_backprop=dy, **options
        )
        return dw, tf.raw_ops.BiasAddGrad(out_backprop=dy)

    return {
        "fprop": lambda: fprop(x, w, bias),
        "dgrad": lambda: dgrad(w, dy),
        "wgrad": lambda: wgrad(x, dy),
    }[direction]


@pytest.mark.parametrize(
    ("layer", "direction"), CASES, ids=[f"{layer.name} {direction}" for layer, direction in CASES]
)
def test_conv2d(benchmark, library, layer, direction):
    benchmark.group = f"{layer.name} {direction}"
    arrays = layer.draw()
    make_call = fastconv_call if library == "fastconv" else tensorflow_call
    call = make_call(direction, *arrays)
    assert_right(call(), layer.expected(direction, *arrays))
    benchmark.name = library
    benchmark(call)
