"""``keras.layers.MaxPooling1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import reason_against_window, window
from fastconv.keras._sequences import of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for, tell, trains

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.MaxPooling1D)
class FastMaxPooling1D(JitWhereXlaServes, keras.layers.MaxPooling1D):
    """A 1-D max-pooling layer: ``keras.layers.MaxPooling1D``, on fastconv's kernels.

    A sequence is an image of height 1 to them. Arguments, defaults, names, errors and files are those
    of ``keras.layers.MaxPooling1D``. In
    training the place of each maximum is kept, one byte each, for the gradient. Inputs the kernels do
    not serve go to the stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, new_steps, channels), or (batch, channels, new_steps).
    """

    def call(self, inputs: Tensor) -> Tensor:
        reason = reason_against_window(self, inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        options = {**window(self), "keep_argmax": trains()}
        return of_sequences(
            inputs, self.data_format, lambda images: adapter.max_pool2d(images, **options)
        )
