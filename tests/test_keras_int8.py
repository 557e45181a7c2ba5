"""FastConv2D.quantize("int8"), as keras.layers.Dense has it, and its op."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastconv
from fastconv.adapters import tensorflow as ops
from fastconv.keras import FastConv2D, FastConvPool2D, FastDepthwiseConv2D
from fastconv.mnist import article, data

OP = "FastconvConv2DInt8"


def quantized_layer(shape, **options):
    """A layer in int8 with a bias that is not zero, and its filters as they were in float32."""
    layer = FastConv2D(**options)
    layer.build((None, *shape))
    generator = np.random.default_rng(1)
    layer.set_weights([generator.standard_normal(w.shape) for w in layer.get_weights()])
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    layer.quantize("int8")
    return layer, kernel


OPTIONS = [
    {"filters": 20, "kernel_size": 3, "padding": "same", "activation": "relu"},
    {"filters": 7, "kernel_size": (2, 3), "strides": 2, "use_bias": False},
    {"filters": 8, "kernel_size": 3, "dilation_rate": 2, "groups": 2, "activation": "tanh"},
    {"filters": 5, "kernel_size": 3, "data_format": "channels_first"},
]


def expected_of(layer, kernel, x, options):
    """By the function for NumPy arrays, of which test_int8.py knows every bit."""
    names = ("strides", "padding", "dilation_rate", "groups", "data_format")
    geometry = {name: options[name] for name in names if name in options}
    relu = "relu" if options.get("activation") == "relu" else None
    bias = keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else None
    w, w_scale = fastconv.quantize_filter(kernel)
    y = fastconv.conv2d_int8(x, w, w_scale, bias, activation=relu, **geometry)
    return tf.tanh(y).numpy() if options.get("activation") == "tanh" else y


@pytest.mark.parametrize("options", OPTIONS)
def test_layer(options, draw, executed, executed_in_xla):
    x = draw(3, 10, 10, 10)
    layer, kernel = quantized_layer(x.shape[1:], **options)
    expected = expected_of(layer, kernel, x, options)
    np.testing.assert_array_equal(layer(x), expected)
    specification = tf.TensorSpec((None, 10, 10, 10))
    graph = tf.function(layer).get_concrete_function(specification)
    np.testing.assert_array_equal(graph(tf.constant(x)), expected)
    assert graph.structured_outputs.shape[1:] == expected.shape[1:]
    assert executed() == {OP: 2}
    compiled = tf.function(layer, jit_compile=True)(x)
    np.testing.assert_allclose(compiled, expected, rtol=1e-6)  # XLA's tanh is another
    assert executed_in_xla() == {OP: 1}


def test_weights_are_those_of_keras(draw):
    layer, kernel = quantized_layer((8, 8, 6), filters=9, kernel_size=3)
    assert layer.dtype_policy.name == "int8_from_float32"
    assert layer.quantization_mode == "int8"
    wanted, scale = keras.quantizers.AbsMaxQuantizer(axis=(0, 1, 2))(kernel)
    np.testing.assert_array_equal(layer.kernel, wanted)
    np.testing.assert_array_equal(layer.kernel_scale, np.ravel(scale))
    w, w_scale = fastconv.quantize_filter(kernel)
    np.testing.assert_array_equal(layer.kernel, w)
    np.testing.assert_array_equal(layer.kernel_scale, w_scale)
    assert [v.name for v in layer.trainable_variables] == ["bias"]


@pytest.mark.parametrize("options", OPTIONS)
def test_keras_operations_agree(options, draw, monkeypatch, caplog):
    """What computes where the kernels do not."""
    if options.get("groups") == 2:
        options = {**options, "dilation_rate": 1}  # TensorFlow has no gradient of both on the CPU
    x = draw(2, 10, 10, 10)
    layer, _ = quantized_layer(x.shape[1:], **options)

    def value_and_gradients():
        with tf.GradientTape() as tape:
            inputs = tf.constant(x)
            tape.watch(inputs)
            y = layer(inputs)
            loss = tf.reduce_sum(tf.sin(y / 10))
        return [y, *tape.gradient(loss, [inputs, *layer.trainable_variables])]

    by_kernels = value_and_gradients()
    monkeypatch.delattr(ops, "conv2d_int8")
    with caplog.at_level("DEBUG", "fastconv"):
        by_keras = value_and_gradients()
    assert "no kernel of int8" in caplog.text
    for found, wanted in zip(by_kernels, by_keras, strict=True):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * largest)


def test_a_policy_of_another_type_is_computed_by_keras(draw, executed):
    layer = FastConv2D(4, 3, dtype="mixed_bfloat16")
    x = draw(2, 8, 8, 3)
    before = layer(x)
    layer.quantize("int8")
    y = layer(x)
    assert layer.dtype_policy.name == "int8_from_mixed_bfloat16"
    assert y.dtype == "bfloat16"
    np.testing.assert_allclose(y, before, rtol=0, atol=0.05)
    assert OP not in executed()


def small_model(conv2d):
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            conv2d(8, 3, activation="relu"),
            keras.layers.Conv2D(4, 3),  # stock, which Keras does not quantise
            conv2d(16, 3, use_bias=False),
            keras.layers.Flatten(),
            keras.layers.Dense(5),
        ]
    )


def quantize(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each layer that has no quantize()
        model.quantize("int8")


def test_model_and_files(draw, tmp_path, executed):
    x = draw(4, 12, 12, 3)
    model = small_model(FastConv2D)
    model.compile("sgd", "mse", jit_compile=False)
    before = model.predict(x, verbose=0)
    quantize(model)
    assert [layer.quantization_mode for layer in model.layers if layer.weights] == [
        "int8",
        None,
        "int8",
        "int8",
    ]
    y = model.predict(x, verbose=0)
    assert executed()[OP] == 2
    np.testing.assert_allclose(y, before, rtol=0, atol=0.05 * np.abs(before).max())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is FastConv2D
    np.testing.assert_array_equal(loaded(x), y)
    model.save_weights(tmp_path / "model.weights.h5")
    again = small_model(FastConv2D)
    quantize(again)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again(x), y)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(x), y)


def test_biases_can_still_be_trained(draw):
    model = small_model(FastConv2D)
    quantize(model)
    model.compile("sgd", "mse")
    kernel, bias = (w.numpy() for w in (model.layers[0].kernel, model.layers[0].bias))
    model.fit(draw(4, 12, 12, 3), draw(4, 5), epochs=1, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel, kernel)
    assert (model.layers[0].bias.numpy() != bias).any()


def test_accelerated_and_restored(draw):
    x = draw(2, 12, 12, 3)
    model = fastconv.accelerate(small_model(keras.layers.Conv2D))
    quantize(model)
    convolutions = [layer for layer in model.layers if isinstance(layer, FastConv2D)]
    assert [layer.quantization_mode for layer in convolutions] == ["int8"] * 3
    y = model(x)
    # There is no stock layer that does what they do.
    assert all(type(layer) is FastConv2D for layer in fastconv.restore(model).layers[:3])
    np.testing.assert_array_equal(model(x), y)
    # Those that are not in int8 become stock, and as impossible to quantise.
    stock = fastconv.restore(fastconv.accelerate(keras.Sequential([keras.layers.Conv2D(2, 1)])))
    stock.build((None, 4, 4, 1))
    with pytest.raises(NotImplementedError):
        stock.layers[0].quantize("int8")


def test_layers_of_a_policy_of_int8_are_not_accelerated(draw):
    """No file makes them; what they compute is told where they are called, as without us."""
    layer = fastconv.accelerate(keras.layers.Conv2D(2, 1, dtype="int8_from_float32"))
    with pytest.raises(NotImplementedError, match="_int8_call"):
        layer(draw(1, 4, 4, 1))


class Mine(FastConv2D):
    pass


class Own(FastConv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel) + 1


def built(layer):
    layer.build((None, 8, 8, 4))
    return layer


def test_errors():
    layer = FastConv2D(3, 3)
    with pytest.raises(ValueError, match="isn't yet built"):
        layer.quantize("int8")
    built(layer)
    with pytest.raises(ValueError, match="mode"):
        layer.quantize("int7")
    for mode in ("float8", "int4"):
        with pytest.raises((NotImplementedError, ValueError), match=f"{mode}"):
            layer.quantize(mode)
    assert layer.quantization_mode is None
    layer.quantize("int8")
    with pytest.raises(ValueError, match="already quantized"):
        layer.quantize("int8")
    with pytest.raises(NotImplementedError, match=r"Received: layer '"):
        layer.enable_lora(2)
    with pytest.raises(NotImplementedError, match=r"Received: lora_rank=2"):
        built(FastConv2D(3, 3, lora_rank=2)).quantize("int8")
    for other in (Mine(3, 3), FastConvPool2D(3, 3), FastDepthwiseConv2D(3)):
        with pytest.raises(NotImplementedError, match="does not have a `quantize`"):
            built(other).quantize("int8")
    with pytest.raises(NotImplementedError, match="does not have a `quantize`"):
        built(Own(3, 3)).quantize("int8", type_check=False)
    mine = built(Mine(3, 3))
    mine.quantize("int8", type_check=False)
    assert mine.quantization_mode == "int8"


@pytest.mark.skipif(
    not hasattr(keras.quantizers, "Int8QuantizationConfig"), reason="of later versions of Keras"
)
def test_configurations():
    quantizers = keras.quantizers
    usual = quantizers.Int8QuantizationConfig()
    layer = built(FastConv2D(3, 3))
    layer.quantize(config=usual)
    assert layer.quantization_mode == "int8"
    for config in (
        quantizers.Int8QuantizationConfig(activation_quantizer=None),
        quantizers.Int8QuantizationConfig(
            weight_quantizer=quantizers.AbsMaxQuantizer(value_range=(-64, 63))
        ),
    ):
        with pytest.raises(NotImplementedError, match=r"Received: config="):
            built(FastConv2D(3, 3)).quantize("int8", config=config)


@pytest.mark.parametrize("wrap", [lambda f: f, tf.function], ids=["eager", "graph"])
@pytest.mark.parametrize(
    "change",
    [
        {"w_scale": np.ones(4, np.float32)},
        {"bias": np.ones((1, 5), np.float32)},
        {"w": np.ones((3, 3, 3, 5), np.int8)},
        {"w": np.ones((3, 3, 2**15, 5), np.int8), "x": np.ones((1, 3, 3, 2**15), np.float32)},
    ],
    ids=["scale", "bias", "channels", "products"],
)
def test_errors_of_the_op(change, wrap):
    arguments = {
        "x": np.ones((1, 6, 6, 4), np.float32),
        "w": np.ones((3, 3, 4, 5), np.int8),
        "w_scale": np.ones(5, np.float32),
        "bias": np.ones(5, np.float32),
        **change,
    }
    with pytest.raises(tf.errors.InvalidArgumentError, match="Received: "):
        wrap(lambda: ops.conv2d_int8(**arguments))()


def test_accuracy_of_the_articles_model():
    """Within 0.2 points of float32, on the images that ship with the package."""
    images = data.read_npz(data.SUBSET, "")
    x_train, y_train = article.prepare(images.x_train, images.y_train)
    x_test, y_test = article.prepare(images.x_test, images.y_test)
    keras.utils.set_random_seed(3)
    model = article.build_model(article.fast_layers())
    model.fit(x_train, y_train, batch_size=64, epochs=1, verbose=0)
    everything = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
    _, before = model.evaluate(*everything, batch_size=256, verbose=0)
    quantize(model)
    model.compile(loss="categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    _, after = model.evaluate(*everything, batch_size=256, verbose=0)
    assert before > 0.9
    assert abs(after - before) <= 0.002
