"""fastconv's operations on JAX arrays: jitted, differentiable, vmapped, sharded over the batch.

The kernels are called by XLA through its foreign function interface (``jax.ffi``). Importing this
module registers them and starts nothing of JAX; ``reason_unavailable()`` tries one and says why they
cannot run in this process, if they cannot.

On several devices each computes its part of the batch by itself; the gradients of filters and biases
are then summed over the devices. ``jax.vmap`` makes one larger batch of many, or, where each of them
has filters or a filter's gradient of its own, calls the kernel once for each.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from fastconv.adapters import _host, _operations, _xla_library
from fastconv.adapters._extents import Attributes, Extent
from fastconv.adapters._xla_library import ops_executed

__all__ = [
    "avg_pool2d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv2d_transpose",
    "global_avg_pool2d",
    "global_max_pool2d",
    "max_pool2d",
    "ops_executed",
    "platforms",
    "pooled_in_one",
    "reason_unavailable",
]

Array: TypeAlias = Any
# Hashable: an operation is compiled once for each set of attributes.
FrozenAttributes: TypeAlias = "tuple[tuple[str, Any], ...]"

_logger = logging.getLogger("fastconv")


# --- registration ---------------------------------------------------------------------------------


def _register(*, on_gpu: bool) -> None:
    for name, address in _xla_library.handlers(on_gpu=on_gpu).items():
        jax.ffi.register_ffi_target(
            name,
            jax.ffi.pycapsule(ctypes.c_void_p(address)),
            platform="CUDA" if on_gpu else "cpu",
            api_version=1,
        )


def _registration_failure() -> str | None:
    """Why XLA does not take the kernels for the host."""
    try:
        _register(on_gpu=False)
    except Exception as error:  # noqa: BLE001 - Whatever it is, models must work without.
        return f"{type(error).__name__}: {error}"
    return None


_failure = _registration_failure()  # at import: before anything is compiled


@functools.cache
def platforms() -> tuple[str, ...]:
    """The backends of JAX's that have our kernels. The first call registers those for GPUs."""
    if _failure is not None:
        return ()
    if jax.default_backend() == "cpu" or not _xla_library.gpu_is_available():
        return ("cpu",)
    _register(on_gpu=True)
    return ("cpu", "gpu")


@functools.cache
def reason_unavailable() -> str | None:
    """Why the kernels cannot run in JAX here; None if they can. The first call tries one."""
    reason = _failure or _self_test_failure()
    if reason is not None:
        _logger.debug("the kernels cannot run in JAX: %s", reason)
    return reason


def _self_test_failure() -> str | None:
    try:
        backend = jax.default_backend()
        if backend not in platforms():
            return f"JAX computes on {backend}, for which there are no kernels here"
        # At once, also where a function is being traced.
        with jax.ensure_compile_time_eval():
            ones = jnp.ones((3, 2, 2, 1), jnp.float32)
            y = conv2d(ones, jnp.ones((2, 2, 1, 1), jnp.float32))
            if y.shape != (3, 1, 1, 1) or not bool((y == 4.0).all()):
                return f"the self-test gave {y.tolist()}, not ones times 4"
    except Exception as error:  # noqa: BLE001 - As above.
        return f"{type(error).__name__}: {error}"
    return None


def supports_jit() -> bool:
    """Whether models with our kernels may be compiled by XLA."""
    return True


def dtypes() -> tuple[str, ...]:
    """The data types that the layers may leave to us."""
    return _operations.DTYPES


def reason_against_kind(x: Any) -> str | None:
    """Why the kernels cannot take ``x``, whatever its shape and data type; None if they can."""
    if not isinstance(x, jax.Array):
        return f"the input is a {type(x).__name__}, not an array of JAX's"
    # Nothing else traces Keras's models so, and JAX refuses to export calls of our library.
    if not all(isinstance(extent, int) for extent in x.shape):
        return f"the shape is symbolic, as where a model is exported: {x.shape}"
    return None


def reason_against_place(x: Any) -> str | None:
    """Why the kernels cannot run where ``x`` is; None if they can."""
    del x
    return reason_against_all()


def reason_against_all() -> str | None:
    """Why the kernels serve nothing in this process, as far as it is known; None if they may."""
    reason = reason_unavailable()
    return None if reason is None else f"the kernels cannot run in JAX here: {reason}"


def place() -> str:
    """Where the kernels compute, in words."""
    return "the GPU" if jax.default_backend() == "gpu" else "the CPU"


# --- public operations ----------------------------------------------------------------------------
# The arguments are those of fastconv.adapters.tensorflow; fastconv.jax documents them.


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    dilation_rate: Any = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> Array:
    """2-D convolution with bias and ReLU fused."""
    inputs = _arrays(x=x, w=w, bias=bias)
    attributes = _operations.conv2d_attributes(
        strides, padding, dilation_rate, activation, data_format
    )
    y = _framework.run_one(_operations.CONV2D, inputs, attributes)
    _remember(y, inputs, attributes)
    return y


def conv2d_max_pool2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    dilation_rate: Any = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> Array:
    """``max_pool2d(conv2d(...), 2)`` in one operation, which keeps no more than is pooled."""
    del keep_argmax  # kept exactly where a gradient is taken
    attributes = _operations.conv2d_attributes(
        strides, padding, dilation_rate, activation, data_format
    )
    return _conv2d_max_pool2d(_arrays(x=x, w=w, bias=bias), attributes)


def max_pool2d(
    x: Array,
    pool_size: Any,
    *,
    strides: Any = None,
    padding: Any = "valid",
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> Array:
    """2-D max-pooling."""
    del keep_argmax  # kept exactly where a gradient is taken
    attributes = _operations.pool2d_attributes(pool_size, strides, padding, data_format)
    return _framework.run_one(_operations.MAX_POOL2D, _arrays(x=x), attributes)


def avg_pool2d(
    x: Array,
    pool_size: Any,
    *,
    strides: Any = None,
    padding: Any = "valid",
    data_format: str = "channels_last",
) -> Array:
    """2-D average-pooling, in which padding is not counted."""
    attributes = _operations.pool2d_attributes(pool_size, strides, padding, data_format)
    return _framework.run_one(_operations.AVERAGE_POOL2D, _arrays(x=x), attributes)


def global_avg_pool2d(x: Array, *, data_format: str = "channels_last") -> Array:
    """The average of each channel of each image."""
    attributes = _operations.global_pool2d_attributes(data_format)
    return _framework.run_one(_operations.AVERAGE_POOL2D, _arrays(x=x), attributes)


def global_max_pool2d(x: Array, *, data_format: str = "channels_last") -> Array:
    """The maximum of each channel of each image."""
    attributes = _operations.global_pool2d_attributes(data_format)
    return _framework.run_one(_operations.MAX_POOL2D, _arrays(x=x), attributes)


def conv2d_transpose(
    x: Array,
    w: Array,
    *,
    strides: Any = 1,
    padding: Any = "valid",
    output_padding: Any = None,
    dilation_rate: Any = 1,
    data_format: str = "channels_last",
) -> Array:
    """Transposed 2-D convolution as ``keras.ops.conv_transpose``."""
    inputs = _arrays(x=x, w=w)
    attributes = _operations.conv2d_transpose_attributes(
        inputs[1].shape, strides, padding, output_padding, dilation_rate, data_format
    )
    return _framework.run_one(_operations.CONV2D_TRANSPOSE, inputs, attributes)


def _conv2d_max_pool2d(inputs: Sequence[Array], attributes: Attributes) -> Array:
    attributes = {**attributes, "num_argmax": 0}
    return _framework.run_one(_operations.CONV2D_MAX_POOL2D, inputs, attributes)


def _arrays(**arrays: Any) -> list[Array]:
    """Those that are not None as arrays of JAX's, all of one of our data types."""
    converted: list[Array] = []
    for name, array in arrays.items():
        if array is None:
            continue
        array = jnp.asarray(array)
        dtype = array.dtype.name
        if not converted and dtype not in _operations.DTYPES:
            rule = "float32, float16 or bfloat16"
        elif converted and array.dtype != converted[0].dtype:
            rule = f"{converted[0].dtype}, as `x` is"
        else:
            converted.append(array)
            continue
        raise TypeError(f"`{name}` must be of {rule}. Received: {name}.dtype={dtype}")
    return converted


# --- a convolution may still become one operation with the pooling behind it ----------------------


class _LastConv2d(threading.local):
    """What conv2d() was last called with in this thread. It keeps none of it alive."""

    y: Callable[[], Any] = staticmethod(lambda: None)
    inputs: Sequence[Callable[[], Any]] = ()
    attributes: Attributes | None = None


_last_conv2d = _LastConv2d()


def _remember(y: Array, inputs: Sequence[Array], attributes: Attributes) -> None:
    if isinstance(y, jax.core.Tracer):
        _last_conv2d.y = weakref.ref(y)
        _last_conv2d.inputs = [weakref.ref(array) for array in inputs]
        _last_conv2d.attributes = attributes


def pooled_in_one(y: Array, *, keep_argmax: bool = False) -> Array | None:
    """What ``max_pool2d(y, 2)`` gives, by ``conv2d_max_pool2d``, where that can take y's place.

    Args:
        y: an array. Only of a result of ``conv2d`` in a function that is being compiled can the
            convolution still be replaced: XLA leaves it out if nothing else reads it.
        keep_argmax: as for ``max_pool2d``.

    Returns:
        An array, or None.
    """
    del keep_argmax
    if _last_conv2d.y() is not y or not _is_compiling():
        return None
    inputs = [reference() for reference in _last_conv2d.inputs]
    if _last_conv2d.attributes is None or any(array is None for array in inputs):
        return None
    return _conv2d_max_pool2d(inputs, _last_conv2d.attributes)


def _is_compiling() -> bool:
    """Whether what is computed now is written down, not done: then constants are traced too."""
    return isinstance(jnp.add(jnp.float32(0), jnp.float32(0)), jax.core.Tracer)


# --- from operations to JAX -----------------------------------------------------------------------


class _Jax(_operations.Framework):
    def run(self, name: str, inputs: Sequence[Array], attributes: Attributes) -> list[Array]:
        return list(_differentiable(name, tuple(sorted(attributes.items())))(*inputs))

    def where_positive(self, gradient: Array, output: Array) -> Array:
        return jnp.where(output > 0, gradient, 0)

    def shared_by_maxima(self, x: Array, y: Array, dy: Array, axes: tuple[int, int]) -> Array:
        chosen = (x == y).astype(x.dtype)
        return chosen / chosen.sum(axis=axes, keepdims=True) * dy


_framework = _Jax()


@functools.cache
def _differentiable(name: str, frozen: FrozenAttributes) -> Any:
    """The operation as a function of its inputs, whose reverse-mode gradients are known to JAX."""
    attributes = dict(frozen)

    @jax.custom_vjp  # type: ignore[untyped-decorator]
    def run(*inputs: Array) -> Any:
        return _batched(name, frozen, tuple(array.ndim for array in inputs))(*inputs)

    variant, kept_attributes = _operations.variant_for_gradient(name, attributes)
    num_outputs = len(_operations.outputs_with_batch(name, attributes))

    def forward(*inputs: Array) -> Any:
        kept = _framework.run(variant, inputs, kept_attributes)
        return tuple(kept[:num_outputs]), (inputs, tuple(kept))

    def backward(residuals: Any, upstream: Any) -> Any:
        inputs, kept = residuals
        call = _operations.Call(inputs, kept, kept_attributes)
        return tuple(_operations.RULES[variant](_framework, call, *upstream))

    run.defvjp(forward, backward)
    return jax.jit(run, inline=True)


@functools.cache
def _batched(name: str, frozen: FrozenAttributes, ranks: tuple[int, ...]) -> Any:
    """The operation as a function of its inputs that jax.vmap can map over."""
    has_batch = _operations.inputs_with_batch(name, len(ranks))
    sums = not all(_operations.outputs_with_batch(name, dict(frozen)))
    kernel = _partitioned(name, frozen, ranks)

    @custom_vmap  # type: ignore[untyped-decorator]
    def run(*inputs: Array) -> Any:
        return kernel(*inputs)

    @run.def_vmap  # type: ignore[untyped-decorator]
    def many(axis_size: int, is_mapped: Sequence[bool], *inputs: Array) -> Any:
        mapped = [array for array, is_so in zip(inputs, is_mapped, strict=True) if is_so]
        own_filters = any(
            is_so and not batch for is_so, batch in zip(is_mapped, has_batch, strict=True)
        )
        if sums or own_filters:

            def one(arrays: Sequence[Array]) -> Any:
                remaining = iter(arrays)
                return run(
                    *(
                        next(remaining) if is_so else array
                        for array, is_so in zip(inputs, is_mapped, strict=True)
                    )
                )

            outputs = jax.lax.map(one, mapped)
        else:
            outputs = run(
                *(
                    _fold(array, is_so, axis_size) if batch else array
                    for array, is_so, batch in zip(inputs, is_mapped, has_batch, strict=True)
                )
            )
            size = inputs[0].shape[int(is_mapped[0])]  # the first input always has a batch
            outputs = tuple(array.reshape(axis_size, size, *array.shape[1:]) for array in outputs)
        return outputs, tuple(True for _ in outputs)

    return run


def _fold(array: Array, is_mapped: bool, axis_size: int) -> Array:
    """The mapped axis and that of the batch as one."""
    if not is_mapped:
        array = jnp.broadcast_to(array, (axis_size, *array.shape))
    return array.reshape(axis_size * array.shape[1], *array.shape[2:])


@functools.cache
def _partitioned(name: str, frozen: FrozenAttributes, ranks: tuple[int, ...]) -> Any:
    """The operation as a function of its inputs that is sharded over the batch, and no other axis."""
    attributes = dict(frozen)
    inputs_batch = _operations.inputs_with_batch(name, len(ranks))
    outputs_batch = _operations.outputs_with_batch(name, attributes)

    def call(*inputs: Array) -> Any:
        return _call(name, inputs, attributes)

    def batch_axes(arguments: Sequence[Any]) -> Any:
        """The mesh's axes that the batch lies along; None for none."""
        for argument, batch in zip(arguments, inputs_batch, strict=True):
            spec: Any = getattr(argument.sharding, "spec", ())
            if batch and len(spec) and spec[0] is not None:
                return spec[0]
        return None

    def shardings(mesh: Any, axes: Any, batches: Sequence[bool]) -> Any:
        specs = [PartitionSpec(axes) if batch else PartitionSpec() for batch in batches]
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def infer(mesh: Any, arguments: Sequence[Any], results: Any) -> Any:
        del results
        return shardings(mesh, batch_axes(arguments), outputs_batch)

    def partition(mesh: Any, arguments: Sequence[Any], results: Any) -> Any:
        del results
        axes = batch_axes(arguments)

        def local(*inputs: Array) -> Any:
            outputs = call(*inputs)
            if axes is None:
                return outputs
            return tuple(
                output if batch else jax.lax.psum(output, axes)
                for output, batch in zip(outputs, outputs_batch, strict=True)
            )

        return (
            mesh,
            local,
            shardings(mesh, axes, outputs_batch),
            shardings(mesh, axes, inputs_batch),
        )

    partitioned = custom_partitioning(call)
    output_ranks = [
        len(extents) if extents else 4
        for _, extents in _operations.outputs(name, (1, 1, 1, 1), attributes)
    ]
    operands = _factors("in", ranks, inputs_batch)
    results = _factors("out", output_ranks, outputs_batch)
    partitioned.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{operands} -> {results}",
    )
    return partitioned


def _factors(kind: str, ranks: Sequence[int], batches: Sequence[bool]) -> str:
    """Of arrays with these ranks, in the notation of Shardy's rules: they share the batch alone."""
    return ", ".join(
        " ".join(
            "batch" if axis == 0 and batch else f"{kind}{index}axis{axis}" for axis in range(rank)
        )
        for index, (rank, batch) in enumerate(zip(ranks, batches, strict=True))
    )


def _call(name: str, inputs: Sequence[Array], attributes: Attributes) -> Any:
    platforms()  # which registers the kernels
    shapes = [array.shape for array in inputs]
    _host.check(name, shapes, attributes)
    results = [
        jax.ShapeDtypeStruct(
            [
                extent.evaluate(inputs) if isinstance(extent, Extent) else extent
                for extent in extents
            ],
            jnp.dtype(dtype),
        )
        for dtype, extents in _operations.outputs(
            name, shapes[-1 if len(inputs) < 2 else 1], attributes, inputs[0].dtype.name
        )
        if extents is not None
    ]
    # The attributes of the handler: names, and lists of 64-bit integers.
    lists = {
        key: value if isinstance(value, str) else np.array(np.atleast_1d(value), np.int64)
        for key, value in attributes.items()
    }
    return tuple(
        jax.ffi.ffi_call(name, results)(
            *inputs, num_inputs=np.array([len(inputs)], np.int64), **lists
        )
    )
