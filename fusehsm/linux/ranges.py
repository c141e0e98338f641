"""Keeps sets of byte ranges."""

from bisect import bisect_left, bisect_right


class RangeSet:
    """Half-open byte ranges [start, end), kept sorted and merged."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Add [start, end). An empty range adds nothing."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) is in the set. True for an empty range."""
        if start >= end:
            return True
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and self._ends[index] >= end

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that are not in the set, in ascending order."""
        found = []
        index = bisect_right(self._ends, start)
        while start < end:
            if index == len(self._starts) or self._starts[index] >= end:
                found.append((start, end))
                break
            if start < self._starts[index]:
                found.append((start, self._starts[index]))
            start = self._ends[index]
            index += 1
        return found

    def clear(self) -> None:
        """Remove all ranges."""
        self._starts.clear()
        self._ends.clear()

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> "zip[tuple[int, int]]":
        return zip(self._starts, self._ends, strict=True)
