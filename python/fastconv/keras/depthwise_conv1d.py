"""``keras.layers.DepthwiseConv1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._convolution import activated, epilogue, leaves_to_stock, of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for

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
            return depthwise_convolution_of_rows(self, images, self.kernel, **epilogue(self))

        return activated(self, of_sequences(self, inputs, convolve))


def depthwise_convolution_of_rows(
    layer: keras.layers.Layer, images: Tensor, kernel: Tensor, **options: Any
) -> Tensor:
    """The convolution of each channel of images of height 1 with ``kernel`` (taps, channels,
    multiplier)."""
    taps, channels, multiplier = kernel.shape
    return adapter.conv2d(
        images,
        # Channel c's filters come c-th, which is where those of the c-th group are.
        keras.ops.reshape(kernel, (1, taps, 1, channels * multiplier)),
        strides=(1, *layer.strides),
        padding=layer.padding,
        dilation_rate=(1, *layer.dilation_rate),
        data_format=layer.data_format,
        **options,
    )
