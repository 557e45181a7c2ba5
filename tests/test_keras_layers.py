"""The fast layers beside the stock ones: outputs, gradients, weights, files and fall-throughs."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastconv.adapters.tensorflow import ops_executed
from fastconv.keras import FastConv2D, FastMaxPooling2D


def executed():
    return sum(ops_executed().values())


def assert_close(actual, wanted, tolerance=1e-5):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    scale = np.abs(wanted).max(initial=1e-30)
    assert np.abs(actual - wanted).max(initial=0) <= tolerance * scale


def outputs_and_gradients(layer, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(tf.sin(3.0 * y))
    return y, tape.gradient(loss, [x, *layer.trainable_variables])


def assert_same_layer(fast, stock, x):
    stock.build(x.shape)
    fast.build(x.shape)
    fast.set_weights(stock.get_weights())
    before = executed()
    y, gradients = outputs_and_gradients(fast, x)
    assert executed() >= before + 2, "our kernels did not run"
    wanted_y, wanted_gradients = outputs_and_gradients(stock, x)
    assert_close(y, wanted_y)
    for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"activation": "relu", "use_bias": False},
        {"activation": "gelu"},
        {"padding": "same", "strides": 2, "activation": "relu"},
        {"padding": "same", "strides": (2, 3)},
        {"padding": "same", "dilation_rate": 2},
        {"kernel_size": (5, 1), "padding": "same"},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_conv2d_equals_stock(options):
    options = {"filters": 7, "kernel_size": 3, "bias_initializer": "glorot_normal"} | options
    if options.get("use_bias") is False:
        del options["bias_initializer"]
    else:
        options["bias_initializer"] = keras.initializers.RandomNormal(seed=1)
    x = np.random.default_rng(0).standard_normal((3, 11, 9, 5)).astype("float32")
    assert_same_layer(FastConv2D(**options), keras.layers.Conv2D(**options), x)


def test_grouped_conv2d_equals_stock():
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 6)).astype("float32")
    options = {"filters": 4, "kernel_size": 3, "groups": 2, "padding": "same"}
    fast, stock = FastConv2D(**options), keras.layers.Conv2D(**options)
    stock.build(x.shape)
    fast.build(x.shape)
    fast.set_weights(stock.get_weights())
    assert_close(fast(x), tf.function(stock)(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"pool_size": 3, "strides": 2}, {"pool_size": 3, "strides": 2, "padding": "same"},
     {"pool_size": (1, 4)}],
    ids=str,
)  # fmt: skip
def test_max_pooling_equals_stock(options):
    x = np.random.default_rng(0).standard_normal((3, 11, 9, 5)).astype("float32")
    assert_same_layer(FastMaxPooling2D(**options), keras.layers.MaxPooling2D(**options), x)


def test_channels_first_equals_channels_last():
    x = np.random.default_rng(0).standard_normal((2, 5, 9, 8)).astype("float32")
    first = FastConv2D(4, 3, data_format="channels_first", activation="relu")
    last = keras.layers.Conv2D(4, 3, activation="relu", data_format="channels_last")
    first.build(x.shape)
    last.build(x.transpose(0, 2, 3, 1).shape)
    first.set_weights(last.get_weights())
    wanted = np.transpose(last(x.transpose(0, 2, 3, 1)), (0, 3, 1, 2))
    assert_close(first(x), wanted)
    pooled = FastMaxPooling2D(data_format="channels_first")(x)
    assert_close(pooled, x[:, :, :8].reshape(2, 5, 4, 2, 4, 2).max((3, 5)), 0)


@pytest.mark.parametrize("training", [True, False, None])
def test_pooling_gradient_with_and_without_argmax(training):
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 8, 8, 3)), tf.float32)
    before = ops_executed()
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = FastMaxPooling2D()(x, training=training)
    forward = {op: n - before[op] for op, n in ops_executed().items() if n != before[op]}
    assert list(forward) == ["FastconvMaxPool2DWithArgmax" if training else "FastconvMaxPool2D"]
    with tf.GradientTape() as stock_tape:
        stock_tape.watch(x)
        stock = keras.layers.MaxPooling2D()(x)
    assert_close(tape.gradient(y, x), stock_tape.gradient(stock, x), 0)


def small_model(conv, pool, **compile_options):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 2)),
            conv(8, 3, activation="relu"),
            pool(2),
            conv(6, 3, activation="relu", padding="same"),
            pool(2),
            keras.layers.Flatten(),
            keras.layers.Dense(4, "softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"], **compile_options)
    return model


def stock_model(**options):
    return small_model(keras.layers.Conv2D, keras.layers.MaxPooling2D, **options)


def fast_model(**options):
    return small_model(FastConv2D, FastMaxPooling2D, **options)


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    return rng.random((64, 12, 12, 2), "float32"), np.eye(4, dtype="float32")[rng.integers(4, size=64)]


def train(model, data):
    return model.fit(*data, batch_size=16, epochs=3, shuffle=False, verbose=0).history["loss"]


def test_training_follows_stock(data):
    before = executed()
    fast, stock = fast_model(), stock_model()
    assert not fast.jit_compile
    np.testing.assert_allclose(train(fast, data), train(stock, data), rtol=1e-4)
    assert executed() >= before + 3 * 4 * 8
    assert_close(fast.predict(data[0], verbose=0), stock.predict(data[0], verbose=0), 1e-3)
    np.testing.assert_allclose(
        fast.evaluate(*data, verbose=0), stock.evaluate(*data, verbose=0), rtol=1e-4
    )


def test_inside_xla_the_stock_ops_stand_in(data, caplog):
    x = tf.constant(data[0])
    layer = FastConv2D(3, 3, activation="relu")
    wanted = layer(x)
    before = executed()
    with caplog.at_level(logging.DEBUG, "fastconv"):
        compiled = tf.function(layer, jit_compile=True)(x)
    assert executed() == before
    assert "XLA" in caplog.text
    assert_close(compiled, wanted)


@pytest.mark.parametrize("policy", ["float64", "mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_other_dtypes_are_stocks(policy):
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 3))
    fast, stock = FastConv2D(4, 3, dtype=policy), keras.layers.Conv2D(4, 3, dtype=policy)
    stock.build(x.shape)
    fast.build(x.shape)
    fast.set_weights(stock.get_weights())
    before = executed()
    y = fast(x)
    assert executed() == before
    assert y.dtype == stock(x).dtype
    np.testing.assert_array_equal(tf.cast(y, "float64"), tf.cast(stock(x), "float64"))


def test_unknown_height_and_width(data):
    inputs = keras.Input((None, None, 2))
    layer = FastConv2D(3, 3, strides=2, padding="same", activation="relu")
    model = keras.Model(inputs, FastMaxPooling2D()(layer(inputs)))
    assert model.output_shape == (None, None, None, 3)
    stock = keras.layers.Conv2D(3, 3, strides=2, padding="same", activation="relu")
    stock.build((None, None, None, 2))
    stock.set_weights(layer.get_weights())
    wanted = keras.layers.MaxPooling2D()(stock(data[0]))
    assert_close(model.predict(data[0], verbose=0), wanted)


def test_keras_file_round_trip(data, tmp_path):
    model = fast_model()
    train(model, data)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[0], FastConv2D)
    assert isinstance(loaded.layers[1], FastMaxPooling2D)
    np.testing.assert_array_equal(
        loaded.predict(data[0], verbose=0), model.predict(data[0], verbose=0)
    )


@pytest.mark.parametrize("source, target", [(fast_model, stock_model), (stock_model, fast_model)])
def test_weights_move_both_ways(source, target, data, tmp_path):
    model, other = source(), target()
    train(model, data)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fast, stock", [(FastConv2D, keras.layers.Conv2D)])
def test_config_equals_stock(fast, stock):
    options = {"filters": 3, "kernel_size": 2, "name": "layer", "kernel_regularizer": "l2"}
    assert fast(**options).get_config() == stock(**options).get_config()
    assert fast.from_config(stock(**options).get_config()).kernel_size == (2, 2)


@pytest.mark.parametrize(
    "options",
    [{"filters": 0, "kernel_size": 3}, {"filters": 3, "kernel_size": 0},
     {"filters": 3, "kernel_size": 3, "groups": 2}, {"filters": 3, "kernel_size": 3, "strides": 0},
     {"filters": 3, "kernel_size": 3, "padding": "causal"}],
    ids=str,
)  # fmt: skip
def test_errors_are_stocks(options):
    with pytest.raises(Exception) as wanted:
        keras.layers.Conv2D(**options)
    with pytest.raises(wanted.type) as actual:
        FastConv2D(**options)
    assert str(actual.value) == str(wanted.value)


def test_kernel_larger_than_input_is_stocks_error():
    x = np.zeros((1, 3, 3, 1), "float32")
    with pytest.raises(Exception) as wanted:
        keras.layers.Conv2D(1, 5)(x)
    with pytest.raises(wanted.type):
        FastConv2D(1, 5)(x)


def test_lora_kernel_is_used(data):
    layer = FastConv2D(3, 3)
    layer.build(data[0].shape)
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    wanted = tf.nn.conv2d(data[0], layer.kernel, 1, "VALID")
    assert_close(layer(data[0]), wanted)


def test_saved_model_export(data, tmp_path):
    model = fast_model()
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    assert_close(served.serve(data[0]), model.predict(data[0], verbose=0))
