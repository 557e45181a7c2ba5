"""The fast layers beside the stock ones on whichever backend KERAS_BACKEND names.

No test file of its own: a process has one backend, so test_keras_backends.py runs this in one for
each.
"""

import logging

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax

    jax.config.update("jax_num_cpu_devices", 2)  # before JAX makes its devices

from keras import layers as stock_layers

import fastconv
from fastconv import keras as fast_layers
from fastconv.keras._stand_in import STAND_INS, adapter
from fastconv.mnist import data as mnist

ON_TRAINING = {  # by backend, the kernels that the article's model trains with
    "jax": {"FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"},
    "tensorflow": {"FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"},
    "torch": {
        "FastconvConv2D",
        "FastconvConv2DGradInput",
        "FastconvConv2DGradFilter",
        "FastconvMaxPool2DWithArgmax",
        "FastconvMaxPool2DGrad",
    },
}


@pytest.fixture
def executed():
    """How often each kernel has run since the test began; those that have not are left out."""
    if BACKEND == "jax":
        assert adapter.reason_unavailable() is None  # which runs one the first time
    before = adapter.ops_executed()
    return lambda: {
        name: count - before[name]
        for name, count in adapter.ops_executed().items()
        if count > before[name]
    }


def numpy(tensors):
    return [keras.ops.convert_to_numpy(tensor) for tensor in tensors]


def assert_all_close(actual, wanted, tolerance=1e-5):
    for a, w in zip(actual, wanted, strict=True):
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * np.abs(w).max(initial=1e-30))


def every_layer(data_format):
    """A model in which every stock layer of images that has a fast one occurs."""
    shape = (13, 12, 4) if data_format == "channels_last" else (4, 13, 12)
    inputs = keras.Input(shape)
    keras.config.set_image_data_format(data_format)
    x = stock_layers.Conv2D(8, 3, padding="same", activation="relu", groups=2)(inputs)
    x = stock_layers.MaxPooling2D(3, 2, padding="same")(x)
    x = stock_layers.DepthwiseConv2D(3, depth_multiplier=2, activation="relu")(x)
    x = stock_layers.SeparableConv2D(6, (2, 1), activation="gelu")(x)
    x = stock_layers.Conv2DTranspose(5, 3, strides=2, padding="same")(x)
    x = stock_layers.AveragePooling2D(2, padding="same")(x)
    x = stock_layers.Concatenate()(
        [stock_layers.GlobalAveragePooling2D()(x), stock_layers.GlobalMaxPooling2D()(x)]
    )
    model = keras.Model(inputs, stock_layers.Dense(1)(x))
    keras.config.set_image_data_format("channels_last")
    return model


def sequence():
    inputs = keras.Input((9, 3))
    x = stock_layers.Conv1D(5, 3, padding="causal", dilation_rate=2, activation="relu")(inputs)
    x = stock_layers.DepthwiseConv1D(3, padding="same", dilation_rate=2, activation="relu")(x)
    x = stock_layers.MaxPooling1D(3, strides=1, padding="same")(x)
    x = stock_layers.SeparableConv1D(4, 3, depth_multiplier=2, activation="gelu")(x)
    x = stock_layers.AveragePooling1D(2)(x)
    x = stock_layers.Conv1DTranspose(5, 3, strides=2, padding="same", activation="relu")(x)
    x = stock_layers.Concatenate()(
        [stock_layers.GlobalAveragePooling1D()(x), stock_layers.GlobalMaxPooling1D()(x)]
    )
    return keras.Model(inputs, stock_layers.Dense(1)(x))


def trained(model, steps=2):
    """Predictions before training, and the weights behind it."""
    generator = np.random.default_rng(1)
    model.set_weights([0.3 * generator.standard_normal(w.shape) for w in model.get_weights()])
    x = generator.standard_normal((4, *model.input_shape[1:]), "float32")
    y = generator.standard_normal((4, 1), "float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.predict(x, verbose=0)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return [before, *numpy(model.weights)]


@pytest.mark.parametrize("model", ["channels_last", "channels_first", "sequence"])
def test_every_layer_predicts_and_trains_as_stock(model, executed):
    model = sequence() if model == "sequence" else every_layer(model)
    wanted = trained(model)
    assert executed() == {}
    fast = fastconv.accelerate(keras.models.clone_model(model))
    assert_all_close(trained(fast), wanted, 1e-4)
    kernels = set(executed())
    assert "FastconvConv2DGradFilter" in kernels
    assert {"FastconvMaxPool2DGrad", "FastconvAveragePool2DGrad"} < kernels
    assert "FastconvConv2DTranspose" in kernels
    served = [e for e in fast_layers.summary(fast) if e.served_by == "fastconv"]
    assert {e.type for e in served} == {
        STAND_INS[type(layer)].__qualname__ for layer in model.layers if type(layer) in STAND_INS
    }


def article(layers):
    keras.utils.set_random_seed(7)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers[0](32, (3, 3), activation="relu"),
            layers[1]((2, 2)),
            layers[0](64, (3, 3), activation="relu"),
            layers[1]((2, 2)),
            stock_layers.Flatten(),
            stock_layers.Dense(64, activation="relu"),
            stock_layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model


STOCK = (stock_layers.Conv2D, stock_layers.MaxPooling2D)
FAST = (fast_layers.FastConv2D, fast_layers.FastMaxPooling2D)


@pytest.fixture(scope="module")
def digits():
    data = mnist.read_npz(mnist.SUBSET, "the packaged subset")
    x = data.x_train[:512].reshape(-1, 28, 28, 1).astype("float32") / 255
    return x, keras.utils.to_categorical(data.y_train[:512], 10)


def test_the_articles_model_trains_as_stock(digits, executed):
    histories, predictions = [], []
    for layers in (STOCK, FAST):
        model = article(layers)
        keras.utils.set_random_seed(1)
        history = model.fit(*digits, epochs=2, batch_size=32, verbose=0)
        histories.append(history.history["loss"])
        predictions.append(model.predict(digits[0][:32], verbose=0))
    assert ON_TRAINING[BACKEND] <= set(executed())
    assert histories[1][1] < 0.7 * histories[1][0], "it learns"
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-3)
    np.testing.assert_allclose(predictions[1], predictions[0], atol=5e-3)


def test_convolution_with_pooling_as_one_layer(digits, executed):
    layer = fast_layers.FastConvPool2D(8, 3, activation="relu")
    y = layer(digits[0][:4])
    assert executed() == {"FastconvConv2DMaxPool2D": 1}
    convolution = stock_layers.Conv2D(8, 3, activation="relu")
    convolution.build(digits[0][:4].shape)
    convolution.set_weights(layer.get_weights())
    wanted = stock_layers.MaxPooling2D(2)(convolution(digits[0][:4]))
    assert_all_close(numpy([y]), numpy([wanted]))


def test_mixed_policy(executed):
    """All layers serve it; their results round otherwise than stock code's."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = every_layer("channels_last")
        fast = fastconv.accelerate(keras.models.clone_model(model))
    finally:
        keras.config.set_dtype_policy("float32")
    wanted = trained(model)
    assert executed() == {}
    assert_all_close(trained(fast), wanted, 0.05)
    assert {"FastconvConv2DTranspose", "FastconvAveragePool2DGrad"} < set(executed())
    served = [e for e in fast_layers.summary(fast) if e.served_by == "fastconv"]
    assert len(served) == sum(type(layer) in STAND_INS for layer in model.layers)
    assert {str(weight.dtype) for weight in fast.weights} == {"float32"}


def test_int8(executed, caplog):
    layer = fast_layers.FastConv2D(7, (2, 3), strides=2, activation="relu")
    layer.build((None, 9, 11, 6))
    draw = np.random.default_rng(3).standard_normal
    layer.set_weights([draw(w.shape) for w in layer.get_weights()])
    w, w_scale = fastconv.quantize_filter(keras.ops.convert_to_numpy(layer.kernel))
    bias = keras.ops.convert_to_numpy(layer.bias)
    layer.quantize("int8")
    x = draw((3, 9, 11, 6)).astype("float32")
    with caplog.at_level(logging.DEBUG, "fastconv"):
        y = layer(x)
    expected = fastconv.conv2d_int8(x, w, w_scale, bias, strides=2, activation="relu")
    assert_all_close(numpy([y]), [expected], 1e-6)
    if BACKEND != "tensorflow":
        assert executed() == {}
        assert f"no kernel of int8 for the backend {BACKEND}" in caplog.text


def test_other_data_types_are_left_to_stock(executed, caplog):
    x = np.ones((1, 6, 6, 3), "float32")
    fast = fast_layers.FastConv2D(2, 3, dtype="float64")
    with caplog.at_level(logging.DEBUG, "fastconv"):
        fast(x)
    assert executed() == {}
    assert "the data type is not float32" in caplog.text
    assert fastconv.explain(fast).served_by == "stock"


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution knows JAX")
def test_data_parallel(digits, executed):
    """On two devices as on one, and each computes its half."""
    x, y = digits[0][:64], digits[1][:64]
    results = []
    for distribution in (None, keras.distribution.DataParallel(devices=jax.devices())):
        keras.distribution.set_distribution(distribution)
        try:
            model = article(FAST)
            before = executed()
            history = model.fit(x, y, batch_size=32, epochs=1, verbose=0, shuffle=False)
            runs = {name: count - before.get(name, 0) for name, count in executed().items()}
            results.append((history.history["loss"], numpy(model.weights), runs))
        finally:
            keras.distribution.set_distribution(None)
    (loss, weights, runs), (loss_of_two, weights_of_two, runs_of_two) = results
    assert len(jax.devices()) == 2
    np.testing.assert_allclose(loss_of_two, loss, rtol=1e-4)
    for two, one in zip(weights_of_two, weights, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-4)
    assert runs_of_two == {name: 2 * count for name, count in runs.items() if count}


@pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow's is in test_keras_accelerate.py")
def test_export(digits, tmp_path):
    """JAX exports no call of a library: what is exported is the stock layers' code."""
    tf = pytest.importorskip("tensorflow")
    model = article(FAST)
    x = digits[0][:5]
    wanted = model.predict(x, verbose=0)
    model.export(tmp_path, verbose=False)
    exported = tf.saved_model.load(tmp_path)
    found = exported.serve(x)
    assert_all_close([np.asarray(found)], [wanted])


@pytest.mark.skipif(BACKEND != "torch", reason="jit_compile=True is torch.compile on torch alone")
def test_torch_compile(digits, executed):
    import torch

    x, y = digits[0][:64], digits[1][:64]
    losses = []
    for jit_compile in (False, True):
        model = article(FAST)
        model.compile("sgd", "categorical_crossentropy", jit_compile=jit_compile)
        with torch._dynamo.config.patch(suppress_errors=False):
            losses.append(model.fit(x, y, epochs=2, verbose=0, shuffle=False).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert ON_TRAINING["torch"] <= set(executed())
