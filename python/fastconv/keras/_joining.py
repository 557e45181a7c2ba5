"""Layers that become part of the convolution before them, in graphs at inference.

A convolution's batch normalisation, shortcut and ReLU each read and write its whole output again, which
for many networks takes longer than the convolution. ``accelerate()`` makes these layers, where they
stand behind a ``FastConv2D`` whose output nothing else reads, the classes below. They compute what the
stock layers do, whose code serves in training and outside graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._stand_in import JOINING, Tensor, adapter, stand_in_for, static_shape
from fastconv.keras.conv2d import FastConv2D
from fastconv.keras.depthwise_conv2d import FastDepthwiseConv2D

if TYPE_CHECKING:
    from collections.abc import Sequence

_JOINS = keras.backend.backend() == "tensorflow"  # whose graphs can still be changed

__all__ = [
    "FastActivation",
    "FastAdd",
    "FastBatchNormalization",
    "FastReLU",
    "joins_a_convolution",
]


@stand_in_for(keras.layers.BatchNormalization, JOINING)
class FastBatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization`` that becomes part of the convolution before it.

    It does so in graphs (``predict()``, ``evaluate()``, ``tf.function``) where it uses its moving
    statistics: the filters are scaled as the kernel packs them. Results differ from the stock layer's by
    rounding. Else its code is the stock layer's, as are arguments, weights and files.
    """

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        # `training` may be a tensor, whose value is not known yet.
        moving = training is None or training is False or not self.trainable
        if moving and mask is None and _may_join(inputs):
            joined = adapter.normalized_in_one(
                inputs,
                self.moving_mean,
                self.moving_variance,
                scale=self.gamma if self.scale else None,
                offset=self.beta if self.center else None,
                epsilon=self.epsilon,
            )
            if joined is not None:
                return joined
        return super().call(inputs, training=training, mask=mask)


@stand_in_for(keras.layers.Add, JOINING)
class FastAdd(keras.layers.Add):
    """``keras.layers.Add`` that becomes part of a convolution before it.

    See ``FastBatchNormalization``, which stands between the two.
    """

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        before = _layers_before(self)
        if isinstance(inputs, (list, tuple)) and len(inputs) == len(before) == 2 and _like(*inputs):
            for index in (1, 0):
                if not _is_joined_normalization(before[index]):
                    continue
                joined = adapter.added_in_one(inputs[index], inputs[1 - index])
                if joined is not None:
                    return joined
        return super().call(inputs)


@stand_in_for(keras.layers.Activation, JOINING)
class FastActivation(keras.layers.Activation):
    """``keras.layers.Activation`` that becomes part of the convolution before it.

    See ``FastBatchNormalization``. The activation is ``keras.activations.relu``.
    """

    def call(self, inputs: Tensor) -> Tensor:
        joined = _joined_relu(self, inputs)
        return super().call(inputs) if joined is None else joined


@stand_in_for(keras.layers.ReLU, JOINING)
class FastReLU(keras.layers.ReLU):
    """``keras.layers.ReLU`` that becomes part of the convolution before it.

    See ``FastBatchNormalization``. It has no maximum, slope or threshold.
    """

    def call(self, inputs: Tensor) -> Tensor:
        joined = _joined_relu(self, inputs)
        return super().call(inputs) if joined is None else joined


def joins_a_convolution(layer: keras.layers.Layer, model: keras.Model) -> bool:
    """Whether ``layer``, a stock layer of ``model``, whose convolutions are fast, may be part of one.

    Nothing else may read the convolution's output, or that of a layer between: it does not exist then.
    """
    if not _JOINS:
        return False
    before = _layers_before(layer)
    kind = type(layer)
    if kind is keras.layers.BatchNormalization:
        return len(before) == 1 and _scales(layer, before[0])
    if kind is keras.layers.Add:
        # Inputs of a model may have batches of different sizes.
        single = len(getattr(model, "inputs", None) or ()) == 1
        return single and len(before) == 2 and any(_is_joined_normalization(b) for b in before)
    if kind in (keras.layers.Activation, keras.layers.ReLU):
        return (
            _is_relu(layer)
            and len(before) == 1
            and (_is_joined_normalization(before[0]) or _is_alone(before[0], FastAdd))
        )
    return False


def _layers_before(layer: keras.layers.Layer) -> list[Any]:
    """The layers whose outputs ``layer`` reads, if it is called once in a functional model."""
    nodes = layer._inbound_nodes
    return [node.operation for node in nodes[0].parent_nodes] if len(nodes) == 1 else []


def _is_alone(layer: Any, kind: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether ``layer`` is of ``kind`` and its output is read once."""
    return isinstance(layer, kind) and len(layer._inbound_nodes) == len(layer._outbound_nodes) == 1


def _scales(layer: keras.layers.Layer, before: Any) -> bool:
    if not _is_alone(before, (FastConv2D, FastDepthwiseConv2D)):
        return False
    axis = {"channels_last": (-1, 3), "channels_first": (1, -3)}[before.data_format]
    return (
        before.activation in (None, keras.activations.linear)
        and before.activity_regularizer is None
        and layer.axis in axis
        and layer.compute_dtype == "float32"
    )


def _is_joined_normalization(layer: Any) -> bool:
    return _is_alone(layer, FastBatchNormalization)


def _joined_relu(layer: keras.layers.Layer, inputs: Tensor) -> Tensor | None:
    """The layer's output by the convolution before it; None where that cannot give it."""
    return adapter.activated_in_one(inputs) if _is_relu(layer) and _may_join(inputs) else None


def _is_relu(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value is None and layer.negative_slope == 0 and layer.threshold == 0
    return layer.activation is keras.activations.relu


def _may_join(*tensors: Tensor) -> bool:
    """Whether they are float32, on a backend that can join."""
    return _JOINS and all(
        keras.ops.is_tensor(x) and keras.backend.standardize_dtype(x.dtype) == "float32"
        for x in tensors
    )


def _like(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have like shapes, of which but the batch is known."""
    if not _may_join(one, other):
        return False
    shape = static_shape(one)
    return len(shape) == 4 and shape == static_shape(other) and None not in shape[1:]
