"""A convolution with 2 x 2 max-pooling behind it as one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._convolution import epilogue, fused_activation, geometry, leaves_to_stock
from fastconv.keras._pooling import window_behind
from fastconv.keras._stand_in import adapter, trains
from fastconv.keras.conv2d import FastConv2D

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastconv.keras._stand_in import Tensor


@keras.saving.register_keras_serializable(package="fastconv")
class FastConvPool2D(FastConv2D):
    """``MaxPooling2D(2)(Conv2D(...))`` as one layer, computed in one pass.

    Arguments, defaults and weights are those of ``keras.layers.Conv2D``. The convolution's output is
    pooled where it is computed and never in memory as a whole; for the gradient, the pooled output is
    kept with a byte an element. It saves memory in eager mode as well, where a ``FastConv2D`` and the
    ``FastMaxPooling2D`` behind it are two ops.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height // 2, new_width // 2, filters), or (batch, filters,
    new_height // 2, new_width // 2), of which new_height and new_width are those of the convolution.
    """

    def call(self, inputs: Tensor) -> Tensor:
        if not self._in_one_op(inputs):
            window = window_behind(self.data_format)
            return keras.ops.max_pool(super().call(inputs), **window)
        return adapter.conv2d_max_pool2d(
            inputs,
            self.kernel,
            **epilogue(self),
            **geometry(self),
            keep_argmax=trains(),
        )

    def _in_one_op(self, inputs: Tensor) -> bool:
        own_convolution = type(self).convolution_op is FastConv2D.convolution_op
        fused = fused_activation(self.activation) is not None
        if not own_convolution or not fused or leaves_to_stock(self, inputs):
            return False
        # The stock code tells of an output that has no window.
        return 0 not in self.compute_output_shape(inputs.shape)[1:]

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        shape = list(super().compute_output_shape(input_shape))
        for axis in (2, 3) if self.data_format == "channels_first" else (1, 2):
            shape[axis] = None if shape[axis] is None else shape[axis] // 2
        return tuple(shape)
