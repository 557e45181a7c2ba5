"""``keras.layers.GlobalMaxPooling2D`` on fastconv's kernels."""

import keras

from fastconv.keras._pooling import reason_against_global, without_image_axes
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for, tell


@stand_in_for(keras.layers.GlobalMaxPooling2D)
class FastGlobalMaxPooling2D(JitWhereXlaServes, keras.layers.GlobalMaxPooling2D):
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

    def call(self, inputs):
        reason = reason_against_global(self, inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        outputs = adapter.global_max_pool2d(inputs, data_format=self.data_format)
        return without_image_axes(self, outputs)
