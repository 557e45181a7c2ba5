"""Convolution and pooling of PyTorch tensors by fastconv's kernels.

Arguments are those of ``torch.nn.functional``; tensors are on the CPU, (batch, channels,
height, width) or without the batch. Where float32 is written below, they may be of float16 or bfloat16 as
well, all of a call of one of them; sums are float32, and results are rounded once. Memory is neither copied nor rearranged: contiguous tensors are
computed as NCHW, those of ``torch.channels_last`` as NHWC, and results have the memory format of the
input. Filters alone are rearranged, in each call.

The operations are ops of PyTorch's dispatcher (``torch.ops.fastconv``): they can be differentiated to
any order and compiled (``torch.compile(fullgraph=True)``). :func:`accelerate` has a whole module use
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from fastconv._arguments import normalize_integer, normalize_pair, shown
from fastconv.adapters import torch as _adapter
from fastconv.adapters.torch import ops_executed

__all__ = ["accelerate", "avg_pool2d", "conv2d", "max_pool2d", "ops_executed", "restore"]

Tensor: TypeAlias = torch.Tensor
IntegerOrPair: TypeAlias = "int | Sequence[int]"
Sides: TypeAlias = "tuple[tuple[int, int], tuple[int, int]]"


def conv2d(
    input: Tensor,  # noqa: A002 - as torch.nn.functional.conv2d names it
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntegerOrPair = 1,
    padding: IntegerOrPair | str = 0,
    dilation: IntegerOrPair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """2-D convolution, as ``torch.nn.functional.conv2d``, with bias and ReLU fused.

    Parameters
    ----------
    input
        float32 tensor of shape (batch, channels, height, width) or (channels, height, width).
    weight
        float32 tensor of shape (filters, channels / groups, rows, columns).
    bias
        float32 tensor of shape (filters,), or None.
    stride, dilation
        An integer, or a pair for height and width; a sequence of one stands for the integer.
    padding
        Rows and columns of zeros on each side: an integer or a pair; or ``"valid"`` for none; or
        ``"same"`` for an output of the input's height and width, which needs a stride of 1.
    groups
        Number of groups that channels and filters are split into.
    activation
        None, or ``"relu"``, which PyTorch's function has not.

    Returns
    -------
    y
        float32 tensor of shape (batch, filters, new_height, new_width), or without the batch, in
        the memory format of ``input``.

    Raises
    ------
    TypeError
        If an argument is not of the kind stated above.
    ValueError
        If a tensor is not on the CPU, the shapes do not fit each other, or an option has none of the
        values stated above.
    """
    groups = normalize_integer(groups, "groups")
    x, unbatched = _batched(input)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"`weight` must be a torch.Tensor. Received: weight={shown(weight)}")
    if weight.dim() != 4 or groups < 1 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            "`weight` must have 4 dimensions, of which the second times `groups` is the number of "
            f"channels. Received: weight.shape={tuple(weight.shape)}, groups={groups}, "
            f"input.shape={tuple(input.shape)}"
        )
    y = _adapter.conv2d(
        _in_one_format(x, weight),
        weight.permute(2, 3, 1, 0),
        bias,
        strides=_pair(stride, "stride"),
        padding=_conv2d_padding(padding, stride),
        dilation_rate=_pair(dilation, "dilation"),
        activation=activation,
        data_format="channels_first",
    )
    return y.squeeze(0) if unbatched else y


def max_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: IntegerOrPair,
    stride: IntegerOrPair | None = None,
    padding: IntegerOrPair = 0,
    dilation: IntegerOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """2-D max-pooling, as ``torch.nn.functional.max_pool2d``.

    Where it is differentiated, the place of each maximum is kept, one byte each.

    Parameters
    ----------
    input
        float32 tensor of shape (batch, channels, height, width) or (channels, height, width).
    kernel_size
        An integer, or a pair for height and width.
    stride
        An integer, a pair for height and width, or None for ``kernel_size``.
    padding
        Rows and columns on each side, which never win: an integer or a pair, below ``kernel_size``.
    dilation
        1.
    ceil_mode
        Whether windows that lie only partly inside at the bottom and the right count.

    Returns
    -------
    y
        float32 tensor of shape (batch, channels, new_height, new_width), or without the batch, in
        the memory format of ``input``.

    Raises
    ------
    TypeError
        If an argument is not of the kind stated above.
    ValueError
        If the tensor is not on the CPU, the window does not fit it, or an option has none of the
        values stated above.
    """
    if _pair(dilation, "dilation") != (1, 1):
        raise ValueError(f"`dilation` must be 1. Received: dilation={dilation!r}")
    x, unbatched = _batched(input)
    y = _adapter.max_pool2d(
        _in_one_format(x), **_pool2d_options(x, kernel_size, stride, padding, ceil_mode)
    )
    return y.squeeze(0) if unbatched else y


def avg_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: IntegerOrPair,
    stride: IntegerOrPair | None = None,
    padding: IntegerOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """2-D average-pooling, as ``torch.nn.functional.avg_pool2d``.

    Parameters
    ----------
    input, kernel_size, stride
        As for :func:`max_pool2d`.
    padding
        Rows and columns of zeros on each side: an integer or a pair.
    ceil_mode
        As for :func:`max_pool2d`; False where padding is counted.
    count_include_pad
        Whether padding is counted: then the input is copied to a padded one first.

    Returns
    -------
    y
        float32 tensor of shape (batch, channels, new_height, new_width), or without the batch, in
        the memory format of ``input``.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool2d` does.
    """
    x, unbatched = _batched(input)
    rows, columns = _pair(padding, "padding")
    if count_include_pad and (rows or columns):
        if ceil_mode:
            raise ValueError(
                "`ceil_mode` must be False where padding is counted. Received: ceil_mode=True, "
                f"padding={padding!r}, count_include_pad=True"
            )
        x = torch.nn.functional.pad(x, (columns, columns, rows, rows))
        padding = 0
    y = _adapter.avg_pool2d(
        _in_one_format(x), **_pool2d_options(x, kernel_size, stride, padding, ceil_mode)
    )
    return y.squeeze(0) if unbatched else y


def _pair(value: Any, name: str) -> tuple[int, int]:
    """The values for height and width: an integer, or a sequence of one, stands for both."""
    alone = isinstance(value, (tuple, list)) and len(value) == 1
    return normalize_pair(value[0] if alone else value, name)


def _batched(input: Tensor) -> tuple[Tensor, bool]:  # noqa: A002
    """``input`` with a batch, and whether it had none."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"`input` must be a torch.Tensor. Received: input={shown(input)}")
    if input.dim() not in (3, 4):
        raise ValueError(
            f"`input` must have 3 or 4 dimensions. Received: input.shape={tuple(input.shape)}"
        )
    return (input.unsqueeze(0), True) if input.dim() == 3 else (input, False)


def _in_one_format(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """``x`` such that only one of the memory formats fits, of which the other axes say nothing.

    A tensor of one channel or one pixel has both; the filters then decide, as in PyTorch.
    """
    if (
        weight is not None
        and x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    ):
        c, h, w = x.shape[1:]
        return x.as_strided(x.shape, (h * w * c, 1, w * c, c))
    return x


def _conv2d_padding(padding: IntegerOrPair | str, stride: IntegerOrPair) -> Sides | str:
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(
                "`padding` must be 'valid', 'same', an integer or a pair of integers. "
                f"Received: padding={shown(padding)}"
            )
        if padding == "same" and _pair(stride, "stride") != (1, 1):
            raise ValueError(
                "`stride` must be 1 where `padding` is 'same'. "
                f"Received: stride={stride!r}, padding='same'"
            )
        return padding
    rows, columns = _pair(padding, "padding")
    return (rows, rows), (columns, columns)


def _pool2d_options(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool
) -> dict[str, Any]:
    """The adapter's arguments of a pooling."""
    windows = _pair(kernel_size, "kernel_size")
    steps = windows if stride is None else _pair(stride, "stride")
    sides = []
    for size, window, step, before in zip(
        x.shape[2:], windows, steps, _pair(padding, "padding"), strict=True
    ):
        after = before
        if ceil_mode and step > 0:
            number = -(-(size + 2 * before - window) // step) + 1
            if (number - 1) * step >= size + before:  # no window begins in the padding behind
                number -= 1
            after = max(before, (number - 1) * step + window - size - before)
        sides.append((before, after))
    return {
        "pool_size": windows,
        "strides": steps,
        "padding": (sides[0], sides[1]),
        "data_format": "channels_first",
    }


# --- modules --------------------------------------------------------------------------------------


def _is_served(input: Any, weight: Tensor | None = None) -> bool:  # noqa: A002
    return (
        isinstance(input, torch.Tensor)
        and input.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (weight is None or weight.dtype == input.dtype)
        and input.device.type == "cpu"
        and input.layout == torch.strided
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """Whether calls are to do more than to compute, which our ops cannot tell PyTorch how to."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()  # vmap and what else torch.func has
        or torch.autograd.forward_ad._current_level >= 0
    )


class _FastConv2d(torch.nn.Conv2d):  # type: ignore[misc]
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        if self.padding_mode != "zeros" or not _is_served(input, weight):
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _FastMaxPool2d(torch.nn.MaxPool2d):  # type: ignore[misc]
    def forward(self, input: Tensor) -> Any:  # noqa: A002
        if self.return_indices or self.dilation not in (1, (1, 1)) or not _is_served(input):
            return super().forward(input)
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode
        )


_STAND_INS = {torch.nn.Conv2d: _FastConv2d, torch.nn.MaxPool2d: _FastMaxPool2d}


def accelerate(module: torch.nn.Module) -> torch.nn.Module:
    """Has every ``torch.nn.Conv2d`` and ``MaxPool2d`` within ``module`` compute by our kernels.

    Modules change their class and nothing else: parameters, hooks, ``state_dict()`` and optimizers
    stay. Subclasses are left alone. What the kernels do not serve (another data type or device, a
    padding mode other than zeros, indices of maxima, dilated pooling) is computed by PyTorch, and so is
    what is called under ``torch.autocast``, the transforms of ``torch.func`` or forward-mode
    differentiation. ``torch.jit.script`` reads stock modules alone: :func:`restore` them first.

    Parameters
    ----------
    module
        A module of PyTorch's.

    Returns
    -------
    module
        The same, which was changed in place.

    Raises
    ------
    TypeError
        If it is no module.
    """
    return _change_classes(module, _STAND_INS)


def restore(module: torch.nn.Module) -> torch.nn.Module:
    """Undoes :func:`accelerate`.

    Parameters
    ----------
    module
        A module of PyTorch's.

    Returns
    -------
    module
        The same, which was changed in place.

    Raises
    ------
    TypeError
        If it is no module.
    """
    return _change_classes(module, {fast: stock for stock, fast in _STAND_INS.items()})


def _change_classes(module: Any, classes: dict[Any, Any]) -> torch.nn.Module:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module. Received: module={module!r}")
    for each in module.modules():
        if type(each) in classes:
            each.__class__ = classes[type(each)]
    return module
