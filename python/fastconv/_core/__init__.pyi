from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastconv._core import cuda as cuda
from fastconv._core import reference as reference
from fastconv._core import timed as timed

_Pair: TypeAlias = tuple[int, int]
_Shape: TypeAlias = tuple[int, int, int, int]
_Padding: TypeAlias = tuple[str, _Shape]  # kind, (top, bottom, left, right)
_Real = TypeVar("_Real", bound=np.generic)  # float32, float16 or bfloat16

__version__: str

class PackedFilter:
    def __init__(self, w: NDArray[np.float32]) -> None: ...
    @property
    def shape(self) -> _Shape: ...
    @property
    def nbytes(self) -> int: ...
    def array(self) -> NDArray[np.float32]: ...

def conv2d(
    x: NDArray[_Real],
    w: NDArray[_Real] | PackedFilter,
    bias: NDArray[_Real] | None,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real]: ...
def conv2d_int8(
    x: NDArray[np.float32],
    w: NDArray[np.int8],
    w_scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]: ...
def conv2d_grad_input(
    dy: NDArray[_Real],
    w: NDArray[_Real] | PackedFilter,
    input_shape: _Shape,
    output: NDArray[_Real] | None,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real]: ...

# A pair of arrays with return_bias_grad, one array without.
def conv2d_grad_filter(
    x: NDArray[_Real],
    dy: NDArray[_Real],
    filter_shape: _Shape,
    output: NDArray[_Real] | None,
    return_bias_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real] | tuple[NDArray[_Real], NDArray[_Real]]: ...

# A pair of arrays with return_argmax, one array without.
def max_pool2d(
    x: NDArray[_Real],
    return_argmax: bool,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real] | tuple[NDArray[_Real], NDArray[np.uint8] | NDArray[np.int32]]: ...
def max_pool2d_grad(
    dy: NDArray[_Real],
    argmax: NDArray[np.uint8] | NDArray[np.int32],
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real]: ...
def avg_pool2d(
    x: NDArray[_Real],
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real]: ...
def avg_pool2d_grad(
    dy: NDArray[_Real],
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real]: ...

# A pair of arrays with return_argmax, one array without.
def conv2d_max_pool2d(
    x: NDArray[_Real],
    w: NDArray[_Real],
    bias: NDArray[_Real] | None,
    return_argmax: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: NDArray[_Real] | None = None,
) -> NDArray[_Real] | tuple[NDArray[_Real], NDArray[np.uint8]]: ...

# (dx or None, dw, dbias)
def conv2d_max_pool2d_grad(
    x: NDArray[_Real],
    w: NDArray[_Real],
    dy: NDArray[_Real],
    output: NDArray[_Real],
    argmax: NDArray[np.uint8],
    with_input_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
) -> tuple[NDArray[_Real] | None, NDArray[_Real], NDArray[_Real]]: ...

# To and from float16 and bfloat16, as kernels do; for tests.
def widened(array: NDArray[Any]) -> NDArray[np.float32]: ...
def narrowed(array: NDArray[np.float32], dtype: np.dtype[_Real]) -> NDArray[_Real]: ...
def set_num_threads(num_threads: int) -> None: ...
def get_num_threads() -> int: ...
def num_threads_is_default() -> bool: ...
def cgroup_cpus(root: str = "") -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def set_accuracy(accuracy: str) -> None: ...
def accuracy() -> str: ...
def set_algorithm(algorithm: str) -> None: ...
def algorithm() -> str: ...
def workspace_bytes() -> tuple[int, int]: ...  # in calls that run, kept for those to come
def explain(
    input_shape: _Shape,
    filter_shape: _Shape,
    direction: str,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    dtype: str,
) -> dict[str, Any]: ...
