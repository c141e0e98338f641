"""Shared mappings in a process that has other threads: Python's own mmap holds all of them up while mmap(2) waits for a listener."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MS_SYNC: Final = 4


@dataclass(frozen=True)
class Mapping:
    """`bytes`: for system calls, which fail with EFAULT where touching it would be SIGBUS."""

    address: int
    length: int
    bytes: "ctypes.Array[ctypes.c_char]"

    def sync(self) -> None:
        """msync(2), until it is on the disk."""
        if _libc.msync(self.address, self.length, _MS_SYNC):
            raise OSError(ctypes.get_errno(), "msync")


@contextmanager
def mapped(fd: int, offset: int, length: int, *, writable: bool) -> Iterator[Mapping]:
    """[offset, offset + length) of a file, shared; in bytes, `offset` a multiple of the page size."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    address = _libc.mmap(None, length, protection, mmap.MAP_SHARED, fd, offset)
    if address == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    try:
        yield Mapping(address, length, (ctypes.c_char * length).from_address(address))
    finally:
        _libc.munmap(address, length)
