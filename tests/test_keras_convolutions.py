"""The other fast convolution layers beside the stock ones, eager, in graphs and inside XLA."""

import inspect
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastconv.adapters import tensorflow as ops
from fastconv.adapters import xla
from fastconv.keras import (
    FastConv1D,
    FastConv1DTranspose,
    FastConv2D,
    FastConv2DTranspose,
    FastDepthwiseConv1D,
    FastDepthwiseConv2D,
    FastMaxPooling2D,
    FastSeparableConv1D,
    FastSeparableConv2D,
)
from keras_support import equal_layers, through, two_orders
from tensorflow_oracle import assert_all_close

L = keras.layers
FORWARD = {"FastconvConv2D": 1}
TRANSPOSE = {"FastconvConv2DTranspose": 1}

CASES = [  # fast, stock, options, shape of the input, ops of a forward pass
    (FastDepthwiseConv2D, L.DepthwiseConv2D, {}, (2, 9, 10, 3), FORWARD),
    (
        FastDepthwiseConv2D,
        L.DepthwiseConv2D,
        {"depth_multiplier": 2, "strides": 2, "padding": "same", "activation": "relu"},
        (2, 9, 10, 3),
        FORWARD,
    ),
    (
        FastDepthwiseConv2D,
        L.DepthwiseConv2D,
        {"dilation_rate": (2, 3), "use_bias": False, "activation": "gelu"},
        (2, 9, 10, 3),
        FORWARD,
    ),
    (
        FastDepthwiseConv2D,
        L.DepthwiseConv2D,
        {"dilation_rate": 2, "strides": 2, "padding": "same"},
        (2, 11, 10, 3),
        FORWARD,
    ),
    (
        FastSeparableConv2D,
        L.SeparableConv2D,
        {"filters": 4, "activation": "relu"},
        (2, 9, 10, 3),
        {"FastconvConv2D": 2},
    ),
    (
        FastSeparableConv2D,
        L.SeparableConv2D,
        {"filters": 4, "depth_multiplier": 2, "strides": 2, "padding": "same", "use_bias": False},
        (2, 9, 10, 3),
        {"FastconvConv2D": 2},
    ),
    (FastConv1D, L.Conv1D, {"filters": 4, "activation": "relu"}, (2, 9, 3), FORWARD),
    (
        FastConv1D,
        L.Conv1D,
        {"filters": 4, "padding": "causal", "dilation_rate": 2, "use_bias": False},
        (2, 9, 3),
        FORWARD,
    ),
    (
        FastConv1D,
        L.Conv1D,
        {"filters": 4, "padding": "causal", "strides": 2, "activation": "gelu"},
        (2, 10, 3),
        FORWARD,
    ),
    (
        FastConv1D,
        L.Conv1D,
        {"filters": 4, "padding": "same", "strides": 3},
        (2, 10, 3),
        FORWARD,
    ),
    (FastDepthwiseConv1D, L.DepthwiseConv1D, {"activation": "relu"}, (2, 9, 3), FORWARD),
    (
        FastDepthwiseConv1D,
        L.DepthwiseConv1D,
        {"depth_multiplier": 2, "strides": 2, "padding": "same", "activation": "gelu"},
        (2, 10, 3),
        FORWARD,
    ),
    (
        FastDepthwiseConv1D,
        L.DepthwiseConv1D,
        {"dilation_rate": 2, "padding": "same", "use_bias": False},
        (2, 9, 3),
        FORWARD,
    ),
    (
        FastSeparableConv1D,
        L.SeparableConv1D,
        {"filters": 4, "activation": "relu"},
        (2, 9, 3),
        {"FastconvConv2D": 2},
    ),
    (
        FastSeparableConv1D,
        L.SeparableConv1D,
        {"filters": 4, "depth_multiplier": 2, "strides": 2, "padding": "same", "use_bias": False},
        (2, 10, 3),
        {"FastconvConv2D": 2},
    ),
    (FastConv1DTranspose, L.Conv1DTranspose, {"filters": 4}, (2, 6, 3), TRANSPOSE),
    (
        FastConv1DTranspose,
        L.Conv1DTranspose,
        {"filters": 4, "strides": 2, "padding": "same", "activation": "relu"},
        (2, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv1DTranspose,
        L.Conv1DTranspose,
        {"filters": 4, "strides": 3, "output_padding": 1, "use_bias": False},
        (2, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv1DTranspose,
        L.Conv1DTranspose,
        {"filters": 4, "strides": 3, "padding": "same", "output_padding": 2, "kernel_size": 4},
        (2, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv1DTranspose,
        L.Conv1DTranspose,
        {"filters": 4, "dilation_rate": 2, "activation": "gelu"},
        (2, 6, 3),
        TRANSPOSE,
    ),
    (FastConv2DTranspose, L.Conv2DTranspose, {"filters": 4}, (2, 5, 6, 3), TRANSPOSE),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 4, "strides": (2, 3), "padding": "same", "activation": "relu"},
        (2, 5, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 4, "strides": 2, "output_padding": 1, "use_bias": False},
        (2, 5, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 4, "strides": 3, "padding": "same", "output_padding": (2, 1)},
        (2, 5, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 4, "dilation_rate": 2, "kernel_size": (2, 3)},
        (2, 5, 6, 3),
        TRANSPOSE,
    ),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 4, "strides": 4, "kernel_size": 2},  # windows that leave gaps
        (2, 5, 6, 3),
        TRANSPOSE,
    ),
]


def identify(case):
    return f"{case[0].__qualname__}-{case[2]}"


def with_kernel_size(options):
    return {"kernel_size": 3, **options}


def inputs_of(layer, shape, draw):
    """An input and weights."""
    layer.build(shape)
    return [tf.constant(draw(*one)) for one in [shape, *(w.shape for w in layer.weights)]]


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_to_second_order(case, draw, executed):
    fast_class, stock_class, options, shape, ops = case
    options = with_kernel_size(options)
    fast, stock = fast_class(**options), stock_class(**options)
    inputs = inputs_of(fast, shape, draw)
    stock.build(shape)
    through(fast)(*inputs)
    assert executed() == ops
    wanted = two_orders(through(stock))(*inputs)
    assert_all_close(two_orders(through(fast))(*inputs), wanted, 5e-6)
    assert_all_close(tf.function(two_orders(through(fast)))(*inputs), wanted, 5e-6)


def channels_last(stock, options, axes):
    """A stock layer that is channels_last, for inputs and outputs that are channels_first."""
    layer = stock(**options)
    forth, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if axes == 4 else ((0, 2, 1), (0, 2, 1))

    def function(x, *weights):
        return tf.transpose(through(layer)(tf.transpose(x, forth), *weights), back)

    return layer, function


# Stock TensorFlow lacks kernels for some of these on a CPU: a stock layer between transposes.
@pytest.mark.parametrize("case", CASES, ids=identify)
def test_channels_first(case, draw, executed):
    fast_class, stock_class, options, shape, ops = case
    options = with_kernel_size(options)
    fast = fast_class(**options, data_format="channels_first")
    stock, transposed = channels_last(stock_class, options, len(shape))
    stock.build(shape)
    first = (shape[0], shape[-1], *shape[1:-1])
    inputs = inputs_of(fast, first, draw)
    actual = through(fast)(*inputs)
    assert executed() == ops
    assert actual.shape == fast.compute_output_shape(first)
    actual = two_orders(through(fast))(*inputs)
    assert_all_close(actual, two_orders(transposed)(*inputs))


# --- inside XLA -----------------------------------------------------------------------------------

XLA_CASES = [
    (
        FastConv2D,
        L.Conv2D,
        {"filters": 4, "strides": (2, 1), "padding": "same", "activation": "relu"},
        (2, 9, 10, 3),
    ),
    (FastConv2D, L.Conv2D, {"filters": 4, "groups": 2, "use_bias": False}, (2, 9, 10, 2)),
    *[CASES[i][:4] for i in (1, 4, 8, 11, 12)],
    (FastMaxPooling2D, L.MaxPooling2D, {"strides": 2, "padding": "same"}, (2, 9, 10, 3)),
]


@pytest.mark.parametrize("known", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", XLA_CASES, ids=identify)
def test_inside_xla(case, known, draw, executed, executed_in_xla):
    """With batch, height and width that are known when the function is traced, and without."""
    fast_class, stock_class, options, shape = case
    pools = fast_class is FastMaxPooling2D
    options = options if pools else with_kernel_size(options)
    fast, stock = fast_class(**options), stock_class(**options)
    inputs = inputs_of(fast, shape, draw)
    stock.build(shape)
    signature = [tf.TensorSpec(tensor.shape) for tensor in inputs]
    if not known:
        signature[0] = tf.TensorSpec([None] * (len(shape) - 1) + [shape[-1]])
    call_options = {"training": True} if pools else {}
    compiled = tf.function(
        two_orders(through(fast, **call_options)), input_signature=signature, jit_compile=True
    )
    actual = compiled(*inputs)
    assert executed() == {}
    assert executed_in_xla()
    if options.get("groups"):  # of which stock TensorFlow has no second-order gradient on a CPU
        wanted = two_orders(through(fast))(*inputs)
    else:
        wanted = two_orders(through(stock))(*inputs)
    assert_all_close(actual, wanted, 5e-6)


def test_channels_first_inside_xla(draw, executed_in_xla):
    x = tf.constant(draw(2, 3, 9, 10))
    model = keras.Sequential(
        [
            keras.Input((3, None, None)),
            FastConv2D(4, 3, activation="relu", data_format="channels_first"),
            FastMaxPooling2D(data_format="channels_first"),
        ]
    )
    gradients = two_orders(lambda x: model(x, training=True))
    compiled = tf.function(
        gradients, input_signature=[tf.TensorSpec((None, 3, None, None))], jit_compile=True
    )
    actual = compiled(x)
    assert executed_in_xla()["FastconvConv2D"]
    assert_all_close(actual, gradients(x), 5e-6)


def test_functions_called_by_a_compiled_one(draw, executed_in_xla):
    layer = FastConv2D(4, 3)
    inner = tf.function(layer)
    x = tf.constant(draw(2, 6, 6, 3))
    compiled = tf.function(lambda x: inner(x) + 1.0, jit_compile=True)
    y = compiled(x)
    assert executed_in_xla() == {"FastconvConv2D": 1}
    assert_all_close([y], [layer(x) + 1.0], 1e-6)


def test_errors_inside_xla():
    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec((None, None, None, 3))])
    def channels_that_do_not_divide(x):
        return ops.conv2d(x, tf.ones((3, 3, 2, 4)))

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"third dimension.*Received"):
        channels_that_do_not_divide(tf.ones((1, 6, 6, 3)))

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec(None), tf.TensorSpec(None)])
    def unknown_ranks(x, w):
        return ops.conv2d(x, w)

    with pytest.raises(ValueError, match=r"rank of every tensor must be known. Received"):
        unknown_ranks(tf.ones((1, 6, 6, 3)), tf.ones((3, 3, 3, 4)))


def test_the_self_test_tells_what_goes_wrong(monkeypatch):
    assert xla.available(), xla.reason_unavailable()

    def fail(*arguments):
        raise RuntimeError("no such op")

    monkeypatch.setattr(xla, "call", fail)
    assert xla._self_test_failure() == "RuntimeError: no such op"
    monkeypatch.setattr(xla, "call", lambda *arguments: [tf.zeros((3, 1, 1, 1))])
    assert "the self-test gave [[[[0.0]]]" in xla._self_test_failure()


# --- standing in for the stock layers -------------------------------------------------------------

KINDS = [
    (FastDepthwiseConv2D, L.DepthwiseConv2D, {"kernel_size": 3}, (2, 6, 6, 3)),
    (FastSeparableConv2D, L.SeparableConv2D, {"filters": 4, "kernel_size": 3}, (2, 6, 6, 3)),
    (FastConv1D, L.Conv1D, {"filters": 4, "kernel_size": 3}, (2, 6, 3)),
    (FastDepthwiseConv1D, L.DepthwiseConv1D, {"kernel_size": 3}, (2, 6, 3)),
    (FastSeparableConv1D, L.SeparableConv1D, {"filters": 4, "kernel_size": 3}, (2, 6, 3)),
    (FastConv1DTranspose, L.Conv1DTranspose, {"filters": 4, "kernel_size": 3}, (2, 6, 3)),
    (FastConv2DTranspose, L.Conv2DTranspose, {"filters": 4, "kernel_size": 3}, (2, 6, 6, 3)),
]
TRANSPOSED = (L.Conv1DTranspose, L.Conv2DTranspose)
KIND_IDS = [kind[0].__qualname__ for kind in KINDS]


@pytest.mark.parametrize("fast, stock, options, shape", KINDS, ids=KIND_IDS)
def test_configuration_is_stocks(fast, stock, options, shape):
    # Not of the classes: before 3.11.4, Python finds Keras's __new__(*args, **kwargs) for subclasses.
    assert inspect.signature(fast.__init__) == inspect.signature(stock.__init__)
    assert fast(**options, name="a").get_config() == stock(**options, name="a").get_config()
    keras.backend.clear_session()
    name = fast(**options).name
    keras.backend.clear_session()
    assert name == stock(**options).name
    assert type(keras.layers.deserialize(keras.layers.serialize(fast(**options)))) is fast
    weights = [weight.path for weight in built(fast(**options, name="a"), shape).weights]
    assert weights == [weight.path for weight in built(stock(**options, name="a"), shape).weights]


def built(layer, shape):
    layer.build(shape)
    return layer


@pytest.mark.parametrize("fast, stock, options, shape", KINDS, ids=KIND_IDS)
def test_other_data_types(fast, stock, options, shape, draw, executed, caplog):
    fast, stock = equal_layers(fast, stock, shape, **options, dtype="float64")
    x = draw(*shape)
    with caplog.at_level(logging.DEBUG, "fastconv"):
        y = fast(x)
    assert executed() == {}
    assert "the data type is not float32" in caplog.text
    wanted = stock(x)
    assert y.dtype == wanted.dtype
    np.testing.assert_array_equal(tf.cast(y, "float64"), tf.cast(wanted, "float64"))


@pytest.mark.parametrize("fast, stock, options, shape", KINDS, ids=KIND_IDS)
def test_errors_are_stocks(fast, stock, options, shape, draw):
    bad_options = [
        {**options, "kernel_size": 0},
        {**options, "strides": 0},
        {**options, "padding": "full"},
        {**options, "data_format": "NHWC"},
    ]
    for bad in bad_options:
        assert_same_failure(lambda bad=bad: fast(**bad), lambda bad=bad: stock(**bad))
    one, other = equal_layers(fast, stock, shape, **options, name="layer")
    for bad in [draw(*shape[:-1], 5), draw(*shape[1:]), draw(1, *[1] * (len(shape) - 2), 3)]:
        if stock in TRANSPOSED and bad.shape[-1] == 3 and bad.ndim == len(shape):
            continue  # a single pixel is no error to it
        assert_same_failure(lambda bad=bad: one(bad), lambda bad=bad: other(bad))


def assert_same_failure(one, other):
    with pytest.raises(Exception) as actual:
        one()
    with pytest.raises(Exception) as wanted:
        other()
    assert (actual.type, str(actual.value)) == (wanted.type, str(wanted.value))


@pytest.mark.parametrize("fast, stock, options, shape", KINDS, ids=KIND_IDS)
def test_symbolic_inputs(fast, stock, options, shape):
    symbolic = keras.KerasTensor((None,) * (len(shape) - 1) + shape[-1:])
    assert fast(**options)(symbolic).shape == stock(**options)(symbolic).shape


def test_lora_of_a_sequence_layer(draw):
    shape = (2, 9, 3)
    fast, stock = equal_layers(FastConv1D, L.Conv1D, shape, filters=4, kernel_size=3)
    for layer in (fast, stock):
        layer.enable_lora(2)
    weights = [draw(*weight.shape) for weight in fast.trainable_variables]
    gradients = []
    x = draw(*shape)
    for layer in (fast, stock):
        for variable, weight in zip(layer.trainable_variables, weights, strict=True):
            variable.assign(weight)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(layer(x)))
        gradients.append(tape.gradient(loss, layer.trainable_variables))
    assert len(gradients[0]) == 3
    assert_all_close(*gradients)


def test_an_output_that_no_convolution_makes_its_input_of(draw, executed):
    # Keras's rule gives (5 - 1) * 4 rows, out of which "same" makes 4, not 5. TensorFlow refuses
    # that too, if not so gently: version 2.18 ends the process.
    options = {"filters": 2, "kernel_size": 2, "strides": 4, "padding": "same", "output_padding": 0}
    layer = FastConv2DTranspose(**options)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`x` must have the shape.*Received"):
        layer(draw(1, 5, 5, 2))
    assert executed() == {}
