"""``keras.layers.Conv1D`` on fastconv's kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._convolution import activated, epilogue, geometry, leaves_to_stock
from fastconv.keras._sequences import of_sequences
from fastconv.keras._stand_in import JitWhereXlaServes, adapter, stand_in_for

if TYPE_CHECKING:
    from fastconv.keras._stand_in import Tensor


@stand_in_for(keras.layers.Conv1D)
class FastConv1D(JitWhereXlaServes, keras.layers.Conv1D):
    """A 1-D convolution layer: ``keras.layers.Conv1D``, computed by fastconv's kernels.

    A sequence is an image of height 1 to them; causal padding is part of the op. Arguments,
    defaults, names, weights, errors and files are those of ``keras.layers.Conv1D``, and so is the
    code for inputs that the kernels do not serve: see ``FastConv2D``.

    Input shape: float32 of (batch, steps, channels), or (batch, channels, steps) with
    ``data_format="channels_first"``.

    Output shape: (batch, new_steps, filters), or (batch, filters, new_steps).
    """

    def call(self, inputs: Tensor) -> Tensor:
        if leaves_to_stock(self, inputs):
            return super().call(inputs)
        padding = self.padding
        if padding == "causal":
            padding = ((0, 0), (self.dilation_rate[0] * (self.kernel_size[0] - 1), 0))

        def convolve(images: Tensor) -> Tensor:
            return adapter.conv2d(
                images,
                keras.ops.expand_dims(self.kernel, 0),
                **geometry(self) | {"padding": padding},
                **epilogue(self),
            )

        return activated(self, of_sequences(inputs, self.data_format, convolve))
