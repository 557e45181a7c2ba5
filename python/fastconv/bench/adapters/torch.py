"""PyTorch: torch.nn.functional and aten's backward, eager, in channels_last (or NCHW)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.bench.adapters import FunctionCase, dense, to_hwio, to_nhwc

if TYPE_CHECKING:
    import torch

    from fastconv.bench._types import Arrays, Floats, Record
    from fastconv.bench.adapters import Case
    from fastconv.bench.problem import Problem


def environment(conditions: Record) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": "avx2"} if conditions["isa"] == "avx2" else {}


class Implementation:
    def __init__(self, conditions: Record) -> None:
        import torch

        torch.set_num_threads(conditions["threads"])
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._format = (
            torch.contiguous_format if conditions["layout"] == "nchw" else torch.channels_last
        )
        self.versions = {"torch": torch.__version__}

    def _tensor(self, array: Floats, axes: tuple[int, ...]) -> torch.Tensor:
        tensor = self._torch.from_numpy(dense(array.transpose(axes)))
        return tensor.contiguous(memory_format=self._format)

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        torch = self._torch
        functional = torch.nn.functional
        x = self._tensor(arrays["x"], (0, 3, 1, 2))
        dy = self._tensor(arrays["dy"], (0, 3, 1, 2))
        (top, bottom), (left, right) = problem.sides
        pads = [top, left]
        # torch pads both sides alike: what is beyond at the bottom and the right is padded by an
        # operation of its own, as torch's users have to.
        uneven = (top != bottom or left != right) and self._reads_beyond(problem)
        options = (list(problem.strides), pads, list(problem.dilations))
        if problem.is_pool:
            window = [problem.r, problem.s]
            pad = [0, 0] if uneven else list(problem.pads)
            if uneven:
                x = functional.pad(x, (left, right, top, bottom), value=float("-inf"))
            arguments = (window, list(problem.strides), pad, [1, 1], False)
            if direction == "fprop":
                return FunctionCase(lambda: functional.max_pool2d(x, *arguments), _activations)
            _, indices = torch.ops.aten.max_pool2d_with_indices(x, *arguments)
            cut = np.s_[:, top : top + problem.h, left : left + problem.w] if uneven else np.s_[:]
            return FunctionCase(
                lambda: torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *arguments, indices),
                lambda value: _activations(value)[cut],
            )
        w = self._tensor(arrays["w"], (3, 2, 0, 1))
        strides, pads, dilations = options
        groups = problem.groups
        cut = np.s_[:]
        if uneven:
            x = functional.pad(x, (left, right, top, bottom)).contiguous(memory_format=self._format)
            pads = [0, 0]
            cut = np.s_[:, top : top + problem.h, left : left + problem.w]
        if direction == "fprop":
            return FunctionCase(
                lambda: torch.conv2d(x, w, None, strides, pads, dilations, groups), _activations
            )
        backward = torch.ops.aten.convolution_backward
        index = 0 if direction == "dgrad" else 1
        mask = [direction == "dgrad", direction == "wgrad", False]

        def call() -> Any:
            return backward(dy, x, w, None, strides, pads, dilations, False, [0, 0], groups, mask)[
                index
            ]

        if index == 0:
            return FunctionCase(call, lambda value: _activations(value)[cut])
        return FunctionCase(call, lambda value: to_hwio(value.numpy()))

    @staticmethod
    def _reads_beyond(problem: Problem) -> bool:
        """Whether padding the top's rows at the bottom too gives another number of outputs."""
        for size, taps, out, stride, dilation, (low, high) in zip(
            (problem.h, problem.w),
            (problem.r, problem.s),
            (problem.oh, problem.ow),
            problem.strides,
            problem.dilations,
            problem.sides,
            strict=True,
        ):
            outputs = (size + 2 * low - (taps - 1) * dilation - 1) // stride + 1
            if outputs != out or high > low:
                return True
        return False


def _activations(value: torch.Tensor) -> Floats:
    return to_nhwc(value.numpy())
