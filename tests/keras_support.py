"""What the tests of the Keras layers share."""

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
    fast.set_weights([generator.standard_normal(w.shape) for w in fast.get_weights()])
    stock.set_weights(fast.get_weights())
    return fast, stock
