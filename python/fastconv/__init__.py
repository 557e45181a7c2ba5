"""fastconv: fast convolution and pooling for Keras and NumPy.

The functions of this package work on NumPy arrays, and on arrays on a GPU (``fastconv.cuda``);
``fastconv.jax`` and ``fastconv.torch`` have them for JAX's arrays and PyTorch's tensors, and
``fastconv.keras`` holds the Keras layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastconv._core import __version__
from fastconv.functional import (
    avg_pool2d,
    avg_pool2d_grad,
    conv2d,
    conv2d_grad_filter,
    conv2d_grad_input,
    conv2d_int8,
    conv2d_max_pool2d,
    conv2d_max_pool2d_grad,
    get_num_threads,
    info,
    max_pool2d,
    max_pool2d_grad,
    quantize_filter,
    set_num_threads,
)
from fastconv.packed_filter import PackedFilter
from fastconv.selection import explain, get_accuracy, set_accuracy

if TYPE_CHECKING:  # what __getattr__ imports when it is asked for
    from fastconv import cuda as cuda
    from fastconv import keras as keras
    from fastconv.keras import accelerate as accelerate
    from fastconv.keras import restore as restore

__all__ = [
    "PackedFilter",
    "__version__",
    "avg_pool2d",
    "avg_pool2d_grad",
    "conv2d",
    "conv2d_grad_filter",
    "conv2d_grad_input",
    "conv2d_int8",
    "conv2d_max_pool2d",
    "conv2d_max_pool2d_grad",
    "explain",
    "get_accuracy",
    "get_num_threads",
    "info",
    "max_pool2d",
    "max_pool2d_grad",
    "quantize_filter",
    "set_accuracy",
    "set_num_threads",
]

_OF_KERAS = ("accelerate", "restore")  # names of fastconv.keras that are ours as well
_MODULES = ("cuda", "jax", "keras", "torch")
# What each of the modules needs that may not be installed, and the extra that brings it.
_NEEDS = {
    "jax": (("jax", "jaxlib"), "jax", "JAX"),
    "keras": (("keras", "tensorflow"), "tensorflow", "TensorFlow and Keras"),
    "torch": (("torch",), "torch", "PyTorch"),
}


def __getattr__(name: str) -> Any:
    # Frameworks take seconds to import: only those who use them pay for it.
    module = "keras" if name in _OF_KERAS else name
    if module not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        loaded = importlib.import_module(f"fastconv.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        packages, extra, needed = _NEEDS.get(module, ((), "", ""))
        if missing not in packages:
            raise
        raise ImportError(
            f"fastconv.{module} needs {needed}, and {error.name} is not installed. "
            f"Install {'both' if ' and ' in needed else 'it'} with: pip install 'fastconv[{extra}]'"
        ) from error
    return loaded if name == module else getattr(loaded, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_OF_KERAS})
