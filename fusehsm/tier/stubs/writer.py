"""Writing content into a file that somebody may truncate in the same moment, so that it does not become long again.

write(2) beyond the end of a file makes it longer, and no flag forbids it. Through a mapping nobody can write beyond the end, but that costs ten times
as much. So only the page with the file's end is written through a mapping: what write(2) makes longer is then shorter than it was before, which
the caller can see.
"""

import errno
import mmap
import os
from contextlib import closing

from fusehsm.linux.syscalls import PAGE_SIZE


def write_without_growing(fd: int, data: memoryview, offset: int, size: int, path: str) -> int:
    """Write at `offset` in a file that was `size` bytes long when last looked at, up to there at most; returns how many bytes.

    Afterwards the file is `size` bytes long only if it was so all the time, or has grown again since. Raises OSError ENOSPC, EDQUOT or EIO.
    """
    last_page = _last_page(size)
    body = min(max(last_page - offset, 0), len(data))
    _write_all(fd, data[:body], offset, path)
    if body < len(data):
        _write_mapped(fd, data[body:], offset + body, last_page, path)
    return len(data)


def may_have_grown_to(now: int, size: int, end: int) -> bool:
    """Whether a file that was `size` bytes long and is `now` may be so by our having written up to `end` after somebody made it shorter still."""
    return now < size and now in (end, min(end, _last_page(size)))


def _last_page(size: int) -> int:
    return (size - 1) // PAGE_SIZE * PAGE_SIZE


def _write_mapped(fd: int, data: memoryview, offset: int, page: int, path: str) -> None:
    try:
        mapping = mmap.mmap(fd, offset - page + len(data), offset=page)
    except ValueError:
        return  # shorter already
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        _write_all(fd, data, offset, path)  # there is no other way here
        return
    source = os.memfd_create("content")
    try:
        os.write(source, data)
        # Read into the mapping by the kernel, which has an error for us where a store of our own would be the end of us (SIGBUS).
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
