"""Sequences, which to the kernels are images of height 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras

from fastconv.keras._stand_in import JOINS, adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastconv.keras._stand_in import Tensor


def height_of_sequences(rank: int) -> tuple[int, ...]:
    """What stands before a 1-D layer's sizes to make them an image's; nothing for a 2-D layer."""
    return (1,) if rank == 1 else ()


def of_sequences(inputs: Tensor, data_format: str, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``compute`` makes of images of height 1, of sequences and to sequences."""
    height_axis = 2 if data_format == "channels_first" else 1
    outputs = compute(keras.ops.expand_dims(inputs, height_axis))
    if JOINS:  # and may still do so
        return adapter.squeezed(outputs, height_axis)
    return keras.ops.squeeze(outputs, height_axis)
