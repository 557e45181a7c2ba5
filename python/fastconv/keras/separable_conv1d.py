"""``keras.layers.SeparableConv1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._convolution import activated, epilogue, leaves_to_stock
from fastconv.keras._sequences import of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for
from fastconv.keras.depthwise_conv2d import depthwise_convolution

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.SeparableConv1D)
class FastSeparableConv1D(JitWhereXlaServes, keras.layers.SeparableConv1D):
    """A separable 1-D convolution layer: ``keras.layers.SeparableConv1D`` on fastconv's kernels.

    A sequence is an image of height 1 to them. They run twice, as for ``FastSeparableConv2D``.
    Arguments, defaults, names, weights, errors and files are those of
    ``keras.layers.SeparableConv1D``, and so is the code for inputs that the kernels do not serve:
    see ``FastConv2D``.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, new_steps, filters), or (batch, filters, new_steps).
    """

    def call(self, inputs: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().call(inputs)

        def convolve(images: Tensor) -> Tensor:
            return adapter.conv2d(
                depthwise_convolution(self, images, self.depthwise_kernel),
                keras.ops.expand_dims(self.pointwise_kernel, 0),
                data_format=self.data_format,
                **epilogue(self),
            )

        return activated(self, of_sequences(inputs, self.data_format, convolve))
