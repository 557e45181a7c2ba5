"""The functions of fastconv on NVIDIA GPUs.

Arrays are those of any library that hands device memory over by DLPack or
``__cuda_array_interface__`` (CuPy, PyTorch, JAX), C-contiguous, of float32, float16 or bfloat16;
results are a :class:`DeviceArray`, which those libraries take the same way. Sums are of float32
whatever the type. The functions have the names, arguments and messages of fastconv's own, which take
such arrays too; those here take ``stream`` besides.

Everything is enqueued on a stream and nothing waits for it but ``DeviceArray.numpy()`` and
``Stream.synchronize()``. What other streams have been given to do with the inputs comes first, and what
reads ``out`` in its own stream's order finds the result. Only of an ``out`` that is handed over by the
methods of DLPack nobody knows that stream: its owner must wait for the one that computes.

They have run on an H200; in the tests the kernels run on an emulator.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv import _core, functional
from fastconv._arguments import (
    conv2d_options,
    normalize_algorithm,
    normalize_direction,
    normalize_dtype_name,
    normalize_integer,
    normalize_shape,
    shown,
)
from fastconv._core.cuda import CudaError, DeviceArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastconv._arguments import IntegerOrPair, Padding

__all__ = [
    "CudaError",
    "DeviceArray",
    "Stream",
    "array",
    "asarray",
    "avg_pool2d",
    "avg_pool2d_grad",
    "conv2d",
    "conv2d_grad_filter",
    "conv2d_grad_input",
    "conv2d_max_pool2d",
    "conv2d_max_pool2d_grad",
    "explain",
    "get_float32_math",
    "is_available",
    "max_pool2d",
    "max_pool2d_grad",
    "set_float32_math",
    "using_stream",
]


def is_available() -> bool:
    """Whether there is a GPU to compute on; ``fastconv.info()["cuda"]`` says why not."""
    return bool(_core.cuda.availability()["available"])


def set_float32_math(math: str) -> None:
    """Sets what products of float32 are computed in, in the whole process.

    Parameters
    ----------
    math
        ``"ieee"``: float32, until this function is called. ``"tf32"``: tensor cores may round the
        factors to 10 bits of mantissa, from compute capability 8.0 on; relative errors of about
        1e-3. float16 and bfloat16 are not concerned.

    Raises
    ------
    TypeError
        If ``math`` is no string.
    ValueError
        If it is none of the two.
    """
    if not isinstance(math, str):
        raise TypeError(f"`math` must be one of 'ieee', 'tf32'. Received: math={math!r}")
    _core.cuda.set_float32_math(math)


def get_float32_math() -> str:
    """What products of float32 are computed in: ``"ieee"`` or ``"tf32"``."""
    return _core.cuda.float32_math()


class Stream:
    """A stream of the device, which does not wait for the default stream. It ends with the object.

    Parameters
    ----------
    device
        Number of the device.

    Raises
    ------
    CudaError
        If there is no GPU, or it makes no stream.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = normalize_integer(device, "device")
        self.handle = _core.cuda.create_stream(self.device)

    def synchronize(self) -> None:
        """Waits until all is done that the stream was given; raises the CudaError of a kernel."""
        _core.cuda.wait(self.device, self.handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def __del__(self) -> None:
        # None where the constructor failed, or the interpreter is shutting down.
        if getattr(self, "handle", None) is not None and _core is not None:
            with contextlib.suppress(CudaError):
                _core.cuda.destroy_stream(self.device, self.handle)


_PER_THREAD = 2  # cudaStreamPerThread


def _handle(stream: Any) -> int:
    """The handle of a stream of ours, CuPy's, PyTorch's, or one that is a handle itself."""
    attributes = ("cuda_stream", "ptr")  # of torch.cuda.Stream, of cupy.cuda.Stream
    found = [name for name in attributes if hasattr(stream, name)]
    if hasattr(stream, "__cuda_stream__"):
        handle = int(stream.__cuda_stream__()[1])
    elif found:
        handle = int(getattr(stream, found[0]))
    else:
        handle = normalize_integer(stream, "stream")
    if handle < 0:
        raise ValueError(
            f"`stream` must be a stream or its handle. Received: stream={shown(stream)}"
        )
    if handle == _PER_THREAD:
        raise ValueError(
            "`stream` must not be cudaStreamPerThread, which is another stream in every thread "
            f"that uses or frees the arrays. Received: stream={shown(stream)}"
        )
    return handle


@contextlib.contextmanager
def using_stream(stream: Any) -> Iterator[None]:
    """Context manager within which this thread's operations are enqueued on ``stream``.

    Without one it is the legacy default stream, which waits for all streams that are not
    non-blocking.

    Parameters
    ----------
    stream
        A :class:`Stream`, one of CuPy's or PyTorch's, one that has ``__cuda_stream__``, or the
        handle (cudaStream_t) as an integer, 0 being the legacy default stream. Arrays that are
        made on a stream keep the object alive, for their memory goes back in its order; who
        gives a handle must keep the stream as long as the arrays.

    Raises
    ------
    TypeError
        If it is none of these.
    ValueError
        If it is a negative integer, or ``cudaStreamPerThread`` (2).
    """
    handle = _handle(stream)
    before = _core.cuda.set_stream(handle, None if isinstance(stream, int) else stream)
    try:
        yield
    finally:
        _core.cuda.set_stream(*before)


def array(source: Any, dtype: Any = None, *, device: int = 0, stream: Any = None) -> DeviceArray:
    """A copy of an array of the host on the device.

    Parameters
    ----------
    source
        What ``numpy.asarray`` takes.
    dtype
        ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"uint8"``, ``"int32"`` or a dtype of one;
        None for that of ``source``. bfloat16 without ml_dtypes: an array of uint16 that holds the
        bits, and ``dtype="bfloat16"``.
    device
        Number of the device.
    stream
        As for :func:`using_stream`; None for the current one.

    Raises
    ------
    TypeError
        If the type is none of these.
    CudaError
        If there is no GPU.
    """
    name = dtype if isinstance(dtype, str) else None if dtype is None else np.dtype(dtype).name
    if name == "bfloat16":
        host = np.asarray(source)
        if host.dtype not in (np.uint16, "bfloat16"):
            from ml_dtypes import bfloat16

            host = host.astype(bfloat16)
    else:
        host = np.asarray(source, dtype=name)
        name = host.dtype.name
    host = np.ascontiguousarray(host).reshape(host.shape)
    host = host.astype(host.dtype.newbyteorder("="), copy=False)
    if name == "bfloat16":
        host = host.view(np.uint16)
    with _maybe_using(stream):
        return _core.cuda.from_numpy(host, name, normalize_integer(device, "device"))


def asarray(source: Any, *, stream: Any = None) -> DeviceArray:
    """An array of another library on the device, as it is: without a copy.

    Parameters
    ----------
    source
        An array on a GPU that offers DLPack or ``__cuda_array_interface__``, C-contiguous.
    stream
        As for :func:`using_stream`; None for the current one. It waits for what the array's own
        stream has been given.

    Raises
    ------
    TypeError
        If ``source`` is no such array, or its type is none that fastconv computes with.
    ValueError
        If it is not C-contiguous.
    """
    with _maybe_using(stream):
        return _core.cuda.import_array(source, "source")


def _maybe_using(stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if stream is None else using_stream(stream)


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of arrays on a GPU alone, and with an argument ``stream``."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def on_device(*arguments: Any, stream: Any = None, **options: Any) -> Any:
        with _maybe_using(stream):
            if arguments:
                arguments = (_core.cuda.import_array(arguments[0], first), *arguments[1:])
            elif first in options:
                options[first] = _core.cuda.import_array(options[first], first)
            return function(*arguments, **options)

    signature = inspect.signature(function)
    keyword = inspect.Parameter("stream", inspect.Parameter.KEYWORD_ONLY, default=None)
    on_device.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), keyword]
    )
    on_device.__module__ = __name__
    on_device.__doc__ = (
        f"``fastconv.{function.__name__}`` of arrays on a GPU; the result is a DeviceArray.\n\n"
        "Arrays may be of float16 or bfloat16 too, all of one type. ``stream`` is as for\n"
        ":func:`using_stream`, None for the current one. Else as there:\n\n"
        f"{inspect.getdoc(function)}"
    )
    return on_device


conv2d = _on_device(functional.conv2d)
conv2d_grad_input = _on_device(functional.conv2d_grad_input)
conv2d_grad_filter = _on_device(functional.conv2d_grad_filter)
max_pool2d = _on_device(functional.max_pool2d)
max_pool2d_grad = _on_device(functional.max_pool2d_grad)
avg_pool2d = _on_device(functional.avg_pool2d)
avg_pool2d_grad = _on_device(functional.avg_pool2d_grad)
conv2d_max_pool2d = _on_device(functional.conv2d_max_pool2d)
conv2d_max_pool2d_grad = _on_device(functional.conv2d_max_pool2d_grad)


def explain(
    input_shape: Any,
    filter_shape: Any,
    *,
    direction: str = "fprop",
    dtype: str = "float32",
    device: int = 0,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: int = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    algorithm: str | None = None,
) -> list[dict[str, Any]]:
    """Which algorithms serve a convolution on the device, the one that would run first.

    Parameters
    ----------
    input_shape, filter_shape
        Shapes of ``x`` and ``w``.
    direction
        ``"fprop"``, ``"dgrad"`` or ``"wgrad"``.
    dtype
        Name of the type: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    device
        Number of the device.
    strides, padding, dilation_rate, groups, activation, data_format, algorithm
        As for :func:`fastconv.conv2d`.

    Returns
    -------
    candidates
        Dicts of ``algorithm``, ``blocking`` (in words), ``workspace_bytes`` and
        ``predicted_seconds`` (an estimate, no measurement).

    Raises
    ------
    TypeError
        If an option is not of the kind ``conv2d`` takes.
    ValueError
        If the shapes or options do not make a convolution, or there is no such device.
    CudaError
        If there are no CUDA kernels, or CUDA fails.
    """
    return _core.cuda.candidates(
        normalize_shape(input_shape, "input_shape"),
        normalize_shape(filter_shape, "filter_shape"),
        normalize_direction(direction),
        normalize_dtype_name(dtype),
        normalize_integer(device, "device"),
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
    )
