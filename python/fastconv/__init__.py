"""fastconv: fast convolution and pooling for Keras and NumPy.

The functions of this package work on NumPy arrays, and on arrays on a GPU (``fastconv.cuda``);
``fastconv.keras`` holds the Keras layers and needs TensorFlow.
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
    conv2d_max_pool2d,
    conv2d_max_pool2d_grad,
    get_num_threads,
    info,
    max_pool2d,
    max_pool2d_grad,
    set_num_threads,
)
from fastconv.selection import explain, get_accuracy, set_accuracy

if TYPE_CHECKING:  # what __getattr__ imports when it is asked for
    from fastconv import cuda as cuda
    from fastconv import keras as keras
    from fastconv.keras import accelerate as accelerate
    from fastconv.keras import restore as restore

__all__ = [
    "__version__",
    "avg_pool2d",
    "avg_pool2d_grad",
    "conv2d",
    "conv2d_grad_filter",
    "conv2d_grad_input",
    "conv2d_max_pool2d",
    "conv2d_max_pool2d_grad",
    "explain",
    "get_accuracy",
    "get_num_threads",
    "info",
    "max_pool2d",
    "max_pool2d_grad",
    "set_accuracy",
    "set_num_threads",
]

_OF_KERAS = ("accelerate", "restore")  # names of fastconv.keras that are ours as well


def __getattr__(name: str) -> Any:
    if name == "cuda":
        return importlib.import_module("fastconv.cuda")
    # TensorFlow takes seconds to import: only those who use the layers pay for it.
    if name != "keras" and name not in _OF_KERAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        layers = importlib.import_module("fastconv.keras")
        return layers if name == "keras" else getattr(layers, name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("keras", "tensorflow"):
            raise
        raise ImportError(
            f"fastconv.keras needs TensorFlow and Keras, and {error.name} is not installed. "
            "Install both with: pip install 'fastconv[tensorflow]'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), "cuda", "keras", *_OF_KERAS})
