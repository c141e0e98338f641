"""The memory of a process whose thread waits for us (process_vm_readv(2)).

Any of this may wait for as long as the memory does: a mapping of a file on our own mount waits for the very listener. So it is done in the
thread of the call alone, with no lock held. Raises OSError: EFAULT as the kernel would, ESRCH when the thread has gone.
"""

import errno
import mmap
import os
import struct
from typing import Final

from fusehsm.linux import syscalls

_VECTOR: Final = struct.Struct("=QQ")
_MOST_PARTS: Final = 1024  # UIO_MAXIOV


def _fault() -> OSError:
    return OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def read(tid: int, address: int, size: int) -> bytes:
    """`size` bytes at an address of the process of that thread."""
    if not size:
        return b""
    data = syscalls.read_memory(tid, address, size)
    if len(data) != size:
        raise _fault()
    return data


def write(tid: int, address: int, data: bytes | bytearray) -> None:
    """Put bytes at an address."""
    if syscalls.write_memory(tid, address, data) != len(data):
        raise _fault()


def read_string(tid: int, address: int, limit: int) -> bytes:
    """The string at an address without its closing NUL, which must come within `limit` bytes. Raises also OSError ENAMETOOLONG."""
    text = b""
    while len(text) < limit:
        # Not past a page's end: the next may not be there.
        size = min(limit - len(text), mmap.PAGESIZE - (address + len(text)) % mmap.PAGESIZE)
        piece, nul, _ = read(tid, address + len(text), size).partition(b"\0")
        text += piece
        if nul:
            return text
    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def read_vector(tid: int, address: int, count: int) -> list[tuple[int, int]]:
    """The (address, size) of each part of a struct iovec array. Raises also OSError EINVAL as readv(2) does."""
    if count > _MOST_PARTS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    parts = list(_VECTOR.iter_unpack(read(tid, address, count * _VECTOR.size)))
    if any(length >> 63 for _, length in parts):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return parts
