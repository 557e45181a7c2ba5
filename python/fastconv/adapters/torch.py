"""fastconv's operations on PyTorch tensors: eager, compiled, differentiable.

Each operation is an op of the library ``fastconv`` in PyTorch's dispatcher, such as
``torch.ops.fastconv.conv2d``, with fake tensors (``torch.compile``, ``torch.export``) and gradients
of any order. Tensors are float32, float16 or bfloat16 on the CPU; the kernels read and write their
memory in place.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

import fastconv
from fastconv import _core
from fastconv._arguments import shown
from fastconv.adapters import _host, _operations
from fastconv.adapters._extents import Attributes, Extent

__all__ = [
    "avg_pool2d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv2d_transpose",
    "global_avg_pool2d",
    "global_max_pool2d",
    "max_pool2d",
    "ops_executed",
    "pooled_in_one",
]

Tensor: TypeAlias = Any


# --- what the Keras layers ask --------------------------------------------------------------------


def supports_jit() -> bool:
    """Whether models with our kernels may be compiled."""
    return True


def dtypes() -> tuple[str, ...]:
    """The data types that the layers may leave to us."""
    return _operations.DTYPES


def reason_against_kind(x: Any) -> str | None:
    """Why the kernels cannot take ``x``, whatever its shape and data type; None if they can."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        return f"the input is a {type(x).__name__}, not a dense tensor of PyTorch's"
    return None


def reason_against_place(x: Any) -> str | None:
    """Why the kernels cannot run where ``x`` is; None if they can."""
    if x.device.type not in ("cpu", "meta"):  # meta: Keras asks for shapes alone
        return f"the input is on the device {x.device}, and the kernels are for CPUs"
    return None


def reason_against_all() -> str | None:
    """Why the kernels serve nothing in this process, as far as it is known; None if they may."""
    return None


def place() -> str:
    """Where the kernels compute, in words."""
    return "the CPU"


# --- public operations ----------------------------------------------------------------------------
# The arguments are those of fastconv.adapters.tensorflow. fastconv.torch has those of PyTorch.


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    dilation_rate: Any = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> Tensor:
    """2-D convolution with bias and ReLU fused."""
    attributes = _conv2d_attributes(strides, padding, dilation_rate, activation, data_format)
    return _run_in_place(_operations.CONV2D, _tensors(x=x, w=w, bias=bias), attributes)


def conv2d_max_pool2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    dilation_rate: Any = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> Tensor:
    """``max_pool2d(conv2d(...), 2)`` in one operation, which keeps no more than is pooled."""
    del keep_argmax  # kept exactly where a gradient may be taken
    attributes = _conv2d_attributes(strides, padding, dilation_rate, activation, data_format)
    attributes = {**attributes, "num_argmax": 0}
    return _run_in_place(_operations.CONV2D_MAX_POOL2D, _tensors(x=x, w=w, bias=bias), attributes)


def pooled_in_one(y: Tensor, *, keep_argmax: bool = False) -> Tensor | None:
    """None: what was computed cannot be replaced any more."""
    del y, keep_argmax
    return None


def max_pool2d(
    x: Tensor,
    pool_size: Any,
    *,
    strides: Any = None,
    padding: Any = "valid",
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> Tensor:
    """2-D max-pooling."""
    del keep_argmax  # kept exactly where a gradient may be taken
    attributes = _pool2d_attributes(pool_size, strides, padding, data_format)
    return _run_in_place(_operations.MAX_POOL2D, _tensors(x=x), attributes)


def avg_pool2d(
    x: Tensor,
    pool_size: Any,
    *,
    strides: Any = None,
    padding: Any = "valid",
    data_format: str = "channels_last",
) -> Tensor:
    """2-D average-pooling, in which padding is not counted."""
    attributes = _pool2d_attributes(pool_size, strides, padding, data_format)
    return _run_in_place(_operations.AVERAGE_POOL2D, _tensors(x=x), attributes)


def global_avg_pool2d(x: Tensor, *, data_format: str = "channels_last") -> Tensor:
    """The average of each channel of each image."""
    attributes = _global_pool2d_attributes(data_format)
    return _run_in_place(_operations.AVERAGE_POOL2D, _tensors(x=x), attributes)


def global_max_pool2d(x: Tensor, *, data_format: str = "channels_last") -> Tensor:
    """The maximum of each channel of each image."""
    attributes = _global_pool2d_attributes(data_format)
    return _run_in_place(_operations.MAX_POOL2D, _tensors(x=x), attributes)


def conv2d_transpose(
    x: Tensor,
    w: Tensor,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    output_padding: Any = None,
    dilation_rate: Any = 1,
    data_format: str = "channels_last",
) -> Tensor:
    """Transposed 2-D convolution as ``keras.ops.conv_transpose``."""
    inputs = _tensors(x=x, w=w)
    attributes = _transpose_attributes(
        tuple(inputs[1].shape), strides, padding, output_padding, dilation_rate, data_format
    )
    return _run_in_place(_operations.CONV2D_TRANSPOSE, inputs, attributes)


def _once(attributes: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``attributes`` as torch.compile takes it: called while compiling, a constant from then on."""

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def items(*options: Any) -> Any:
        return tuple(attributes(*options).items())

    return lambda *options: dict(items(*options))


_conv2d_attributes = _once(_operations.conv2d_attributes)
_pool2d_attributes = _once(_operations.pool2d_attributes)
_global_pool2d_attributes = _once(_operations.global_pool2d_attributes)
_transpose_attributes = _once(_operations.conv2d_transpose_attributes)


def _tensors(**tensors: Any) -> list[Tensor]:
    """Those that are not None: tensors on the CPU, all of one of our data types."""
    checked: list[Tensor] = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        tensor = getattr(tensor, "value", tensor)  # of a variable of Keras's
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor. Received: {name}={shown(tensor)}")
        rule = None
        if not checked and _dtype_name(tensor) not in _operations.DTYPES:
            rule = "float32, float16 or bfloat16"
        elif checked and tensor.dtype != checked[0].dtype:
            rule = f"{_dtype_name(checked[0])}, as the first tensor is"
        if rule is not None:
            raise TypeError(f"`{name}` must be of {rule}. Received: {name}.dtype={tensor.dtype}")
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"`{name}` must be on the CPU. Received: {name}.device={tensor.device}"
            )
        checked.append(tensor)
    return checked


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _run_in_place(name: str, inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    """The first output of an operation, in the layout in which its input lies in memory."""
    x = inputs[0]
    if x.dim() == 4 and not x.is_contiguous():
        here, there = ((0, 2, 3, 1), (0, 3, 1, 2))
        if attributes["data_format"] == "NHWC":
            here, there = there, here
        turned = x.permute(here)
        if turned.is_contiguous():
            other = "NHWC" if attributes["data_format"] == "NCHW" else "NCHW"
            y = _framework.run(name, [turned, *inputs[1:]], {**attributes, "data_format": other})
            return y[0].permute(there)
    return _framework.run(name, inputs, attributes)[0]


# --- from operations to PyTorch -------------------------------------------------------------------

# By operation: the inputs of the op in PyTorch, of which those with ? may be None, and its outputs.
# An output that was not asked for has no elements.
_SIGNATURES = {
    _operations.CONV2D: ("x, w, bias?", 1),
    _operations.CONV2D_GRAD_INPUT: ("x, w, dy, output?", 1),
    _operations.CONV2D_GRAD_FILTER: ("x, w, dy, output?", 2),
    _operations.CONV2D_TRANSPOSE: ("x, w", 1),
    _operations.MAX_POOL2D: ("x", 1),
    _operations.MAX_POOL2D_WITH_ARGMAX: ("x", 2),
    _operations.MAX_POOL2D_GRAD: ("x, argmax, dy", 1),
    _operations.MAX_POOL2D_GRAD_GRAD: ("ddx, argmax", 1),
    _operations.AVERAGE_POOL2D: ("x", 1),
    _operations.AVERAGE_POOL2D_GRAD: ("x, dy", 1),
    _operations.CONV2D_MAX_POOL2D: ("x, w, bias?", 2),
    _operations.CONV2D_MAX_POOL2D_GRAD: ("x, w, dy, y, argmax", 3),
}
_ATTRIBUTE_TYPES = {
    **dict.fromkeys(("padding", "data_format", "activation"), "str"),
    **dict.fromkeys(("num_bias", "num_argmax", "num_dx"), "int"),
}
_OP_NAMES = {
    "FastconvConv2D": "conv2d",
    "FastconvConv2DGradInput": "conv2d_grad_input",
    "FastconvConv2DGradFilter": "conv2d_grad_filter",
    "FastconvConv2DTranspose": "conv2d_transpose",
    "FastconvMaxPool2D": "max_pool2d",
    "FastconvMaxPool2DWithArgmax": "max_pool2d_with_argmax",
    "FastconvMaxPool2DGrad": "max_pool2d_grad",
    "FastconvMaxPool2DGradGrad": "max_pool2d_grad_grad",
    "FastconvAveragePool2D": "avg_pool2d",
    "FastconvAveragePool2DGrad": "avg_pool2d_grad",
    "FastconvConv2DMaxPool2D": "conv2d_max_pool2d",
    "FastconvConv2DMaxPool2DGrad": "conv2d_max_pool2d_grad",
}

_executed: Counter[str] = Counter()


def ops_executed() -> dict[str, int]:
    """How often each of our kernels has run as an op of PyTorch's, by the operation's name."""
    return {name: _executed[name] for name in _SIGNATURES}


class _Torch(_operations.Framework):
    def run(self, name: str, inputs: Sequence[Tensor], attributes: Attributes) -> list[Tensor]:
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        # A trace is run again without gradients, to be compared: it is to have the same ops.
        if differentiable and not torch.jit.is_tracing():
            name, attributes = _operations.variant_for_gradient(name, attributes)
        num_inputs = _SIGNATURES[name][0].count(",") + 1
        arguments = [*inputs, *[None] * (num_inputs - len(inputs))]
        values = [attributes[key] for key in _operations.attribute_names(name)]
        outputs = _OPS[name](*arguments, *values)
        return [
            output
            for output, is_there in zip(
                outputs if isinstance(outputs, (tuple, list)) else [outputs],
                _present(name, attributes),
                strict=True,
            )
            if is_there
        ]

    def where_positive(self, gradient: Tensor, output: Tensor) -> Tensor:
        return torch.where(output > 0, gradient, 0.0)

    def shared_by_maxima(self, x: Tensor, y: Tensor, dy: Tensor, axes: tuple[int, int]) -> Tensor:
        chosen = (x == y).to(x.dtype)
        return chosen / chosen.sum(dim=axes, keepdim=True) * dy


_framework = _Torch()


def _present(name: str, attributes: Attributes) -> tuple[bool, ...]:
    """Which outputs of the op were asked for."""
    if name == _operations.CONV2D_GRAD_FILTER:
        return True, bool(attributes["num_bias"])
    if name == _operations.CONV2D_MAX_POOL2D:
        return True, bool(attributes["num_argmax"])
    if name == _operations.CONV2D_MAX_POOL2D_GRAD:
        return True, bool(attributes["num_dx"]), bool(attributes["num_bias"])
    return (True,) * _SIGNATURES[name][1]


@functools.cache
def _follow_torch_threads() -> None:
    """Uses no more threads than PyTorch, unless fastconv was told a number of its own."""
    if _core.num_threads_is_default() and torch.get_num_threads() < fastconv.get_num_threads():
        fastconv.set_num_threads(torch.get_num_threads())


def _shapes(
    name: str, inputs: Sequence[Tensor], attributes: Attributes
) -> list[tuple[Any, torch.dtype]] | None:
    """The shape and data type of each output that was asked for; None where the inputs do not fit."""
    filter_shape = tuple(inputs[1].shape) if len(inputs) > 1 else None
    if inputs[0].dim() != 4:
        return None
    shapes = []
    for dtype, extents in _operations.outputs(
        name, filter_shape, attributes, _dtype_name(inputs[0])
    ):
        if extents is None:
            return None
        shape = [
            extent.evaluate(inputs) if isinstance(extent, Extent) else extent for extent in extents
        ]
        if None in shape:
            return None
        shapes.append((shape, getattr(torch, dtype)))
    return shapes


def _array(tensor: Tensor) -> Any:
    """A NumPy array in the tensor's memory. Of bfloat16 PyTorch makes none."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise TypeError(
            "bfloat16 needs the package ml_dtypes. Received: a tensor of bfloat16"
        ) from error
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _tensor(array: Any) -> Tensor:
    """A tensor in the array's memory."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view("int16")).view(torch.bfloat16)


def _define(name: str) -> Any:
    """Makes the operation an op of PyTorch's dispatcher."""
    op = f"fastconv::{_OP_NAMES[name]}"
    inputs, num_outputs = _SIGNATURES[name]
    input_names = inputs.split(", ")
    num_inputs = len(input_names)
    keys = _operations.attribute_names(name)
    parameters = [
        *(f"Tensor{'?' * i.endswith('?')} {i.removesuffix('?')}" for i in input_names),
        *(f"{_ATTRIBUTE_TYPES.get(key, 'int[]')} {key}" for key in keys),
    ]
    results = ", ".join(["Tensor"] * num_outputs)
    torch.library.define(
        op,
        f"({', '.join(parameters)}) -> {results if num_outputs == 1 else f'({results})'}",
        tags=torch.Tag.pt2_compliant_tag,
    )

    def split(arguments: Sequence[Any]) -> tuple[list[Tensor], dict[str, Any]]:
        given = [tensor for tensor in arguments[:num_inputs] if tensor is not None]
        return given, dict(zip(keys, arguments[num_inputs:], strict=True))

    def all_outputs(outputs: Sequence[Tensor], attributes: dict[str, Any], like: Tensor) -> Any:
        if num_outputs == 1:
            return outputs[0]
        remaining = iter(outputs)
        return tuple(
            next(remaining) if is_there else like.new_empty(0)
            for is_there in _present(name, attributes)
        )

    def compute(*arguments: Any) -> Any:
        _follow_torch_threads()
        given, attributes = split(arguments)
        arrays = [_array(tensor.detach().contiguous()) for tensor in given]
        shapes = _shapes(name, given, attributes)
        if shapes is None or name in (
            _operations.CONV2D_MAX_POOL2D_GRAD,
            _operations.MAX_POOL2D_GRAD_GRAD,
        ):
            outputs = [_tensor(y) for y in _host.run(name, arrays, attributes)]
        else:
            # PyTorch's memory is aligned to cache lines.
            first = torch.empty(shapes[0][0], dtype=shapes[0][1])
            _, *others = _host.run(name, arrays, attributes, out=_array(first))
            outputs = [first, *(_tensor(y) for y in others)]
        _executed[name] += 1
        return all_outputs(outputs, attributes, given[0])

    def fake(*arguments: Any) -> Any:
        given, attributes = split(arguments)
        shapes = _shapes(name, given, attributes)
        if shapes is None:
            _host.check(name, [tuple(tensor.shape) for tensor in given], attributes)
            raise ValueError(
                "The inputs must fit each other. Received: shapes "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in given)}"
            )
        outputs = [given[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes]
        return all_outputs(outputs, attributes, given[0])

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else [output]
        ctx.attributes = dict(zip(keys, inputs[num_inputs:], strict=True))
        is_read = _outputs_read(name, ctx.attributes)
        ctx.save_for_backward(
            *inputs[:num_inputs],
            *(tensor if read else None for tensor, read in zip(outputs, is_read, strict=True)),
        )

    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = ctx.saved_tensors
        given = [tensor for tensor in saved[:num_inputs] if tensor is not None]
        present = _present(name, ctx.attributes)
        outputs = [y for y, there in zip(saved[num_inputs:], present, strict=True) if there]
        wanted = [dy for dy, there in zip(upstream, present, strict=True) if there]
        skipped = [i for i in range(len(given)) if not ctx.needs_input_grad[i]]
        call = _operations.Call(given, outputs, ctx.attributes, frozenset(skipped))
        gradients = _operations.RULES[name](_framework, call, *wanted)
        gradients = [*gradients, *[None] * (num_inputs - len(gradients))]
        return (*gradients, *[None] * len(keys))

    torch.library.impl(op, "CPU", compute)
    torch.library.register_fake(op, fake)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    return getattr(torch.ops.fastconv, _OP_NAMES[name])


def _outputs_read(name: str, attributes: Attributes) -> tuple[bool, ...]:
    """Which outputs of the op the rule for its gradient reads."""
    if name == _operations.CONV2D:
        return (attributes["activation"] == "RELU",)
    if name == _operations.MAX_POOL2D:
        return (_operations.is_global(attributes),)
    if name == _operations.MAX_POOL2D_WITH_ARGMAX:
        return False, True
    if name == _operations.CONV2D_MAX_POOL2D:
        return True, bool(attributes["num_argmax"])
    return (False,) * _SIGNATURES[name][1]


_OPS: dict[str, Callable[..., Any]] = {name: _define(name) for name in _SIGNATURES}
