"""The memory of a process whose thread waits for us (process_vm_readv(2)).

Any of this may wait for as long as the memory does: a mapping of a file on our own mount waits for the very listener. So it is done in the
thread of the call alone, with no lock held. Raises OSError: EFAULT as the kernel would, ESRCH when the thread has gone.
"""

import ctypes
import errno
import mmap
import os
import struct
from typing import Any, Final

_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)
_readv: Final[Any] = _libc.process_vm_readv
_writev: Final[Any] = _libc.process_vm_writev
_VECTOR: Final = struct.Struct("=QQ")
_MOST_PARTS: Final = 1024  # UIO_MAXIOV


class _Part(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


for _function in (_readv, _writev):
    _function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_Part),
        ctypes.c_ulong,
        ctypes.POINTER(_Part),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _function.restype = ctypes.c_ssize_t


def _transfer(function: Any, tid: int, local: Any, address: int, size: int) -> int:
    here = _Part(ctypes.addressof(local), size)
    there = _Part(address, size)
    done = int(function(tid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0))
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return done


def _fault() -> OSError:
    return OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def read(tid: int, address: int, size: int) -> bytes:
    """`size` bytes at an address of the process of that thread."""
    if not size:
        return b""
    buffer = ctypes.create_string_buffer(size)
    if _transfer(_readv, tid, buffer, address, size) != size:
        raise _fault()
    return buffer.raw


def write(tid: int, address: int, data: bytes | bytearray) -> None:
    """Put bytes at an address."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    if _transfer(_writev, tid, buffer, address, len(data)) != len(data):
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
