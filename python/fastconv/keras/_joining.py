"""Layers that become part of one beside them: batch normalisation, a sum of two, activations, padding.

Each of those beside a convolution reads and writes its whole output again, which for many networks
takes longer than the convolution. In graphs at inference they become part of a convolution whose
output nothing else reads. In training, and where no such convolution is before it, batch normalisation
is an operation of its own, of which the sum and the activation become part. ``accelerate()`` makes such
layers the classes below. They compute what the stock layers do, whose code serves elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._graph import have_one_batch, is_given_out, is_read_once, layers_before
from fastconv.keras._sequences import of_sequences
from fastconv.keras._stand_in import (
    JOINING,
    JOINS,
    Tensor,
    adapter,
    makes_graph,
    reason_for_stock,
    stand_in_for,
    static_shape,
)
from fastconv.keras.conv1d import FastConv1D
from fastconv.keras.conv2d import FastConv2D
from fastconv.keras.depthwise_conv1d import FastDepthwiseConv1D
from fastconv.keras.depthwise_conv2d import FastDepthwiseConv2D
from fastconv.keras.max_pooling2d import FastMaxPooling2D
from fastconv.keras.separable_conv1d import FastSeparableConv1D
from fastconv.keras.separable_conv2d import FastSeparableConv2D

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CONVOLUTIONS_2D = (FastConv2D, FastDepthwiseConv2D, FastSeparableConv2D)
_CONVOLUTIONS = (*_CONVOLUTIONS_2D, FastConv1D, FastDepthwiseConv1D, FastSeparableConv1D)

__all__ = [
    "FastActivation",
    "FastAdd",
    "FastBatchNormalization",
    "FastReLU",
    "FastZeroPadding2D",
    "joins",
]


@stand_in_for(keras.layers.BatchNormalization, JOINING)
class FastBatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization`` in few passes over its input, or in none.

    In graphs (``predict()``, ``evaluate()``, ``tf.function``) where it uses its moving statistics, it
    becomes part of the convolution before it: the filters are scaled as the kernel packs them. In
    training, and where there is no such convolution, it is fastconv's own kernel, to which the sum and
    the activation behind it are joined. Results differ from the stock layer's by rounding. Else its code
    is the stock layer's, as are arguments, weights and files.
    """

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        # `training` may be a tensor, whose value is not known yet.
        moving = training is None or training is False or not self.trainable
        gamma = self.gamma if self.scale else None
        beta = self.beta if self.center else None
        if training is True and not moving and mask is None and self._has_kernel(inputs):
            return self._by_own_moments(inputs, gamma, beta)
        if (
            moving
            and mask is None
            and _may_join(inputs)
            and _scales(self)
            and not is_given_out(layers_before(self)[0])
        ):
            joined = adapter.normalized_in_one(
                inputs,
                self.moving_mean,
                self.moving_variance,
                scale=gamma,
                offset=beta,
                epsilon=self.epsilon,
            )
            if joined is not None:
                return joined
        if moving and mask is None and self._has_kernel(inputs):
            moments = self.moving_mean, self.moving_variance
            return _of_images(
                inputs,
                lambda images: adapter.batch_norm_inference(
                    images, *moments, gamma, beta, epsilon=self.epsilon
                ),
            )
        return super().call(inputs, training=training, mask=mask)

    def _by_own_moments(self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """The normalised inputs; the moving moments move."""

        def normalize(images: Tensor) -> Tensor:
            y, mean, variance = adapter.batch_norm(images, gamma, beta, epsilon=self.epsilon)
            for moment, average in ((mean, self.moving_mean), (variance, self.moving_variance)):
                average.assign(average * self.momentum + moment * (1.0 - self.momentum))
            return y

        return _of_images(inputs, normalize)

    def _has_kernel(self, inputs: Tensor) -> bool:
        """Whether fastconv's kernel can normalise ``inputs``."""
        if not (JOINS and _is_plain(self) and keras.ops.is_tensor(inputs)):
            return False
        rank = len(static_shape(inputs))
        return (
            rank in (3, 4)
            # Without it, what is not finite comes out otherwise.
            and isinstance(self.epsilon, (int, float))
            and self.epsilon > 0
            and self.axis in (-1, rank - 1)
            and reason_for_stock(inputs, self.compute_dtype, rank) is None
            and not adapter.inside_xla()
        )


def _of_images(inputs: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``normalize`` makes of images, of those or of sequences, channels last."""
    if len(static_shape(inputs)) == 4:
        return normalize(inputs)
    return of_sequences(inputs, "channels_last", normalize)


@stand_in_for(keras.layers.Add, JOINING)
class FastAdd(keras.layers.Add):
    """``keras.layers.Add`` that becomes part of a convolution, or batch normalisation, before it.

    See ``FastBatchNormalization``, which may stand between the two.
    """

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        before = layers_before(self)
        if (
            isinstance(inputs, (list, tuple))
            and len(inputs) == len(before) == 2
            and _like(*inputs)
            and have_one_batch(self)
        ):
            for index in (1, 0):
                if not _takes_sum(before[index]) or is_given_out(before[index]):
                    continue
                joined = adapter.added_in_one(inputs[index], inputs[1 - index])
                if joined is not None:
                    return joined
        return super().call(inputs)


@stand_in_for(keras.layers.Activation, JOINING)
class FastActivation(keras.layers.Activation):
    """``keras.layers.Activation`` that becomes part of what is before it.

    See ``FastBatchNormalization``. The activation is ``relu``, ``relu6``, ``silu`` or ``hard_silu``
    of ``keras.activations``.
    """

    def call(self, inputs: Tensor) -> Tensor:
        joined = _joined_activation(self, inputs)
        return super().call(inputs) if joined is None else joined


@stand_in_for(keras.layers.ReLU, JOINING)
class FastReLU(keras.layers.ReLU):
    """``keras.layers.ReLU`` that becomes part of what is before it.

    See ``FastBatchNormalization``. It has no slope or threshold, and no maximum but 6.
    """

    def call(self, inputs: Tensor) -> Tensor:
        joined = _joined_activation(self, inputs)
        return super().call(inputs) if joined is None else joined


@stand_in_for(keras.layers.ZeroPadding2D, JOINING)
class FastZeroPadding2D(keras.layers.ZeroPadding2D):
    """``keras.layers.ZeroPadding2D`` that becomes the padding of the convolution behind it.

    In graphs, in training too, the convolution reads what was to be padded, if it has no padding of its
    own. So does a max-pooling where that comes of a ReLU, below which there is no zero to find.
    """

    def call(self, inputs: Tensor) -> Tensor:
        outputs = super().call(inputs)
        # What Keras takes for an integer, an operation may refuse.
        plain = all(type(side) is int for sides in self.padding for side in sides)
        if makes_graph() and plain and is_read_once(self) and not is_given_out(self):
            adapter.mark_padded(outputs, inputs, self.padding, self.data_format)
        return outputs


def joins(layer: keras.layers.Layer) -> bool:
    """Whether ``layer``, a stock layer of a model whose convolutions are fast, is made faster.

    Nothing else may read the output of the layer it joins: that output does not exist then.
    """
    if not JOINS:
        return False
    before = layers_before(layer)
    kind = type(layer)
    if kind is keras.layers.BatchNormalization:
        return _is_plain(layer) or _scales(layer)
    if kind is keras.layers.Add:
        return len(before) == 2 and have_one_batch(layer) and any(_takes_sum(b) for b in before)
    if kind in (keras.layers.Activation, keras.layers.ReLU):
        return (
            _activation_of(layer) is not None
            and len(before) == 1
            and (_is_joined_normalization(before[0]) or _is_alone(before[0], FastAdd))
        )
    if kind is keras.layers.ZeroPadding2D:
        behind = [node.operation for node in layer._outbound_nodes]
        return (
            _is_alone(layer, kind)
            and isinstance(behind[0], (*_CONVOLUTIONS_2D, FastMaxPooling2D))
            and behind[0].padding == "valid"
            and behind[0].data_format == layer.data_format
        )
    return False


def _is_alone(layer: Any, kind: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether ``layer`` is of ``kind`` and its output is read once."""
    return isinstance(layer, kind) and is_read_once(layer)


def _is_plain(layer: Any) -> bool:
    """Whether a batch normalisation is one that the kernel can compute, channels last.

    It is of images or sequences, as far as is known.
    """
    ndim = getattr(layer.input_spec, "ndim", None)
    ranks = (3, 4) if ndim is None else (ndim,)
    return (
        any(rank in (3, 4) and layer.axis in (-1, rank - 1) for rank in ranks)
        and not getattr(layer, "synchronized", False)
        and not getattr(layer, "renorm", False)
        and layer.compute_dtype == "float32"
    )


def _scales(layer: keras.layers.Layer) -> bool:
    """Whether a batch normalisation scales what a convolution gives to it alone."""
    befores = layers_before(layer)
    if len(befores) != 1 or not _is_linear_convolution(befores[0]):
        return False
    last = befores[0].rank + 1
    axis = {"channels_last": (-1, last), "channels_first": (1, -last)}[befores[0].data_format]
    return layer.axis in axis and layer.compute_dtype == "float32"


def _is_linear_convolution(layer: Any) -> bool:
    """Whether it is a convolution without an activation whose output is read once."""
    return (
        _is_alone(layer, _CONVOLUTIONS)
        and layer.activation in (None, keras.activations.linear)
        and layer.activity_regularizer is None
    )


def _is_joined_normalization(layer: Any) -> bool:
    return _is_alone(layer, FastBatchNormalization)


def _takes_sum(layer: Any) -> bool:
    return _is_joined_normalization(layer) or _is_linear_convolution(layer)


def _joined_activation(layer: keras.layers.Layer, inputs: Tensor) -> Tensor | None:
    """The layer's output by what is before it; None where that cannot give it."""
    activation = _activation_of(layer)
    before = layers_before(layer)
    if activation is None or not _may_join(inputs) or len(before) != 1:
        return None
    if not is_read_once(before[0]) or is_given_out(before[0]):
        return None
    return adapter.activated_in_one(inputs, activation)


def _activation_of(layer: keras.layers.Layer) -> str | None:
    """Which activation that an operation may compute ``layer`` is; None if none."""
    if isinstance(layer, keras.layers.ReLU):
        if layer.negative_slope != 0 or layer.threshold != 0:
            return None
        return {None: "relu", 6: "relu6"}.get(layer.max_value)
    known = ("relu", "relu6", "silu", "hard_silu")
    names = (name for name in known if layer.activation is getattr(keras.activations, name))
    return next(names, None)


def _may_join(*tensors: Tensor) -> bool:
    """Whether they are float32, in a graph in which layers can be joined."""
    return makes_graph() and all(
        keras.ops.is_tensor(x) and keras.backend.standardize_dtype(x.dtype) == "float32"
        for x in tensors
    )


def _like(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have like shapes, of which but the batch is known."""
    if not _may_join(one, other):
        return False
    shape = static_shape(one)
    return len(shape) in (3, 4) and shape == static_shape(other) and None not in shape[1:]
