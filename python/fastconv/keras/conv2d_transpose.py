"""``keras.layers.Conv2DTranspose`` on fastconv's kernels."""

from __future__ import annotations

import keras

from fastconv.keras._convolution import TransposedConvolution
from fastconv.keras._stand_in import stand_in_for


@stand_in_for(keras.layers.Conv2DTranspose)
class FastConv2DTranspose(TransposedConvolution, keras.layers.Conv2DTranspose):
    """A transposed 2-D convolution layer: ``keras.layers.Conv2DTranspose`` on fastconv's kernels.

    It is the input's gradient of a convolution, and its own gradients are that convolution and its
    filter's gradient: the same three kernels. Bias and activation are Keras's ops. Arguments,
    defaults, names, weights, errors and files are those of ``keras.layers.Conv2DTranspose``, and so
    is the code for inputs that the kernels do not serve: see ``FastConv2D``. Some ``"same"`` with
    ``output_padding`` and wide strides ask for an output that no convolution makes the input of:
    TensorFlow's and ours alike raise an error.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, filters), or (batch, filters, new_height,
    new_width).
    """
