"""``keras.layers.GlobalAveragePooling1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import GlobalPooling
from fastconv.keras._stand_in import adapter, stand_in_for, tell

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.GlobalAveragePooling1D)
class FastGlobalAveragePooling1D(GlobalPooling, keras.layers.GlobalAveragePooling1D):
    """The average of each channel: ``keras.layers.GlobalAveragePooling1D``, on fastconv's kernels.

    A sequence is an image of height 1 to them. Arguments, defaults, names, errors and files are those
    of ``keras.layers.GlobalAveragePooling1D``. Inputs that come with a mask, and those the kernels do
    not serve, go to the stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, channels); with ``keepdims=True`` (batch, 1, channels), or (batch,
    channels, 1).
    """

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().call(inputs)
        tell(self, "the input comes with a mask")
        return super(GlobalPooling, self).call(inputs, mask=mask)  # the stock layer's

    def _pool(self, images: Tensor) -> Tensor:
        return adapter.global_avg_pool2d(images, data_format=self.data_format)
