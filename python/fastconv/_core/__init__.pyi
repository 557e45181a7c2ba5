from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastconv._core import cuda as cuda
from fastconv._core import reference as reference
from fastconv._core import timed as timed

_Pair: TypeAlias = tuple[int, int]
_Shape: TypeAlias = tuple[int, int, int, int]
_Padding: TypeAlias = tuple[str, _Shape]  # kind, (top, bottom, left, right)
_Floats: TypeAlias = NDArray[np.float32]

__version__: str

def conv2d(
    x: _Floats,
    w: _Floats,
    bias: _Floats | None,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: _Floats | None = None,
) -> _Floats: ...
def conv2d_grad_input(
    dy: _Floats,
    w: _Floats,
    input_shape: _Shape,
    output: _Floats | None,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: _Floats | None = None,
) -> _Floats: ...

# A pair of arrays with return_bias_grad, one array without.
def conv2d_grad_filter(
    x: _Floats,
    dy: _Floats,
    filter_shape: _Shape,
    output: _Floats | None,
    return_bias_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: _Floats | None = None,
) -> _Floats | tuple[_Floats, _Floats]: ...

# A pair of arrays with return_argmax, one array without.
def max_pool2d(
    x: _Floats,
    return_argmax: bool,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: _Floats | None = None,
) -> _Floats | tuple[_Floats, NDArray[np.uint8] | NDArray[np.int32]]: ...
def max_pool2d_grad(
    dy: _Floats,
    argmax: NDArray[np.uint8] | NDArray[np.int32],
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: _Floats | None = None,
) -> _Floats: ...
def avg_pool2d(
    x: _Floats,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: _Floats | None = None,
) -> _Floats: ...
def avg_pool2d_grad(
    dy: _Floats,
    input_shape: _Shape,
    pool_size: _Pair,
    strides: _Pair,
    padding: _Padding,
    data_format: str,
    out: _Floats | None = None,
) -> _Floats: ...

# A pair of arrays with return_argmax, one array without.
def conv2d_max_pool2d(
    x: _Floats,
    w: _Floats,
    bias: _Floats | None,
    return_argmax: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
    out: _Floats | None = None,
) -> _Floats | tuple[_Floats, NDArray[np.uint8]]: ...

# (dx or None, dw, dbias)
def conv2d_max_pool2d_grad(
    x: _Floats,
    w: _Floats,
    dy: _Floats,
    output: _Floats,
    argmax: NDArray[np.uint8],
    with_input_grad: bool,
    strides: _Pair,
    padding: _Padding,
    dilation_rate: _Pair,
    groups: int,
    activation: str,
    data_format: str,
    algorithm: str | None = None,
) -> tuple[_Floats | None, _Floats, _Floats]: ...
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
) -> dict[str, Any]: ...
