"""OpenVINO: a model of one operation, built in memory; fprop alone, in float32.

Input and output are tensors of our own. Its layout is NCHW; inside it chooses its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastconv.bench.adapters import (
    FunctionCase,
    Unsupported,
    dense,
    empty,
    to_nchw,
    to_nhwc,
    to_oihw,
)

if TYPE_CHECKING:
    from fastconv.bench._types import Arrays, Record
    from fastconv.bench.adapters import Case
    from fastconv.bench.problem import Problem


class Implementation:
    def __init__(self, conditions: Record) -> None:
        import openvino

        self._openvino = openvino
        self._core = openvino.Core()
        self._options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(conditions["threads"]),
            # Else it computes in bfloat16 where the CPU can.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if conditions["isa"]:
            raise Unsupported("no way to limit its instruction set")
        self.versions = {"openvino": openvino.__version__.split("-")[0]}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        if direction != "fprop":
            raise Unsupported("inference only")
        ov = self._openvino
        ops = ov.opset8
        (top, bottom), (left, right) = problem.sides
        x = to_nchw(arrays["x"])
        p, g = problem, problem.groups
        parameter = ops.parameter(x.shape, np.float32)
        if p.is_pool:
            node = ops.max_pool(
                parameter, list(p.strides), [1, 1], [top, left], [bottom, right], [p.r, p.s]
            ).output(0)
        else:
            w = arrays["w"]
            geometry = (list(p.strides), [top, left], [bottom, right], list(p.dilations))
            if g == 1:
                filters = ops.constant(to_oihw(w))
                node = ops.convolution(parameter, filters, *geometry)
            else:
                # HWIO to (groups, filters of a group, channels of a group, rows, columns).
                grouped = w.reshape(p.r, p.s, p.c // g, g, p.channels_out // g).transpose(
                    3, 4, 2, 0, 1
                )
                filters = ops.constant(dense(grouped))
                node = ops.group_convolution(parameter, filters, *geometry)
        model = ov.Model([node], [parameter])
        request = self._core.compile_model(model, "CPU", self._options).create_infer_request()
        y = empty((p.n, p.channels_out, p.oh, p.ow))
        request.set_input_tensor(ov.Tensor(x, shared_memory=True))
        request.set_output_tensor(ov.Tensor(y, shared_memory=True))
        case = FunctionCase(request.infer, lambda _: to_nhwc(y))
        case.kept = (x, y)  # which the tensors share but do not keep alive
        return case
