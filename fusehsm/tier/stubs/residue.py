"""What is in a block that does not count as here: nothing, as a rule.

A fill that was killed leaves some of the store's content. But the kernel, when a listener dies, lets go on whoever waits for it, so there may be
what a user has written into a hole: the rest of the page is then zeros that nobody has ever meant.
"""

import os
from collections.abc import Iterator, Sequence
from enum import Enum

from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.tier.stubs.extents import holes


class Residue(Enum):
    """NONE: holes, or the store's own content. USERS: other content, in which no byte can be a zero that belongs to a hole. UNKNOWN: there may be."""

    NONE = 0
    USERS = 1
    UNKNOWN = 2


def residue(fd: int, start: int, end: int, pieces: Sequence[tuple[int, bytes]]) -> Residue:
    """What is in [start, end) of a file; `pieces` are the store's content of it, as (offset, data), holes left out."""
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
    """The holes in [start, end) of blocks that are not here, ascending. `end` is a block's, or the limit of what is the store's.

    In the page with the limit there may be what the user has appended: the kernel asks for an append where the file position is, which is
    elsewhere. Zeros below the limit are then none of theirs.
    """
    last = start
    for hole, stop in holes(fd, start, end):
        yield hole, stop
        last = stop
    page = max(end // PAGE_SIZE * PAGE_SIZE, start)
    if last <= page < end < os.fstat(fd).st_size and not any(os.pread(fd, end - page, page)):
        yield page, end


def doubtful(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end), blocks that are not here, of which it cannot be told what ought to be there: holes, and pages of which only a part
    may have been written, as a page next to a hole or an end of the file is that begins or ends with a zero."""
    yield from unfilled(fd, start, end)
    for first, stop in _data(fd, start, min(end, os.fstat(fd).st_size)):
        page = first // PAGE_SIZE * PAGE_SIZE
        if not any(os.pread(fd, 1, first)):
            yield page, page + PAGE_SIZE
        if not any(os.pread(fd, 1, stop - 1)):
            yield (stop - 1) // PAGE_SIZE * PAGE_SIZE, stop


def forget_clean_pages(fd: int) -> None:
    """Let holes be seen as holes: where space has been allocated and nothing written, a page that somebody has read counts as data (lseek(2) in ext4
    and XFS)."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _data(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """The parts of [start, end) that are not unfilled."""
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
