"""What the tests of the Keras layers share."""

import keras
import numpy as np
import tensorflow as tf


def outputs_and_gradients(function, inputs):
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = function(*inputs)
        loss = tf.reduce_sum(tf.sin(3.0 * y))
    return [y, *tape.gradient(loss, inputs)]


def equal_layers(fast_class, stock_class, shape, **options):
    """A fast and a stock layer with the same weights, none of which is zero."""
    fast, stock = fast_class(**options), stock_class(**options)
    fast.build(shape)
    stock.build(shape)
    generator = np.random.default_rng(1)
    weights = [generator.standard_normal(w.shape) for w in fast.weights]
    fast.set_weights(weights)
    stock.set_weights(weights)
    return fast, stock


def through(layer, **call_options):
    """The layer as a function of its input and its weights.

    It is called as in a model: stateless_call() gives `training` to `call()`, which need not take it.
    """

    def call(x, *weights):
        with keras.StatelessScope(list(zip(layer.weights, weights, strict=True))):
            return layer(x, **call_options)

    return call


def two_orders(function):
    """function(*inputs), and its gradients by every input of first and second order."""

    def orders(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y = function(*inputs)
                loss = bounded(y)
            gradients = inner.gradient(loss, inputs)
            penalty = tf.add_n([bounded(gradient) for gradient in gradients])
        return [y, *gradients, *outer.gradient(penalty, inputs)]

    return orders


def bounded(tensor):
    """A sum of sines of at most 3: of large numbers, they would magnify rounding errors."""
    scale = tf.stop_gradient(3.0 / tf.reduce_max(tf.abs(tensor)))
    return tf.reduce_sum(tf.sin(scale * tensor))
