"""A convolution and the max-pooling behind it as one op: FastConvPool2D, and the pair in graphs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

from fastconv.keras import FastConv2D, FastConvPool2D, FastMaxPooling2D, accelerate
from keras_support import through, two_orders
from tensorflow_oracle import assert_all_close

FUSED = {"FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"}


def stock_pair(layer):
    """What FastConvPool2D stands for."""

    def call(x, kernel, bias=None):
        data_format = layer.data_format
        y = keras.ops.conv(
            x, kernel, layer.strides, layer.padding, data_format, layer.dilation_rate
        )
        if bias is not None:
            y += bias if data_format == "channels_last" else tf.reshape(bias, (-1, 1, 1))
        return keras.ops.max_pool(layer.activation(y), 2, data_format=data_format)

    return call


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"activation": "gelu"},
        {"activation": "relu", "padding": "same", "strides": (1, 2), "use_bias": False},
        {"activation": "relu", "dilation_rate": 2},
    ],
    ids=str,
)
def test_layer(options, training, data_format, draw, executed):
    layer = FastConvPool2D(4, 3, data_format=data_format, **options)
    x = draw(2, 3, 11, 12) if data_format == "channels_first" else draw(2, 11, 12, 3)
    layer.build(x.shape)
    inputs = [tf.constant(x), *[tf.constant(draw(*w.shape)) for w in layer.weights]]
    actual = two_orders(through(layer, training=training))(*inputs)
    if options.get("activation") != "gelu":
        assert executed().keys() >= FUSED
    assert actual[0].shape == layer.compute_output_shape(x.shape)
    assert_all_close(actual, two_orders(stock_pair(layer))(*inputs), 1e-5)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_unknown_shapes(jit_compile, draw, executed, executed_in_xla):
    layer = FastConvPool2D(4, 3, activation="relu", padding="same", strides=2)
    x = draw(2, 11, 14, 3)
    layer.build(x.shape)
    inputs = [tf.constant(x), *[tf.constant(draw(*w.shape)) for w in layer.weights]]
    function = tf.function(
        two_orders(through(layer, training=True)),
        input_signature=[
            tf.TensorSpec((None, None, None, 3)),
            *[tf.TensorSpec(w.shape) for w in layer.weights],
        ],
        jit_compile=jit_compile,
    )
    actual = function(*inputs)
    assert (executed_in_xla() if jit_compile else executed()).keys() >= FUSED
    assert_all_close(actual, two_orders(stock_pair(layer))(*inputs), 1e-5)


def test_other_data_types_go_to_stock(draw, executed):
    layer = FastConvPool2D(4, 3, activation="relu", dtype="float64")
    x = draw(2, 8, 8, 3)
    y = layer(x)
    assert not executed()
    assert y.dtype == layer.compute_dtype
    wanted = stock_pair(layer)(tf.cast(x, y.dtype), *[tf.cast(w, y.dtype) for w in layer.weights])
    assert_all_close([tf.cast(y, tf.float32)], [tf.cast(wanted, tf.float32)], 1e-2)


def test_layer_in_files(draw, tmp_path):
    model = keras.Sequential([keras.Input((9, 10, 3)), FastConvPool2D(4, 3, activation="relu")])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = draw(2, 9, 10, 3)
    assert type(again.layers[0]) is FastConvPool2D
    np.testing.assert_array_equal(model(x), again(x))


def test_layer_takes_unknown_shapes():
    layer = FastConvPool2D(4, 3)
    assert layer(keras.Input((None, 9, 3))).shape == (None, None, 3, 4)


# --- the pair of layers in graphs -----------------------------------------------------------------


def small_model(pool=None, **conv_options):
    inputs = keras.Input((9, 10, 3))
    y = FastConv2D(4, 3, **{"activation": "relu", **conv_options})(inputs)
    return keras.Model(inputs, (pool or FastMaxPooling2D())(y))


def ops_of(model, x, executed):
    """Those that predict_on_batch() runs, and its result."""
    before = executed()
    y = model.predict_on_batch(x)
    return {op for op, count in executed().items() if count > before.get(op, 0)}, y


def test_pair_becomes_one_op(draw, executed):
    x = draw(2, 9, 10, 3)
    model = small_model()
    ops, y = ops_of(model, x, executed)
    assert ops == {"FastconvConv2DMaxPool2D"}
    assert_all_close([y], [model(x)], 1e-6)  # eager: two ops
    assert executed()["FastconvMaxPool2D"] == 1


def test_accelerated_pair_becomes_one_op(draw, executed):
    x = draw(2, 9, 10, 3)
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), L.Conv2D(4, 3, activation="relu"), L.MaxPooling2D()]
    )
    wanted = model.predict_on_batch(x)
    ops, y = ops_of(accelerate(model), x, executed)
    assert ops == {"FastconvConv2DMaxPool2D"}
    assert_all_close([y], [wanted], 1e-6)


@pytest.mark.parametrize(
    "model",
    [
        small_model(FastMaxPooling2D(3)),
        small_model(FastMaxPooling2D(2, strides=1)),
        small_model(FastMaxPooling2D(padding="same")),
        small_model(activation="gelu"),
        small_model(activity_regularizer="l2"),
        small_model(FastMaxPooling2D(data_format="channels_first")),
    ],
    ids=["3x3", "overlapping", "same", "gelu", "activity regularizer", "layouts"],
)
def test_other_pairs_stay_two_ops(model, draw, executed):
    x = draw(2, 9, 10, 3)
    ops, y = ops_of(model, x, executed)
    assert ops == {"FastconvConv2D", "FastconvMaxPool2D"}
    assert_all_close([y], [model(x)], 1e-6)


def test_output_that_others_read_is_computed_once(draw, executed):
    inputs = keras.Input((8, 8, 3))
    y = FastConv2D(4, 3, padding="same", activation="relu")(inputs)
    up = L.UpSampling2D()(FastMaxPooling2D()(y))
    model = keras.Model(inputs, L.Add()([y, up]))
    ops, _ = ops_of(model, draw(2, 8, 8, 3), executed)
    assert ops == {"FastconvConv2D", "FastconvMaxPool2D"}


def test_layers_used_twice_stay_two_ops(draw, executed):
    inputs = keras.Input((12, 12, 3))
    conv, pool = FastConv2D(3, 3, padding="same"), FastMaxPooling2D()
    model = keras.Model(inputs, pool(conv(pool(conv(inputs)))))
    x = draw(2, 12, 12, 3)
    ops, y = ops_of(model, x, executed)
    assert ops == {"FastconvConv2D", "FastconvMaxPool2D"}
    assert_all_close([y], [model(x)], 1e-6)


def test_feature_maps_can_still_be_had(draw):
    model = small_model()
    both = keras.Model(model.inputs, [model.layers[1].output, model.output])
    x = draw(2, 9, 10, 3)
    assert_all_close(both.predict_on_batch(x), [model.layers[1](x), model(x)], 1e-6)
