"""``keras.layers.DepthwiseConv1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._convolution import activated, epilogue, leaves_to_stock
from fastconv.keras._sequences import of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, stand_in_for
from fastconv.keras.depthwise_conv2d import depthwise_convolution

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.DepthwiseConv1D)
class FastDepthwiseConv1D(JitWhereXlaServes, keras.layers.DepthwiseConv1D):
    """A depthwise 1-D convolution layer: ``keras.layers.DepthwiseConv1D`` on fastconv's kernels.

    A sequence is an image of height 1 to them. Arguments, defaults, names, weights, errors and
    files are those of ``keras.layers.DepthwiseConv1D``, and so is the code for inputs that the
    kernels do not serve: see ``FastConv2D``.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, new_steps, channels * depth_multiplier), or (batch, channels *
    depth_multiplier, new_steps).
    """

    def call(self, inputs: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().call(inputs)

        def convolve(images: Tensor) -> Tensor:
            return depthwise_convolution(self, images, self.kernel, **epilogue(self))

        return activated(self, of_sequences(inputs, self.data_format, convolve))
