"""What the fast layers share: standing in for a stock layer, and leaving a call to it."""

from __future__ import annotations

import importlib
import logging
import numbers
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import keras
from keras.src.backend.common import global_state

# By the backend's name, the module that brings the operations to its tensors.
_ADAPTERS = {
    "jax": "fastconv.adapters.jax",
    "tensorflow": "fastconv.adapters.tensorflow",
    "torch": "fastconv.adapters.torch",
}


def _load_adapter(backend: str) -> tuple[Any, str | None]:
    """The backend's adapter, and why there is none; one of them is None."""
    if backend not in _ADAPTERS:
        return None, f"the Keras backend is {backend}, not one of {', '.join(sorted(_ADAPTERS))}"
    try:
        return importlib.import_module(_ADAPTERS[backend]), None
    except ModuleNotFoundError:
        raise  # which Keras would have told
    except Exception as error:
        if backend == "tensorflow":
            raise
        return None, f"fastconv cannot work with this {backend}: {type(error).__name__}: {error}"


adapter, _reason_without_adapter = _load_adapter(keras.backend.backend())
JOINS = keras.backend.backend() == "tensorflow"  # whose graphs can still be changed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from keras.layers import Layer as _Layer
else:
    _Layer = object  # what the mixins are mixed into

__all__ = [
    "JOINING",
    "JOINS",
    "STAND_INS",
    "JitWhereXlaServes",
    "Tensor",
    "adapter",
    "has_empty_output",
    "makes_graph",
    "reason_against_arguments",
    "reason_for_stock",
    "reason_for_stock_always",
    "reason_last_told",
    "stand_in_for",
    "static_shape",
    "tell",
    "trains",
]

Class = TypeVar("Class", bound=type)
Tensor: TypeAlias = Any  # of the backend's

_logger = logging.getLogger("fastconv")
# layer: the reason it was last heard to use the stock code
_told: weakref.WeakKeyDictionary[keras.layers.Layer, str] = weakref.WeakKeyDictionary()

# Arguments of the layers that are an integer or a tuple of them.
_INTEGERS = (
    "filters",
    "depth_multiplier",
    "groups",
    "kernel_size",
    "pool_size",
    "strides",
    "dilation_rate",
    "output_padding",
)

STAND_INS: dict[type[Any], type[Any]] = {}  # stock class: the fast class that stands in for it
JOINING: dict[type[Any], type[Any]] = {}  # likewise, of layers that become part of a convolution


def stand_in_for(
    stock: type[Any], table: dict[type[Any], type[Any]] = STAND_INS
) -> Callable[[Class], Class]:
    """Class decorator: makes the class take ``stock``'s place in models and their files.

    Keras derives from a class's ``__name__`` the default names of layers and the keys of
    ``.weights.h5`` and ``.keras`` files. The class takes over that of the stock layer, so that both
    give the same names and weights can be loaded from one into the other. Its own name remains its
    ``__qualname__`` and the name it is registered by. ``accelerate()`` and ``patch()`` know it
    from now on, or whoever reads ``table``. Its ``call()`` must have the parameters of the stock layer's,
    for ``accelerate()`` gives the class to layers of which Keras has noted them.
    """

    def decorate(cls: Class) -> Class:
        keras.saving.register_keras_serializable(package="fastconv", name=cls.__name__)(cls)
        cls.__name__ = stock.__name__
        table[stock] = cls
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
            adapter is None or bool(adapter.supports_jit())
        )

    def __setattr__(self, name: str, value: object) -> None:
        # What the layer itself says is kept for when it becomes a stock layer again. Keras's own
        # __setattr__ would ask the property at once, for each layer that is made.
        if name == "supports_jit":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


def reason_for_stock(inputs: Tensor, compute_dtype: str, rank: int = 4) -> str | None:
    """Why the kernels cannot take these inputs, whatever the layer's options; None if they can."""
    if adapter is None:
        return _reason_without_adapter
    reason: str | None = adapter.reason_against_kind(inputs)
    if reason is not None:
        return reason
    dtype = keras.backend.standardize_dtype(inputs.dtype)
    served = adapter.dtypes()
    if compute_dtype != dtype or dtype not in served:
        return f"the data type is not {_listed(served)}: {dtype}, computed in {compute_dtype}"
    shape = static_shape(inputs)
    if len(shape) != rank:
        return f"the input's rank is not {rank}: {inputs.shape}"
    return cast("str | None", adapter.reason_against_place(inputs))


def reason_against_arguments(layer: keras.layers.Layer) -> str | None:
    """Why the ops cannot take the layer's own arguments as they are; None if they can.

    Keras keeps what it was given, and TensorFlow takes a 2.0 or a True for an integer here and
    refuses it there.
    """
    for name in _INTEGERS:
        value = getattr(layer, name, None)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(isinstance(v, numbers.Integral) and not isinstance(v, bool) for v in values):
            return f"`{name}` is no integer, or not of integers: {value!r}"
    if not isinstance(getattr(layer, "padding", "valid"), str):
        return f"`padding` is no word: {layer.padding!r}"
    return None


def reason_for_stock_always(layer: keras.layers.Layer) -> str | None:
    """Why the kernels serve no input of ``layer``, as far as it is known; None if they may."""
    if adapter is None:
        return _reason_without_adapter
    if layer.compute_dtype not in (served := adapter.dtypes()):
        return (
            f"the data type is not {_listed(served)}: the layer computes in {layer.compute_dtype}"
        )
    return cast("str | None", adapter.reason_against_all()) or reason_against_arguments(layer)


def makes_graph() -> bool:
    """Whether layers called now become part of a graph in which they can still be joined."""
    return JOINS and bool(adapter.makes_graph())


def trains() -> bool:
    """Whether the layer that is called now is called with ``training=True``.

    Pooling layers and convolutions have no such argument, and Keras gives ``call()`` what it takes. One
    that took more than the stock layer's could not be rematerialised as that is.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    # It may be a tensor, whose value is not known yet.
    return getattr(context, "training", None) is True


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def static_shape(inputs: Tensor) -> tuple[int | None, ...]:
    """The shape of a tensor of the backend's, None where unknown; () if not even the rank is."""
    shape = inputs.shape
    if hasattr(shape, "as_list"):  # TensorFlow's
        return () if shape.rank is None else tuple(shape.as_list())
    return tuple(shape)


def reason_last_told(layer: keras.layers.Layer) -> str | None:
    """The reason for which ``layer`` was last heard to use the stock code; None if it never was."""
    return _told.get(layer)


def tell(layer: keras.layers.Layer, reason: str) -> None:
    """Logs why ``layer`` uses the stock code, once for as long as the reason stays the same."""
    if _told.get(layer) == reason:
        return
    _told[layer] = reason
    _logger.debug("%s %r uses the stock code: %s", type(layer).__qualname__, layer.name, reason)


def has_empty_output(inputs: Tensor, window: Sequence[int], padding: str, data_format: str) -> bool:
    """Whether no output pixel comes of ``inputs``, as far as is known: the stock layer refuses it.

    ``window`` is the height and width, or the length, that one output pixel sees.
    """
    shape = static_shape(inputs)
    if 0 in shape[1:]:
        return True
    sizes = shape[2:] if data_format == "channels_first" else shape[1:-1]
    return padding == "valid" and any(
        size is not None and size < extent for size, extent in zip(sizes, window, strict=True)
    )
