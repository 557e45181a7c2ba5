"""``keras.layers.DepthwiseConv2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._convolution import activated, epilogue, geometry, leaves_to_stock
from fastconv.keras._sequences import height_of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.DepthwiseConv2D)
class FastDepthwiseConv2D(JitWhereXlaServes, keras.layers.DepthwiseConv2D):
    """A depthwise 2-D convolution layer: ``keras.layers.DepthwiseConv2D`` on fastconv's kernels.

    To them it is a convolution with as many groups as channels. Arguments, defaults, names,
    weights, errors and files are those of ``keras.layers.DepthwiseConv2D``, and so is the code for
    inputs that the kernels do not serve: see ``FastConv2D``.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, channels * depth_multiplier), or (batch, channels *
    depth_multiplier, new_height, new_width).
    """

    def call(self, inputs: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().call(inputs)
        outputs = depthwise_convolution(self, inputs, self.kernel, **epilogue(self))
        return activated(self, outputs)


def depthwise_convolution(
    layer: keras.layers.Layer, inputs: Tensor, kernel: Tensor, **options: Any
) -> Tensor:
    """The convolution of each channel of images with ``kernel`` (taps..., channels, multiplier)."""
    *taps, channels, multiplier = kernel.shape
    return adapter.conv2d(
        inputs,
        # Channel c's filters come c-th, which is where those of the c-th group are.
        keras.ops.reshape(
            kernel, (*height_of_sequences(layer.rank), *taps, 1, channels * multiplier)
        ),
        **geometry(layer),
        **options,
    )
