"""The fast layers beside the stock ones: outputs, gradients, weights, files and fall-throughs."""

import copy
import inspect
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tensorflow_oracle as oracle
from fastconv.adapters import xla
from fastconv.keras import (
    FastAveragePooling2D,
    FastBatchNormalization,
    FastConv2D,
    FastConvPool2D,
    FastGlobalAveragePooling2D,
    FastGlobalMaxPooling2D,
    FastMaxPooling1D,
    FastMaxPooling2D,
    _stand_in,
)
from keras_support import equal_layers, outputs_and_gradients, through
from tensorflow_oracle import assert_all_close

DOCS = Path(__file__).parents[1] / "docs" / "keras.md"

PAIRS = [
    pytest.param(FastConv2D, keras.layers.Conv2D, {"filters": 3, "kernel_size": 2}, id="conv"),
    pytest.param(FastMaxPooling2D, keras.layers.MaxPooling2D, {}, id="pool"),
    pytest.param(
        FastAveragePooling2D, keras.layers.AveragePooling2D, {"pool_size": 2}, id="average"
    ),
    pytest.param(
        FastGlobalAveragePooling2D,
        keras.layers.GlobalAveragePooling2D,
        {"keepdims": True},
        id="global average",
    ),
    pytest.param(FastGlobalMaxPooling2D, keras.layers.GlobalMaxPooling2D, {}, id="global max"),
]


# --- outputs and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", [None, "linear", "relu", "gelu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": "same", "strides": 2},
        {"padding": "SAME", "dilation_rate": (2, 1)},
        {"strides": (2, 3), "groups": 2},
        {"kernel_size": (5, 1), "padding": "same", "groups": 4},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_conv2d(options, activation, use_bias, data_format, draw, executed):
    layer = FastConv2D(
        **{"filters": 8, "kernel_size": 3, **options},
        activation=activation,
        use_bias=use_bias,
        data_format=data_format,
    )
    x = draw(2, 4, 9, 10) if data_format == "channels_first" else draw(2, 9, 10, 4)
    layer.build(x.shape)
    weights = [draw(*w.shape) for w in layer.get_weights()]

    def stock(x, kernel, bias=None):
        y = oracle.conv2d(
            x,
            kernel,
            bias,
            strides=layer.strides,
            padding=layer.padding.upper(),
            dilations=layer.dilation_rate,
            data_format=data_format,
        )
        return layer.activation(y)

    actual = outputs_and_gradients(through(layer), [x, *weights])
    assert executed() == {
        "FastconvConv2D": 1,
        "FastconvConv2DGradInput": 1,
        "FastconvConv2DGradFilter": 1,
    }
    assert_all_close(actual, outputs_and_gradients(stock, [x, *weights]), 1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "relu"}, {"padding": "same", "strides": (2, 3), "use_bias": False}],
    ids=str,
)
def test_conv2d_is_stocks(options, draw):
    x = draw(2, 9, 10, 3)
    fast, stock = equal_layers(
        FastConv2D, keras.layers.Conv2D, x.shape, filters=4, kernel_size=3, **options
    )
    assert_all_close(outputs_and_gradients(fast, [x]), outputs_and_gradients(stock, [x]), 1e-5)


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool_size": 3, "strides": 2},
        {"pool_size": 3, "strides": (1, 2), "padding": "same"},
        {"pool_size": (1, 4), "padding": "valid"},
        {"pool_size": 2, "strides": 3},
    ],
    ids=str,
)
def test_max_pooling2d(options, data_format, training, draw, executed):
    x = tf.constant(draw(2, 9, 10, 8))
    fast = FastMaxPooling2D(data_format=data_format, **options)
    stock = keras.layers.MaxPooling2D(data_format=data_format, **options)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fast(x, training=training)
    # No argmax where none is asked for: it would cost inference time.
    op = "FastconvMaxPool2DWithArgmax" if training else "FastconvMaxPool2D"
    assert executed() == {op: 1}
    dy = draw(*y.shape)
    with tf.GradientTape() as stock_tape:
        stock_tape.watch(x)
        wanted = stock(x)
    actual = [y, tape.gradient(y, x, dy)]
    assert_all_close(actual, [wanted, stock_tape.gradient(wanted, x, dy)], 1e-6)


def test_second_order_gradients(draw):
    x = tf.constant(draw(2, 8, 8, 3))
    fast, stock = equal_layers(
        FastConv2D, keras.layers.Conv2D, x.shape, filters=4, kernel_size=3, activation="relu"
    )
    pools = {fast: FastMaxPooling2D(), stock: keras.layers.MaxPooling2D()}

    def penalized(layer):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(tf.sin(pools[layer](layer(x), training=True)))
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, layer.trainable_variables)

    wanted = penalized(stock)
    assert_all_close(penalized(fast), wanted)
    assert_all_close(tf.function(penalized)(fast), wanted)


def test_activation_layers_and_functions_of_the_user(draw):
    x = draw(2, 6, 6, 3)
    for activation in (keras.layers.LeakyReLU(), lambda y: y - 1.0):
        options = {"filters": 4, "kernel_size": 3, "activation": activation}
        fast, stock = equal_layers(FastConv2D, keras.layers.Conv2D, x.shape, **options)
        assert_all_close([fast(x)], [stock(x)], 1e-5)


def test_lora(draw):
    x = draw(2, 6, 6, 3)
    fast, stock = equal_layers(
        FastConv2D, keras.layers.Conv2D, x.shape, filters=4, kernel_size=3, activation="relu"
    )
    for layer in (fast, stock):
        layer.enable_lora(2)
    weights = [draw(*w.shape) for w in fast.trainable_variables]
    gradients = []
    for layer in (fast, stock):
        for variable, weight in zip(layer.trainable_variables, weights, strict=True):
            variable.assign(weight)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(layer(x)))
        gradients.append(tape.gradient(loss, layer.trainable_variables))
    assert len(gradients[0]) == 3  # the bias and the two matrices; the kernel is frozen
    assert_all_close(*gradients)


def test_convolution_op_of_a_subclass(draw, executed):
    class ScaledConv2D(FastConv2D):
        def convolution_op(self, inputs, kernel):
            return super().convolution_op(inputs, 2.0 * kernel)

    x = draw(2, 6, 6, 3)
    layer = ScaledConv2D(4, 3, activation="relu", bias_initializer="ones")
    y = layer(x)
    assert executed() == {"FastconvConv2D": 1}
    wanted = oracle.conv2d(
        x, 2.0 * layer.kernel, layer.bias, strides=1, padding="VALID", activation="relu"
    )
    assert_all_close([y], [wanted], 1e-5)


def test_inside_other_layers(draw):
    videos = draw(2, 3, 8, 8, 2)
    fast = keras.layers.TimeDistributed(FastConv2D(4, 3))
    stock = keras.layers.TimeDistributed(keras.layers.Conv2D(4, 3))
    fast.build(videos.shape)
    stock.build(videos.shape)
    stock.set_weights(fast.get_weights())
    assert_all_close([fast(videos)], [stock(videos)], 1e-5)
    pool = keras.layers.TimeDistributed(FastMaxPooling2D())
    wanted = keras.layers.TimeDistributed(keras.layers.MaxPooling2D())(videos)
    assert_all_close([pool(videos, training=True)], [wanted], 0)


# --- what the stock code does instead -------------------------------------------------------------


def assert_stock_code(layers, inputs, executed, caplog, reason):
    """The fast one of ``layers`` gives bit for bit what the stock one gives, and says why."""
    fast, stock = layers
    with caplog.at_level(logging.DEBUG, "fastconv"):
        y = fast(inputs)
        fast(inputs)
    assert executed() == {}
    messages = [record.getMessage() for record in caplog.records if record.name == "fastconv"]
    assert len(messages) == 1, "told once"
    assert reason in messages[0]
    assert type(fast).__qualname__ in messages[0]
    wanted = stock(inputs)
    assert y.dtype == wanted.dtype
    np.testing.assert_array_equal(tf.cast(y, "float64"), tf.cast(wanted, "float64"))


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_other_data_types(fast, stock, options, draw, executed, caplog):
    x = draw(2, 6, 6, 3)
    layers = equal_layers(fast, stock, x.shape, dtype="float64", **options)
    reason = "the data type is not float32, float16 or bfloat16: float64, computed in float64"
    assert_stock_code(layers, x, executed, caplog, reason)


def test_other_ranks(draw, executed, caplog):
    # Keras builds the layer for images alone; what comes of videos then is TensorFlow's own matter.
    layers = equal_layers(
        FastConv2D, keras.layers.Conv2D, (2, 6, 6, 3), filters=4, kernel_size=3, name="layer"
    )
    videos = draw(2, 2, 6, 6, 3)
    with caplog.at_level(logging.DEBUG, "fastconv"):
        assert_same_error(*(failure(lambda layer=layer: layer(videos)) for layer in layers))
    assert executed() == {}
    assert "the input's rank is not 4" in caplog.text


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_other_backends(fast, stock, options, draw, executed, caplog, monkeypatch):
    adapter, reason = _stand_in._load_adapter("numpy")
    monkeypatch.setattr(_stand_in, "adapter", adapter)
    monkeypatch.setattr(_stand_in, "_reason_without_adapter", reason)
    x = draw(2, 6, 6, 3)
    layers = equal_layers(fast, stock, x.shape, **options)
    assert_stock_code(layers, x, executed, caplog, "the Keras backend is numpy")
    assert layers[0].supports_jit


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_machines_with_a_gpu(fast, stock, options, draw, executed, caplog, monkeypatch):
    monkeypatch.setattr(_stand_in.adapter, "_gpus", lambda: ["GPU:0"])
    x = draw(2, 6, 6, 3)
    layers = equal_layers(fast, stock, x.shape, **options)
    assert_stock_code(layers, x, executed, caplog, "TensorFlow sees a GPU")
    assert layers[0].supports_jit


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_inside_xla_where_the_kernels_cannot_run(
    fast, stock, options, draw, executed, caplog, monkeypatch
):
    monkeypatch.setattr(xla, "reason_unavailable", lambda: "this test says so")
    x = tf.constant(draw(2, 6, 6, 3))
    fast, stock = equal_layers(fast, stock, x.shape, **options)
    assert not fast.supports_jit
    wanted = outputs_and_gradients(stock, [x])

    # A function that the compiled one calls becomes part of the same XLA computation.
    inner = tf.function(fast)
    compiled = tf.function(lambda x: outputs_and_gradients(inner, [x]), jit_compile=True)
    with caplog.at_level(logging.DEBUG, "fastconv"):
        actual = compiled(x)
    assert executed() == {}
    assert "the graph is compiled by XLA" in caplog.text
    assert "this test says so" in caplog.text
    assert_all_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_symbolic_inputs(fast, stock, options):
    for shape in [(None, None, None, 3), (None, 7, 8, 3)]:
        symbolic = keras.KerasTensor(shape)
        assert fast(**options)(symbolic).shape == stock(**options)(symbolic).shape
        built = fast(**options)
        built.build(shape)
        assert built.call(symbolic).shape == stock(**options)(symbolic).shape


# --- errors ---------------------------------------------------------------------------------------


def failure(function):
    with pytest.raises(Exception) as raised:
        function()
    return raised.value


def assert_same_error(actual, wanted):
    assert type(actual) is type(wanted)
    assert str(actual) == str(wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"filters": 0, "kernel_size": 3},
        {"filters": 3, "kernel_size": 0},
        {"filters": 3, "kernel_size": (1, 2, 3)},
        {"filters": 3, "kernel_size": 3, "groups": 0},
        {"filters": 3, "kernel_size": 3, "groups": 2},
        {"filters": 3, "kernel_size": 3, "strides": 0},
        {"filters": 3, "kernel_size": 3, "strides": 2, "dilation_rate": 2},
        {"filters": 3, "kernel_size": 3, "padding": "causal"},
        {"filters": 3, "kernel_size": 3, "data_format": "NHWC"},
        {"filters": 3, "kernel_size": 3, "unknown": 1},
    ],
    ids=str,
)
def test_errors_of_conv2d_arguments(options):
    assert_same_error(
        failure(lambda: FastConv2D(**options)), failure(lambda: keras.layers.Conv2D(**options))
    )


@pytest.mark.parametrize(
    "options", [{"pool_size": 0}, {"pool_size": (1, 2, 3)}, {"data_format": "NHWC"}], ids=str
)
def test_errors_of_max_pooling2d_arguments(options):
    assert_same_error(
        failure(lambda: FastMaxPooling2D(**options)),
        failure(lambda: keras.layers.MaxPooling2D(**options)),
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 6, 3), (6, 6, 3), (1, 6, 6, 5)],
    ids=["smaller than the kernel", "no batch", "channels that do not divide"],
)
def test_errors_of_conv2d_inputs(shape):
    options = {"filters": 3, "kernel_size": 3, "groups": 3, "name": "layer"}
    x = np.zeros(shape, "float32")
    assert_same_error(
        failure(lambda: FastConv2D(**options)(x)),
        failure(lambda: keras.layers.Conv2D(**options)(x)),
    )


def test_an_input_that_became_too_small(draw):
    # The layer has been built for larger ones, so that TensorFlow is the first to notice.
    layers = equal_layers(
        FastConv2D, keras.layers.Conv2D, (1, 8, 8, 3), filters=3, kernel_size=3, name="layer"
    )
    x = draw(1, 1, 6, 3)
    assert_same_error(*(failure(lambda layer=layer: layer(x)) for layer in layers))


# --- standing in for the stock layers -------------------------------------------------------------


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_configuration_is_stocks(fast, stock, options):
    # Not of the classes: before 3.11.4, Python finds Keras's __new__(*args, **kwargs) for subclasses.
    assert inspect.signature(fast.__init__) == inspect.signature(stock.__init__)
    assert fast(**options, name="a").get_config() == stock(**options, name="a").get_config()
    keras.backend.clear_session()
    name = fast(**options).name
    keras.backend.clear_session()
    assert name == stock(**options).name
    assert fast.from_config(stock(**options, name="a").get_config()).name == "a"
    revived = keras.layers.deserialize(keras.layers.serialize(fast(**options)))
    assert type(revived) is fast


def test_configuration_keeps_every_argument():
    options = {
        "filters": 4,
        "kernel_size": (2, 3),
        "strides": (1, 2),
        "padding": "same",
        "data_format": "channels_first",
        "groups": 2,
        "activation": "relu",
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "activity_regularizer": "l1",
        "kernel_constraint": "max_norm",
        "bias_constraint": "non_neg",
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "dtype": "mixed_float16",
        "trainable": False,
        "name": "layer",
    }
    assert FastConv2D(**options).get_config() == keras.layers.Conv2D(**options).get_config()


@pytest.mark.parametrize("fast, stock, options", PAIRS)
def test_copies(fast, stock, options, draw):
    x = draw(2, 6, 6, 3)
    layer = fast(**options)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is fast
        np.testing.assert_array_equal(twin(x), y)


# --- models ---------------------------------------------------------------------------------------


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
    labels = np.eye(4, dtype="float32")[rng.integers(4, size=64)]
    return rng.random((64, 12, 12, 2), "float32"), labels


def train(model, data):
    return model.fit(*data, batch_size=16, epochs=3, shuffle=False, verbose=0).history["loss"]


def predictions(model, data):
    return model.predict(data[0], verbose=0)


STEPS = 3 * 4  # of train()
# In a graph the poolings and the convolutions before them are one op each.
OPS_OF_A_STEP = {"FastconvConv2DMaxPool2D": 2, "FastconvConv2DMaxPool2DGrad": 2}
OPS_OF_AN_EAGER_STEP = {
    "FastconvConv2D": 2,
    "FastconvMaxPool2DWithArgmax": 2,
    "FastconvMaxPool2DGrad": 2,
    "FastconvConv2DGradFilter": 2,
    "FastconvConv2DGradInput": 1,  # nobody asks for the gradient of the images
}


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"steps_per_execution": 4}, {"jit_compile": True}],
    ids=str,
)
def test_training_follows_stock(options, data, executed, executed_in_xla):
    fast, stock = fast_model(**options), stock_model()
    losses = train(fast, data)
    here, elsewhere = executed, executed_in_xla
    if options.get("jit_compile"):
        here, elsewhere = elsewhere, here
    ops = OPS_OF_AN_EAGER_STEP if options.get("run_eagerly") else OPS_OF_A_STEP
    assert here() == {op: STEPS * count for op, count in ops.items()}
    assert elsewhere() == {}
    np.testing.assert_allclose(losses, train(stock, data), rtol=1e-4)
    assert_all_close([predictions(fast, data)], [predictions(stock, data)], 1e-3)
    np.testing.assert_allclose(
        fast.evaluate(*data, verbose=0), stock.evaluate(*data, verbose=0), rtol=1e-4
    )


# Keras announces that it goes without XLA where it is told to use it.
@pytest.mark.filterwarnings("ignore:Model doesn't support `jit_compile=True`")
def test_training_where_the_kernels_cannot_run_in_xla(data, executed, monkeypatch):
    monkeypatch.setattr(xla, "reason_unavailable", lambda: "this test says so")
    model = fast_model(jit_compile=True)
    assert not model.jit_compile
    train(model, data)
    assert executed() == {op: STEPS * count for op, count in OPS_OF_A_STEP.items()}


def test_inference_keeps_no_argmax(data, executed):
    model = fast_model()
    model.predict(data[0], batch_size=32, verbose=0)
    model.evaluate(*data, batch_size=32, verbose=0)
    assert executed() == {"FastconvConv2DMaxPool2D": 8}


def test_keras_decides_on_xla_as_for_stock_layers():
    for choice in ("auto", True, False):
        assert fast_model(jit_compile=choice).jit_compile is (
            stock_model(jit_compile=choice).jit_compile
        )


@pytest.mark.parametrize("size", [(None, None), (12, None)], ids=str)
def test_unknown_height_and_width(size, data):
    inputs = keras.Input((*size, 2))
    layer = FastConv2D(3, 3, strides=2, padding="same", activation="relu")
    outputs = keras.layers.GlobalAveragePooling2D()(FastMaxPooling2D()(layer(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    stock = keras.layers.Conv2D(3, 3, strides=2, padding="same", activation="relu")
    stock.build((None, None, None, 2))
    stock.set_weights(layer.get_weights())
    wanted = tf.reduce_mean(keras.layers.MaxPooling2D()(stock(data[0])), (1, 2))
    assert_all_close([predictions(model, data)], [wanted], 1e-5)
    model.fit(data[0], np.zeros((64, 3)), verbose=0)


@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="Keras 3.8 has no RematScope")
@pytest.mark.parametrize("recompute", ["full", "activations"])
def test_rematerialization(recompute, draw):
    with keras.RematScope(mode=recompute):
        layer = FastConv2D(3, 3, activation="relu")
    x = draw(2, 6, 6, 3)
    stock = keras.layers.Conv2D(3, 3, activation="relu")
    layer.build(x.shape)
    stock.build(x.shape)
    stock.set_weights(layer.get_weights())
    gradients = []
    for one in (layer, stock):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(one(x)))
        gradients.append(tape.gradient(loss, one.trainable_variables))
    assert_all_close(*gradients)


@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="Keras 3.8 has no RematScope")
def test_rematerialization_in_a_graph(data):
    """TensorFlow rematerialises no call with keywords, of which ``training`` would be one."""

    def network(*layers):
        return keras.Sequential([keras.Input((12, 12, 2)), *layers])

    def results(model):
        function = tf.function(lambda x: model(x, training=True))
        return outputs_and_gradients(function, [tf.constant(data[0])])

    with keras.RematScope(mode="full"):
        fast = [FastConv2D(3, 3, activation="relu"), FastMaxPooling2D(2)]
        pooled = [FastConvPool2D(3, 3, activation="relu")]
        sequences = [FastMaxPooling1D(3)]
    stock = network(keras.layers.Conv2D(3, 3, activation="relu"), keras.layers.MaxPooling2D(2))
    for layers in (fast, pooled):
        model = network(*layers)
        model.set_weights(stock.get_weights())
        assert_all_close(results(model), results(stock), 1e-5)
    reshape = keras.layers.Reshape((72, 4))
    stock = network(reshape, keras.layers.MaxPooling1D(3))
    assert_all_close(results(network(reshape, *sequences)), results(stock))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_autograph_reads_what_is_called_by_hand(jit_compile, data, caplog):
    """Keras keeps AutoGraph from the layers, but where a function of TensorFlow's calls ``call()``."""
    layers = [
        FastConv2D(3, 3),
        FastConvPool2D(4, 1),
        FastBatchNormalization(),
        FastMaxPooling2D(padding="same"),
        FastAveragePooling2D(2),
        FastGlobalMaxPooling2D(),
    ]
    keras.Sequential([keras.Input((12, 12, 2)), *layers])

    @tf.function(jit_compile=jit_compile)
    def by_hand(x):
        for layer in layers:
            x = layer.call(x)
        return x

    assert by_hand(data[0]).shape == (64, 4)
    assert "AutoGraph" not in caplog.text


# --- files ----------------------------------------------------------------------------------------


def assert_fast(model):
    assert isinstance(model.layers[0], FastConv2D)
    assert isinstance(model.layers[1], FastMaxPooling2D)


def test_keras_files(data, tmp_path):
    model = fast_model()
    train(model, data)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_fast(loaded)
    np.testing.assert_array_equal(predictions(loaded, data), predictions(model, data))
    np.testing.assert_allclose(train(loaded, data), train(model, data), rtol=1e-6)


def test_legacy_h5_files(data, tmp_path):
    model = fast_model()
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    assert_fast(loaded)
    np.testing.assert_array_equal(predictions(loaded, data), predictions(model, data))


def test_a_fast_models_file_opens_as_stock_without_fastconv(data, tmp_path):
    model = fast_model()
    train(model, data)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", data[0])
    (loading,) = re.findall(r"```python\n(import keras\n.*?)```", DOCS.read_text(), re.DOTALL)
    program = f"""
import sys
import numpy as np
{loading}
assert type(model.layers[0]) is keras.layers.Conv2D
assert type(model.layers[1]) is keras.layers.MaxPooling2D
assert "fastconv" not in sys.modules
np.save("y.npy", model.predict(np.load("x.npy"), verbose=0))
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
    assert_all_close([np.load(tmp_path / "y.npy")], [predictions(model, data)], 1e-5)


# The optimizer of a model that has not been trained has no place for the file's variables yet.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize("source, target", [(fast_model, stock_model), (stock_model, fast_model)])
def test_weights_move_both_ways(source, target, data, tmp_path):
    model, other = source(), target()
    train(model, data)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_exported_models(data, tmp_path):
    model = fast_model()
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    # The batches are different ones, and so may be the algorithms.
    assert_all_close([served.serve(data[0])], [predictions(model, data)], 1e-6)
    x = tf.constant(data[0])
    assert_all_close(outputs_and_gradients(served.serve, [x]), outputs_and_gradients(model, [x]))


def test_models_are_copied(data):
    model = fast_model()
    train(model, data)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_fast(twin)
        np.testing.assert_array_equal(predictions(twin, data), predictions(model, data))
    clone = keras.models.clone_model(model)
    assert_fast(clone)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(predictions(clone, data), predictions(model, data))
