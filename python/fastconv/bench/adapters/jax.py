"""JAX: jax.lax's convolution and its transposes, jitted, on XLA's CPU backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.bench.adapters import FunctionCase, to_nchw, to_nhwc

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastconv.bench._types import Arrays, Floats, Record
    from fastconv.bench.adapters import Case
    from fastconv.bench.problem import Problem


def environment(conditions: Record) -> dict[str, str]:
    flags = []
    if conditions["isa"] == "avx2":
        flags.append("--xla_cpu_max_isa=AVX2")
    if conditions["threads"] == 1:
        flags.append("--xla_cpu_multi_thread_eigen=false")
    # More than one thread: as many as the process may use CPUs, see worker.py.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


class Implementation:
    def __init__(self, conditions: Record) -> None:
        import jax

        self._jax = jax
        self._nchw = conditions["layout"] == "nchw"
        self.versions = {"jax": jax.__version__}

    def prepare(self, problem: Problem, direction: str, arrays: Arrays) -> Case:
        jax = self._jax
        lay = to_nchw if self._nchw else np.ascontiguousarray
        unlay = to_nhwc if self._nchw else np.asarray
        x, dy = jax.device_put(lay(arrays["x"])), jax.device_put(lay(arrays["dy"]))
        letters = "NCHW" if self._nchw else "NHWC"
        if problem.is_pool:

            def around(pair: tuple[int, int]) -> tuple[int, ...]:
                return (1, 1, *pair) if self._nchw else (1, *pair, 1)

            window, strides = around((problem.r, problem.s)), around(problem.strides)
            sides = ((0, 0), (0, 0), *problem.sides) if self._nchw else (
                (0, 0), *problem.sides, (0, 0)
            )  # fmt: skip

            def forward(a: Any) -> Any:
                return jax.lax.reduce_window(a, -np.inf, jax.lax.max, window, strides, sides)

            if direction == "fprop":
                return self._case(forward, (x,), unlay)
            return self._case(lambda a, b: jax.vjp(forward, a)[1](b)[0], (x, dy), unlay)
        w = jax.device_put(np.ascontiguousarray(arrays["w"]))

        def convolve(a: Any, b: Any) -> Any:
            return jax.lax.conv_general_dilated(
                a,
                b,
                problem.strides,
                problem.sides,
                rhs_dilation=problem.dilations,
                dimension_numbers=(letters, "HWIO", letters),
                feature_group_count=problem.groups,
            )

        if direction == "fprop":
            return self._case(convolve, (x, w), unlay)
        if direction == "dgrad":
            return self._case(
                lambda b, c: jax.linear_transpose(lambda a: convolve(a, b), x)(c)[0],
                (w, dy),
                unlay,
            )
        return self._case(
            lambda a, c: jax.linear_transpose(lambda b: convolve(a, b), w)(c)[0],
            (x, dy),
            np.asarray,
        )

    def _case(
        self,
        function: Callable[..., Any],
        operands: tuple[Any, ...],
        unlay: Callable[[Any], Floats],
    ) -> Case:
        compiled = self._jax.jit(function).lower(*operands).compile()
        return FunctionCase(
            lambda: compiled(*operands).block_until_ready(),
            lambda value: unlay(np.asarray(value)),
        )
