"""Batch normalisation in training: the operation against float64, and the layer against Keras's."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastconv import _core
from fastconv.adapters import tensorflow as adapter
from fastconv.keras import FastBatchNormalization, accelerate
from keras_support import two_orders
from running import assert_same_arrays, running_on
from tensorflow_oracle import assert_all_close

L = keras.layers
EPSILON = 1e-3
SHAPES = [(2, 5, 7, 1), (1, 1, 1, 5), (3, 9, 8, 16), (2, 40, 33, 70), (1, 6, 5, 601), (4, 3, 3, 64)]


def arrays(shape, seed=0):
    """x, gamma, beta and a residual, so that each activation has values of all its kinds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.7, 2, shape)
    gamma, beta = rng.uniform(-2, 2, (2, shape[-1]))
    residual = rng.normal(1, 3, shape)
    return [array.astype("float32") for array in (x, gamma, beta, residual)]


def joined(x, gamma, beta, *residual, activation=None):
    """By the operation, which a graph gives its sum and activation."""
    y, _, _ = adapter.batch_norm(x, gamma, beta, epsilon=EPSILON)
    if residual:
        y = adapter.added_in_one(y, *residual)
    return y if activation is None else adapter.activated_in_one(y, activation)


def by_tensorflow(x, gamma, beta, *residual, activation=None):
    # Not tf.nn.moments, whose second derivative leaves out what the mean does.
    mean = tf.reduce_mean(x, [0, 1, 2])
    variance = tf.reduce_mean((x - mean) ** 2, [0, 1, 2])
    y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
    if residual:
        y += residual[0]
    return ACTIVATIONS[activation](y)


ACTIVATIONS = {
    None: tf.identity,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "silu": tf.nn.silu,
    "hard_silu": lambda y: y * tf.clip_by_value(y / 6 + 0.5, 0, 1),
}
# An output tells no gated activation's derivative: of a sum, they are left to an operation of their own.
KINDS = [
    (activation, adds)
    for activation in ACTIVATIONS
    for adds in (False, True)
    if not (adds and activation in ("silu", "hard_silu"))
]


def assert_as_float64(shape, activation, adds, isas):
    x, gamma, beta, residual = arrays(shape)
    dy = np.random.default_rng(1).standard_normal(shape).astype("float32")
    inputs = (x, gamma, beta, residual) if adds else (x, gamma, beta)

    def gradients(function, inputs, dy):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = function(*inputs, activation=activation)
        return [y, *tape.gradient(y, inputs, dy)]

    wide = [tf.constant(array, "float64") for array in inputs]
    wanted = gradients(by_tensorflow, wide, tf.constant(dy, "float64"))
    # Of one row, dx is a difference of equal numbers.
    dx_scale = 1e-3 if shape == (1, 1, 1, 5) else 1
    wanted[1] *= dx_scale
    for isa in isas:
        with running_on(isa):
            found = tf.function(gradients, autograph=False)(
                joined, [tf.constant(array) for array in inputs], tf.constant(dy)
            )
        found[1] *= dx_scale
        assert_all_close(found, wanted, tolerance=2e-5)


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("activation, adds", KINDS)
def test_against_float64(isa, activation, adds):
    for shape in SHAPES:
        assert_as_float64(shape, activation, adds, [isa])


# More than 16 MiB: whole lines of results are written past the caches, and rows taken in other turns. The
# fourth has lines that rows share.
BEYOND_CACHES = [(1, 70, 1001, 64), (2, 91, 250, 96), (2, 45, 45, 1040), (1, 90, 701, 72)]


@pytest.mark.parametrize("shape", BEYOND_CACHES, ids=str)
@pytest.mark.parametrize("activation, adds", [(None, False), ("relu", True), ("silu", False)])
def test_beyond_caches(shape, activation, adds):
    assert np.prod(shape) > 4 << 20
    assert_as_float64(shape, activation, adds, _core.available_isas())


@pytest.mark.parametrize("isa", _core.available_isas())
def test_moments(isa):
    """To float32's last digits, where the mean is large beside the deviation as well."""
    rng = np.random.default_rng(2)
    x = (rng.normal(0, 1, (4, 60, 50, 37)) + 1000 * np.arange(37)).astype("float32")
    with running_on(isa):
        _, mean, variance = adapter.batch_norm(x, None, None, epsilon=EPSILON)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2), "float64"), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, x.astype("float64").var((0, 1, 2)), rtol=2e-5)
    constant = tf.fill((2, 3, 3, 8), 0.1)
    np.testing.assert_array_equal(adapter.batch_norm(constant, None, None, epsilon=1.0)[2], 0)


@pytest.mark.parametrize("isa", _core.available_isas())
@pytest.mark.parametrize("unlike", ["pixel", "rows"])
@pytest.mark.parametrize("mean, other", [(0, 1e4), (1000, 0), (0, 1e3), (100, 0), (30, 0)])
def test_moments_of_images_that_begin_unlike_the_rest(isa, unlike, mean, other):
    """The origin of sums is no outlier's: squares would be mostly what the mean takes away again."""
    rng = np.random.default_rng(4)
    for shape in [(1, 128, 128, 1), (2, 90, 100, 33)]:
        x = rng.normal(mean, 1, shape).astype("float32")
        x[0, :2] = x[0, :2] if unlike == "pixel" else other
        x[0, 0, 0] = other
        with running_on(isa):
            _, found, variance = adapter.batch_norm(x, None, None, epsilon=EPSILON)
        deviation = x.std((0, 1, 2), "float64")
        np.testing.assert_array_less(np.abs(found - x.mean((0, 1, 2), "float64")), 2e-5 * deviation)
        np.testing.assert_allclose(variance, deviation**2, rtol=5e-5)


def test_sums_of_like_terms():
    """A gradient that is the same everywhere, of which each addition would be rounded the same way."""
    x = np.random.default_rng(5).standard_normal((1, 128, 128, 1)).astype("float32")
    beta = tf.zeros(1)
    with tf.GradientTape() as tape:
        tape.watch(beta)
        y, _, _ = adapter.batch_norm(tf.constant(x), tf.ones(1), beta, epsilon=EPSILON)
    dbeta = tape.gradient(y, beta, tf.fill(x.shape, 0.1))
    np.testing.assert_allclose(dbeta, x.size * float(np.float32(0.1)), rtol=5e-6)


def test_values_that_are_no_numbers():
    x = np.ones((1, 4, 4, 20), "float32")
    x[0, 1, 1, 3], x[0, 2, 2, 7] = np.nan, np.inf
    y, mean, variance = (
        t.numpy() for t in adapter.batch_norm(tf.constant(x), None, None, epsilon=EPSILON)
    )
    spoilt = np.isin(np.arange(20), (3, 7))
    assert np.isnan(y[..., spoilt]).all()
    assert np.isnan(mean[3])
    assert np.isinf(mean[7])
    assert np.isnan(variance[spoilt]).all()
    np.testing.assert_array_equal(y[..., ~spoilt], 0)


@pytest.mark.parametrize("shape", [(0, 4, 4, 6), (2, 4, 4, 0), (0, 4, 4, 0)])
def test_no_rows_or_channels(shape):
    x = tf.zeros(shape)
    ones, zeros = tf.ones(shape[3]), tf.zeros(shape[3])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, mean, _ = adapter.batch_norm(x, ones, zeros, epsilon=EPSILON)
    assert y.shape == shape
    assert np.isnan(mean).all()
    assert tape.gradient(y, x).shape == shape
    assert adapter.batch_norm_inference(x, zeros, ones, None, None, epsilon=1e-3).shape == shape


@pytest.mark.parametrize("shape", [(2, 40, 33, 300), BEYOND_CACHES[0], BEYOND_CACHES[2]], ids=str)
def test_the_same_bits_for_any_number_of_threads(shape):
    x, gamma, beta, residual = (tf.constant(a) for a in arrays(shape))

    @tf.function(autograph=False)
    def run():
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta, residual])
            y = joined(x, gamma, beta, residual, activation="relu")
            loss = tf.reduce_sum(y * y)
        return [y, *tape.gradient(loss, [x, gamma, beta])]

    results = []
    for threads in (1, 2, 5):
        with running_on(threads=threads):
            results.append([tensor.numpy() for tensor in run()])
    assert_same_arrays(results[1], results[0])
    assert_same_arrays(results[2], results[0])


@pytest.mark.parametrize("activation", ["silu", "hard_silu"])
def test_a_sum_is_not_gated(activation):
    @tf.function(autograph=False)
    def run(x, gamma, beta, residual):
        y, _, _ = adapter.batch_norm(x, gamma, beta, epsilon=EPSILON)
        assert adapter.activated_in_one(y, activation) is not None
        assert adapter.activated_in_one(adapter.added_in_one(y, residual), activation) is None
        return y

    run(*(tf.constant(a) for a in arrays((2, 3, 3, 4))))
    inputs = [tf.ones((2, 4, 4, 8)), *(tf.ones(8) for _ in range(4))]
    inputs += [tf.ones((2, 4, 4, 8))] * 2
    attributes = {"epsilon": EPSILON, "activation": activation.upper(), "num_output": 1}
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be 'RELU' or 'RELU6'"):
        adapter._framework.run("FastconvBatchNormGrad", inputs, attributes)


@pytest.mark.parametrize("isa", _core.available_isas())
def test_gates_of_all_sizes(isa):
    """To 4 units in the last place of the value, or what float32's least normal number is to it."""
    rng = np.random.default_rng(4)
    x = np.concatenate([
        *(rng.standard_normal(1001) * size for size in (1e-30, 1e-3, 1, 3, 30)),
        np.linspace(-120, 120, 4803), [0.0, -0.0, 3.0, -3.0, 1e30, -1e30, 3e38, np.inf],
    ]).astype("float32")  # fmt: skip
    images = x.reshape(1, 1, -1, 1)
    ones, zeros = tf.ones(1), tf.zeros(1)

    @tf.function(autograph=False)
    def run(x):
        # Variance and epsilon of 1 in all: the value is x.
        y = adapter.batch_norm_inference(x, zeros, ones * 0.5, None, None, epsilon=0.5)
        return [adapter.activated_in_one(y, name) for name in ("silu", "hard_silu")]

    with running_on(isa):
        silu, hard = (found.numpy().ravel() for found in run(tf.constant(images)))
        nan = run(tf.constant(np.full((1, 1, 5, 1), np.nan, "float32")))
    wide = x.astype("float64")
    with np.errstate(over="ignore"):
        wanted = wide / (1 + np.exp(-wide))
    np.testing.assert_allclose(silu, wanted, rtol=5e-7, atol=1e-35)
    # Where the gate is all but shut, float32 rounds what opens it.
    opening = np.clip(wide / 6 + 0.5, 0, 1)
    bound = 1e-6 * np.abs(wide * opening) + 2e-7 * np.abs(np.clip(wide, -4, 4))
    assert (np.abs(hard[:-1] - (wide * opening)[:-1]) <= bound[:-1]).all()
    assert hard[-1] == np.inf
    assert all(np.isnan(y).all() for y in nan)


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "with a sum"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference(activation, adds):
    """By moments that are not x's own: the value, and gradients of two orders by every input."""
    x, gamma, beta, residual = arrays((2, 6, 7, 5))
    mean, variance = arrays((1, 1, 1, 5), seed=3)[0].ravel(), np.full(5, 1.7, "float32")

    def fast(x, mean, variance, gamma, beta, *residual):
        y = adapter.batch_norm_inference(x, mean, variance, gamma, beta, epsilon=EPSILON)
        y = adapter.added_in_one(y, *residual) if residual else y
        return y if activation is None else adapter.activated_in_one(y, activation)

    def stock(x, mean, variance, gamma, beta, *residual):
        y = tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
        return ACTIVATIONS[activation](y + residual[0] if residual else y)

    inputs = [x, mean, variance, gamma, beta, *([residual] if adds else [])]
    inputs = [tf.constant(array) for array in inputs]
    found = tf.function(two_orders(fast), autograph=False)(*inputs)
    assert_all_close(found, two_orders(stock)(*inputs), tolerance=3e-5)


@pytest.mark.parametrize("activation, adds", KINDS)
def test_two_orders(activation, adds):
    inputs = [tf.constant(array) for array in arrays((2, 6, 7, 5))[: 4 if adds else 3]]
    found = tf.function(
        two_orders(lambda *inputs: joined(*inputs, activation=activation)), autograph=False
    )(*inputs)
    wanted = two_orders(lambda *inputs: by_tensorflow(*inputs, activation=activation))(*inputs)
    assert_all_close(found, wanted, tolerance=3e-5)


def test_three_orders():
    """The gradient's gradient by TensorFlow's own operations has one as well."""

    def slope(function):
        def by_x(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                # Weights all alike would leave next to nothing: sums over the batch are normalised too.
                loss = tf.reduce_sum(tf.sin(function(x)) * tf.cast(weights, x.dtype))
            return tape.gradient(loss, x)

        return by_x

    x, gamma, beta, weights = (tf.constant(array) for array in arrays((2, 4, 4, 2)))
    found = slope(slope(slope(lambda x: joined(x, gamma, beta))))(x)
    x, gamma, beta = (tf.cast(each, tf.float64) for each in (x, gamma, beta))
    wanted = slope(slope(slope(lambda x: by_tensorflow(x, gamma, beta))))(x)
    assert_all_close([found], [tf.cast(wanted, tf.float32)], tolerance=1e-5)


def test_the_moments_have_a_gradient():
    x = tf.constant(arrays((2, 6, 7, 5))[0])

    def stock(x):
        mean = tf.reduce_mean(x, [0, 1, 2])
        return mean * tf.reduce_mean((x - mean) ** 2, [0, 1, 2])

    def fast(x):
        _, mean, variance = adapter.batch_norm(x, None, None, epsilon=EPSILON)
        return mean * variance

    assert_all_close(two_orders(fast)(x), two_orders(stock)(x), tolerance=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: tf.ones((3, 4))}, "`x` must have 4 dimensions"),
        ({2: tf.ones(5)}, r"`variance` must have the shape \(8,\)"),
        ({3: tf.ones((8, 1))}, r"`gamma` must have the shape \(8,\)"),
        ({5: tf.ones((2, 4, 4, 9))}, r"`residual` must have the shape \(2, 4, 4, 8\)"),
    ],
)
def test_errors(change, message):
    inputs = [tf.ones((2, 4, 4, 8)), *(tf.ones(8) for _ in range(4)), tf.ones((2, 4, 4, 8))]
    for index, tensor in change.items():
        inputs[index] = tensor
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        adapter._framework.run(
            "FastconvBatchNorm", inputs, {"epsilon": EPSILON, "activation": "RELU"}
        )


# --- the layer ------------------------------------------------------------------------------------


def network(**options):
    inputs = keras.Input((10, 9, 4))
    x = L.Conv2D(24, 3, padding="same", use_bias=False)(inputs)
    x = L.BatchNormalization(**options)(x)
    shortcut = x = L.ReLU(6.0)(x)
    x = L.BatchNormalization(momentum=0.5)(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    x = L.Activation("relu")(L.Add()([x, shortcut]))
    x = L.BatchNormalization()(x)  # behind no convolution
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(L.Activation("relu6")(x))))


def trained(model, steps=3, eager=False):
    rng = np.random.default_rng(5)
    x, y = (rng.standard_normal(s).astype("float32") for s in [(8, 10, 9, 4), (8, 3)])
    model.compile(keras.optimizers.SGD(0.05), "mse", run_eagerly=eager)
    history = [model.train_on_batch(x, y) for _ in range(steps)]
    return [*history, *model.get_weights()]


def executions():
    return adapter.ops_executed()["FastconvBatchNormGrad"]


@pytest.fixture
def pair():
    def make(build=network):
        keras.utils.set_random_seed(1)
        stock = build()
        fast = accelerate(build())
        fast.set_weights(stock.get_weights())
        return stock, fast

    return make


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("center, scale", list(itertools.product([False, True], repeat=2)))
def test_training_as_stock(pair, eager, center, scale):
    stock, fast = pair(lambda: network(center=center, scale=scale, epsilon=0.01))
    before = executions()
    found = trained(fast, eager=eager)
    assert executions() - before == 3 * 3
    assert_all_close(found, trained(stock, eager=eager), tolerance=2e-4)


def test_a_step_has_no_other_pass(pair):
    """Sums and ReLUs are part of the operation, forward and backward."""
    _, fast = pair()
    x = tf.ones((2, 10, 9, 4))

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(fast(x, training=True))
        return tape.gradient(loss, fast.trainable_weights)

    graph = step.get_concrete_function().graph
    needed, stack = set(), [output.op for output in graph.outputs]
    while stack:
        operation = stack.pop()
        if operation not in needed:
            needed.add(operation)
            stack += [each.op for each in operation.inputs]
    types = [operation.type for operation in needed]
    assert types.count("FastconvBatchNorm") == types.count("FastconvBatchNormGrad") == 3
    assert not {"Relu", "Relu6", "ReluGrad", "Relu6Grad", "SquaredDifference"} & set(types)


@pytest.mark.parametrize(
    "options", [{"axis": 1}, {"synchronized": True}, {"dtype": "mixed_bfloat16"}], ids=str
)
def test_left_to_stock(options):
    model = keras.Sequential([keras.Input((6, 5, 8)), L.BatchNormalization(**options)])
    accelerate(model)
    assert type(model.layers[0]) is L.BatchNormalization


def test_images_alone():
    """Of dense features, and inside XLA, the stock code serves."""
    model = accelerate(keras.Sequential([keras.Input((8,)), L.BatchNormalization()]))
    assert type(model.layers[0]) is L.BatchNormalization
    layer = FastBatchNormalization()
    before = executions()
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 3, 3, 8)).astype("float32"))
    found = tf.function(lambda x: layer(x, training=True), jit_compile=True)(x)
    stock = L.BatchNormalization()
    assert_all_close([found], [stock(x, training=True)], tolerance=1e-5)
    assert_all_close(layer.get_weights(), stock.get_weights(), tolerance=1e-5)
    assert executions() == before


def test_training_that_is_a_tensor(pair):
    stock, fast = pair()
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 10, 9, 4)).astype("float32"))
    results = [
        model(x, training=tf.constant(training))
        for model in (fast, stock)
        for training in (True, False)
    ]
    assert_all_close(results[:2], results[2:], tolerance=1e-4)
