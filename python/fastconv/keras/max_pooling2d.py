"""``keras.layers.MaxPooling2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._pooling import (
    follows_one_convolution,
    reason_against_window,
    window,
    window_behind,
)
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for, tell, trains

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.MaxPooling2D)
class FastMaxPooling2D(JitWhereXlaServes, keras.layers.MaxPooling2D):
    """A 2-D max-pooling layer: ``keras.layers.MaxPooling2D``, computed by fastconv's kernels.

    Arguments, defaults, names, errors and files are those of ``keras.layers.MaxPooling2D``. In
    training the place of each maximum is kept, one byte each, for the gradient; gradients are right
    without ``training=True`` as well, but have to search the maxima again. Inputs the kernels do
    not serve go to the stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    In a graph (``fit()``, ``predict()``, ``tf.function``) a 2 x 2 pooling that alone reads the output
    of a ``FastConv2D`` becomes one op with it, as ``FastConvPool2D`` is everywhere.

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
        keep_argmax = trains()
        if window(self) == window_behind(self.data_format) and follows_one_convolution(self):
            pooled = adapter.pooled_in_one(inputs, keep_argmax=keep_argmax)
            if pooled is not None:
                return pooled
        return adapter.max_pool2d(inputs, **window(self), keep_argmax=keep_argmax)
