"""``keras.layers.GlobalMaxPooling1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import GlobalPooling
from fastconv.keras._stand_in import adapter, stand_in_for

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.GlobalMaxPooling1D)
class FastGlobalMaxPooling1D(GlobalPooling, keras.layers.GlobalMaxPooling1D):
    """The maximum of each channel: ``keras.layers.GlobalMaxPooling1D``, on fastconv's kernels.

    A sequence is an image of height 1 to them. Arguments, defaults, names, errors and files are those
    of ``keras.layers.GlobalMaxPooling1D``; the rest is as in ``FastGlobalMaxPooling2D``.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, channels); with ``keepdims=True`` (batch, 1, channels), or (batch,
    channels, 1).
    """

    def _pool(self, images: Tensor) -> Tensor:
        return adapter.global_max_pool2d(images, data_format=self.data_format)
