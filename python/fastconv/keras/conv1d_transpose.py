"""``keras.layers.Conv1DTranspose`` on fastconv's kernels."""

from __future__ import annotations

import keras

from fastconv.keras._convolution import TransposedConvolution
from fastconv.keras._stand_in import stand_in_for


@stand_in_for(keras.layers.Conv1DTranspose)
class FastConv1DTranspose(TransposedConvolution, keras.layers.Conv1DTranspose):
    """A transposed 1-D convolution layer: ``keras.layers.Conv1DTranspose`` on fastconv's kernels.

    A sequence is an image of height 1 to them. Arguments, defaults, names, weights, errors and files
    are those of ``keras.layers.Conv1DTranspose``, and so is the code for inputs that the kernels do
    not serve: see ``FastConv2DTranspose``.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, new_steps, filters), or (batch, filters, new_steps).
    """
