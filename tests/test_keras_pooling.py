"""Average and global pooling layers beside stock Keras; ties and NaN of all pooling layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

from fastconv.keras import (
    FastAveragePooling1D,
    FastAveragePooling2D,
    FastGlobalAveragePooling1D,
    FastGlobalAveragePooling2D,
    FastGlobalMaxPooling1D,
    FastGlobalMaxPooling2D,
    FastMaxPooling1D,
    FastMaxPooling2D,
    accelerate,
)
from keras_support import outputs_and_gradients, two_orders
from tensorflow_oracle import assert_all_close

WINDOWS = [
    {"pool_size": 2},
    {"pool_size": 3, "strides": 2},
    {"pool_size": 3, "strides": (1, 2), "padding": "same"},
    {"pool_size": (1, 4), "padding": "valid"},
    {"pool_size": 2, "strides": 3},
]
SEQUENCES = [
    {"pool_size": 2},
    {"pool_size": 3, "strides": 1, "padding": "same"},
    {"pool_size": 2, "strides": 3, "padding": "valid"},
]
CASES = [
    *[(FastAveragePooling1D, L.AveragePooling1D, options) for options in SEQUENCES],
    *[(FastMaxPooling1D, L.MaxPooling1D, options) for options in SEQUENCES],
    *[(FastAveragePooling2D, L.AveragePooling2D, options) for options in WINDOWS],
    (FastGlobalAveragePooling1D, L.GlobalAveragePooling1D, {}),
    (FastGlobalAveragePooling1D, L.GlobalAveragePooling1D, {"keepdims": True}),
    (FastGlobalMaxPooling1D, L.GlobalMaxPooling1D, {}),
    (FastGlobalMaxPooling1D, L.GlobalMaxPooling1D, {"keepdims": True}),
    (FastGlobalAveragePooling2D, L.GlobalAveragePooling2D, {}),
    (FastGlobalAveragePooling2D, L.GlobalAveragePooling2D, {"keepdims": True}),
    (FastGlobalMaxPooling2D, L.GlobalMaxPooling2D, {}),
    (FastGlobalMaxPooling2D, L.GlobalMaxPooling2D, {"keepdims": True}),
]
OPS = {  # forward, gradient
    FastAveragePooling1D: {"FastconvAveragePool2D", "FastconvAveragePool2DGrad"},
    FastMaxPooling1D: {
        *("FastconvMaxPool2D", "FastconvMaxPool2DWithArgmax"),
        *("FastconvMaxPool2DGrad", "FastconvMaxPool2DGradGrad"),
    },
    FastAveragePooling2D: {"FastconvAveragePool2D", "FastconvAveragePool2DGrad"},
    FastGlobalAveragePooling1D: {"FastconvAveragePool2D", "FastconvAveragePool2DGrad"},
    FastGlobalAveragePooling2D: {"FastconvAveragePool2D", "FastconvAveragePool2DGrad"},
    FastGlobalMaxPooling1D: {"FastconvMaxPool2D"},
    FastGlobalMaxPooling2D: {"FastconvMaxPool2D"},
}

over = pytest.mark.parametrize(
    "fast_class, stock_class, options",
    CASES,
    ids=lambda value: getattr(value, "__qualname__", None),
)


def image(draw, data_format, layer):
    sizes = (10,) if "1D" in layer.__qualname__ else (9, 10)
    return tf.constant(
        draw(2, 3, *sizes) if data_format == "channels_first" else draw(2, *sizes, 3)
    )


@over
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_beside_stock(fast_class, stock_class, options, data_format, draw, executed):
    fast = fast_class(data_format=data_format, **options)
    stock = stock_class(data_format=data_format, **options)
    x = image(draw, data_format, fast_class)
    actual = two_orders(fast)(x)
    assert set(executed()) == OPS[fast_class]
    assert actual[0].shape == fast.compute_output_shape(x.shape)
    assert_all_close(actual, two_orders(stock)(x), 2e-6)


@over
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_unknown_shapes(
    fast_class, stock_class, options, data_format, jit_compile, draw, executed_in_xla
):
    x = image(draw, data_format, fast_class)
    channel_axis = 1 if data_format == "channels_first" else x.shape.rank - 1
    unknown = [x.shape[axis] if axis == channel_axis else None for axis in range(x.shape.rank)]
    function = tf.function(
        two_orders(fast_class(data_format=data_format, **options)),
        input_signature=[tf.TensorSpec(unknown)],
        jit_compile=jit_compile,
    )
    actual = function(x)
    assert bool(executed_in_xla()) == jit_compile
    stock = stock_class(data_format=data_format, **options)
    assert_all_close(actual, two_orders(stock)(x), 2e-6)


def test_training_notes_the_maxima(draw, executed):
    """One byte each, where the layer is told that a gradient will be taken."""
    x = tf.constant(draw(2, 10, 3))
    FastMaxPooling1D()(x, training=True)
    assert executed() == {"FastconvMaxPool2DWithArgmax": 1}


@pytest.mark.parametrize("fast_class", [FastGlobalAveragePooling2D, FastGlobalMaxPooling2D])
def test_empty_batches(fast_class):
    assert fast_class()(tf.zeros((0, 4, 5, 3))).shape == (0, 3)


@pytest.mark.parametrize("fast_class", [FastGlobalAveragePooling1D, FastGlobalMaxPooling1D])
def test_empty_batches_of_sequences(fast_class):
    assert fast_class()(tf.zeros((0, 5, 3))).shape == (0, 3)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_masked_steps_do_not_count(data_format, keepdims, draw, executed):
    options = {"data_format": data_format, "keepdims": keepdims}
    x = draw(2, 3, 5) if data_format == "channels_first" else draw(2, 5, 3)
    mask = tf.constant([[True, True, False, True, False], [False, True, False, False, False]])
    fast = FastGlobalAveragePooling1D(**options)
    np.testing.assert_array_equal(
        fast(x, mask=mask), L.GlobalAveragePooling1D(**options)(x, mask=mask)
    )
    assert executed() == {}


def test_a_mask_that_comes_with_the_input(executed):
    """Of an Embedding: Keras hands it to the layers that say they take one."""
    model = keras.Sequential(
        [keras.Input((4,)), L.Embedding(7, 3, mask_zero=True), L.GlobalAveragePooling1D()]
    )
    words = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    wanted = model(words)
    accelerate(model)
    assert type(model.layers[-1]) is FastGlobalAveragePooling1D
    np.testing.assert_array_equal(model(words), wanted)
    assert executed() == {}


@pytest.mark.parametrize(
    ("fast", "stock"),
    [
        (FastMaxPooling2D(), L.MaxPooling2D()),
        (FastGlobalMaxPooling2D(), L.GlobalMaxPooling2D()),
        (L.TimeDistributed(FastGlobalMaxPooling1D()), L.TimeDistributed(L.GlobalMaxPooling1D())),
    ],
    ids=["windows", "global", "global of rows"],
)
def test_ties(fast, stock):
    """Of a window, the first maximum gets the gradient; of a whole image, all share it: as stock."""
    x = tf.constant(np.random.default_rng(0).integers(0, 3, (2, 6, 8, 5)).astype(np.float32))
    dy = tf.constant(np.random.default_rng(1).standard_normal(fast(x).shape).astype(np.float32))
    gradients = []
    for layer in (fast, stock):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True) if layer is fast else layer(x)
        gradients.append(tape.gradient(y, x, dy))
    assert_all_close([fast(x), gradients[0]], [stock(x), gradients[1]], 1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        FastMaxPooling2D(),
        FastAveragePooling2D(2),
        FastGlobalAveragePooling2D(),
        FastGlobalMaxPooling2D(),
    ],
    ids=lambda layer: type(layer).__qualname__,
)
def test_nan_is_not_lost(layer):
    """Stock MaxPooling2D skips NaN on a CPU."""
    for place in np.ndindex(2, 2):
        x = np.ones((1, 2, 2, 17), np.float32)
        x[(0, *place, 5)] = np.nan
        y = np.reshape(layer(x), -1)
        assert np.isnan(y[5])
        assert (np.delete(y, 5) == 1).all()


def test_windows_of_infinities():
    x = np.full((1, 4, 4, 3), -np.inf, np.float32)
    for layer in (FastMaxPooling2D(), FastGlobalMaxPooling2D()):
        assert (np.asarray(layer(x)) == -np.inf).all()


def test_accelerated_models_pool_with_the_kernels(draw, executed):
    def build():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, None, 3))
        x = L.Conv2D(6, 3, activation="relu")(inputs)
        x = L.AveragePooling2D(2, padding="same")(x)
        both = L.Concatenate()([L.GlobalAveragePooling2D()(x), L.GlobalMaxPooling2D()(x)])
        return keras.Model(inputs, L.Dense(2)(both))

    x = draw(2, 9, 10, 3)
    fast, stock = accelerate(build()), build()
    assert_all_close(outputs_and_gradients(fast, [x]), outputs_and_gradients(stock, [x]), 1e-5)
    assert executed()["FastconvAveragePool2D"] == 2
    assert executed()["FastconvMaxPool2D"] == 1
