"""What the fast layers share: standing in for a stock layer, and leaving a call to it."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import keras

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from fastconv.adapters import tensorflow as adapter
    from fastconv.adapters import xla
else:
    tf = adapter = xla = None

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from keras.layers import Layer as _Layer
else:
    _Layer = object  # what the mixins are mixed into

__all__ = [
    "STAND_INS",
    "JitWhereXlaServes",
    "adapter",
    "has_empty_output",
    "reason_for_stock",
    "reason_for_stock_always",
    "reason_last_told",
    "stand_in_for",
    "tell",
    "tf",
    "xla",
]

Class = TypeVar("Class", bound=type)

_logger = logging.getLogger("fastconv")
# layer: the reason it was last heard to use the stock code
_told: weakref.WeakKeyDictionary[keras.layers.Layer, str] = weakref.WeakKeyDictionary()

STAND_INS: dict[type[Any], type[Any]] = {}  # stock class: the fast class that stands in for it


def stand_in_for(stock: type[Any]) -> Callable[[Class], Class]:
    """Class decorator: makes the class take ``stock``'s place in models and their files.

    Keras derives from a class's ``__name__`` the default names of layers and the keys of
    ``.weights.h5`` and ``.keras`` files. The class takes over that of the stock layer, so that both
    give the same names and weights can be loaded from one into the other. Its own name remains its
    ``__qualname__`` and the name it is registered by. ``accelerate()`` and ``patch()`` know it
    from now on.
    """

    def decorate(cls: Class) -> Class:
        keras.saving.register_keras_serializable(package="fastconv", name=cls.__name__)(cls)
        cls.__name__ = stock.__name__
        STAND_INS[stock] = cls
        return cls

    return decorate


class JitWhereXlaServes(_Layer):
    """Mixin: where our kernels cannot run inside XLA, has Keras run models with the layer outside.

    A property and not an attribute set in ``__init__``, so that the stock layer's ``__init__``
    remains the class's own, with the signature that Keras inspects and users read.
    """

    @property
    def supports_jit(self) -> bool:
        return self.__dict__.get("supports_jit", True) and (
            adapter is None or bool(_gpus()) or xla.available()
        )

    def __setattr__(self, name: str, value: object) -> None:
        # What the layer itself says is kept for when it becomes a stock layer again. Keras's own
        # __setattr__ would ask the property at once, for each layer that is made.
        if name == "supports_jit":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


def reason_for_stock(inputs: tf.Tensor, compute_dtype: str, rank: int = 4) -> str | None:
    """Why the kernels cannot take these inputs, whatever the layer's options; None if they can."""
    reason = _reason_of_the_backend()
    if reason is not None:
        return reason
    if not isinstance(inputs, tf.Tensor):
        return f"the input is a {type(inputs).__name__}, not a dense tensor of TensorFlow's"
    if compute_dtype != "float32" or inputs.dtype != tf.float32:
        return f"the data type is not float32: {inputs.dtype.name}, computed in {compute_dtype}"
    if inputs.shape.rank != rank:
        return f"the input's rank is not {rank}: {inputs.shape}"
    if _gpus():
        return "TensorFlow sees a GPU, and the kernels are for CPUs"
    if adapter.inside_xla() and not xla.available():
        return (
            "the graph is compiled by XLA, inside which the kernels cannot run here: "
            f"{xla.reason_unavailable()}"
        )
    return None


def reason_for_stock_always(layer: keras.layers.Layer) -> str | None:
    """Why the kernels serve no input of ``layer``, as far as it is known; None if they may."""
    reason = _reason_of_the_backend()
    if reason is not None:
        return reason
    if layer.compute_dtype != "float32":
        return f"the data type is not float32: the layer computes in {layer.compute_dtype}"
    if _gpus():
        return "TensorFlow sees a GPU, and the kernels are for CPUs"
    return None


def reason_last_told(layer: keras.layers.Layer) -> str | None:
    """The reason for which ``layer`` was last heard to use the stock code; None if it never was."""
    return _told.get(layer)


def tell(layer: keras.layers.Layer, reason: str) -> None:
    """Logs why ``layer`` uses the stock code, once for as long as the reason stays the same."""
    if _told.get(layer) == reason:
        return
    _told[layer] = reason
    _logger.debug("%s %r uses the stock code: %s", type(layer).__qualname__, layer.name, reason)


def has_empty_output(
    inputs: tf.Tensor, window: Sequence[int], padding: str, data_format: str
) -> bool:
    """Whether no output pixel comes of ``inputs``, as far as is known: the stock layer refuses it.

    ``window`` is the height and width, or the length, that one output pixel sees.
    """
    shape = inputs.shape.as_list()
    if 0 in shape[1:]:
        return True
    sizes = shape[2:] if data_format == "channels_first" else shape[1:-1]
    return padding == "valid" and any(
        size is not None and size < extent for size, extent in zip(sizes, window, strict=True)
    )


def _reason_of_the_backend() -> str | None:
    if adapter is None:
        return f"the Keras backend is {keras.backend.backend()}, not tensorflow"
    return None


def _gpus() -> list[Any]:
    gpus: list[Any] = tf.config.get_visible_devices("GPU")
    return gpus
