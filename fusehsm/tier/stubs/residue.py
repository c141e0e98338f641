"""Data in a block that does not count as here. As a rule there is none.

A fill that was killed leaves some of the store's content. But when a listener dies, the kernel lets every waiting access go on. So the block may hold
a user's write into a hole. The rest of that page is then zeros that are neither the user's nor the store's.
"""

import os
from collections.abc import Iterator, Sequence
from enum import Enum

from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.tier.stubs.extents import holes


class Residue(Enum):
    """The data found in a block that is not here."""

    # Holes, or the store's own content.
    NONE = 0
    # Other content, in which no zero can come from a hole.
    USERS = 1
    # Other content, in which a zero may come from a hole.
    UNKNOWN = 2


def residue(fd: int, start: int, end: int, pieces: Sequence[tuple[int, bytes]]) -> Residue:
    """The residue in [start, end) of a file, in bytes; `pieces`: the store's content of that range as (offset, data), without its holes."""
    end = min(end, os.fstat(fd).st_size)
    if not _data(fd, start, end):
        return Residue.NONE
    forget_clean_pages(fd)
    found = Residue.NONE
    for first, stop in _data(fd, start, end):
        data = os.pread(fd, stop - first, first)
        expected = _expected(first, first + len(data), pieces)
        if data == expected:
            continue
        if any(wanted and not byte for byte, wanted in zip(data, expected, strict=True)):
            return Residue.UNKNOWN
        found = Residue.USERS
    return found


def unfilled(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes in [start, end), in bytes and ascending, of blocks that are not here. `end`: of a block, or the limit of the store's content.

    The page with the limit may hold data that the user has appended: the event of an append names the file position, not the end of the file.
    The zeros of that page below the limit are not the user's.
    """
    last = start
    for hole, stop in holes(fd, start, end):
        yield hole, stop
        last = stop
    page = max(end // PAGE_SIZE * PAGE_SIZE, start)
    if last <= page < end < os.fstat(fd).st_size and not any(os.pread(fd, end - page, page)):
        yield page, end


def doubtful(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The extents of [start, end), in blocks that are not here, whose right content is unknown: holes, and pages that may be written only in part.
    A page may be so if it is next to a hole or to the end of the file, and begins or ends with a zero there."""
    yield from unfilled(fd, start, end)
    for first, stop in _data(fd, start, min(end, os.fstat(fd).st_size)):
        page = first // PAGE_SIZE * PAGE_SIZE
        if not any(os.pread(fd, 1, first)):
            yield page, page + PAGE_SIZE
        if not any(os.pread(fd, 1, stop - 1)):
            yield (stop - 1) // PAGE_SIZE * PAGE_SIZE, stop


def forget_clean_pages(fd: int) -> None:
    """Drop clean pages, so that lseek(2) finds holes. Where space is allocated but not written, ext4 and XFS count a cached page as data."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _data(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """The extents of [start, end) that unfilled() leaves out."""
    found = []
    for hole, stop in unfilled(fd, start, end):
        if start < hole:
            found.append((start, hole))
        start = stop
    if start < end:
        found.append((start, end))
    return found


def _expected(start: int, end: int, pieces: Sequence[tuple[int, bytes]]) -> bytes:
    content = bytearray(end - start)
    for offset, data in pieces:
        first, stop = max(start, offset), min(end, offset + len(data))
        if first < stop:
            content[first - start : stop - start] = data[first - offset : stop - offset]
    return bytes(content)
