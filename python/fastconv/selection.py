"""Which algorithm computes a convolution, and how exact it must be.

The choice rests on shapes, options, instruction set and accuracy, never on the number of threads,
so that results stay the same bits for any.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fastconv import _core
from fastconv._arguments import (
    conv2d_options,
    normalize_accuracy,
    normalize_direction,
    normalize_dtype_name,
    normalize_shape,
    shown,
)

if TYPE_CHECKING:
    from typing import SupportsIndex

    from fastconv._arguments import IntegerOrPair, Padding
    from fastconv.functional import Shape

__all__ = ["explain", "get_accuracy", "set_accuracy"]


def set_accuracy(accuracy: str) -> None:
    """Bounds the rounding error of convolutions, in the whole process.

    Until then it is what the environment variable ``FASTCONV_ACCURACY`` says, else ``"default"``.

    Parameters
    ----------
    accuracy
        ``"strict"``: every result is a sum of float32 products, no algorithm that trades products
        for sums (no Winograd). ``"default"``: also algorithms whose largest error stays below 1e-5
        of the largest result. ``"fast"``: any.

    Raises
    ------
    TypeError
        If ``accuracy`` is no string.
    ValueError
        If it is not one of the three.
    """
    _core.set_accuracy(normalize_accuracy(accuracy))


def get_accuracy() -> str:
    """The accuracy in force: ``"strict"``, ``"default"`` or ``"fast"``.

    Raises
    ------
    ValueError
        If the environment variable ``FASTCONV_ACCURACY`` or ``FASTCONV_ALGORITHM`` has a wrong
        value.
    """
    return _core.accuracy()


def explain(
    input_shape: Any,
    filter_shape: Shape | None = None,
    *,
    direction: str = "fprop",
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    dtype: str = "float32",
) -> Any:
    """What a convolution of these shapes would do now, without doing it; or who serves a layer.

    Parameters
    ----------
    input_shape
        Shape of the input ``x`` of :func:`conv2d`. Or a Keras layer, alone: then the result is that
        of ``fastconv.keras.explain_layer``, which says whether our kernels compute it, and why.
    filter_shape
        Shape of the filters ``w``.
    direction
        ``"fprop"`` (:func:`conv2d`), ``"dgrad"`` (:func:`conv2d_grad_input`) or ``"wgrad"``
        (:func:`conv2d_grad_filter`).
    strides, padding, dilation_rate, groups, activation, data_format
        As for :func:`conv2d`.
    dtype
        Name of the arrays' type: ``"float32"``, ``"float16"`` or ``"bfloat16"``.

    Returns
    -------
    explanation
        ``algorithm``, the name of the one chosen (``FASTCONV_ALGORITHM`` in the environment names
        one to prefer wherever it serves); ``blocking``, its register tile and blocks in words;
        ``workspace_bytes``, the scratch memory of one call; ``flops``, the multiplications and
        additions of the direct sum; ``predicted_seconds``, by the cost model, from the multiply-add
        rate of one core, measured at the first call, and the number of threads; ``candidates``, a
        list of all that serve the problem, each with ``algorithm``, ``predicted_seconds`` and
        ``allowed``, whether it may be chosen: the accuracy in force lets it, and it is not one that
        is only there to be compared with, as the ``bf16_portable`` of bfloat16.

    Raises
    ------
    TypeError
        If an option is not of the kind ``conv2d`` takes, or a lone argument is no Keras layer.
    ValueError
        If the shapes or options do not make a convolution, or an environment variable of fastconv
        has a wrong value.
    """
    if filter_shape is None:
        if isinstance(input_shape, (tuple, list)):
            raise TypeError(
                "`filter_shape` must be given with an input shape. Received: filter_shape=None"
            )
        # Of what was not imported, which takes seconds, it can be no layer.
        if "keras" not in sys.modules:
            raise TypeError(
                "The argument must be an input shape, with a `filter_shape`, or a Keras layer. "
                f"Received: {shown(input_shape)}"
            )
        from fastconv import keras

        return keras.explain_layer(input_shape)
    return _core.explain(
        normalize_shape(input_shape, "input_shape"),
        normalize_shape(filter_shape, "filter_shape"),
        normalize_direction(direction),
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        dtype=normalize_dtype_name(dtype),
    )
