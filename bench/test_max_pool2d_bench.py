"""The article's poolings: fastconv's NumPy functions next to stock TensorFlow."""

import pytest

import fastconv
from problems import POOL_LAYERS, assert_right


def fastconv_call(direction, x, dy):
    # What training computes: fprop keeps the argmax that the gradient needs.
    _, argmax = fastconv.max_pool2d(x, 2, return_argmax=True)
    return {
        "fprop": lambda: fastconv.max_pool2d(x, 2, return_argmax=True),
        "bprop": lambda: fastconv.max_pool2d_grad(dy, argmax, x.shape, 2),
    }[direction]


def tensorflow_call(direction, x, dy):
    import tensorflow as tf

    options = {"ksize": [1, 2, 2, 1], "strides": [1, 2, 2, 1], "padding": "VALID"}
    x, dy = tf.constant(x), tf.constant(dy)
    y = tf.nn.max_pool2d(x, 2, 2, "VALID")

    @tf.function
    def fprop(x):
        return tf.nn.max_pool2d(x, 2, 2, "VALID")

    @tf.function
    def bprop(x, y, dy):
        return tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=dy, **options)

    return {"fprop": lambda: fprop(x), "bprop": lambda: bprop(x, y, dy)}[direction]


@pytest.mark.parametrize("direction", ["fprop", "bprop"])
@pytest.mark.parametrize("layer", POOL_LAYERS, ids=lambda layer: layer.name)
def test_max_pool2d(benchmark, library, layer, direction):
    benchmark.group = f"{layer.name} {direction}"
    arrays = layer.draw()
    make_call = fastconv_call if library == "fastconv" else tensorflow_call
    call = make_call(direction, *arrays)
    result = call()
    if library == "fastconv" and direction == "fprop":
        result, _ = result
    assert_right(result, layer.expected(direction, *arrays))
    benchmark.name = library
    benchmark(call)
