"""Reads and writes the memory of a process whose thread waits for an answer (process_vm_readv(2)).

Each function may wait as long as the memory does: a mapping of a file on a fusehsm mount waits for that same listener. So only the call's own
thread uses them, with no lock held. Each raises OSError: EFAULT as the kernel would, ESRCH if the thread has gone.
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
    """`size` bytes at an address in the process of that thread."""
    if not size:
        return b""
    data = syscalls.read_memory(tid, address, size)
    if len(data) != size:
        raise _fault()
    return data


def write(tid: int, address: int, data: bytes | bytearray) -> None:
    """Write bytes at an address in the process of that thread."""
    if syscalls.write_memory(tid, address, data) != len(data):
        raise _fault()


def read_string(tid: int, address: int, limit: int) -> bytes:
    """The string at an address, without its final NUL, which must come within `limit` bytes. Also raises OSError ENAMETOOLONG."""
    text = b""
    while len(text) < limit:
        # Not past the end of a page: the next page may not be there.
        size = min(limit - len(text), mmap.PAGESIZE - (address + len(text)) % mmap.PAGESIZE)
        piece, nul, _ = read(tid, address + len(text), size).partition(b"\0")
        text += piece
        if nul:
            return text
    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def read_vector(tid: int, address: int, count: int) -> list[tuple[int, int]]:
    """The (address, size) of each part of a struct iovec array. Also raises OSError EINVAL as readv(2) does."""
    if count > _MOST_PARTS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    parts = list(_VECTOR.iter_unpack(read(tid, address, count * _VECTOR.size)))
    if any(length >> 63 for _, length in parts):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return parts
