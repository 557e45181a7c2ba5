"""What the fast convolution layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._sequences import height_of_sequences, of_sequences
from fastconv.keras._stand_in import (
    JitWhereXlaServes,
    adapter,
    has_empty_output,
    reason_against_arguments,
    reason_for_stock,
    static_shape,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastconv.keras._stand_in import Tensor


def leaves_to_stock(layer: keras.layers.Layer, inputs: Tensor) -> bool:
    """Whether the stock code must take ``inputs``; says so in the log if it must."""
    reason = reason_for_stock_code(layer, inputs)
    if reason is not None:
        tell(layer, reason)
    return reason is not None


def fused_activation(activation: Callable[..., Any] | None) -> str | None:
    """The name of the activation that the op computes itself; None if it leaves it to Keras."""
    if activation is None or activation is keras.activations.linear:
        return "linear"
    if activation is keras.activations.relu:
        return "relu"
    return None


def geometry(layer: keras.layers.Layer) -> dict[str, Any]:
    """Where the op's windows lie: its arguments but the tensors and the epilogue."""
    return {
        "strides": (*height_of_sequences(layer.rank), *layer.strides),
        "padding": layer.padding,
        "dilation_rate": (*height_of_sequences(layer.rank), *layer.dilation_rate),
        "data_format": layer.data_format,
    }


def epilogue(layer: keras.layers.Layer) -> dict[str, Any]:
    """What the op does behind the convolution: its arguments ``bias`` and ``activation``."""
    return {
        "bias": layer.bias if layer.use_bias else None,
        "activation": fused_activation(layer.activation),
    }


def activated(layer: keras.layers.Layer, outputs: Tensor) -> Tensor:
    """``outputs`` of an op with the layer's epilogue, with an activation that it left to Keras."""
    return outputs if fused_activation(layer.activation) else layer.activation(outputs)


def reason_for_stock_code(layer: keras.layers.Layer, inputs: Tensor) -> str | None:
    """Why the stock code must take ``inputs``; None if the kernels can."""
    reason = _reason_against(layer, inputs)
    if reason is not None:
        return reason
    window = [
        (taps - 1) * dilation + 1
        for taps, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    ]
    if has_empty_output(inputs, window, layer.padding, layer.data_format):
        return f"the output would be empty: input of shape {inputs.shape}"
    return None


def _reason_against(layer: keras.layers.Layer, inputs: Tensor) -> str | None:
    """As ``reason_for_stock_code()``, whatever extents ``inputs`` has."""
    rank = layer.rank + 2
    return reason_for_stock(inputs, layer.compute_dtype, rank) or reason_against_arguments(layer)


class TransposedConvolution(JitWhereXlaServes):
    """Mixin, before the stock layer of a transposed convolution."""

    def call(self, inputs: Tensor) -> Tensor:
        reason = _reason_against(self, inputs)
        if reason is None and 0 in static_shape(inputs)[1:]:
            reason = f"the input is empty: {inputs.shape}"
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        if self.rank == 1:
            outputs = of_sequences(inputs, self.data_format, self._convolve)
        else:
            outputs = self._convolve(inputs)
        if self.use_bias:
            extents = (1,) * self.rank
            channels_first = self.data_format == "channels_first"
            shape = (1, -1, *extents) if channels_first else (1, *extents, -1)
            outputs = keras.ops.add(outputs, keras.ops.reshape(self.bias, shape))
        return outputs if self.activation is None else self.activation(outputs)

    def _convolve(self, images: Tensor) -> Tensor:
        kernel, added = self.kernel, self.output_padding
        if self.rank == 1:
            kernel = keras.ops.expand_dims(kernel, 0)
            added = None if added is None else (0, *added)
        return adapter.conv2d_transpose(images, kernel, **geometry(self), output_padding=added)
