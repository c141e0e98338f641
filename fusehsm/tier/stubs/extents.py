"""Extents of a file: ranges of consecutive block numbers, and holes."""

import errno
import os
from collections.abc import Iterator, Sequence

# Holes of a file (lseek(2), SEEK_HOLE and SEEK_DATA).


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes of a file within [start, end), each as (start, end) in bytes, ascending. Beyond the end of the file there are no holes."""
    while (hole := _seek(fd, start, os.SEEK_HOLE, end)) < end:
        start = _seek(fd, hole, os.SEEK_DATA, end)
        if hole < (end_of_file := os.fstat(fd).st_size):
            yield hole, min(start, end_of_file)


def _seek(fd: int, start: int, whence: int, end: int) -> int:
    """lseek(2); `end` if it finds nothing before `end`. Raises OSError, but not ENXIO."""
    try:
        return min(os.lseek(fd, start, whence), end)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end


def extents_of(numbers: Sequence[int], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges (first, end), `end` not included; of at most `most` numbers each, if given."""
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
