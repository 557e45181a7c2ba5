"""A filter that is kept from call to call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastconv import _core

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PackedFilter"]


class PackedFilter:
    """A filter for many calls of :func:`conv2d` and :func:`conv2d_grad_input`, in place of the array.

    An algorithm lays a filter out anew before it uses it: panels of a matrix product, or Winograd's
    transform. Of an array that is done in every call, for it may have changed. A ``PackedFilter`` has a
    copy of the array that nobody changes, and keeps what was made of it. The first call of a kind makes
    it. Where a call has few pixels, as with a batch of one, later ones take a twentieth to a quarter
    less time; the results are the same bits.

    It has the filter, and up to four layouts of it: one for each function, algorithm and instruction set
    that the calls have chosen, and for small images one for each number of threads. Winograd's F(4x4, 3x3) takes
    four times the filter's memory. Several threads may use one at once.

    Parameters
    ----------
    w
        Array of float32 of shape (rows, columns, channels / groups, filters). It is copied.

    Raises
    ------
    TypeError
        If ``w`` is no array of float32.
    ValueError
        If it does not have four dimensions, or one of them is 0.

    Examples
    --------
    >>> import numpy as np, fastconv
    >>> w = fastconv.PackedFilter(np.ones((3, 3, 16, 32), np.float32))
    >>> fastconv.conv2d(np.ones((1, 8, 8, 16), np.float32), w, padding="same").shape
    (1, 8, 8, 32)
    """

    __slots__ = ("_filter",)

    def __init__(self, w: NDArray[np.float32]) -> None:
        self._filter = _core.PackedFilter(w)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(rows, columns, channels / groups, filters)."""
        return self._filter.shape

    @property
    def nbytes(self) -> int:
        """The bytes held now, of the filter and of all layouts made so far."""
        return self._filter.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the filter alone, of which they make their own layouts."""
        return type(self), (self._filter.array(),)

    def __repr__(self) -> str:
        return f"PackedFilter(shape={self.shape}, nbytes={self.nbytes})"


def compiled(w: Any) -> Any:
    """What the compiled functions take for ``w``: of a PackedFilter, theirs."""
    return w._filter if isinstance(w, PackedFilter) else w
