"""fastconv itself: its Python functions, and its kernels timed from inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import fastconv
from fastconv import _core
from fastconv.bench.adapters import Case, empty, to_nchw, to_nhwc
from fastconv.packed_filter import compiled

if TYPE_CHECKING:
    from fastconv.bench._types import Arrays, Floats, Record, Shape
    from fastconv.bench.problem import Problem


def environment(conditions: Record) -> dict[str, str]:
    variables = {"FASTCONV_NUM_THREADS": str(conditions["threads"])}
    if conditions["isa"]:
        variables["FASTCONV_ISA"] = conditions["isa"]
    if conditions["algorithm"]:
        variables["FASTCONV_ALGORITHM"] = conditions["algorithm"]
    return variables


class Implementation:
    def __init__(self, conditions: Record) -> None:
        self._nchw = conditions["layout"] == "nchw"
        self._seconds = conditions["seconds"]
        self._packed = conditions["filter"] == "packed"
        if conditions["accuracy"]:
            fastconv.set_accuracy(conditions["accuracy"])
        facts = fastconv.info()
        self.versions = {"fastconv": facts["version"], "isa": facts["isa"]}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        return _FastconvCase(problem, direction, arrays, self._nchw, self._packed)

    def limits(self) -> dict[str, float]:
        """Measured: operations a second in registers, bytes a second in memory."""
        seconds = min(0.25, 2.5 * self._seconds)  # a quick run is to be quick
        # The cost model measures the machine at its first question: now, while nothing else runs.
        fastconv.explain((1, 1, 1, 1), (1, 1, 1, 1))
        # Beyond any cache; small enough for any machine.
        size = 256 << 20
        limits = {
            "flops": _core.timed.flops(seconds),
            "read": _core.timed.bandwidth("read", size, seconds),
            "write": _core.timed.bandwidth("write", size, seconds),
            "copy": _core.timed.bandwidth("copy", 2 * size, seconds),
        }
        # Once more: threads that have just begun may share a core for a while.
        limits["flops"] = max(limits["flops"], _core.timed.flops(seconds))
        return limits


class _FastconvCase(Case):
    def __init__(
        self, problem: Problem, direction: str, arrays: Arrays, nchw: bool, packed: bool
    ) -> None:
        lay = to_nchw if nchw else np.ascontiguousarray
        self._unlay = to_nhwc if nchw and direction != "wgrad" else np.asarray
        x, dy = lay(arrays["x"]), lay(arrays["dy"])
        options: dict[str, Any] = {
            "strides": problem.strides,
            "padding": problem.sides,
            "data_format": "channels_first" if nchw else "channels_last",
        }
        (top, bottom), (left, right) = problem.sides
        # As the functions of fastconv.functional hand them to the compiled part.
        raw = {**options, "padding": ("explicit", (top, bottom, left, right))}
        arguments: dict[str, Any]
        extra: dict[str, Any]
        if problem.is_pool:
            window = options["pool_size"] = raw["pool_size"] = (problem.r, problem.s)
            if direction == "fprop":
                arguments = {"x": x}
                extra, self._result = {"return_argmax": False}, empty(dy.shape)
            else:
                _, argmax = fastconv.max_pool2d(
                    x, window, return_argmax=True, **_without_window(options)
                )
                arguments = {"dy": dy, "argmax": argmax, "input_shape": x.shape}
                extra, self._result = {}, empty(x.shape)
            name = "max_pool2d" if direction == "fprop" else "max_pool2d_grad"
        else:
            w = np.ascontiguousarray(arrays["w"])
            more: dict[str, Any] = {"dilation_rate": problem.dilations, "groups": problem.groups}
            options |= more
            raw |= more | {"activation": "linear"}
            calls: dict[str, tuple[str, dict[str, Any], dict[str, Any], Floats]] = {
                "fprop": ("conv2d", {"x": x, "w": w}, {"bias": None}, dy),
                "dgrad": (
                    "conv2d_grad_input",
                    {"dy": dy, "w": w, "input_shape": x.shape},
                    {"output": None},
                    x,
                ),
                "wgrad": (
                    "conv2d_grad_filter",
                    {"x": x, "dy": dy, "filter_shape": w.shape},
                    {"output": None, "return_bias_grad": False},
                    w,
                ),
            }
            name, arguments, extra, like = calls[direction]
            self._result = empty(like.shape)
            self._explain(direction, x.shape, w.shape, options)
            if "w" in arguments and packed:
                arguments["w"] = fastconv.PackedFilter(w)
        self._function = getattr(fastconv, name)
        self._timed = getattr(_core.timed, name)
        self._call = {**arguments, **options, "out": self._result}
        self._raw = {**arguments, **extra, **raw, "out": self._result}
        if "w" in self._raw:
            self._raw["w"] = compiled(self._raw["w"])

    def _explain(
        self, direction: str, x_shape: Shape, w_shape: Shape, options: dict[str, Any]
    ) -> None:
        plan = fastconv.explain(x_shape, w_shape, direction=direction, **options)
        self.algorithm = plan["algorithm"]
        self.blocking = plan["blocking"]
        self.workspace = plan["workspace_bytes"]
        self.predicted = plan["predicted_seconds"]

    def call(self) -> None:
        self._function(**self._call)

    def result(self) -> Floats:
        self._result.fill(np.nan)
        self.call()
        return self._unlay(self._result)

    def kernel_times(self, count: int) -> list[int]:
        _core.timed.set_calls(count)
        self._timed(**self._raw)
        return _core.timed.nanoseconds()


def _without_window(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "pool_size"}
