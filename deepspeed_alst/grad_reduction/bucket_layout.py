"""Index arithmetic of gradient slices and of their owners. Integers only.

Slices are reduced one at a time; each rank sums an equal share, whoever owns the elements.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Columns ``[start, stop)`` of one gradient, laid out as [P, columns], at column ``at`` of a slice."""

    index: int
    start: int
    stop: int
    at: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


def segments(num_columns: Sequence[int], width: int) -> Iterator[list[Segment]]:
    """Yield slices of at most ``width`` columns that hold the columns of all gradients in order."""
    filled: list[Segment] = []
    used = 0
    for index, columns in enumerate(num_columns):
        start = 0
        while start < columns:
            stop = min(columns, start + width - used)
            filled.append(Segment(index, start, stop, used))
            used += stop - start
            start = stop
            if used == width:
                yield filled
                filled, used = [], 0
    if filled:
        yield filled


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, stop)`` of a bucket, all of one fragment."""

    fragment: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def pieces_by_owner(
    bounds: Sequence[int], owners: Sequence[int], start: int, stop: int, num_ranks: int
) -> list[list[Piece]]:
    """Return the pieces of ``[start, stop)`` that each rank owns, in bucket order.

    Fragment i holds the elements ``[bounds[i], bounds[i + 1])`` and belongs to rank ``owners[i]``.
    """
    owned: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for fragment, owner in enumerate(owners):
        first, last = max(start, bounds[fragment]), min(stop, bounds[fragment + 1])
        if first < last:
            owned[owner].append(Piece(fragment, first, last))
    return owned
