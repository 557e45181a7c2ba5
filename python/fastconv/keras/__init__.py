"""Drop-in Keras layers whose work is done by fastconv's kernels.

``FastConv2D`` and its siblings are subclasses of the stock layers: same arguments, weights, names
and files. What the kernels do not serve (a data type other than float32, a Keras backend other than
TensorFlow, ...) is done by the stock layer's own code; the logger ``fastconv`` says so and why at
level DEBUG. Importing this module registers the layers with Keras, so that models that hold them
can be loaded.

``accelerate()`` makes the layers of a whole model fast, ``restore()`` stock again; ``summary()``
and ``explain_layer()`` tell who computes what, and why; ``patch()`` is for code one cannot edit.
"""

from fastconv.keras._accelerate import accelerate, patch, restore, summary
from fastconv.keras._explain import Explanation, explain_layer
from fastconv.keras._joining import (
    FastActivation,
    FastAdd,
    FastBatchNormalization,
    FastReLU,
    FastZeroPadding2D,
)
from fastconv.keras.average_pooling1d import FastAveragePooling1D
from fastconv.keras.average_pooling2d import FastAveragePooling2D
from fastconv.keras.conv1d import FastConv1D
from fastconv.keras.conv1d_transpose import FastConv1DTranspose
from fastconv.keras.conv2d import FastConv2D
from fastconv.keras.conv2d_transpose import FastConv2DTranspose
from fastconv.keras.conv_pool2d import FastConvPool2D
from fastconv.keras.depthwise_conv1d import FastDepthwiseConv1D
from fastconv.keras.depthwise_conv2d import FastDepthwiseConv2D
from fastconv.keras.global_average_pooling1d import FastGlobalAveragePooling1D
from fastconv.keras.global_average_pooling2d import FastGlobalAveragePooling2D
from fastconv.keras.global_max_pooling1d import FastGlobalMaxPooling1D
from fastconv.keras.global_max_pooling2d import FastGlobalMaxPooling2D
from fastconv.keras.max_pooling1d import FastMaxPooling1D
from fastconv.keras.max_pooling2d import FastMaxPooling2D
from fastconv.keras.separable_conv1d import FastSeparableConv1D
from fastconv.keras.separable_conv2d import FastSeparableConv2D

__all__ = [
    "Explanation",
    "FastActivation",
    "FastAdd",
    "FastAveragePooling1D",
    "FastAveragePooling2D",
    "FastBatchNormalization",
    "FastConv1D",
    "FastConv1DTranspose",
    "FastConv2D",
    "FastConv2DTranspose",
    "FastConvPool2D",
    "FastDepthwiseConv1D",
    "FastDepthwiseConv2D",
    "FastGlobalAveragePooling1D",
    "FastGlobalAveragePooling2D",
    "FastGlobalMaxPooling1D",
    "FastGlobalMaxPooling2D",
    "FastMaxPooling1D",
    "FastMaxPooling2D",
    "FastReLU",
    "FastSeparableConv1D",
    "FastSeparableConv2D",
    "FastZeroPadding2D",
    "accelerate",
    "explain_layer",
    "patch",
    "restore",
    "summary",
]
