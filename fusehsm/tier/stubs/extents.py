"""Extents of a file: numbers of blocks that follow each other, and ranges without data."""

import errno
import os
from collections.abc import Iterator, Sequence

# Where a file has no data.


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes of a file within [start, end), as [start, end) in bytes, ascending. What lies beyond its end is none."""
    while (hole := _seek(fd, start, os.SEEK_HOLE, end)) < end:
        start = _seek(fd, hole, os.SEEK_DATA, end)
        if hole < (end_of_file := os.fstat(fd).st_size):
            yield hole, min(start, end_of_file)


def _seek(fd: int, start: int, whence: int, end: int) -> int:
    """lseek(2), with `end` as the answer where nothing is found before it."""
    try:
        return min(os.lseek(fd, start, whence), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end


def extents_of(numbers: Sequence[int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, end), of at most `most` numbers each if that is given."""
    first = end = -1
    for number in numbers:
        if number == end and (most is None or end - first < most):
            end += 1
            continue
        if end > first:
            yield first, end
        first, end = number, number + 1
    if end > first:
        yield first, end
