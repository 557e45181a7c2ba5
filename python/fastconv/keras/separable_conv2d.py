"""``keras.layers.SeparableConv2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._convolution import activated, epilogue, leaves_to_stock
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for
from fastconv.keras.depthwise_conv2d import depthwise_convolution

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.SeparableConv2D)
class FastSeparableConv2D(JitWhereXlaServes, keras.layers.SeparableConv2D):
    """A separable 2-D convolution layer: ``keras.layers.SeparableConv2D`` on fastconv's kernels.

    They run twice: a depthwise convolution, then one of 1 x 1 taps with the bias and, where it is
    ``keras.activations.relu``, the activation. Arguments, defaults, names, weights, errors and
    files are those of ``keras.layers.SeparableConv2D``, and so is the code for inputs that the
    kernels do not serve: see ``FastConv2D``.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, filters), or (batch, filters, new_height,
    new_width).
    """

    def call(self, inputs: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().call(inputs)
        outputs = adapter.conv2d(
            depthwise_convolution(self, inputs, self.depthwise_kernel),
            self.pointwise_kernel,
            data_format=self.data_format,
            **epilogue(self),
        )
        return activated(self, outputs)
