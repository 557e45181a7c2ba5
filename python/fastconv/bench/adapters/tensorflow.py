"""TensorFlow: one operation in a compiled graph (tf.function), the form that training runs.

TensorFlow's CPU kernels take NHWC alone; its oneDNN kernels are on, as they are by default.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from fastconv.bench.adapters import FunctionCase, Unsupported

if TYPE_CHECKING:
    import tensorflow as tf

    from fastconv.bench._types import Arrays, Floats, Record
    from fastconv.bench.adapters import Case
    from fastconv.bench.problem import Problem


def environment(conditions: Record) -> dict[str, str]:
    return {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


class Implementation:
    def __init__(self, conditions: Record) -> None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(conditions["threads"])
        tf.config.threading.set_inter_op_parallelism_threads(1)
        if conditions["layout"] == "nchw":
            raise Unsupported("its CPU kernels have no NCHW")
        self._tf = tf
        one_dnn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1") != "0"
        self.versions = {"tensorflow": tf.__version__ + (" with oneDNN" if one_dnn else "")}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        tf = self._tf
        (top, bottom), (left, right) = problem.sides
        strides = [1, *problem.strides, 1]
        x, dy = tf.constant(arrays["x"]), tf.constant(arrays["dy"])
        if problem.is_pool:
            return self._pool(problem, direction, x, dy, strides)
        if problem.strides[0] != problem.strides[1] and problem.groups > 1:
            raise Unsupported("no depthwise convolution with unequal strides")
        options: dict[str, Any] = {"strides": strides, "dilations": [1, *problem.dilations, 1]}
        if top or bottom or left or right:
            options |= {
                "padding": "EXPLICIT",
                "explicit_paddings": [0, 0, top, bottom, left, right, 0, 0],
            }
        else:
            options["padding"] = "VALID"
        w = tf.constant(arrays["w"])
        if problem.groups > 1 and problem.groups == problem.c:
            return self._depthwise(problem, direction, x, w, dy, options)
        if direction == "fprop":
            function = tf.function(lambda a, b: tf.raw_ops.Conv2D(input=a, filter=b, **options))
            operands = (x, w)
        elif direction == "dgrad":
            sizes = tf.constant(problem.x_shape)
            function = tf.function(
                lambda a, b: tf.raw_ops.Conv2DBackpropInput(
                    input_sizes=sizes, filter=a, out_backprop=b, **options
                )
            )
            operands = (w, dy)
        else:
            sizes = tf.constant(problem.w_shape)
            function = tf.function(
                lambda a, b: tf.raw_ops.Conv2DBackpropFilter(
                    input=a, filter_sizes=sizes, out_backprop=b, **options
                )
            )
            operands = (x, dy)
        return self._case(function, *operands)

    def _depthwise(
        self,
        problem: Problem,
        direction: str,
        x: tf.Tensor,
        w: tf.Tensor,
        dy: tf.Tensor,
        options: dict[str, Any],
    ) -> Case:
        tf = self._tf
        multiplier = problem.channels_out // problem.c
        # HWIO with I = 1 and O = channels * multiplier, channel by channel.
        shape = (problem.r, problem.s, problem.c, multiplier)
        if direction == "fprop":
            function = tf.function(
                lambda a, b: tf.raw_ops.DepthwiseConv2dNative(input=a, filter=b, **options)
            )
            return self._case(function, x, tf.reshape(w, shape))
        if direction == "dgrad":
            sizes = tf.constant(problem.x_shape)
            function = tf.function(
                lambda a, b: tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                    input_sizes=sizes, filter=a, out_backprop=b, **options
                )
            )
            return self._case(function, tf.reshape(w, shape), dy)
        sizes = tf.constant(shape)
        function = tf.function(
            lambda a, b: tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                input=a, filter_sizes=sizes, out_backprop=b, **options
            )
        )
        return self._case(function, x, dy, to_shape=problem.w_shape)

    def _pool(
        self, problem: Problem, direction: str, x: tf.Tensor, dy: tf.Tensor, strides: list[int]
    ) -> Case:
        tf = self._tf
        sides = [side for pair in problem.sides for side in pair]
        options: dict[str, Any] = {"ksize": [1, problem.r, problem.s, 1], "strides": strides}
        if any(sides):
            options |= {"padding": "EXPLICIT", "explicit_paddings": [0, 0, *sides, 0, 0]}
        else:
            options["padding"] = "VALID"
        forward = tf.function(lambda a: tf.raw_ops.MaxPool(input=a, **options))
        if direction == "fprop":
            return self._case(forward, x)
        backward = tf.function(
            lambda a, b, c: tf.raw_ops.MaxPoolGrad(orig_input=a, orig_output=b, grad=c, **options)
        )
        return self._case(backward, x, forward(x), dy)

    def _case(
        self, function: Any, *operands: tf.Tensor, to_shape: tuple[int, ...] | None = None
    ) -> Case:
        concrete = function.get_concrete_function(*operands)

        def to_numpy(value: tf.Tensor) -> Floats:
            array: Floats = value.numpy()
            return array if to_shape is None else array.reshape(to_shape)

        errors = self._tf.errors
        try:
            concrete(*operands)
        except (errors.UnimplementedError, errors.InvalidArgumentError) as error:
            # Of all cases alike: without the number that the operation's node has.
            message = re.sub(r"\{\{function_node [^}]*\}\}\s*", "", str(error).splitlines()[0])
            raise Unsupported(message) from error
        return FunctionCase(lambda: concrete(*operands), to_numpy)
