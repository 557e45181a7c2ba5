"""What the fast pooling layers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._graph import is_given_out, is_read_once, layers_before
from fastconv.keras._sequences import height_of_sequences, of_sequences
from fastconv.keras._stand_in import (
    JitWhereXlaServes,
    has_empty_output,
    makes_graph,
    reason_against_arguments,
    reason_for_stock,
    static_shape,
    tell,
)
from fastconv.keras.conv2d import FastConv2D

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


def reason_against_window(layer: keras.layers.Layer, inputs: Tensor) -> str | None:
    """Why the stock code must take ``inputs`` of a layer with a window; None if it need not."""
    rank = len(layer.pool_size) + 2
    reason = reason_for_stock(inputs, layer.compute_dtype, rank) or reason_against_arguments(layer)
    if reason is not None:
        return reason
    if not all(layer.strides):
        return f"the strides contain 0: {layer.strides}"
    padding = layer.padding.lower()
    if padding not in ("valid", "same"):
        return f"the padding is none of Keras's: {layer.padding!r}"
    if has_empty_output(inputs, layer.pool_size, padding, layer.data_format):
        return f"the output would be empty: input of shape {inputs.shape}"
    return None


def window(layer: keras.layers.Layer) -> dict[str, Any]:
    """The adapter's arguments of a layer with a window; a sequence's is that of an image of height 1."""
    height = height_of_sequences(len(layer.pool_size))
    return {
        "pool_size": (*height, *layer.pool_size),
        "strides": (*height, *layer.strides),
        "padding": layer.padding.lower(),
        "data_format": layer.data_format,
    }


def window_behind(data_format: str) -> dict[str, Any]:
    """The arguments, as of ``window()``, of the pooling that is one op with a convolution."""
    return {
        "pool_size": (2, 2),
        "strides": (2, 2),
        "padding": "valid",
        "data_format": data_format,
    }


def follows_one_convolution(layer: keras.layers.Layer) -> bool:
    """Whether Keras's graph says that a FastConv2D's output is read by ``layer``, once, alone.

    Nothing else may need that output: computed in one op with the pooling, it does not exist.
    """
    before = layers_before(layer)
    return (
        len(before) == 1
        and isinstance(before[0], FastConv2D)
        and before[0].activity_regularizer is None
        and before[0].data_format == layer.data_format
        and is_read_once(before[0])
        and not (makes_graph() and is_given_out(before[0]))
    )


class GlobalPooling(JitWhereXlaServes):
    """Mixin, before the stock layer of a global pooling; the class has ``_pool``, the adapter's."""

    def call(self, inputs: Tensor) -> Tensor:
        reason = _reason_against_global(self, inputs)
        if reason is not None:
            tell(self, reason)
            return super().call(inputs)
        if self.input_spec.ndim == 3:
            outputs = of_sequences(inputs, self.data_format, self._pool)
        else:
            outputs = self._pool(inputs)
        if self.keepdims:
            return outputs
        first = 2 if self.data_format == "channels_first" else 1
        return keras.ops.squeeze(outputs, tuple(range(first, first + self.input_spec.ndim - 2)))


def _reason_against_global(layer: keras.layers.Layer, inputs: Tensor) -> str | None:
    reason = reason_for_stock(inputs, layer.compute_dtype, layer.input_spec.ndim)
    if reason is not None:
        return reason
    if 0 in static_shape(inputs)[1:]:
        return f"an extent of the input is 0: {inputs.shape}"
    return None
