"""Free-space allocator of a file: best fit, and freed extents merge with their neighbours."""

import bisect


class Extents:
    """Free extents of a file of initially 0 bytes."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes), sorted, no two adjacent

    def grow(self, size_bytes: int) -> None:
        """Grow the file to ``size_bytes``."""
        if size_bytes > self.size_bytes:
            begin, self.size_bytes = self.size_bytes, size_bytes
            self.free(begin, size_bytes - begin)

    def missing(self, num_bytes: int) -> int:
        """Return the bytes that the file must grow by for ``take(num_bytes)``; 0 if it has room."""
        if any(size >= num_bytes for _, size in self._free):
            return 0
        at_end = sum(self._free[-1]) == self.size_bytes if self._free else False
        return num_bytes - (self._free[-1][1] if at_end else 0)

    def take(self, num_bytes: int) -> int:
        """Allocate from the smallest free extent that fits; return the offset."""
        size, offset = min((size, offset) for offset, size in self._free if size >= num_bytes)
        place = bisect.bisect_left(self._free, (offset,))
        self._free[place : place + 1] = [(offset + num_bytes, size - num_bytes)] if size > num_bytes else []
        return offset

    def free(self, offset: int, num_bytes: int) -> None:
        """Free an extent."""
        place = bisect.bisect_left(self._free, (offset,))
        begin, end = offset, offset + num_bytes
        first, last = place, place
        if place > 0 and sum(self._free[place - 1]) == begin:
            first, begin = place - 1, self._free[place - 1][0]
        if place < len(self._free) and self._free[place][0] == end:
            last, end = place + 1, sum(self._free[place])
        self._free[first:last] = [(begin, end - begin)]
