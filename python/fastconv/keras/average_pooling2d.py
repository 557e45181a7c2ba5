"""``keras.layers.AveragePooling2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import reason_against_window, window
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for, tell

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.AveragePooling2D)
class FastAveragePooling2D(JitWhereXlaServes, keras.layers.AveragePooling2D):
    """A 2-D average-pooling layer: ``keras.layers.AveragePooling2D``, on fastconv's kernels.

    Arguments, defaults, names, errors and files are those of ``keras.layers.AveragePooling2D``; as
    there, padding is not counted. Inputs the kernels do not serve go to the stock layer's code, and
    the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, channels), or (batch, channels, new_height,
    new_width).
    """

    def call(self, inputs: Tensor) -> Tensor:
        reason = reason_against_window(self, inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        return adapter.avg_pool2d(inputs, **window(self))
