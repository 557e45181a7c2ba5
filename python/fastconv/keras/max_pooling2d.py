"""``keras.layers.MaxPooling2D`` on fastconv's kernels."""

import keras

from fastconv.keras._pooling import reason_against_window, window
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for, tell


@stand_in_for(keras.layers.MaxPooling2D)
class FastMaxPooling2D(JitWhereXlaServes, keras.layers.MaxPooling2D):
    """A 2-D max-pooling layer: ``keras.layers.MaxPooling2D``, computed by fastconv's kernels.

    Arguments, defaults, names, errors and files are those of ``keras.layers.MaxPooling2D``. In
    training the place of each maximum is kept, one byte each, for the gradient; gradients are right
    without ``training=True`` as well, but have to search the maxima again. Inputs the kernels do
    not serve go to the stock layer's code, and the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, channels), or (batch, channels, new_height,
    new_width).
    """

    def call(self, inputs, training=None):
        reason = reason_against_window(self, inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        # `training` may be a tensor, whose value is not known yet.
        return adapter.max_pool2d(inputs, **window(self), keep_argmax=training is True)
