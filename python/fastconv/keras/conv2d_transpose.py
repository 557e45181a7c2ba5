"""``keras.layers.Conv2DTranspose`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._stand_in import (
    JitWhereXlaServes,
    adapter,
    reason_against_arguments,
    reason_for_stock,
    stand_in_for,
    static_shape,
    tell,
)

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.Conv2DTranspose)
class FastConv2DTranspose(JitWhereXlaServes, keras.layers.Conv2DTranspose):
    """A transposed 2-D convolution layer: ``keras.layers.Conv2DTranspose`` on fastconv's kernels.

    It is the input's gradient of a convolution, and its own gradients are that convolution and its
    filter's gradient: the same three kernels. Bias and activation are Keras's ops. Arguments,
    defaults, names, weights, errors and files are those of ``keras.layers.Conv2DTranspose``, and so
    is the code for inputs that the kernels do not serve: see ``FastConv2D``. Some ``"same"`` with
    ``output_padding`` and wide strides ask for an output that no convolution makes the input of:
    TensorFlow's and ours alike raise an error.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, filters), or (batch, filters, new_height,
    new_width).
    """

    def call(self, inputs: Tensor) -> Tensor:
        reason = self._reason_for_stock(inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        channels_first = self.data_format == "channels_first"
        outputs = adapter.conv2d_transpose(
            inputs,
            self.kernel,
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        if self.use_bias:
            shape = (1, -1, 1, 1) if channels_first else (1, 1, 1, -1)
            outputs = keras.ops.add(outputs, keras.ops.reshape(self.bias, shape))
        return outputs if self.activation is None else self.activation(outputs)

    def _reason_for_stock(self, inputs: Tensor) -> str | None:
        reason = reason_for_stock(inputs, self.compute_dtype) or reason_against_arguments(self)
        if reason is not None:
            return reason
        if 0 in static_shape(inputs)[1:]:
            return f"the input is empty: {inputs.shape}"
        return None
