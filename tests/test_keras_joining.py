"""Layers that become part of a convolution: batch normalisations, sums, activations, paddings."""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastconv
from fastconv import _core
from fastconv.adapters import tensorflow as adapter
from fastconv.keras import (
    FastActivation,
    FastAdd,
    FastBatchNormalization,
    FastReLU,
    FastZeroPadding2D,
    accelerate,
    explain_layer,
    restore,
)
from keras_support import two_orders
from running import running_on
from tensorflow_oracle import assert_all_close

L = keras.layers
SCALED = "FastconvConv2DScaled"
NORMALIZED = "FastconvBatchNormInference"


@pytest.fixture
def executed():
    """How often each op has run since the last call; only of those that have."""
    last = adapter.ops_executed()

    def since():
        nonlocal last
        before, last = last, adapter.ops_executed()
        return {name: last[name] - before[name] for name in last if last[name] != before[name]}

    return since


def assert_close(found, wanted, tolerance=3e-5):
    assert_all_close([found], [wanted], tolerance)


def normalized(x, layer, **options):
    return L.BatchNormalization(**options)(layer(x))


def with_varied_weights(model):
    """No weight at its default, at which a scale of 1 or an offset of 0 would hide faults."""
    rng = np.random.default_rng(7)
    weights = []
    for variable in model.weights:
        values = rng.normal(0, 0.3, variable.shape)
        if "variance" in variable.path or "gamma" in variable.path:
            values = rng.uniform(0.5, 2, variable.shape)
        weights.append(values.astype("float32"))
    model.set_weights(weights)
    return model


def pair(make):
    """A stock model and an accelerated one, of equal weights."""
    stock = with_varied_weights(make())
    fast = accelerate(make())
    fast.set_weights(stock.get_weights())
    return stock, fast


def images(shape, count=3):
    return np.random.default_rng(3).standard_normal((count, *shape)).astype("float32")


CONVOLUTIONS = {
    "1x1": lambda **o: L.Conv2D(20, 1, **o),
    "3x3": lambda **o: L.Conv2D(70, 3, padding="same", **o),
    "with bias": lambda **o: L.Conv2D(5, 3, use_bias=True, **o),
    "without bias": lambda **o: L.Conv2D(64, 1, use_bias=False, **o),
    "strided": lambda **o: L.Conv2D(33, 3, strides=2, padding="same", **o),
    "dilated": lambda **o: L.Conv2D(16, 3, dilation_rate=2, **o),
    "groups": lambda **o: L.Conv2D(12, 3, groups=4, **o),
    "depthwise": lambda **o: L.DepthwiseConv2D(3, depth_multiplier=2, padding="same", **o),
    "separable": lambda **o: L.SeparableConv2D(11, 3, padding="same", **o),
}


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_normalization_and_relu(kind, channels, executed):
    def make():
        inputs = keras.Input((11, 9, channels))
        x = normalized(inputs, CONVOLUTIONS[kind]())
        return keras.Model(inputs, L.Activation("relu")(x))

    if kind == "groups" and channels == 1:
        channels = 4
    stock, fast = pair(make)
    x = images((11, 9, channels))
    wanted = stock.predict(x, verbose=0)
    executed()
    assert_close(fast.predict(x, verbose=0), wanted)
    depthwise = {"FastconvConv2D": 1} if kind == "separable" else {}
    assert executed() == {SCALED: 1, **depthwise}


@pytest.mark.parametrize("center, scale", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize(
    "relu",
    [
        L.ReLU, lambda: L.Activation("relu"), lambda: L.ReLU(6), lambda: L.Activation("relu6"), None,
        lambda: L.Activation("swish"), lambda: L.Activation("hard_swish"),
    ],
)  # fmt: skip
def test_parts_of_a_normalization(center, scale, relu, executed):
    def make():
        inputs = keras.Input((8, 8, 6))
        x = normalized(inputs, L.Conv2D(7, 3), center=center, scale=scale, epsilon=0.1)
        return keras.Model(inputs, x if relu is None else relu()(x))

    stock, fast = pair(make)
    x = images((8, 8, 6))
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    assert executed() == {SCALED: 1}


def residual_block(first="second", kernel=3, data_format="channels_last", broadcast=False):
    channels_first = data_format == "channels_first"
    options = {"padding": "same", "data_format": data_format}
    axis = 1 if channels_first else -1
    inputs = keras.Input((16, 10, 12) if channels_first else (10, 12, 16))
    x = normalized(inputs, L.Conv2D(24, 1, **options), axis=axis)
    shortcut = x = L.Activation("relu")(x)
    x = normalized(x, L.Conv2D(24, kernel, **options), axis=axis)
    if broadcast:
        shortcut = L.GlobalAveragePooling2D(keepdims=True, data_format=data_format)(shortcut)
    x = L.Add()([shortcut, x] if first == "second" else [x, shortcut])
    return keras.Model(inputs, L.ReLU()(x))


SEQUENCE_LAYERS = {
    "causal": lambda **o: L.Conv1D(16, 3, padding="causal", dilation_rate=2, **o),
    "depthwise": lambda **o: L.DepthwiseConv1D(3, padding="same", **o),
    "separable": lambda **o: L.SeparableConv1D(16, 5, padding="same", **o),
}


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("activation", ["relu", "swish"])
@pytest.mark.parametrize("kind", SEQUENCE_LAYERS)
def test_sequences(kind, activation, data_format, executed):
    """As images of height 1: convolution, normalisation, sum and activation are one operation."""
    channels_first = data_format == "channels_first"
    axis = 1 if channels_first else -1

    def make(data_format=data_format, axis=axis):
        inputs = keras.Input((16, 20) if data_format == "channels_first" else (20, 16))
        options = {"data_format": data_format}
        x = normalized(inputs, SEQUENCE_LAYERS[kind](use_bias=False, **options), axis=axis)
        x = L.Activation(activation)(L.Add()([inputs, x]))
        x = normalized(x, L.Conv1D(8, 1, **options), axis=axis)
        return keras.Model(inputs, L.Activation("relu6")(x))

    # Stock TensorFlow may have no kernel of the other layout.
    stock = with_varied_weights(make("channels_last", -1))
    fast = accelerate(make())
    fast.set_weights(stock.get_weights())
    x = images((20, 16))
    wanted = stock.predict(x, verbose=0)
    executed()
    found = fast.predict(x.transpose(0, 2, 1) if channels_first else x, verbose=0)
    assert_close(found.transpose(0, 2, 1) if channels_first else found, wanted)
    assert executed()[SCALED] == 2
    operations = operations_of(fast, x.transpose(0, 2, 1) if channels_first else x)
    assert not {"Relu", "Relu6", "Sigmoid"} & set(operations)


def test_training_of_sequences(executed):
    """As Keras's example of time series: normalisations, and what is behind them, are kernels."""

    def make():
        x = inputs = keras.Input((24, 3))
        for filters in (16, 24):
            x = L.Conv1D(filters, 3, padding="same")(x)
            x = L.ReLU()(L.BatchNormalization()(x))
        x = L.BatchNormalization()(L.MaxPooling1D(2)(x))
        return keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling1D()(x)))

    stock, fast = pair(make)
    x, y = images((24, 3), 8), images((2,), 8)
    for model in (stock, fast):
        model.compile(keras.optimizers.SGD(0.05), "mse")
        executed()
        model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False)
    ran = executed()
    assert ran["FastconvBatchNormGrad"] == 3 * 2 * 3
    assert ran["FastconvMaxPool2DGrad"] == 2 * 3
    assert_all_close(fast.get_weights(), stock.get_weights(), tolerance=2e-4)
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0), tolerance=2e-4)
    ran = executed()
    assert (ran[SCALED], ran[NORMALIZED]) == (2, 1)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("layer", [L.Conv2D, L.SeparableConv2D])
def test_shortcut_of_a_plain_convolution(layer, use_bias, executed):
    """As in ResNet50V2, which normalises before the convolution."""

    def make():
        inputs = keras.Input((10, 12, 16))
        x = L.Activation("relu")(L.BatchNormalization()(inputs))
        x = L.Add()([inputs, layer(16, 3, padding="same", use_bias=use_bias)(x)])
        return keras.Model(inputs, L.ReLU(6)(x))

    stock, fast = pair(make)
    x = images((10, 12, 16))
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    ran = executed()
    assert (ran[SCALED], ran[NORMALIZED]) == (1, 1)
    assert not {"Relu", "Relu6", "AddV2"} & set(operations_of(fast, x)) or use_bias
    y = images((10, 12, 16), 4)[::-1]
    for model in (stock, fast):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        for _ in range(3):
            model.train_on_batch(images((10, 12, 16), 4), y)
    assert_all_close(fast.get_weights(), stock.get_weights(), tolerance=1e-4)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("first", ["first", "second"])
def test_shortcut(first, kernel, executed):
    stock, fast = pair(lambda: residual_block(first, kernel))
    x = images((10, 12, 16))
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    assert executed() == {SCALED: 2}


def test_a_shortcut_that_is_spread_over_the_image_is_added_by_stock(executed):
    stock, fast = pair(lambda: residual_block(broadcast=True))
    x = images((10, 12, 16))
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    assert executed()[SCALED] == 2


def operations_of(model, x):
    """The types of the TensorFlow operations that the model's inference runs."""
    function = tf.function(lambda inputs: model(inputs, training=False))
    graph = function.get_concrete_function(tf.TensorSpec((None, *x.shape[1:]), tf.float32)).graph
    needed, stack = set(), [output.op for output in graph.outputs]
    while stack:
        operation = stack.pop()
        if operation.name not in needed:
            needed.add(operation.name)
            stack += [each.op for each in operation.inputs] + list(operation.control_inputs)
    return [graph.get_operation_by_name(name).type for name in needed]


def test_no_pass_over_the_outputs_is_left():
    x = images((10, 12, 16))
    operations = operations_of(accelerate(residual_block()), x)
    assert operations.count(SCALED) == 2
    assert not {"FastconvConv2D", "Relu"} & set(operations)
    # Nor any op of a value a channel: the convolution makes its scale and offset by itself.
    assert not {"AddV2", "Sub", "Mul", "Rsqrt"} & set(operations)


def test_channels_first(executed):
    """Stock TensorFlow may have no kernel of that layout: the other layout tells what is right."""
    first = accelerate(with_varied_weights(residual_block(data_format="channels_first")))
    last = with_varied_weights(residual_block())
    x = images((10, 12, 16))
    executed()
    found = first.predict(x.transpose(0, 3, 1, 2), verbose=0).transpose(0, 2, 3, 1)
    assert executed() == {SCALED: 2}
    assert_close(found, last.predict(x, verbose=0))


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("shape, filters, kernel", [
    ((2, 9, 10, 40), 70, 1), ((1, 7, 7, 300), 200, 1), ((2, 8, 9, 33), 20, 3),
    ((2, 12, 8, 3), 17, 3), ((2, 6, 6, 64), 64, 3),
])  # fmt: skip
def test_every_algorithm(isa, shape, filters, kernel):
    """conv(x, w * scale) + bias + residual, under ReLU, against the plain convolution of NumPy."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal(shape).astype("float32")
    w = rng.standard_normal((kernel, kernel, shape[3], filters)).astype("float32")
    scale, offset = (rng.standard_normal(filters).astype("float32") for _ in range(2))
    direct = fastconv.conv2d(x, w, padding="same").astype("float64") * scale + offset
    residual = rng.standard_normal(direct.shape).astype("float32")
    total = direct + residual
    wanted = {"relu": np.maximum(total, 0)}
    wanted["relu6"] = np.minimum(wanted["relu"], 6)
    wanted["silu"] = total / (1 + np.exp(-total))
    wanted["hard_silu"] = total * np.clip(total / 6 + 0.5, 0, 1)
    tolerance = 2e-5 * np.abs(direct).max()

    @tf.function
    def run(x):
        y = adapter.conv2d(x, w, padding="same")
        y = adapter.scaled_in_one(y, tf.constant(scale), tf.constant(offset))
        y = adapter.added_in_one(y, tf.constant(residual))
        return {name: adapter.activated_in_one(y, name) for name in wanted}

    with running_on(isa):
        # One that does not serve a problem leaves it to the others.
        names = "direct", "winograd2", "winograd4", "winograd_rows", "small_channel", "grouped"
        for name in names:
            with running_on(algorithm=name):
                found = run(tf.constant(x))
            for activation, right in wanted.items():
                np.testing.assert_allclose(
                    found[activation], right, rtol=0, atol=tolerance, err_msg=name
                )


@pytest.mark.parametrize("algorithm", ["auto", "direct", "bf16_portable", "bf16_emulated_tiles"])
def test_bfloat16(algorithm):
    """Rounded once, whoever multiplies: the sums are of integers and exact, the scales powers of two."""
    rng = np.random.default_rng(5)
    sizes = [(2, 9, 10, 18), (3, 3, 18, 20), (2, 9, 10, 20), (20,)]
    x, w, residual, offset = (rng.integers(-3, 4, size).astype("float32") for size in sizes)
    scale = 2.0 ** rng.integers(-6, -3, 20).astype("float32")
    with running_on(accuracy="strict"):
        y = fastconv.conv2d(x, w, padding="same") * scale + offset + residual
    wanted = {"relu": np.maximum(y, 0)}
    wanted["relu6"] = np.minimum(wanted["relu"], 6)
    x, w, residual, offset, scale = (
        tf.cast(a, tf.bfloat16) for a in (x, w, residual, offset, scale)
    )

    @tf.function
    def run(x):
        y = adapter.scaled_in_one(adapter.conv2d(x, w, padding="same"), scale, offset)
        y = adapter.added_in_one(y, residual)
        return {name: adapter.activated_in_one(y, name) for name in wanted}

    with running_on(algorithm=algorithm, accuracy="strict"):
        found = run(x)
    for name, right in wanted.items():
        np.testing.assert_array_equal(found[name], tf.cast(right, tf.bfloat16), err_msg=name)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hard_silu"])
def test_gradients_of_two_orders(activation):
    """In graphs, through the joined op, as through the stock layers' three."""
    rng = np.random.default_rng(9)
    x, w = (rng.standard_normal(s).astype("float32") for s in [(2, 6, 7, 5), (3, 3, 5, 8)])
    scale, offset = (rng.standard_normal(8).astype("float32") for _ in range(2))
    residual = rng.standard_normal((2, 4, 5, 8)).astype("float32")

    def joined(x, w, scale, offset, residual):
        y = adapter.scaled_in_one(adapter.conv2d(x, w), scale, offset)
        return adapter.activated_in_one(adapter.added_in_one(y, residual), activation)

    def stock(x, w, scale, offset, residual):
        activate = getattr(keras.activations, activation)
        return activate(tf.nn.conv2d(x, w, 1, "VALID") * scale + offset + residual)

    inputs = [tf.constant(a) for a in (x, w, scale, offset, residual)]
    found = tf.function(two_orders(joined))(*inputs)
    assert_all_close(found, tf.function(two_orders(stock))(*inputs), tolerance=2e-4)


MOMENTS = ("mean", "variance", "gamma", "beta")


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("given", [MOMENTS, (*MOMENTS, "bias"), MOMENTS[:2]], ids="-".join)
def test_gradients_through_a_normalization(given, activation):
    """Of two orders, by what makes scale and offset, as well as by the images and filters."""
    rng = np.random.default_rng(10)
    x, w = (rng.standard_normal(s).astype("float32") for s in [(2, 6, 7, 5), (3, 3, 5, 8)])
    values = {name: rng.uniform(0.5, 1.5, 8).astype("float32") for name in given}

    def joined(x, w, *values):
        own = dict(zip(given, values, strict=True))
        y = adapter.conv2d(x, w, own.get("bias"))
        y = adapter.normalized_in_one(
            y, own["mean"], own["variance"],
            scale=own.get("gamma"), offset=own.get("beta"), epsilon=0.01,
        )  # fmt: skip
        return adapter.activated_in_one(y, activation)

    def stock(x, w, *values):
        own = dict(zip(given, values, strict=True))
        y = tf.nn.conv2d(x, w, 1, "VALID") + own.get("bias", 0.0)
        y = (y - own["mean"]) / tf.sqrt(own["variance"] + 0.01)
        return getattr(keras.activations, activation)(
            y * own.get("gamma", 1.0) + own.get("beta", 0.0)
        )

    inputs = [tf.constant(a) for a in (x, w, *values.values())]
    found = tf.function(two_orders(joined))(*inputs)
    assert_all_close(found, tf.function(two_orders(stock))(*inputs), tolerance=2e-4)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_a_normalization_of_extremes(epsilon):
    """By a variance of next to nothing, or none: as float64 has it, and stock's infinity and NaN."""
    rng = np.random.default_rng(11)
    x, w = (rng.standard_normal(s).astype("float32") for s in [(2, 5, 6, 24), (1, 1, 24, 7)])
    variance = np.array([0, 1e-30, 1e-6, 1, 1e6, 1e30, np.nan], "float32")
    gamma, beta, mean, bias = (rng.standard_normal(7).astype("float32") for _ in range(4))

    @tf.function
    def run(x):
        y = adapter.conv2d(x, tf.constant(w), tf.constant(bias))
        return adapter.normalized_in_one(
            y, *map(tf.constant, (mean, variance)),
            scale=tf.constant(gamma), offset=tf.constant(beta), epsilon=epsilon,
        )  # fmt: skip

    found = run(tf.constant(x)).numpy()
    with np.errstate(divide="ignore"):
        scale = gamma / np.sqrt(variance.astype("float64") + epsilon)
    wanted = (x.astype("float64") @ w[0, 0].astype("float64") + bias - mean) * scale + beta
    finite = np.isfinite(scale) & (np.abs(scale) < 1e30)
    assert finite.sum() == (5 if epsilon == 0 else 6)
    largest = np.abs(wanted[..., finite]).max(axis=(0, 1, 2))
    error = np.abs(found[..., finite] - wanted[..., finite]).max(axis=(0, 1, 2))
    assert (error <= 1e-6 * largest).all(), error / largest
    assert not np.isfinite(found[..., ~finite]).any()


@pytest.mark.parametrize("change, message", [
    ({"variance": (7,)}, "`variance` must have the shape \\(8,\\). Received: variance.shape=\\(7,\\)"),
    ({"mean": (1, 8)}, "`mean` must have the shape \\(8,\\). Received: mean.shape=\\(1, 8\\)"),
    ({"bias": (9,)}, "`bias` must have the shape \\(8,\\). Received: bias.shape=\\(9,\\)"),
])  # fmt: skip
def test_wrong_coefficients(change, message):
    shapes = dict.fromkeys((*MOMENTS, "bias"), (8,)) | change

    @tf.function
    def run(x):
        mean, variance, gamma, beta, bias = map(tf.ones, shapes.values())
        y = adapter.conv2d(x, tf.ones((1, 1, 5, 8)), bias)
        return adapter.normalized_in_one(y, mean, variance, scale=gamma, offset=beta, epsilon=0.1)

    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        run(tf.ones((1, 4, 4, 5)))


def test_a_normalization_of_16_bits_is_refused():
    @tf.function
    def run(x):
        ones = tf.ones(8, x.dtype)
        y = adapter.conv2d(x, tf.ones((1, 1, 5, 8), x.dtype))
        return adapter.normalized_in_one(y, ones, ones, epsilon=0.1)

    with pytest.raises(tf.errors.InvalidArgumentError, match="must be of float32"):
        run(tf.ones((1, 4, 4, 5), tf.bfloat16))


def swish_block():
    """As EfficientNet's: expansion, a depthwise convolution of padded images, projection, a sum."""
    inputs = keras.Input((11, 9, 12))
    x = L.Activation("swish")(normalized(inputs, L.Conv2D(24, 1, use_bias=False)))
    x = L.ZeroPadding2D(((0, 1), (1, 1)))(x)
    x = normalized(x, L.DepthwiseConv2D(3, use_bias=False))
    x = L.Activation("hard_swish")(x)
    gate = L.Conv2D(24, 1, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    x = normalized(L.Multiply()([x, gate]), L.Conv2D(16, 1, use_bias=False))
    x = L.Activation("swish")(L.BatchNormalization()(L.Concatenate()([x, x])))
    return keras.Model(inputs, x)


def test_a_block_of_swish(executed):
    stock, fast = pair(swish_block)
    x = images((11, 9, 12))
    executed()
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    ran = executed()
    assert (ran[SCALED], ran[NORMALIZED]) == (3, 1)
    operations = operations_of(fast, x)
    # The gate's, and none of a swish.
    assert operations.count("Sigmoid") == 1
    assert "Pad" not in operations


def test_training_a_block_of_swish(executed):
    """Against stock, whose float32 differs from ours by rounding."""
    stock, fast = pair(swish_block)
    x, y = images((11, 9, 12), 8), images(fast.output_shape[1:], 8)
    losses = []
    for model in (stock, fast):
        model.compile(keras.optimizers.SGD(1e-2), "mse")
        executed()
        history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, shuffle=False).history
        losses.append(history["loss"])
    assert executed()["FastconvBatchNormGrad"] == 4 * 2 * 3
    assert_close(losses[1], losses[0], tolerance=1e-4)


@pytest.mark.parametrize("layer", [
    lambda: L.Conv2D(6, 3, strides=2), lambda: L.DepthwiseConv2D(3, strides=2),
    lambda: L.SeparableConv2D(5, 3), lambda: L.Conv2D(7, 2, activation="relu"),
])  # fmt: skip
@pytest.mark.parametrize("padding", [1, (2, 0), ((0, 1), (3, 2))])
def test_padding(layer, padding, executed):
    """Read by the convolution, in training too: there is no padded image."""

    def make():
        inputs = keras.Input((8, 7, 4))
        return keras.Model(inputs, layer()(L.ZeroPadding2D(padding)(inputs)))

    stock, fast = pair(make)
    assert type(fast.layers[1]) is FastZeroPadding2D
    assert "layer behind" in explain_layer(fast.layers[1]).reason
    x = images((8, 7, 4))
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    assert "Pad" not in operations_of(fast, x)
    assert_close(fast(x), stock(x))  # eager

    def gradients(model):
        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(model(x, training=True) ** 2)
            return tape.gradient(loss, [x, *model.trainable_weights])

        return run(tf.constant(x))

    assert_all_close(gradients(fast), gradients(stock), tolerance=1e-4)
    assert type(restore(fast).layers[1]) is L.ZeroPadding2D


@pytest.mark.parametrize("kind, joins", [
    ("relu", True), ("relu6", True), ("normalized relu", True), ("silu", False), ("none", False),
    ("wide", False),
])  # fmt: skip
def test_padding_of_a_max_pooling(kind, joins):
    """Behind a ReLU zeros are no larger maximum; elsewhere they may be, and are kept."""

    def make():
        inputs = keras.Input((8, 7, 4))
        x = (
            inputs
            if kind == "none"
            else L.Conv2D(6, 3, activation="relu" if kind == "relu" else None)(inputs)
        )
        if kind not in ("relu", "none"):
            activation = kind if kind in ("relu6", "silu") else "relu"
            x = L.Activation(activation)(L.BatchNormalization()(x))
        x = L.MaxPooling2D(3, strides=2)(
            L.ZeroPadding2D(3 if kind == "wide" else ((1, 2), (2, 1)))(x)
        )
        return keras.Model(inputs, L.Conv2D(3, 1)(x))

    stock, fast = pair(make)
    x = images((8, 7, 4))
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))
    assert operations_of(fast, x).count("Pad") == (not joins)
    y = images(fast.output_shape[1:])
    for model in (stock, fast):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
    assert_all_close(fast.get_weights(), stock.get_weights(), tolerance=1e-4)


def test_paddings_of_other_readers():
    """Of an average-pooling, of a convolution with padding of its own, and of two."""
    inputs = keras.Input((8, 8, 4))
    x = L.AveragePooling2D(3)(L.ZeroPadding2D(1)(inputs))
    x = L.Conv2D(4, 3, padding="same")(L.ZeroPadding2D(1)(x))
    x = L.ZeroPadding2D(2)(x)
    model = keras.Model(inputs, L.Add()([L.Conv2D(4, 3)(x), L.Conv2D(4, 3)(x)]))
    assert FastZeroPadding2D not in classes(accelerate(model))


def test_a_padding_that_is_an_output_too():
    inputs = keras.Input((8, 8, 4))
    padded = L.ZeroPadding2D(1)(inputs)
    model = accelerate(keras.Model(inputs, [L.Conv2D(4, 3)(padded), padded]))
    x = images((8, 8, 4))
    y, found = model.predict(x, verbose=0)
    assert_close(found, np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    assert_close(y, model(x)[0])


def every_join():
    inputs = keras.Input((16, 18, 3))
    x = L.Conv2D(8, 3, activation="relu", name="pooled")(inputs)
    x = L.MaxPooling2D(2)(x)
    x = L.ZeroPadding2D(1, name="padding")(x)
    x = normalized(x, L.Conv2D(8, 3, name="normalized"), name="activated")
    shortcut = x = L.ReLU()(x)
    x = normalized(x, L.Conv2D(8, 3, padding="same"), name="added")
    x = L.Add(name="sum")([shortcut, x])
    x = L.Reshape((-1, 8))(L.Activation("relu")(x))
    x = normalized(x, L.Conv1D(5, 2, name="sequences"))
    return keras.Model(inputs, L.ReLU()(x))


LOOKED_AT = ["pooled", "padding", "normalized", "activated", "added", "sum", "sequences"]


def with_output_of(model, layer):
    """A model that gives out what one of the layers does, and the output."""
    return keras.Model(model.input, [model.get_layer(layer).output, model.output])


def layer_by_layer(model, layer, x):
    """The same of ``x``, by hand."""
    seen = {}
    for each in model.layers[1:]:
        x = each([seen["activated"], x] if each.name == "sum" else x)
        seen[each.name] = x
    return seen[layer], x


def gradient_of_last(both, x):
    """Of the second output by the first, as Grad-CAM takes it: in a graph."""

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            within, y = both(x)
            loss = tf.reduce_sum(y**3)
        return tape.gradient(loss, within)

    return run(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", LOOKED_AT)
def test_gradients_by_outputs_that_are_looked_at(layer, training):
    stock, fast = pair(every_join)
    x = images((16, 18, 3))
    wanted, found = (
        gradient_of_last(functools.partial(with_output_of(model, layer), training=training), x)
        for model in (stock, fast)
    )
    assert_all_close([found], [wanted], 1e-4)


@pytest.mark.parametrize("layer", LOOKED_AT)
def test_gradients_by_outputs_of_a_nested_model(layer):
    """The model that gives them out is a layer of the one that runs, and one of no graph of layers."""

    class Subclassed(keras.Model):
        def __init__(self, model):
            super().__init__()
            self.inner = with_output_of(model, layer)

        def call(self, x):
            with tf.GradientTape() as tape:
                within, y = self.inner(x)
                loss = tf.reduce_sum(y**3)
            return tape.gradient(loss, within)

    stock, fast = (Subclassed(model) for model in pair(every_join))
    x = images((16, 18, 3))
    assert_all_close([fast.predict(x, verbose=0)], [stock.predict(x, verbose=0)], 1e-4)


@pytest.mark.parametrize("name", LOOKED_AT)
def test_gradients_where_layers_are_called_by_hand(name):
    x = images((16, 18, 3))
    wanted, found = (
        gradient_of_last(functools.partial(layer_by_layer, model, name), x)
        for model in pair(every_join)
    )
    assert_all_close([found], [wanted], 1e-4)


@pytest.mark.parametrize("name", LOOKED_AT)
@pytest.mark.parametrize(
    "look",
    [layer_by_layer, lambda model, layer, x: with_output_of(model, layer)(x)],
    ids=["by hand", "another model"],
)
def test_gradients_where_a_model_calls_the_layers_of_one_it_has(name, look):
    """As Grad-CAM and extractors of features do; or in another model of those layers, of no layer."""

    class Looking(keras.Model):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def call(self, x):
            return look(self.base, name, x)

    x = images((16, 18, 3))
    wanted, found = (gradient_of_last(Looking(model), x) for model in pair(every_join))
    assert_all_close([found], [wanted], 1e-4)


def test_sums_of_two_batches_where_a_model_calls_the_layers_of_one_it_has():
    """Within the model that has the layers both batches are one."""
    inputs = keras.Input((8, 8, 3))
    first, second, total = L.Conv2D(4, 3, padding="same"), L.Conv2D(4, 1), L.Add()
    model = accelerate(keras.Model(inputs, total([first(inputs), second(inputs)])))

    class Calling(keras.Model):
        def __init__(self):
            super().__init__()
            self.base = model

        def call(self, both):
            return total([first(both[0]), second(both[1])])

    of_any_batch = tf.TensorSpec((None, 8, 8, 3))
    calling = tf.function(Calling(), input_signature=[[of_any_batch, of_any_batch]])
    many, one = images((8, 8, 3), 4), images((8, 8, 3), 1)
    assert_close(calling([many, one]), first(many) + second(one))


def test_layers_called_by_hand_leave_no_trace():
    """No training of one call is left for the next, as it is in no stock layer."""
    _, fast = pair(residual_block)
    x = images((10, 12, 16))
    normalization = next(each for each in fast.layers if isinstance(each, L.BatchNormalization))

    @tf.function
    def run(x):
        for layer in fast.layers[1:]:
            if layer is normalization:
                break
            x = layer(x)
        normalization.call(x, training=False)
        flatten(x, training=True)
        return dropout(x) - x

    flatten, dropout = L.Flatten(), L.Dropout(0.5)
    assert not np.any(run(x))


def test_joined_in_what_runs(executed):
    """A model that looks within changes nothing for the one that does not."""
    _, fast = pair(every_join)
    looking = keras.Model(fast.input, [fast.get_layer("normalized").output, fast.output])
    x = images((16, 18, 3))
    executed()
    fast.predict(x, verbose=0)
    assert executed() == {"FastconvConv2DMaxPool2D": 1, SCALED: 3}
    looking.predict(x, verbose=0)
    assert executed() == {
        "FastconvConv2DMaxPool2D": 1, "FastconvConv2D": 1, NORMALIZED: 1, SCALED: 2
    }  # fmt: skip


def test_training_is_the_stock_layers(executed):
    stock, fast = pair(residual_block)
    x = images((10, 12, 16), 8)
    y = images((10, 12, 24), 8)
    losses = []
    for model in (stock, fast):
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        executed()
        losses.append(model.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False))
    assert SCALED not in executed()
    assert_close(losses[1].history["loss"], losses[0].history["loss"], tolerance=1e-4)
    executed()
    found = fast.evaluate(x, y, verbose=0)
    assert executed()[SCALED] == 2
    assert_close(found, stock.evaluate(x, y, verbose=0), tolerance=1e-3)


def test_frozen_normalizations_join_in_training(executed):
    stock, fast = pair(residual_block)
    x, y = images((10, 12, 16), 4), images((10, 12, 24), 4)
    for model in (stock, fast):
        for layer in model.layers:
            if isinstance(layer, L.BatchNormalization):
                layer.trainable = False
        model.compile(keras.optimizers.SGD(1e-2), "mse")
        executed()
        model.fit(x, y, batch_size=4, verbose=0)
    assert executed()[SCALED] == 2
    assert_all_close(fast.get_weights(), stock.get_weights(), tolerance=1e-4)


def classes(model):
    return [type(layer) for layer in model.layers]


def test_classes_and_words():
    model = residual_block()
    before = classes(model)
    accelerate(model)
    after = classes(model)
    assert {FastBatchNormalization, FastAdd, FastActivation, FastReLU} <= set(after)
    joined = next(layer for layer in model.layers if isinstance(layer, FastAdd))
    explanation = explain_layer(joined)
    assert (explanation.served_by, explanation.type) == ("fastconv", "FastAdd")
    assert "graphs" in explanation.reason
    restore(model)
    assert classes(model) == before


def test_files(tmp_path):
    stock, fast = pair(residual_block)
    x = images((10, 12, 16))
    wanted = fast.predict(x, verbose=0)
    fast.save(tmp_path / "fast.keras")
    loaded = keras.models.load_model(tmp_path / "fast.keras")
    assert classes(loaded) == classes(fast)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), wanted)
    fast.save_weights(tmp_path / "fast.weights.h5")
    again = residual_block()
    again.load_weights(tmp_path / "fast.weights.h5")
    for one, other in zip(again.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# --- what stays stock -----------------------------------------------------------------------------


def read_twice():
    inputs = keras.Input((8, 8, 4))
    x = L.Conv2D(4, 3, padding="same")(inputs)
    return keras.Model(inputs, L.Concatenate()([L.BatchNormalization()(x), x]))


def activated_before():
    inputs = keras.Input((8, 8, 4))
    x = normalized(inputs, L.Conv2D(4, 3, activation="relu"))
    return keras.Model(inputs, L.Activation("relu")(x))


def other_axis():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, normalized(inputs, L.Conv2D(8, 1), axis=1))


def other_activation():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, L.ReLU(6.0)(L.Conv2D(8, 1)(inputs)))


def other_maximum():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, L.ReLU(5.0)(normalized(inputs, L.Conv2D(8, 1))))


def nothing_before():
    inputs = keras.Input((8, 8, 4))
    return keras.Model(inputs, L.Activation("relu")(L.BatchNormalization()(inputs)))


@pytest.mark.parametrize(
    "make",
    [read_twice, activated_before, other_axis, other_activation, other_maximum, nothing_before],
)
def test_left_alone(make, executed):
    """By no convolution. Normalisations of all kinds but `other_axis` have a kernel."""
    stock, fast = pair(make)
    if make in (other_axis, other_activation):
        own = (FastBatchNormalization, FastAdd, FastActivation, FastReLU)
        assert not [layer for layer in fast.layers if isinstance(layer, own)]
    x = images((8, 8, 4))
    executed()
    fast.predict(x, verbose=0)
    ran = executed()
    assert ran.get(SCALED, 0) == (make is other_maximum)
    own_kernel = (read_twice, activated_before, nothing_before)
    assert ran.get(NORMALIZED, 0) == (make in own_kernel)
    assert_close(fast.predict(x, verbose=0), stock.predict(x, verbose=0))


def two_inputs():
    one, other = keras.Input((6, 6, 4)), keras.Input((6, 6, 4))
    x = normalized(one, L.Conv2D(4, 1))
    return keras.Model([one, other], L.Add()([normalized(other, L.Conv2D(4, 1)), x]))


def first_of_the_batch(layer):
    def make():
        inputs = keras.Input((6, 6, 4))
        many, one = (normalized(x, L.Conv2D(4, 1)) for x in (inputs, layer()(inputs)))
        return keras.Model(inputs, L.Add()([many, one]))

    return make


@keras.saving.register_keras_serializable("tests")
class FirstOfBatch(L.Layer):
    def call(self, x):
        return x[:1]

    def compute_output_shape(self, shape):
        return (None, *shape[1:])


@pytest.mark.parametrize(
    "make, counts",
    [
        (two_inputs, (3, 1)),
        (first_of_the_batch(FirstOfBatch), (3,)),
        (
            first_of_the_batch(
                lambda: L.Lambda(lambda x: x[:1], output_shape=lambda s: (None, *s[1:]))
            ),
            (3,),
        ),
    ],
    ids=["inputs", "layer", "lambda"],
)
def test_batches_may_differ(make, counts):
    """One image's features added to those of many: such sums are not joined."""
    stock, fast = pair(make)
    assert not [layer for layer in fast.layers if isinstance(layer, FastAdd)]
    x = [images((6, 6, 4), count) for count in counts]
    x = x if len(x) > 1 else x[0]
    assert_close(tf.function(fast)(x).numpy(), tf.function(stock)(x).numpy())


@pytest.mark.parametrize("axis, joined", [(-1, True), (3, True), (0, False), (-4, False)])
def test_sums_behind_a_concatenation(axis, joined):
    """As in NASNet: along the batch, what is concatenated has another one."""
    inputs = keras.Input((6, 6, 4))
    x = normalized(L.Concatenate(axis=axis)([inputs, inputs]), L.Conv2D(4, 1))
    model = accelerate(keras.Model(inputs, L.Add()([inputs, x])))
    assert (FastAdd in classes(model)) == joined


@pytest.mark.parametrize("backwards", [False, True])
def test_batches_of_two_inputs_may_be_one(backwards, executed):
    """What is made of the same inputs has the same batch, be it of several."""

    def make():
        inputs = [keras.Input((6, 6, 4)), keras.Input((6, 6, 4))]
        x = L.Multiply()(inputs)
        y = L.Multiply()([L.Rescaling(0.5)(each) for each in inputs[::-1]])
        x = normalized(x, L.Conv2D(4, 1))
        y = (y + 3.0) * 0.5
        return keras.Model(inputs, L.Add()([y, x] if backwards else [x, y]))

    stock, fast = pair(make)
    x = [images((6, 6, 4), count) for count in (3, 1)]
    executed()
    found = tf.function(fast)(x).numpy()
    assert executed() == {SCALED: 1}
    assert_close(found, tf.function(stock)(x).numpy())
