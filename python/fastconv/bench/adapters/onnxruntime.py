"""ONNX Runtime: a model of one operation, built in memory; fprop alone.

Its CPU provider computes in NCHW. Input and output stay in its own memory (I/O binding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastconv.bench.adapters import FunctionCase, Unsupported, empty, to_nchw, to_nhwc, to_oihw

if TYPE_CHECKING:
    from fastconv.bench._types import Arrays, Record
    from fastconv.bench.adapters import Case
    from fastconv.bench.problem import Problem


class Implementation:
    def __init__(self, conditions: Record) -> None:
        import onnx
        import onnxruntime

        if conditions["isa"]:
            raise Unsupported("no way to limit its instruction set")
        self._onnx, self._runtime = onnx, onnxruntime
        self._threads = conditions["threads"]
        self.versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        if direction != "fprop":
            raise Unsupported("inference only")
        onnx, runtime = self._onnx, self._runtime
        helper, proto = onnx.helper, onnx.TensorProto
        (top, bottom), (left, right) = problem.sides
        x = to_nchw(arrays["x"])
        y_shape = (problem.n, problem.channels_out, problem.oh, problem.ow)
        attributes = {
            "kernel_shape": [problem.r, problem.s],
            "strides": list(problem.strides),
            "pads": [top, left, bottom, right],
            "dilations": list(problem.dilations),
        }
        weights = []
        if problem.is_pool:
            node = helper.make_node("MaxPool", ["x"], ["y"], **attributes)
        else:
            node = helper.make_node("Conv", ["x", "w"], ["y"], group=problem.groups, **attributes)
            weights = [onnx.numpy_helper.from_array(to_oihw(arrays["w"]), "w")]
        graph = helper.make_graph(
            [node],
            "case",
            [helper.make_tensor_value_info("x", proto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", proto.FLOAT, y_shape)],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        x_value = runtime.OrtValue.ortvalue_from_numpy(x)
        y = empty(y_shape)
        y_value = runtime.OrtValue.ortvalue_from_numpy(y)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x_value)
        binding.bind_ortvalue_output("y", y_value)
        return FunctionCase(
            lambda: session.run_with_iobinding(binding), lambda _: to_nhwc(y_value.numpy())
        )
