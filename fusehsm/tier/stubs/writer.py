"""Writing content into a file that another process may truncate at the same time. The write must not make the file long again.

write(2) beyond the end of a file makes the file longer, and no flag forbids it. A write through a mapping cannot go beyond the end, but costs ten
times as much. So only the page with the file's end is written through a mapping. If write(2) makes a truncated file longer, the file is still shorter
than before, and the caller can see that.
"""

import errno
import mmap
import os
from contextlib import closing

from fusehsm.linux.syscalls import PAGE_SIZE


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
