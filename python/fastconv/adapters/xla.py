"""fastconv's kernels inside XLA: what ``jit_compile=True`` compiles.

The library ``libfastconv_xla`` registers the kernels as handlers of XLA's foreign function
interface. A kernel is called by a StableHLO module, written here as text, that TensorFlow's op
XlaCallModule makes part of the compiled graph. Both are no part of TensorFlow's public API:
``available()`` tries them and says whether they work in this process.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from fastconv.adapters import _xla_library
from fastconv.adapters._extents import Extent, static_extents
from fastconv.adapters._xla_library import ops_executed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastconv.adapters._extents import Extents, Outputs

__all__ = [
    "available",
    "call",
    "on_gpus",
    "ops_executed",
    "reason_against_gpus",
    "reason_unavailable",
]

_MODULE_VERSION = 9  # of XlaCallModule: StableHLO as text, platforms in an attribute
_TYPES = {
    tf.float32: "f32",
    tf.float16: "f16",
    tf.bfloat16: "bf16",
    tf.uint8: "ui8",
    tf.int8: "i8",
    tf.int32: "i32",
}

_logger = logging.getLogger("fastconv")


def _register() -> tuple[Any, str | None]:
    """TensorFlow's op that calls a module, and why it cannot be used; one of them is None."""
    try:
        from tensorflow.compiler.tf2xla.python import xla as tf2xla

        reason = _xla_library.load().fastconv_xla_register()
        return tf2xla.call_module, None if reason is None else reason.decode()
    except Exception as error:  # noqa: BLE001 - Whatever it is, models must work without XLA.
        return None, f"{type(error).__name__}: {error}"


# At import, before anything is compiled. It runs nothing of TensorFlow's, whose devices can still
# be configured after it.
_call_module, _registration_failure = _register()


@functools.cache
def reason_against_gpus() -> str | None:
    """Why XLA cannot call our CUDA kernels on a GPU; None if it can. The first call registers them."""
    if _registration_failure is not None:
        return _registration_failure
    try:
        if not _xla_library.gpu_is_available():
            return "fastconv finds no GPU; fastconv.info()['cuda'] says why"
        reason = _xla_library.load().fastconv_xla_register_cuda()
        return None if reason is None else reason.decode()
    except Exception as error:  # noqa: BLE001 - As above.
        return f"{type(error).__name__}: {error}"


def on_gpus() -> bool:
    """Whether TensorFlow sees a GPU, and XLA can call our CUDA kernels on it."""
    return bool(tf.config.get_visible_devices("GPU")) and reason_against_gpus() is None


def available() -> bool:
    """Whether the kernels can run inside XLA. The first call compiles one to see."""
    return reason_unavailable() is None


@functools.cache
def reason_unavailable() -> str | None:
    """Why the kernels cannot run inside XLA; None if they can."""
    reason = _registration_failure or _self_test_failure()
    if reason is not None:
        _logger.debug("the kernels cannot run inside XLA: %s", reason)
    return reason


def _self_test_failure() -> str | None:
    try:
        with tf.init_scope(), tf.device("GPU:0" if on_gpus() else "CPU:0"):
            ones = tf.ones((3, 2, 2, 1))
            function = tf.function(_self_test, jit_compile=True, autograph=False)
            signature = tf.TensorSpec((None, None, 2, 1), tf.float32)
            y = function.get_concrete_function(signature)(ones)
            if y.shape != (3, 1, 1, 1) or not bool(tf.reduce_all(y == 4.0)):
                return f"the self-test gave {y.numpy().tolist()}, not ones times 4"
    except Exception as error:  # noqa: BLE001 - As above.
        return f"{type(error).__name__}: {error}"
    return None


def _self_test(x: tf.Tensor) -> tf.Tensor:
    attributes = {
        "strides": (1, 1),
        "dilations": (1, 1),
        "padding": "VALID",
        "explicit_paddings": (0, 0, 0, 0),
        "data_format": "NHWC",
        "activation": "LINEAR",
    }
    extents: Extents = [Extent(0, 0), Extent(0, 1, plus=-2, then=1), 1, 1]
    return call("FastconvConv2D", [x, tf.ones((2, 2, 1, 1))], attributes, [("float32", extents)])[0]


def call(
    name: str, inputs: Sequence[tf.Tensor], attributes: Mapping[str, Any], outputs: Outputs
) -> list[tf.Tensor]:
    """Makes a call of the kernel ``name`` part of the graph that XLA compiles.

    Args:
        name: the op, such as ``"FastconvConv2D"``.
        inputs: its inputs, a flat list of tensors.
        attributes: its attributes: strings and lists of integers.
        outputs: the data type and the extents (see Extent) of each output.

    Returns:
        A list of tensors.
    """
    # Not by ":=", which AutoGraph cannot read.
    known = (static_extents(extents, inputs) for _, extents in outputs)
    shapes = [shape for shape in known if shape is not None]
    if len(shapes) < len(outputs):
        raise ValueError(
            "Inside XLA the rank of every tensor must be known. Received: "
            f"{', '.join(str(tensor.shape) for tensor in inputs)}"
        )
    results: list[tf.Tensor] = _call_module(
        list(inputs),
        version=_MODULE_VERSION,
        module=_module(name, inputs, attributes, outputs, shapes),
        Tout=[tf.as_dtype(dtype) for dtype, _ in outputs],
        Sout=[tf.TensorShape(shape) for shape in shapes],
        platforms=["CPU"],
        # The module is the same on a GPU: XLA finds the handler by the operation and the platform.
        disabled_checks=["platform"] if on_gpus() else [],
    )
    return results


# --- StableHLO ------------------------------------------------------------------------------------


def _module(
    name: str,
    inputs: Sequence[tf.Tensor],
    attributes: Mapping[str, Any],
    outputs: Outputs,
    shapes: list[list[int | None]],
) -> str:
    """A module whose main function is one custom call.

    Where a result's shape is not known yet, an operand behind the others computes it from the
    inputs; XLA evaluates that when it knows them.
    """
    operands = [f"%in{i}" for i in range(len(inputs))]
    types = [_type(tensor.dtype, tensor.shape) for tensor in inputs]
    results = [
        _type(tf.as_dtype(dtype), shape) for (dtype, _), shape in zip(outputs, shapes, strict=True)
    ]
    parameters = ", ".join(f"{o}: {t}" for o, t in zip(operands, types, strict=True))
    lines, shape_operands = [], ""
    if any(None in shape for shape in shapes):
        text = _Text(types)
        for extents in (extents for _, extents in outputs if extents is not None):
            operands.append(text.shape(extents, name))
            types.append(f"tensor<{len(extents)}xi32>")
        lines = text.lines
        indices = ", ".join(str(len(inputs) + i) for i in range(len(outputs)))
        shape_operands = (
            f", indices_of_shape_operands = dense<[{indices}]> : tensor<{len(outputs)}xi64>"
        )
    values = {**attributes, "num_inputs": (len(inputs),)}
    config = ", ".join(f"{key} = {_attribute(value)}" for key, value in values.items())
    returns = ", ".join(results)
    returned = "%out" if len(outputs) == 1 else ", ".join(f"%out#{i}" for i in range(len(outputs)))
    arity = "" if len(outputs) == 1 else f":{len(outputs)}"
    body = "\n".join(lines)
    return f"""module @fastconv attributes {{jax.uses_shape_polymorphism = true}} {{
func.func public @main({parameters}) -> ({returns}) {{
{body}
%out{arity} = stablehlo.custom_call @{name}({", ".join(operands)}) {{
  api_version = 4 : i32, backend_config = {{{config}}}{shape_operands}
}} : ({", ".join(types)}) -> ({returns})
return {returned} : {returns}
}}
}}"""


def _type(dtype: tf.DType, shape: Iterable[int | None]) -> str:
    extents = "".join("?x" if extent is None else f"{extent}x" for extent in shape)
    return f"tensor<{extents}{_TYPES[dtype]}>"


def _attribute(value: str | int | Iterable[int]) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    values = (value,) if isinstance(value, int) else value
    return f"array<i64: {', '.join(map(str, values))}>"


class _Text:
    """Lines of StableHLO that compute shapes."""

    def __init__(self, input_types: list[str]) -> None:
        self.lines: list[str] = []
        self._input_types = input_types

    def shape(self, extents: Sequence[Extent | int | None], name: str) -> str:
        parts = []
        for extent in extents:
            if extent is None:
                raise ValueError(
                    "Inside XLA, the shape of filters must be known and strides must be positive. "
                    f"Received: an output of {name} of unknown shape"
                )
            size = self._extent(extent) if isinstance(extent, Extent) else self._constant(extent)
            parts.append(self._add(f"stablehlo.reshape {size} : (tensor<i32>) -> tensor<1xi32>"))
        types = ", ".join(["tensor<1xi32>"] * len(parts))
        return self._add(
            f"stablehlo.concatenate {', '.join(parts)}, dim = 0 : ({types}) -> "
            f"tensor<{len(parts)}xi32>"
        )

    def _extent(self, extent: Extent) -> str:
        size = self._add(
            f"stablehlo.get_dimension_size %in{extent.source}, dim = {extent.axis} : "
            f"({self._input_types[extent.source]}) -> tensor<i32>"
        )
        for operation, number, neutral in (
            ("multiply", extent.times, 1),
            ("add", extent.plus, 0),
            ("divide", extent.over, 1),
            ("add", extent.then, 0),
        ):
            if number != neutral:
                other = self._constant(number)
                size = self._add(f"stablehlo.{operation} {size}, {other} : tensor<i32>")
        return size

    def _constant(self, number: int) -> str:
        return self._add(f"stablehlo.constant dense<{number}> : tensor<i32>")

    def _add(self, line: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"{name} = {line}")
        return name
