# The operations on a GPU. Inputs are what offers DLPack or __cuda_array_interface__ there.
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import CapsuleType

from fastconv._core import _Padding, _Pair, _Shape

class CudaError(RuntimeError): ...

class DeviceArray:
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any] | str: ...
    @property
    def device(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def pointer(self) -> int: ...
    def numpy(self) -> NDArray[Any]: ...
    def __array__(self, *args: object, **kwargs: object) -> NDArray[Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

def conv2d(
    x: object,
    w: object,
    bias: object,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: object = None,
) -> DeviceArray: ...
def conv2d_grad_input(
    dy: object,
    w: object,
    input_shape: _Shape,
    output: object,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: object = None,
) -> DeviceArray: ...

# A pair of arrays with return_bias_grad, one array without.
def conv2d_grad_filter(
    x: object,
    dy: object,
    filter_shape: _Shape,
    output: object,
    return_bias_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: object = None,
) -> DeviceArray | tuple[DeviceArray, DeviceArray]: ...

# A pair of arrays with return_argmax, one array without.
def max_pool2d(
    x: object,
    return_argmax: bool,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: object = None,
) -> DeviceArray | tuple[DeviceArray, DeviceArray]: ...
def max_pool2d_grad(
    dy: object,
    argmax: object,
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: object = None,
) -> DeviceArray: ...
def avg_pool2d(
    x: object,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: object = None,
) -> DeviceArray: ...
def avg_pool2d_grad(
    dy: object,
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: object = None,
) -> DeviceArray: ...

# A pair of arrays with return_argmax, one array without.
def conv2d_max_pool2d(
    x: object,
    w: object,
    bias: object,
    return_argmax: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: object = None,
) -> DeviceArray | tuple[DeviceArray, DeviceArray]: ...
def conv2d_max_pool2d_grad(
    x: object,
    w: object,
    dy: object,
    output: object,
    argmax: object,
    with_input_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
) -> tuple[DeviceArray | None, DeviceArray, DeviceArray]: ...
def is_device_array(object: object) -> bool: ...
def import_array(object: object, name: str) -> DeviceArray: ...
def from_numpy(array: NDArray[Any], type: str, device: int) -> DeviceArray: ...
def availability() -> dict[str, Any]: ...
def use_library(path: str) -> None: ...
def candidates(
    input_shape: _Shape,
    filter_shape: _Shape,
    direction: str,
    type: str,
    device: int,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None,
) -> list[dict[str, Any]]: ...
def set_float32_math(math: str) -> None: ...
def float32_math() -> str: ...
def set_stream(handle: int, object: object) -> tuple[int, Any]: ...
def stream() -> int: ...
def create_stream(device: int) -> int: ...
def destroy_stream(device: int, handle: int) -> None: ...
def wait(device: int, handle: int) -> None: ...
