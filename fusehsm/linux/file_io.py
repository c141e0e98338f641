"""Reads and synchronises files without stopping the event loop, and shares descriptors with threads that trio may abandon."""

import errno
import fcntl
import os
import struct
import threading
from typing import Final

import trio

Buffer = bytes | bytearray | memoryview

_THREADS = 64

_FS_IOC_FIEMAP: Final = 0xC020660B  # linux/fiemap.h
_FIEMAP: Final = struct.Struct("=QQIIII")
_EXTENT: Final = struct.Struct("=QQQ16xI12x")
_MOST_EXTENTS: Final = 8
# Flags of extents that a write in place takes no more space for: FIEMAP_EXTENT_LAST, _UNKNOWN, _DELALLOC, _UNWRITTEN and _MERGED. _UNKNOWN
# comes with _DELALLOC: the space is reserved, its place is not chosen yet.
_HAS_SPACE: Final = 0x1 | 0x2 | 0x4 | 0x800 | 0x1000


class BackingReader:
    """Reads pages of the page cache at once, and starts a thread only for a read that waits for a disk."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def read(self, descriptor: int, offset: int, size: int) -> Buffer:
        """Read up to `size` bytes at `offset`, fewer only at the end of the file.

        The descriptor must stay open until the read returns. Raises OSError.
        """
        data = _read_cached(descriptor, size, offset)
        if data is None:
            data = await trio.to_thread.run_sync(_read_all, descriptor, size, offset, limiter=self._limiter)
        return data

    async def synchronise(self, descriptor: int, data_only: bool) -> None:
        """fsync(2) or fdatasync(2). Raises OSError."""
        await trio.to_thread.run_sync(
            os.fdatasync if data_only else os.fsync, descriptor, limiter=self._limiter
        )


def _read_cached(descriptor: int, size: int, offset: int) -> Buffer | None:
    """Read if all of the range is in the page cache (RWF_NOWAIT, preadv2(2)); None if the read would wait for a disk."""
    buffer = bytearray(size)
    try:
        count = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        count = 0
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None
    if count == size:
        return buffer
    return memoryview(buffer)[:count] if offset + count >= os.fstat(descriptor).st_size else None


def _read_all(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def is_allocated(descriptor: int, offset: int, size: int) -> bool:
    """Whether every byte of a range has its space in the file system (FS_IOC_FIEMAP). False where that is not known, or in many pieces."""
    request = bytearray(_FIEMAP.size + _MOST_EXTENTS * _EXTENT.size)
    _FIEMAP.pack_into(request, 0, offset, size, 0, 0, _MOST_EXTENTS, 0)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, request)
    except OSError:
        return False
    start, _, length, flags = _EXTENT.unpack_from(request, _FIEMAP.size)
    if start <= offset and offset + size <= start + length and not flags & ~_HAS_SPACE:
        return True  # most often
    number = _FIEMAP.unpack_from(request)[3]
    end = offset
    for index in range(number):
        start, _, length, flags = _EXTENT.unpack_from(request, _FIEMAP.size + index * _EXTENT.size)
        if start > end or flags & ~_HAS_SPACE:
            return False
        end = start + length
    return end >= offset + size


class SharedDescriptor:
    """A descriptor that a task shares with a thread. trio may abandon the thread, so the last holder closes the descriptor.

    The maker is the first holder. The thread becomes a holder when it begins to run, possibly after the task was cancelled.
    """

    def __init__(self, descriptor: int) -> None:
        self.number = descriptor
        self._holders = 1
        self._lock = threading.Lock()

    def hold(self) -> bool:
        """Add a holder; False if the descriptor is closed already."""
        with self._lock:
            if not self._holders:
                return False
            self._holders += 1
            return True

    def release(self) -> None:
        """Remove a holder; the last one closes the descriptor. Raises OSError as close(2) does. After close() it does nothing."""
        with self._lock:
            if not self._holders:
                return
            self._holders -= 1
            last = not self._holders
        if last:
            os.close(self.number)

    def close(self) -> None:
        """Close the descriptor at once; no other holder may use it any more, but each may still call release().

        Call it in a thread, because close(2) may wait for a disk.
        """
        with self._lock:
            held, self._holders = self._holders, 0
        if held:
            os.close(self.number)
