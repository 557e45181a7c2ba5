"""Output shapes as expressions of input shapes: static where known, left to XLA where not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence


class Extent(NamedTuple):
    """An extent of an output: ``(size * times + plus) // over + then``.

    ``size`` is the extent of the input number ``source`` along ``axis``.
    """

    source: int
    axis: int
    times: int = 1
    plus: int = 0
    over: int = 1
    then: int = 0

    def evaluate(self, inputs: Sequence[Any]) -> Any:
        """None where the input's extent is unknown, or where the kernel will refuse it."""
        size = inputs[self.source].shape[self.axis]
        if size is None:
            return None
        room = size * self.times + self.plus
        return room // self.over + self.then if room >= 0 else None


# Of one output, in order; None where not even their number is known.
Extents: TypeAlias = "list[Extent | int | None] | None"
# The data type, by name, and the extents of each output.
Outputs: TypeAlias = "Sequence[tuple[str, Extents]]"
# An operation's attributes by name: strings, integers and tuples of them.
Attributes: TypeAlias = Mapping[str, Any]


def like(source: int, rank: int = 4) -> list[Extent | int | None]:
    """The extents of the input number ``source``."""
    return [Extent(source, axis) for axis in range(rank)]


def static_extents(extents: Extents, inputs: Sequence[Any]) -> list[int | None] | None:
    """``extents``, of which each is an Extent, a number or None, as numbers and None.

    None for all where the rank of an input that they depend on is unknown.
    """
    sources = {extent.source for extent in extents or () if isinstance(extent, Extent)}
    if extents is None or any(inputs[source].shape.rank is None for source in sources):
        return None
    return [e.evaluate(inputs) if isinstance(e, Extent) else e for e in extents]
