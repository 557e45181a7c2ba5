"""Stock TensorFlow's answers for every layout and for groups, in ops that it can differentiate.

On a CPU its convolutions know neither channels_first nor the gradient of groups.
"""

import numpy as np
import tensorflow as tf


def conv2d(x, w, bias=None, *, activation=None, data_format="channels_last", **options):
    """tf.nn.conv2d of each group in channels_last. ``options`` are those of tf.nn.conv2d."""
    x = _to_channels_last(x, data_format)
    groups = x.shape[3] // w.shape[2]
    y = tf.concat(
        [
            tf.nn.conv2d(part, filters, **options)
            for part, filters in zip(tf.split(x, groups, 3), tf.split(w, groups, 3), strict=True)
        ],
        axis=3,
    )
    if bias is not None:
        y += bias
    if activation == "relu":
        y = tf.nn.relu(y)
    return _from_channels_last(y, data_format)


def max_pool2d(x, *, data_format="channels_last", **options):
    """tf.nn.max_pool2d in channels_last. ``options`` are those of tf.nn.max_pool2d."""
    y = tf.nn.max_pool2d(_to_channels_last(x, data_format), **options)
    return _from_channels_last(y, data_format)


def orders(function, inputs, order=2):
    """function(*inputs), then the gradients by every input of order 1, of order 2, ...

    Each order differentiates the sum of the sines of what the order before gave, so that none of
    them vanishes.
    """
    inputs = list(inputs)
    tapes = [tf.GradientTape() for _ in range(order)]
    for tape in tapes:
        tape.__enter__()
        tape.watch(inputs)
    results = [function(*inputs)]
    latest = results
    for tape in reversed(tapes):
        loss = tf.add_n([tf.reduce_sum(tf.sin(tensor)) for tensor in latest])
        tape.__exit__(None, None, None)
        latest = tape.gradient(loss, inputs)
        results += latest
    return results


def assert_all_close(actual, wanted, tolerance=3e-5):
    """Element-wise, relative to the largest value of each tensor."""
    for a, w in zip(actual, wanted, strict=True):
        a, w = np.asarray(a), np.asarray(w)
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * np.abs(w).max(initial=1e-30))


def _to_channels_last(x, data_format):
    return tf.transpose(x, (0, 2, 3, 1)) if data_format == "channels_first" else x


def _from_channels_last(y, data_format):
    return tf.transpose(y, (0, 3, 1, 2)) if data_format == "channels_first" else y
