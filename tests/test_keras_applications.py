"""Keras's own networks, converted by accelerate(): outputs and gradients beside the stock layers'.

The networks that take longest are left to ``make test ARGS="-m sweep"``.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fastconv.keras import FastActivation, accelerate
from fastconv.keras._stand_in import STAND_INS

sweep = pytest.mark.sweep

# The network, a size that it takes, and how far its outputs may be from stock's, relative to their
# norm: Winograd's rounding errors add up over the layers. With FASTCONV_ACCURACY=strict all but
# EfficientNet, which multiplies activations with each other, are within 1e-4.
NETWORKS = [
    pytest.param("MobileNetV2", 32, 5e-4),
    pytest.param("ResNet50", 32, 5e-4),
    pytest.param("Xception", 71, 5e-4),
    pytest.param("MobileNetV3Small", 32, 3e-3),
    pytest.param("VGG16", 32, 5e-4, marks=sweep),
    pytest.param("EfficientNetB0", 32, 3e-3, marks=sweep),
    pytest.param("DenseNet121", 32, 5e-4, marks=sweep),
    pytest.param("InceptionV3", 75, 5e-4, marks=sweep),
    pytest.param("ResNet50V2", 32, 5e-4, marks=sweep),
    pytest.param("NASNetMobile", 32, 3e-3, marks=sweep),
]
# Among a million ReLUs there is one whose input is zero but for rounding, and whose slope is either
# 0 or 1: gradients are compared as a whole, for what a wrong kernel would do to them.
GRADIENT_TOLERANCE = 0.03


def make(name, size, rng):
    """The network with random weights, normalized so that signals neither die nor explode."""
    keras.utils.set_random_seed(1)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    normalizations = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    for layer in normalizations:
        layer.momentum = 0.0
    model(rng.random((8, size, size, 3), "float32"), training=True)
    for layer in normalizations:
        # One variance for all channels: a channel that hardly varies would amplify rounding errors.
        variance = layer.moving_variance.numpy()
        layer.moving_variance.assign(np.full_like(variance, variance.mean()))
    return model


def outputs_and_gradients(model, x, weights):
    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x, training=False)
            loss = tf.reduce_sum(y * weights)
        return y, tape.gradient(loss, [x, *model.trainable_variables])

    y, gradients = run(x)
    return y.numpy(), [gradient.numpy() for gradient in gradients]


def distance(actual, wanted):
    """Relative to the norm of all."""
    pairs = list(zip(actual, wanted, strict=True))
    apart = sum(float(np.sum((a - w) ** 2, dtype="float64")) for a, w in pairs)
    return np.sqrt(apart / sum(float(np.sum(w**2, dtype="float64")) for _, w in pairs))


@pytest.mark.parametrize("name, size, tolerance", NETWORKS)
def test_application(name, size, tolerance, rng, executed):
    model = make(name, size, rng)
    x = tf.constant(rng.random((2, size, size, 3), "float32"))
    weights = rng.standard_normal((2, 10)).astype("float32")
    wanted, wanted_gradients = outputs_and_gradients(model, x, weights)
    assert executed() == {}
    accelerate(model)
    assert not [layer for layer in model._flatten_layers() if type(layer) in STAND_INS]
    y, gradients = outputs_and_gradients(model, x, weights)

    def count(*stocks):
        return sum(isinstance(layer, stocks) for layer in model._flatten_layers())

    L = keras.layers
    # A separable layer, which is no Conv2D to Keras, is two convolutions.
    convolutions = count(L.Conv2D, L.DepthwiseConv2D) + 2 * count(L.SeparableConv2D)
    counts = executed()
    # With batch normalisation and activation, or without, or with a pooling. A gradient takes what was before
    # a swish, which its output does not tell, from the convolution once more.
    pooled = counts.get("FastconvConv2DMaxPool2DGrad", 0)
    forward = counts.get("FastconvConv2D", 0) + counts.get("FastconvConv2DScaled", 0) + pooled
    again = sum(
        isinstance(layer, FastActivation)
        and layer.activation in (keras.activations.silu, keras.activations.hard_silu)
        for layer in model._flatten_layers()
    )
    assert forward == convolutions + again
    for op in ("FastconvConv2DGradInput", "FastconvConv2DGradFilter"):
        assert counts[op] == convolutions - pooled
    assert np.abs(wanted).max() > 1e-4
    assert distance([y], [wanted]) <= tolerance
    assert distance(gradients, wanted_gradients) <= GRADIENT_TOLERANCE
