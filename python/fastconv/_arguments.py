"""Normalises the options that every door takes: Keras's spellings in, plain integers and names out.

Only kinds are checked here, and what no 64-bit integer can hold; whether a value makes sense for
its operation is decided once, in C++, where the problem is described.

NumPy is imported where it is needed: it takes ten times as long to import as all of fastconv.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from typing import SupportsIndex

IntegerOrPair: TypeAlias = "SupportsIndex | Sequence[SupportsIndex]"
Sides: TypeAlias = "tuple[int, int, int, int]"
Padding: TypeAlias = "str | Sequence[Sequence[SupportsIndex]]"

_NO_SIDES: Sides = (0, 0, 0, 0)


def shown(value: Any) -> str:
    """``value`` as an error message shows it: in a line, of a large array the shape alone."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype") and (len(shape) > 1 or sum(shape) > 16):
        return f"<{type(value).__name__} of shape {tuple(shape)}>"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def normalize_integer(value: Any, name: str) -> int:
    """``value`` as an int. Takes NumPy's integers too, but no bool."""
    integer = _as_integer(value)
    if integer is None:
        raise TypeError(f"`{name}` must be an integer. Received: {name}={shown(value)}")
    return _fit(integer, name, value)


def normalize_pair(value: Any, name: str) -> tuple[int, int]:
    """The values for height and width: an integer stands for both."""
    integer = _as_integer(value)
    if integer is not None:
        integer = _fit(integer, name, value)
        return integer, integer
    rule = f"`{name}` must be an integer or a pair of integers"
    items = _as_integers(value, name, rule, value)
    if len(items) != 2:
        raise ValueError(f"{rule}. Received: {name}={shown(value)}")
    return items[0], items[1]


def normalize_shape(value: Any, name: str) -> tuple[int, int, int, int]:
    """The shape of a 4-dimensional array."""
    rule = f"`{name}` must be four integers that are not negative"
    shape = _as_integers(value, name, rule, value)
    if len(shape) != 4 or min(shape) < 0:
        raise ValueError(f"{rule}. Received: {name}={shown(value)}")
    return shape[0], shape[1], shape[2], shape[3]


def normalize_padding(padding: Any) -> tuple[str, Sides]:
    """The kind, ``"valid"``, ``"same"`` or ``"explicit"``, and (top, bottom, left, right).

    The sides are those of an explicit padding; else they are 0.
    """
    if type(padding) is str and padding in ("valid", "same"):
        return padding, _NO_SIDES
    rule = "`padding` must be 'valid', 'same' or ((top, bottom), (left, right))"
    if isinstance(padding, str):
        kind = padding.lower()
        if kind not in ("valid", "same"):
            raise ValueError(f"{rule}. Received: padding={shown(padding)}")
        return kind, _NO_SIDES
    if not _is_sequence(padding):
        raise TypeError(f"{rule}. Received: padding={shown(padding)}")
    axes = [_as_integers(sides, "padding", f"{rule}, of integers", padding) for sides in padding]
    if [len(sides) for sides in axes] != [2, 2]:
        raise ValueError(f"{rule}. Received: padding={shown(padding)}")
    (top, bottom), (left, right) = axes
    return "explicit", (top, bottom, left, right)


def normalize_data_format(data_format: Any) -> str:
    """``"channels_last"`` or ``"channels_first"``."""
    return _choose(data_format, "data_format", ("channels_last", "channels_first"))


def normalize_activation(activation: Any) -> str:
    """``"linear"``, for which None stands too, or ``"relu"``."""
    if activation is None:
        return "linear"
    return _choose(activation, "activation", ("linear", "relu"), also="None, ")


def normalize_accuracy(accuracy: Any) -> str:
    """``"strict"``, ``"default"`` or ``"fast"``."""
    return _choose(accuracy, "accuracy", ("strict", "default", "fast"))


def normalize_direction(direction: Any) -> str:
    """``"fprop"``, ``"dgrad"`` or ``"wgrad"``."""
    return _choose(direction, "direction", ("fprop", "dgrad", "wgrad"))


def normalize_dtype_name(dtype: Any) -> str:
    """``"float32"``, ``"float16"`` or ``"bfloat16"``."""
    return _choose(dtype, "dtype", ("float32", "float16", "bfloat16"))


def normalize_algorithm(algorithm: Any) -> str | None:
    """A name, or None for the selector's choice. Which names there are is known in C++."""
    if algorithm is None or isinstance(algorithm, str):
        return algorithm
    raise TypeError(
        f"`algorithm` must be None or the name of an algorithm. Received: algorithm={shown(algorithm)}"
    )


def conv2d_options(
    strides: Any, padding: Any, dilation_rate: Any, groups: Any, activation: Any, data_format: Any
) -> dict[str, Any]:
    return {
        "strides": normalize_pair(strides, "strides"),
        "padding": normalize_padding(padding),
        "dilation_rate": normalize_pair(dilation_rate, "dilation_rate"),
        "groups": normalize_integer(groups, "groups"),
        "activation": normalize_activation(activation),
        "data_format": normalize_data_format(data_format),
    }


def _choose(value: Any, name: str, choices: tuple[str, ...], also: str = "") -> str:
    if type(value) is str and value in choices:
        return value
    rule = f"`{name}` must be one of {also}{', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"{rule}. Received: {name}={shown(value)}")
    if value not in choices:
        raise ValueError(f"{rule}. Received: {name}={shown(value)}")
    return value


def _as_integer(value: Any) -> int | None:
    """``value`` as an int; None where it is no integer. A bool is a truth, not a number."""
    if type(value) is int:
        return value
    import numpy as np

    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _as_integers(value: Any, name: str, rule: str, received: Any) -> list[int]:
    """The items of the sequence ``value``, which is ``received`` or a part of it."""
    if type(value) is tuple and set(map(type, value)) == {int}:  # as nearly always
        return [_fit(item, name, received) for item in value]
    items = [_as_integer(item) for item in value] if _is_sequence(value) else [None]
    integers = [item for item in items if item is not None]
    if len(integers) != len(items):
        raise TypeError(f"{rule}. Received: {name}={shown(received)}")
    return [_fit(integer, name, received) for integer in integers]


def _is_sequence(value: Any) -> bool:
    if isinstance(value, Sequence):
        return not isinstance(value, (str, bytes))
    import numpy as np

    return isinstance(value, np.ndarray) and value.ndim > 0


def _fit(integer: int, name: str, received: Any) -> int:
    if not -(2**63) <= integer < 2**63:
        raise ValueError(f"`{name}` must fit 64-bit integers. Received: {name}={shown(received)}")
    return integer
