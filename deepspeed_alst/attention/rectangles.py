"""Cut the scores of causal attention into rectangles that need no mask but a kernel's causal one on a square.

Integers only. A causal mask on a square means the same to every kernel; on other shapes some align it top-left and
others bottom-right.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deepspeed_alst.attention.hf_masks import MaskSpec


class Rectangle(NamedTuple):
    """Query rows and keys of a sequence, whose scores one kernel call computes."""

    first_row: int
    last_row: int
    first_key: int
    last_key: int
    triangle: str = ""
    """``"lower"``: row i sees keys 0 to i of a square; ``"upper"``: keys i and later; empty: all keys."""


def rectangles(first: int, last: int, length: int, mask: MaskSpec | None, key_block: int) -> Iterator[Rectangle]:
    """Yield the rectangles that together hold every pair of a row in ``[first, last)`` and a key that it sees.

    Args:
        first: first row.
        last: row after the last.
        length: tokens of the sequence.
        mask: window, chunks and documents; None if there are none.
        key_block: maximum keys of a rectangle without a triangle. It bounds what a kernel allocates per key.
    """
    mask, start = mask or MaskSpec(), 0
    for count, size in mask.runs(length):
        skipped = min(count, max(0, (first - start) // size))
        for begin in range(start + skipped * size, min(last, start + count * size), size):
            rows = max(first, begin), min(last, begin + size)
            if rows[0] == rows[1]:  # a shard of few tokens, of which a rank has none
                continue
            if mask.window is None or mask.window >= size:
                yield from _all_before(*rows, begin, rows[0], key_block)
                yield Rectangle(*rows, *rows, "lower")
            else:
                yield from _in_window(*rows, begin, mask.window, key_block)
        start += count * size


def _all_before(first: int, last: int, first_key: int, last_key: int, key_block: int) -> Iterator[Rectangle]:
    for key in range(first_key, last_key, key_block):
        yield Rectangle(first, last, key, min(last_key, key + key_block))


def _in_window(first: int, last: int, start: int, window: int, key_block: int) -> Iterator[Rectangle]:
    """Yield those of rows that see the ``window`` last tokens, themselves included, from ``start`` on."""
    for row in range(first, last, window):
        end = min(last, row + window)
        # Keys in [row - window + 1, end - window) leave the window of one row after another.
        leaving = max(start, row - window + 1), max(start, end - window)
        yield from _all_before(row, end, leaving[1], row, key_block)
        if size := leaving[1] - leaving[0]:
            whole = end - 1 - size  # rows before it see all of these keys: the first ones of the stretch
            if whole > row:
                yield Rectangle(row, whole, *leaving)
            yield Rectangle(whole, end - 1, *leaving, "upper")
        yield Rectangle(row, end, row, end, "lower")


def in_block(parts: Iterable[Rectangle], first: int, last: int) -> Iterator[Rectangle]:
    """Yield what of the rectangles is in a block of keys: of a triangle a smaller one, and what is beside it."""
    for part in parts:
        begin, end = max(part.first_key, first), min(part.last_key, last)
        if begin >= end:
            continue
        if not part.triangle:
            yield part._replace(first_key=begin, last_key=end)
            continue
        square = part.first_row + begin - part.first_key, part.first_row + end - part.first_key
        yield Rectangle(*square, begin, end, part.triangle)
        beside = (square[1], part.last_row) if part.triangle == "lower" else (part.first_row, square[0])
        if beside[0] < beside[1]:
            yield Rectangle(*beside, begin, end)


def blocks(part: Rectangle, rows: int, keys: int) -> Iterator[Rectangle]:
    """Yield the rectangles of at most so many rows and keys, a triangle's on squares of so many rows, of one."""
    for row in range(part.first_row, part.last_row, rows):
        end = min(part.last_row, row + rows)
        begin, stop = part.first_key, part.last_key
        if part.triangle:
            square = part.first_key + row - part.first_row, part.first_key + end - part.first_row
            yield Rectangle(row, end, *square, part.triangle)
            begin, stop = (begin, square[0]) if part.triangle == "lower" else (square[1], stop)
        yield from _all_before(row, end, begin, stop, keys)


def of_size(first: int, last: int, size: int) -> list[slice]:
    """Return slices of at most ``size`` that together are ``[first, last)``."""
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]
