"""Layers of float16 and bfloat16, mixed policies among them, beside Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastconv
from fastconv.adapters import tensorflow as ops
from fastconv.keras import (
    FastAveragePooling2D,
    FastBatchNormalization,
    FastConv1D,
    FastConv1DTranspose,
    FastConv2D,
    FastConv2DTranspose,
    FastConvPool2D,
    FastDepthwiseConv1D,
    FastDepthwiseConv2D,
    FastGlobalAveragePooling1D,
    FastGlobalAveragePooling2D,
    FastGlobalMaxPooling1D,
    FastGlobalMaxPooling2D,
    FastMaxPooling2D,
    FastSeparableConv1D,
    FastSeparableConv2D,
    explain_layer,
)
from keras_support import equal_layers, two_orders
from running import running_on

L = keras.layers
DTYPES = ["float16", "bfloat16"]
POLICIES = [*DTYPES, "mixed_float16", "mixed_bfloat16"]
IMAGES = (2, 9, 10, 4)

KINDS = [  # fast, stock, options, shape of the input
    (FastConv2D, L.Conv2D, {"filters": 8, "kernel_size": 3, "activation": "relu"}, IMAGES),
    (
        FastConv2D,
        L.Conv2D,
        {"filters": 8, "kernel_size": 3, "strides": 2, "padding": "same", "activation": "tanh"},
        IMAGES,
    ),
    (
        FastConv2D,
        L.Conv2D,
        {"filters": 8, "kernel_size": 1, "data_format": "channels_first", "use_bias": False},
        (2, 4, 9, 10),
    ),
    (FastConv1D, L.Conv1D, {"filters": 8, "kernel_size": 3, "padding": "causal"}, (2, 9, 4)),
    (FastDepthwiseConv1D, L.DepthwiseConv1D, {"kernel_size": 3}, (2, 9, 4)),
    (FastDepthwiseConv2D, L.DepthwiseConv2D, {"kernel_size": 3}, IMAGES),
    (FastSeparableConv1D, L.SeparableConv1D, {"filters": 8, "kernel_size": 3}, (2, 9, 4)),
    (FastSeparableConv2D, L.SeparableConv2D, {"filters": 8, "kernel_size": 3}, IMAGES),
    (FastConv1DTranspose, L.Conv1DTranspose, {"filters": 8, "kernel_size": 3}, (2, 9, 4)),
    (
        FastConv2DTranspose,
        L.Conv2DTranspose,
        {"filters": 8, "kernel_size": 3, "strides": 2, "activation": "relu"},
        (2, 5, 6, 4),
    ),
    (FastMaxPooling2D, L.MaxPooling2D, {"pool_size": 3, "strides": 2}, IMAGES),
    (FastAveragePooling2D, L.AveragePooling2D, {"pool_size": 2, "padding": "same"}, IMAGES),
    (FastGlobalAveragePooling1D, L.GlobalAveragePooling1D, {}, (2, 9, 4)),
    (FastGlobalMaxPooling1D, L.GlobalMaxPooling1D, {"keepdims": True}, (2, 9, 4)),
    (FastGlobalAveragePooling2D, L.GlobalAveragePooling2D, {"keepdims": True}, IMAGES),
    (FastGlobalMaxPooling2D, L.GlobalMaxPooling2D, {}, IMAGES),
]
IDS = [f"{stock.__name__}-{number}" for number, (_, stock, *_) in enumerate(KINDS)]


def unit(dtype):
    """The distance of 1 and the next number."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[tf.as_dtype(dtype).name]


def assert_near(actual, expected, tolerance):
    """Within ``tolerance`` of the largest number."""
    assert actual.dtype == expected.dtype
    actual, expected = (np.asarray(tf.cast(tensor, "float64")) for tensor in (actual, expected))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * abs(expected).max())


def output_of(layer, x):
    try:
        return layer(x)
    except tf.errors.UnimplementedError:
        # On processors without AVX-512, TensorFlow's convolutions in 16 bits take channels last alone.
        assert layer.data_format == "channels_first"
        specification = layer.input_spec
        layer.data_format, layer.input_spec = "channels_last", None
        y = tf.transpose(layer(tf.transpose(x, (0, 2, 3, 1))), (0, 3, 1, 2))
        layer.data_format, layer.input_spec = "channels_first", specification
        return y


def output_and_gradients(layer, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = output_of(layer, x)
        # What is summed in 16 bits otherwise would differ by the order.
        loss = tf.reduce_sum(tf.cast(y, "float32") ** 2)
    return y, tape.gradient(loss, [x, *layer.trainable_variables])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fast, stock, options, shape", KINDS, ids=IDS)
def test_layers(fast, stock, options, shape, policy, draw, executed):
    fast, stock = equal_layers(fast, stock, shape, dtype=policy, **options)
    x = tf.constant(draw(*shape))
    if not policy.startswith("mixed"):
        x = tf.cast(x, policy)
    found, gradients = output_and_gradients(fast, x)
    assert executed(), "the stock code served"
    assert explain_layer(fast).served_by == "fastconv"
    assert f"{fast.compute_dtype} on the CPU" in explain_layer(fast).reason
    wanted, wanted_gradients = output_and_gradients(stock, x)
    assert found.dtype == fast.compute_dtype
    # Stock code rounds sums, the bias's among them, once more than ours.
    assert_near(found, wanted, 4 * unit(fast.compute_dtype))
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert_near(gradient, wanted_gradient, 16 * unit(fast.compute_dtype))
    kinds = {variable.dtype for variable in fast.variables}
    assert kinds <= {"float32" if policy.startswith("mixed") else policy}


def test_rounded_once(draw):
    """Exactly the float32 layer's result of the rounded numbers, rounded, where one algorithm computes both:
    a processor's units for bfloat16 add up in an order of their own."""
    layer = FastConv2D(8, 3, padding="same", activation="relu", dtype="mixed_bfloat16")
    wide = FastConv2D(8, 3, padding="same", activation="relu")
    x = draw(3, 12, 13, 16)
    layer.build(x.shape)
    wide.build(x.shape)
    wide.set_weights([tf.cast(tf.cast(w, "bfloat16"), "float32") for w in layer.get_weights()])
    with running_on(algorithm="direct"):
        y = layer(x)
        expected = tf.cast(wide(tf.cast(tf.cast(x, "bfloat16"), "float32")), "bfloat16")
    np.testing.assert_array_equal(tf.cast(y, "float32"), tf.cast(expected, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_two_orders(dtype, compiled, draw, executed):
    def ours(x, w, bias):
        y = ops.conv2d(x, w, bias, padding="same", activation="relu")
        y = ops.max_pool2d(y, 2, keep_argmax=True)
        return ops.avg_pool2d(ops.conv2d_transpose(y, w, strides=2), 2)

    def stock(x, w, bias):
        y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, w, 1, "SAME"), bias))
        # Rounded as ours is, so that the maxima are the same ones.
        y = tf.cast(tf.cast(y, dtype), "float32")
        y = tf.nn.max_pool2d(y, 2, 2, "VALID")
        return tf.nn.avg_pool2d(keras.ops.conv_transpose(y, w, 2), 2, 2, "VALID")

    inputs = [tf.cast(draw(*shape), dtype) for shape in [(2, 8, 8, 4), (3, 3, 4, 4), (4,)]]
    found = tf.function(two_orders(ours), autograph=False) if compiled else two_orders(ours)
    found = found(*inputs)
    assert len(executed()) >= 6
    wanted = two_orders(stock)(*[tf.cast(tensor, "float32") for tensor in inputs])
    for tensor, exact in zip(found, wanted, strict=True):
        assert tensor.dtype == dtype
        assert_near(tf.cast(tensor, "float32"), exact, 8 * unit(dtype))


class RoundedConvPool:
    """Stock layers in float32, of rounded numbers, whose result is rounded.

    In bfloat16, the convolution's sums would be rounded before the pooling, and now and then
    another pixel of a window be the largest.
    """

    def __init__(self, weights):
        convolution = L.Conv2D(8, 3, activation="relu", dtype="float32")
        pooling = L.MaxPooling2D(2, dtype="float32")
        self.model = keras.Sequential([keras.Input(IMAGES[1:]), convolution, pooling])
        self.model.set_weights([tf.cast(tf.cast(w, "bfloat16"), "float32") for w in weights])
        self.trainable_variables = self.model.trainable_variables

    def __call__(self, x):
        return tf.cast(self.model(tf.cast(tf.cast(x, "bfloat16"), "float32")), "bfloat16")


def test_conv_pool(draw, executed):
    layer = FastConvPool2D(8, 3, activation="relu", dtype="mixed_bfloat16")
    layer.build(IMAGES)
    x = tf.constant(draw(*IMAGES))
    y, gradients = output_and_gradients(layer, x)
    assert executed().keys() == {"FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"}
    wanted, wanted_gradients = output_and_gradients(RoundedConvPool(layer.get_weights()), x)
    assert_near(y, wanted, 4 * unit("bfloat16"))
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert_near(gradient, wanted_gradient, 16 * unit("bfloat16"))


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


def network():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((12, 12, 2)),
            L.Conv2D(8, 3, activation="relu"),
            L.MaxPooling2D(2),
            L.Conv2D(8, 3, padding="same", use_bias=False),
            L.BatchNormalization(),
            L.ReLU(),
            L.GlobalAveragePooling2D(),
            L.Dense(5, dtype="float32"),
        ]
    )


def trained(model, x, y):
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model.fit(x, y, batch_size=16, epochs=4, shuffle=False, verbose=0).history["loss"]


def test_training(policy, draw, rng, executed):
    x, y = draw(48, 12, 12, 2), rng.integers(0, 5, 48)
    stock, fast = network(), fastconv.accelerate(network())
    wanted, found = trained(stock, x, y), trained(fast, x, y)
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-2)
    counts = executed()
    assert counts["FastconvConv2DMaxPool2D"] == counts["FastconvConv2DMaxPool2DGrad"] == 12
    assert counts["FastconvConv2DGradFilter"] == 12
    assert {variable.dtype for variable in fast.trainable_variables} == {"float32"}
    # Normalisation is left to Keras, which computes it in float32.
    assert type(fast.layers[3]) is L.BatchNormalization
    assert explain_layer(fast.layers[0]).served_by == "fastconv"


def test_files(policy, draw, tmp_path):
    model = fastconv.accelerate(network())
    x = draw(3, 12, 12, 2)
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.layers[0]) is FastConv2D
    assert again.layers[0].dtype_policy.name == policy
    np.testing.assert_array_equal(again.predict(x, verbose=0), y)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x), y, rtol=1e-6)
    fastconv.restore(model)
    model.save_weights(tmp_path / "stock.weights.h5")
    again.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_array_equal(again.predict(x, verbose=0), y)


def test_training_inside_xla(policy, draw, rng, executed_in_xla):
    x, y = draw(32, 12, 12, 2), rng.integers(0, 5, 32)
    losses = []
    for jit_compile in (False, True):
        model = fastconv.accelerate(network())
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=jit_compile)
        losses.append(model.fit(x, y, batch_size=16, verbose=0).history["loss"])
    assert {"FastconvConv2DMaxPool2DGrad", "FastconvConv2DGradFilter"} <= executed_in_xla().keys()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_inside_xla(dtype, draw, executed_in_xla):
    def run(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = ops.max_pool2d(ops.conv2d(x, w, activation="relu"), 3, strides=2, keep_argmax=True)
            y = ops.avg_pool2d(y, 2)
        return [y, *tape.gradient(y, [x, w])]

    inputs = [tf.cast(draw(*shape), dtype) for shape in [IMAGES, (3, 3, 4, 8)]]
    found = tf.function(run, jit_compile=True, autograph=False)(*inputs)
    assert len(executed_in_xla()) == 7
    for tensor, wanted in zip(found, run(*inputs), strict=True):
        assert tensor.dtype == wanted.dtype == dtype
        np.testing.assert_array_equal(tf.cast(tensor, "float32"), tf.cast(wanted, "float32"))


# --- what is left to stock code -------------------------------------------------------------------


def test_inputs_of_another_type(draw, executed):
    layer = FastMaxPooling2D(dtype="mixed_bfloat16", autocast=False)
    assert layer(tf.constant(draw(*IMAGES))).dtype == "float32"
    assert not executed()


def test_batch_normalization_is_explained():
    told = explain_layer(FastBatchNormalization(dtype="mixed_bfloat16"))
    assert told.served_by == "stock"
    assert told.reason == "the data type is not float32: the layer computes in bfloat16"


@pytest.mark.parametrize("other", ["float32", "float16"])
def test_one_type_an_op(other, draw):
    x, w = tf.cast(draw(1, 4, 4, 2), "bfloat16"), tf.cast(draw(2, 2, 2, 2), other)
    with pytest.raises((TypeError, tf.errors.InvalidArgumentError)):
        ops.conv2d(x, w)
    with pytest.raises((TypeError, ValueError)):
        tf.function(ops.conv2d, autograph=False).get_concrete_function(x, w)
