"""``keras.layers.Conv2D`` on fastconv's kernels."""

import keras

from fastconv.keras._stand_in import (
    OutsideXla,
    adapter,
    has_empty_output,
    reason_for_stock,
    stand_in_for,
    tell,
)


@stand_in_for(keras.layers.Conv2D)
class FastConv2D(OutsideXla, keras.layers.Conv2D):
    """A 2-D convolution layer: ``keras.layers.Conv2D``, computed by fastconv's kernels.

    Arguments, defaults, names, weights, errors and files are those of ``keras.layers.Conv2D``.
    The bias is part of the convolution op, and so is the activation where it is
    ``keras.activations.relu``. Inputs the kernels do not serve go to the stock layer's code, and
    the logger ``fastconv`` tells why at level DEBUG.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, filters), or (batch, filters, new_height,
    new_width).
    """

    def call(self, inputs):
        # A subclass may override convolution_op, as keras.layers.Conv2D invites it to.
        if not _is_own_convolution_op(self) or self._leave_to_stock(inputs):
            return super().call(inputs)
        fused = _fused_activation(self.activation)
        outputs = self._convolve(
            inputs,
            self.kernel,
            bias=self.bias if self.use_bias else None,
            activation=fused,
        )
        return outputs if fused else self.activation(outputs)

    def convolution_op(self, inputs, kernel):
        if self._leave_to_stock(inputs):
            return super().convolution_op(inputs, kernel)
        return self._convolve(inputs, kernel)

    def _convolve(self, inputs, kernel, **epilogue):
        return adapter.conv2d(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
            **epilogue,
        )

    def _leave_to_stock(self, inputs):
        reason = self._reason_for_stock(inputs)
        if reason is not None:
            tell(self, reason)
        return reason is not None

    def _reason_for_stock(self, inputs):
        reason = reason_for_stock(inputs, self.compute_dtype)
        if reason is not None:
            return reason
        window = [
            (taps - 1) * dilation + 1
            for taps, dilation in zip(self.kernel_size, self.dilation_rate, strict=True)
        ]
        if has_empty_output(inputs, window, self.padding, self.data_format):
            return f"the output would be empty: input of shape {inputs.shape}"
        return None


def _is_own_convolution_op(layer):
    return type(layer).convolution_op is FastConv2D.convolution_op


def _fused_activation(activation):
    """The name of the activation that the op computes itself; None if it leaves it to Keras."""
    if activation is None or activation is keras.activations.linear:
        return "linear"
    if activation is keras.activations.relu:
        return "relu"
    return None
