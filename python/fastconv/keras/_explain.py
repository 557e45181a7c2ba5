"""Who computes a layer, fastconv's kernels or Keras's own code, and why."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from fastconv._arguments import shown
from fastconv.keras._joining import FastZeroPadding2D
from fastconv.keras._stand_in import (
    JOINING,
    STAND_INS,
    adapter,
    reason_for_stock_always,
    reason_last_told,
)

_CONVOLUTIONS_WITH_EPILOGUE = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


@dataclass(frozen=True)
class Explanation:
    """Who computes a layer.

    Attributes:
        name: the layer's name.
        type: the layer's class.
        served_by: ``"fastconv"`` or ``"stock"``.
        reason: why, in words.
    """

    name: str
    type: str
    served_by: str
    reason: str

    def __str__(self) -> str:
        return f"{self.type} {self.name!r} is computed by {self.served_by}: {self.reason}"


def explain_layer(layer: keras.layers.Layer) -> Explanation:
    """Who computes ``layer``, as far as that does not depend on the input, and why.

    A fast layer decides by each input; what it decided against the kernels for is told as well.

    Args:
        layer: a Keras layer, of fastconv's or not.

    Returns:
        An Explanation, which prints as a sentence.

    Raises:
        TypeError: if it is no Keras layer.
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"`layer` must be a Keras layer. Received: layer={shown(layer)}")
    served_by, reason = _explain(layer)
    return Explanation(layer.name, type(layer).__qualname__, served_by, reason)


def _explain(layer: keras.layers.Layer) -> tuple[str, str]:
    dtype = layer.compute_dtype
    if isinstance(layer, tuple(STAND_INS.values())):
        reason = reason_for_stock_always(layer)
        if reason is not None:
            return "stock", reason
        return "fastconv", _how(layer)
    if isinstance(layer, FastZeroPadding2D):
        return "fastconv", "part of the layer behind it, in graphs, where that is fastconv's"
    if isinstance(layer, tuple(JOINING.values())):
        reason = reason_for_stock_always(layer)
        if reason is not None:
            return "stock", reason
        if dtype != "float32":
            return "stock", f"the data type is not float32: the layer computes in {dtype}"
        if isinstance(layer, keras.layers.BatchNormalization):
            return (
                "fastconv",
                "part of a convolution before it, in graphs at inference; else a kernel",
            )
        return "fastconv", "part of the layer before it, in graphs; else stock"
    kind = type(layer)
    if kind in STAND_INS:
        return "stock", f"not replaced; accelerate() would make it a {STAND_INS[kind].__qualname__}"
    for stock in STAND_INS:
        if isinstance(layer, stock):
            return "stock", f"a subclass of {stock.__name__}, whose own code is left alone"
    return "stock", f"fastconv has no layer for {kind.__qualname__}"


def _how(layer: keras.layers.Layer) -> str:
    parts = [f"{layer.compute_dtype} on {adapter.place()}"]
    if isinstance(layer, _CONVOLUTIONS_WITH_EPILOGUE):
        fused = ["bias"] if layer.use_bias else []
        if layer.activation is keras.activations.relu:
            fused.append("relu")
        if fused:
            parts.append(f"{' and '.join(fused)} in the kernel")
    if (told := reason_last_told(layer)) is not None:
        parts.append(f"but once the stock code served, since {told}")
    return "; ".join(parts)
