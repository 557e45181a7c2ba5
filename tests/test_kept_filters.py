"""Filters that TensorFlow's ops keep laid out between calls: used where they are the same, and only there."""

import itertools
import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import fastconv
from fastconv.adapters import tensorflow as adapter
from fastconv.keras import accelerate
from running import running_on

L = keras.layers
SHAPE = (2, 9, 10, 24)
FILTER = (3, 3, 24, 40)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


class Kept:
    """How many runs since the last question found their filter kept."""

    def __init__(self):
        self.last = adapter.kept_filters()

    def __call__(self):
        before, self.last = self.last, adapter.kept_filters()
        return self.last - before


def convolution(w, **options):
    """A traced convolution by the variable ``w``, an op of its own."""
    return tf.function(lambda x: adapter.conv2d(x, w, padding="same", **options), autograph=False)


def by_numpy(x, w, **options):
    """The same bits, of a call that keeps nothing."""
    return fastconv.conv2d(x, w.numpy(), padding="same", **options)


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4", "auto"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_third_call_finds_it(algorithm, data_format):
    x, w = arrays(SHAPE, FILTER)
    w = tf.Variable(w)
    x = x.transpose(0, 3, 1, 2).copy() if data_format == "channels_first" else x
    run = convolution(w, data_format=data_format)
    with running_on(algorithm=algorithm):
        wanted = by_numpy(x, w, data_format=data_format)
        kept = Kept()
        for call in range(6):
            np.testing.assert_array_equal(run(x), wanted)
            assert kept() == (call >= 2)


CHANGES = {
    "assign": lambda w, new: w.assign(new),
    "add in place": lambda w, new: w.assign_add(new),
    "subtract in place": lambda w, new: w.assign_sub(new),
    "one row in place": lambda w, new: w.scatter_nd_update([[1, 2]], new[:1, 0]),
    "by gradient descent": lambda w, new: tf.raw_ops.ResourceApplyGradientDescent(
        var=w.handle, alpha=0.5, delta=new
    ),
    "in a graph": lambda w, new: tf.function(lambda: w.assign(w * 2 + new))(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_a_variable_that_changes(change, calls):
    """After any number of calls with one value: never the last one's result."""
    (x, w), changes = arrays(SHAPE, FILTER), arrays(*[FILTER] * 6, seed=1)
    w = tf.Variable(w)
    run = convolution(w)
    for new in changes:
        for _ in range(calls):
            np.testing.assert_array_equal(run(x), by_numpy(x, w))
        CHANGES[change](w, tf.constant(new))
        np.testing.assert_array_equal(run(x), by_numpy(x, w))


def test_a_change_of_the_array_that_was_assigned():
    """TensorFlow copies it; were it to share the memory, it would hold what the array does."""
    x, w = arrays(SHAPE, FILTER)
    layer = L.Conv2D(40, 3, padding="same", use_bias=False)
    model = accelerate(keras.Sequential([keras.Input(SHAPE[1:]), layer]))
    for step in range(5):
        w *= -1.5
        layer.set_weights([w])
        for _ in range(step):
            wanted = fastconv.conv2d(x, layer.get_weights()[0], padding="same")
            np.testing.assert_array_equal(model.predict(x, verbose=0), wanted)


def aligned(array):
    """A copy of it where TensorFlow takes memory as it is: at a multiple of 64 bytes."""
    room = np.empty(array.nbytes + 64, "uint8")
    at = -room.ctypes.data % 64
    room = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    room[...] = array
    return room


def test_memory_that_somebody_else_writes_to():
    """A filter that an array shares by DLPack is the one that it holds now."""
    x, w = arrays(SHAPE, FILTER)
    w = aligned(w)
    shared = tf.experimental.dlpack.from_dlpack(w.__dlpack__())
    captured = convolution(shared)
    given = tf.function(lambda x, w: adapter.conv2d(x, w, padding="same"), autograph=False)

    @tf.function(autograph=False)
    def reshaped(x, w):
        return adapter.conv2d(x, tf.identity(tf.reshape(w, FILTER)), padding="same")

    kept = Kept()
    for _ in range(5):
        w *= 0.5
        wanted = fastconv.conv2d(x, w, padding="same")
        for run in (captured, lambda x: given(x, shared), lambda x: reshaped(x, shared)):
            np.testing.assert_array_equal(run(x), wanted)
        np.testing.assert_array_equal(adapter.conv2d(x, shared, padding="same"), wanted)
    assert kept() == 0


def test_a_session_of_tensorflow_1():
    """What it is fed it takes as it is; to a reference variable it assigns in place."""
    x, w = arrays(SHAPE, FILTER)
    fed = aligned(w)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        place = tf.compat.v1.placeholder("float32", FILTER)
        variables = [tf.compat.v1.Variable(w, use_resource=kind) for kind in (False, True)]
        assigned = [variable.assign(place) for variable in variables]
        ys = [adapter.conv2d(x, filters, padding="same") for filters in (place, *variables)]
        session.run(tf.compat.v1.global_variables_initializer())
        kept = Kept()
        for _ in range(4):
            fed *= -0.5
            session.run([tensor.op for tensor in assigned], {place: fed})
            wanted = fastconv.conv2d(x, fed, padding="same")
            for _ in range(4):
                for found in session.run(ys, {place: fed}):
                    np.testing.assert_array_equal(found, wanted)
        assert 0 < kept() <= 4 * 3  # of the resource variable


def test_what_a_graph_knows_to_stay():
    x, w = arrays(SHAPE, FILTER)
    constant = tf.function(lambda x: adapter.conv2d(x, tf.constant(w), padding="same"))
    variable = tf.Variable(w.reshape(9, 24, 40))
    reshaped = tf.function(
        lambda x: adapter.conv2d(x, tf.reshape(variable, FILTER), padding="same"), autograph=False
    )
    kept = Kept()
    for run in (constant, reshaped):
        for _ in range(5):
            np.testing.assert_array_equal(run(x), fastconv.conv2d(x, w, padding="same"))
        assert kept() == 3


def test_changes_at_each_call_give_it_up():
    """As in training: what is held would cost each assignment a copy."""
    x, w = arrays(SHAPE, FILTER)
    w = tf.Variable(w)
    run = convolution(w)
    kept = Kept()
    for _ in range(40):
        w.assign_sub(tf.ones(FILTER) * 0.01)
        np.testing.assert_array_equal(run(x), by_numpy(x, w))
    assert kept() == 0
    for _ in range(1100):  # the longest pause, and three calls more
        y = run(x)
    assert kept() > 0
    np.testing.assert_array_equal(y, by_numpy(x, w))


def test_an_evaluation_each_epoch():
    """A filter that served some calls before it changed is kept anew, however often that goes on."""
    x, w = arrays(SHAPE, FILTER)
    w = tf.Variable(w)
    run = convolution(w)
    for epoch in range(12):
        w.assign_add(tf.ones(FILTER) * 0.1)
        kept = Kept()
        for _ in range(8):
            np.testing.assert_array_equal(run(x), by_numpy(x, w))
        assert kept() >= 5, epoch


def test_other_shapes_of_one_filter():
    """One tensor's memory as another filter, and images of other sizes by one op."""
    x, w = arrays((2, 9, 10, 24), FILTER)
    w = tf.Variable(w)

    @tf.function(reduce_retracing=True, autograph=False)
    def run(x, shape):
        return adapter.conv2d(x, tf.reshape(w, shape), padding="same")

    for _, (channels, filters) in itertools.product(range(4), [(24, 40), (40, 24), (8, 120)]):
        shape = (3, 3, channels, filters)
        images = np.resize(x, (2, 9, 10, channels))
        wanted = fastconv.conv2d(images, w.numpy().reshape(shape), padding="same")
        for size in (9, 4):
            part = np.ascontiguousarray(images[:, :size])
            found = run(tf.constant(part), tf.constant(shape))
            if size == 9:
                np.testing.assert_array_equal(found, wanted)
            else:
                np.testing.assert_array_equal(
                    found, fastconv.conv2d(part, w.numpy().reshape(shape), padding="same")
                )


@pytest.mark.parametrize("algorithm", ["direct", "winograd4"])
def test_scales(algorithm):
    """Of a normalisation, whose moments may change though the filter does not."""
    x, w = arrays(SHAPE, FILTER)
    inputs = keras.Input(SHAPE[1:])
    convolve, normalize = L.Conv2D(40, 3, padding="same", use_bias=False), L.BatchNormalization()
    outputs = L.Activation("swish")(normalize(convolve(inputs)))
    model = accelerate(keras.Model(inputs, outputs))
    convolve.set_weights([w])
    rng = np.random.default_rng(3)
    kept = Kept()
    with running_on(algorithm=algorithm):
        for change in range(3):
            normalize.set_weights([rng.uniform(0.5, 2, 40) for _ in range(4)])
            results = [model.predict(x, verbose=0) for _ in range(8)]
            gamma, beta, mean, variance = normalize.get_weights()
            y = fastconv.conv2d(x, w, padding="same").astype("float64")
            y = (y - mean) / np.sqrt(variance + normalize.epsilon) * gamma + beta
            y = y / (1 + np.exp(-y))
            for result in results:
                np.testing.assert_allclose(result, y, rtol=0, atol=1e-4 * np.abs(y).max())
                np.testing.assert_array_equal(result, results[0])
            assert kept() >= 8 - 2 - 2 * change - 1


@pytest.mark.parametrize("strides", [1, 2])
def test_a_transposed_convolution(strides):
    x, w = arrays(SHAPE, (3, 3, 40, 24))
    w = tf.Variable(w)
    run = tf.function(
        lambda x: adapter.conv2d_transpose(x, w, strides=strides, padding="same"), autograph=False
    )
    y_shape = (SHAPE[0], SHAPE[1] * strides, SHAPE[2] * strides, 40)
    kept = Kept()
    for change in range(3):
        wanted = fastconv.conv2d_grad_input(x, w.numpy(), y_shape, strides=strides, padding="same")
        for _ in range(5):
            np.testing.assert_array_equal(run(x), wanted)
        w.assign(w * (change + 2.0))
    assert kept() >= 3


def test_the_gradient_through_a_frozen_convolution():
    """Whose filter stays, as in fine-tuning; the mask of its ReLU is of each call."""
    x, w, dy = arrays(SHAPE, FILTER, (*SHAPE[:3], FILTER[3]))
    w = tf.Variable(w, trainable=False)

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = adapter.conv2d(x, w, padding="same", activation="relu")
        return tape.gradient(y, x, dy)

    kept = Kept()
    for call in range(5):
        x = -1.5 * x
        y = by_numpy(x, w, activation="relu")
        wanted = fastconv.conv2d_grad_input(
            dy, w.numpy(), SHAPE, padding="same", activation="relu", output=y
        )
        np.testing.assert_array_equal(gradient(tf.constant(x)), wanted)
        assert kept() == 2 * (call >= 2)


def test_with_pooling():
    x, w = arrays(SHAPE, FILTER)
    w = tf.Variable(w)
    run = tf.function(lambda x: adapter.conv2d_max_pool2d(x, w, padding="same"), autograph=False)
    kept = Kept()
    for change in range(3):
        wanted = fastconv.conv2d_max_pool2d(x, w.numpy(), padding="same")
        for _ in range(5):
            np.testing.assert_array_equal(run(x), wanted)
        w.assign(w * (change + 2.0))
    assert kept() >= 3


@pytest.mark.parametrize("shape, filters", [
    ((64, 9, 10, 24), FILTER),  # so many pixels that it does not matter
    ((1, 9, 10, 24), (1, 1, 24, 40)),  # a small filter
    ((1, 40, 40, 3), (7, 7, 3, 64)),  # of few channels
    ((1, 9, 10, 960), (3, 3, 1, 960)),  # depthwise
])  # fmt: skip
def test_what_is_not_worth_it(shape, filters):
    x, w = arrays(shape, filters)
    run, kept = convolution(tf.Variable(w)), Kept()
    for _ in range(4):
        run(x)
    assert kept() == 0


def test_training_and_inference_in_turn():
    """Equal to a model whose inference is made anew each time."""
    x, y = arrays((8, 9, 10, 24), (8, 4))
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        layers = [L.Conv2D(40, 3, activation="relu"), L.Conv2D(48, 3, padding="same")]
        layers += [L.BatchNormalization(), L.ReLU(), L.GlobalAveragePooling2D(), L.Dense(4)]
        model = accelerate(keras.Sequential([keras.Input((9, 10, 24)), *layers]))
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        models.append(model)
    kept = Kept()
    for calls in (3, 1, 4, 5):
        for model in models:
            model.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False)
        models[1].predict_function = None  # and with it what its ops keep
        for _ in range(calls):
            found = models[0].predict(x, verbose=0)
        np.testing.assert_array_equal(found, models[1].predict(x, verbose=0))
    assert kept() > 0


def test_callers_at_once():
    """One op, many threads, and one that assigns: each result is that of some value of the filter."""
    x, w = arrays(SHAPE, FILTER)
    values = [w * (i + 1) for i in range(4)]
    wanted = [fastconv.conv2d(x, value, padding="same") for value in values]
    w = tf.Variable(values[0])
    run = convolution(w)
    x = tf.constant(x)
    run(x)
    wrong, done = [], threading.Event()

    def call():
        while not done.is_set():
            y = run(x).numpy()
            if not any(np.array_equal(y, right) for right in wanted):
                wrong.append(y)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        w.assign(values[i % 4])
        done.wait(0.01 if i % 5 else 0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def run_with(setting, program):
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "FASTCONV_KEEP_FILTERS": setting},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("setting", "kept"), [("0", 0), ("1", 3)])
def test_it_can_be_turned_off(setting, kept):
    done = run_with(
        setting,
        f"""
import numpy as np, tensorflow as tf
from fastconv.adapters import tensorflow as adapter
w = tf.Variable(np.ones({FILTER}, "float32"))
run = tf.function(lambda x: adapter.conv2d(x, w))
for _ in range(5):
    run(tf.ones({SHAPE}))
print("kept", adapter.kept_filters())
""",
    )
    assert done.returncode == 0, done.stderr
    assert f"kept {kept}\n" in done.stdout, done.stderr


def test_a_senseless_value_is_refused():
    done = run_with(
        "off",
        f"""
import tensorflow as tf
from fastconv.adapters import tensorflow as adapter
adapter.conv2d(tf.ones({SHAPE}), tf.ones({FILTER}))
""",
    )
    assert done.returncode != 0
    assert (
        "FASTCONV_KEEP_FILTERS must be 0 or 1. Received: FASTCONV_KEEP_FILTERS=off" in done.stderr
    )
