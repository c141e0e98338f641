"""Where a file has no data."""

import errno
import os
from collections.abc import Iterator


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
