"""``keras.layers.Conv2D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._convolution import activated, epilogue, geometry, leaves_to_stock
from fastconv.keras._int8 import QuantizesToInt8
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for


@stand_in_for(keras.layers.Conv2D)
class FastConv2D(QuantizesToInt8, JitWhereXlaServes, keras.layers.Conv2D):
    """A 2-D convolution layer: ``keras.layers.Conv2D``, computed by fastconv's kernels.

    Arguments, defaults, names, weights, errors and files are those of ``keras.layers.Conv2D``.
    The bias is part of the convolution op, and so is the activation where it is
    ``keras.activations.relu``. Inputs the kernels do not serve go to the stock layer's code, and
    the logger ``fastconv`` tells why at level DEBUG.

    ``quantize("int8")`` makes it compute in int8, for inference, as ``keras.layers.Dense`` does; see
    there.

    Input shape: float32 of (batch, height, width, channels), or (batch, channels, height, width)
    with ``data_format="channels_first"``.

    Output shape: (batch, new_height, new_width, filters), or (batch, filters, new_height,
    new_width).
    """

    def call(self, inputs: Tensor) -> Tensor:
        # A subclass may override convolution_op, as keras.layers.Conv2D invites it to.
        if not _is_own_convolution_op(self) or leaves_to_stock(self, inputs):
            return super().call(inputs)
        return activated(self, self._convolve(inputs, self.kernel, **epilogue(self)))

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().convolution_op(inputs, kernel)
        return self._convolve(inputs, kernel)

    def _convolve(self, inputs: Tensor, kernel: Tensor, **options: Any) -> Tensor:
        return adapter.conv2d(inputs, kernel, **geometry(self), **options)


if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


def _is_own_convolution_op(layer: FastConv2D) -> bool:
    return type(layer).convolution_op is FastConv2D.convolution_op
