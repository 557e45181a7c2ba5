"""``keras.layers.GlobalMaxPooling2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import GlobalPooling
from fastconv.keras._stand_in import adapter, stand_in_for

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.GlobalMaxPooling2D)
class FastGlobalMaxPooling2D(GlobalPooling, keras.layers.GlobalMaxPooling2D):
    """The maximum of each channel: ``keras.layers.GlobalMaxPooling2D``, on fastconv's kernels.

    Arguments, defaults, names, errors and files are those of
    ``keras.layers.GlobalMaxPooling2D``. A NaN makes the maximum NaN; equal maxima share
    the gradient, as in the stock layer. Inputs the kernels do not serve go to the
    stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, channels); with ``keepdims=True`` (batch, 1, 1, channels), or (batch,
    channels, 1, 1).
    """

    def _pool(self, images: Tensor) -> Tensor:
        return adapter.global_max_pool2d(images, data_format=self.data_format)
