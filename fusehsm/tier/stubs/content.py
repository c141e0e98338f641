"""The content of a stub's file: its holes, the data in a block that does not count as here, and writes that do not make the file longer.

As a rule a block that does not count as here has no data. A fill that was killed leaves some of the store's content. But when a listener dies, the
kernel lets every waiting access go on. So the block may hold a user's write into a hole. The rest of that page is then zeros that are neither the
user's nor the store's.

Another process may truncate a file at the same time, and a write must not make it long again. write(2) beyond the end of a file makes the file
longer, and no flag forbids it. A write through a mapping cannot go beyond the end, but costs ten times as much. So only the page with the file's end
is written through a mapping. If write(2) makes a truncated file longer, the file is still shorter than before, and the caller can see that.
"""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from enum import Enum

from fusehsm.linux.syscalls import PAGE_SIZE


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The holes of a file within [start, end), each as (start, end) in bytes, ascending (lseek(2), SEEK_HOLE and SEEK_DATA).

    Beyond the end of the file there are no holes.
    """
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


def write_without_growing(fd: int, data: memoryview, offset: int, size: int, path: str) -> int:
    """Write at `offset` in a file that was last seen with `size` bytes, at most up to `size`. Returns the number of bytes written.

    Afterwards the file has `size` bytes only if it kept that size all the time, or has grown again since. Raises OSError ENOSPC, EDQUOT or EIO.
    """
    last_page = _last_page(size)
    body = min(max(last_page - offset, 0), len(data))
    _write_all(fd, data[:body], offset, path)
    if body < len(data):
        _write_mapped(fd, data[body:], offset + body, last_page, path)
    return len(data)


def may_have_grown_to(now: int, size: int, end: int) -> bool:
    """Whether a file of `size` bytes may have been truncated, and then grown to `now` bytes by our write up to `end`."""
    return now < size and now in (end, min(end, _last_page(size)))


def _last_page(size: int) -> int:
    return (size - 1) // PAGE_SIZE * PAGE_SIZE


def _write_mapped(fd: int, data: memoryview, offset: int, page: int, path: str) -> None:
    try:
        mapping = mmap.mmap(fd, offset - page + len(data), offset=page)
    except ValueError:
        return  # already shorter
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        _write_all(fd, data, offset, path)  # this file system has no mappings
        return
    source = os.memfd_create("content")
    try:
        os.write(source, data)
        # preadv(2) copies into the mapping and fails with EFAULT where our own store instruction would raise SIGBUS.
        with closing(mapping), memoryview(mapping)[offset - page :] as target:
            os.preadv(source, [target], 0)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        if os.fstat(fd).st_size > page:
            raise OSError(errno.ENOSPC, "no room to fill it", path) from None
    finally:
        os.close(source)


def _write_all(fd: int, data: memoryview, offset: int, path: str) -> None:
    written = 0
    while written < len(data):
        count = os.pwrite(fd, data[written:], offset + written)
        if not count:
            raise OSError(errno.ENOSPC, "no room to fill it", path)
        written += count
