"""What Keras's graph of layers tells: which layer reads the output of which, and who else does."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import keras

from fastconv.keras._stand_in import JOINING, STAND_INS

if TYPE_CHECKING:
    from types import FrameType

# Layers, beside those that there are fast ones for, whose output has the batch of their input, or where
# there are several inputs, the batch that these broadcast to.
_KEEP_THE_BATCH = (
    keras.layers.Average,
    keras.layers.CenterCrop,
    keras.layers.Cropping1D,
    keras.layers.Cropping2D,
    keras.layers.Dense,
    keras.layers.Dropout,
    keras.layers.ELU,
    keras.layers.Flatten,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.LeakyReLU,
    keras.layers.Maximum,
    keras.layers.Minimum,
    keras.layers.Multiply,
    keras.layers.Normalization,
    keras.layers.PReLU,
    keras.layers.Permute,
    keras.layers.Rescaling,
    keras.layers.Reshape,
    keras.layers.Resizing,
    keras.layers.Softmax,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.Subtract,
    keras.layers.UpSampling1D,
    keras.layers.UpSampling2D,
    keras.layers.ZeroPadding1D,
)
# Likewise, by the names of their classes, operations such as `x + 3.0` and keras.ops.sigmoid(x) are.
_OPERATIONS_KEEP_THE_BATCH = (
    "Add",
    "Divide",
    "HardSigmoid",
    "HardSilu",
    "Multiply",
    "Relu",
    "Relu6",
    "Sigmoid",
    "Silu",
    "Subtract",
    "TrueDivide",
)

# What calls the layers of a graph one by one. Without it nothing joins.
_RUNNING = getattr(getattr(keras.Function, "_run_through_graph", None), "__code__", None)


def layers_before(layer: keras.layers.Layer) -> list[Any]:
    """The layers whose outputs ``layer`` reads, if it is called once in a functional model."""
    nodes = layer._inbound_nodes
    return [node.operation for node in nodes[0].parent_nodes] if len(nodes) == 1 else []


def is_read_once(layer: Any) -> bool:
    """Whether ``layer`` is called once and one layer alone reads its output."""
    return len(layer._inbound_nodes) == len(layer._outbound_nodes) == 1


def is_given_out(layer: Any) -> bool:
    """Whether anything but its reader may get the output of ``layer``, which is called once.

    Its reader may leave the output unread else: a gradient by it would be None then. The graph of layers
    that runs now tells. Where none runs that has the layer, it is called by hand, as in the ``call()`` of
    a subclassed model, and its output may go anywhere.
    """
    graph = _running_graph()
    if graph is None or all(layer is not operation for operation in graph.operations):
        return True
    given_out = {id(output) for output in graph.outputs}
    (node,) = layer._inbound_nodes
    return any(id(output) in given_out for output in node.output_tensors)


def _running_graph() -> Any:
    """The innermost ``keras.Function`` (a functional model is one) that runs now; None if none does.

    Keras keeps no record of it: the stack of calls is asked, while TensorFlow traces a graph.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _RUNNING:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def have_one_batch(layer: keras.layers.Layer) -> bool:
    """Whether all that ``layer``, called once, reads has one batch, as the graph of layers tells."""
    nodes = layer._inbound_nodes
    if len(nodes) != 1:
        return False
    seen: dict[int, frozenset[int]] = {}
    first, *others = (_origins(tensor, seen) for tensor in nodes[0].input_tensors)
    return all(other == first for other in others)


def _origins(tensor: Any, seen: dict[int, frozenset[int]]) -> frozenset[int]:
    """By their ids, the tensors whose batches broadcast to that of ``tensor``."""
    pending = [tensor]
    while pending:  # no recursion: networks are deep
        current = pending[-1]
        history = getattr(current, "_keras_history", None)
        parents = []
        if history is not None and _keeps_the_batch(history.operation):
            parents = history.operation._inbound_nodes[history.node_index].input_tensors
        missing = [parent for parent in parents if id(parent) not in seen]
        if missing:
            pending += missing
            continue
        pending.pop()
        own = frozenset([id(current)])
        seen[id(current)] = frozenset().union(*(seen[id(p)] for p in parents)) if parents else own
    return seen[id(tensor)]


def _keeps_the_batch(operation: Any) -> bool:
    kind = type(operation)
    if isinstance(operation, keras.layers.Layer):
        if kind is keras.layers.Concatenate:
            return bool(operation.axis == -1 or operation.axis > 0)
        return kind in _KEEP_THE_BATCH or any(
            kind in table or kind in table.values() for table in (STAND_INS, JOINING)
        )
    own = kind.__module__.startswith("keras.src.ops.")
    return own and kind.__name__ in _OPERATIONS_KEEP_THE_BATCH
