"""``keras.layers.GlobalAveragePooling2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import GlobalPooling
from fastconv.keras._stand_in import adapter, stand_in_for

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.GlobalAveragePooling2D)
class FastGlobalAveragePooling2D(GlobalPooling, keras.layers.GlobalAveragePooling2D):
    """The average of each channel: ``keras.layers.GlobalAveragePooling2D``, on fastconv's kernels.

    Arguments, defaults, names, errors and files are those of
    ``keras.layers.GlobalAveragePooling2D``. Inputs the kernels do not serve go to the
    stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, channels); with ``keepdims=True`` (batch, 1, 1, channels), or (batch,
    channels, 1, 1).
    """

    def _pool(self, images: Tensor) -> Tensor:
        return adapter.global_avg_pool2d(images, data_format=self.data_format)
