"""Writing to the backing: where a WRITE goes, and what may wait for a disk in threads.

The kernel takes the offset of what appends from the size that it believes the file to have. The file may have become longer since: by somebody
who writes in SRC, or by the listener that was asked about this very write. So the backing finds the end of the file (RWF_APPEND, pwritev2(2)),
and nothing that somebody else has appended is written over.
"""

import os

import trio

from fusehsm.emulator.explain import Explainer
from fusehsm.emulator.handles import OpenFile
from fusehsm.linux import syscalls
from fusehsm.linux.file_io import Buffer
from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.overlay.overlay import Node, Overlay

_THREADS = 64


class BackingWriter:
    """Changes the content of backing files, by descriptors that must stay open meanwhile. Everything raises OSError."""

    def __init__(self, overlay: Overlay, explainer: Explainer) -> None:
        self._overlay = overlay
        self._explainer = explainer
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def write(
        self,
        file: OpenFile[Node],
        descriptor: int,
        offset: int,
        data: Buffer,
        tid: int,
        *,
        write_back: bool | None,
        appends: bool | None,
        durable: int,
    ) -> tuple[int, bool]:
        """Write `data` at `offset`, or to the end if it is appended; returns how many bytes were written, and whether that was elsewhere than
        at `offset`. The arguments are those of Content.write()."""
        how = durable
        if not write_back and self._goes_to_end(file, offset, os.fstat(descriptor).st_size, tid, appends):
            how |= os.RWF_APPEND
        else:
            self._overlay.before_placing(descriptor)
        written = await self._pwrite(descriptor, data, offset, how)
        if write_back:
            # Nobody goes on where the page cache's own write has stopped for want of room.
            while written < len(data):
                written += await self._pwrite(descriptor, memoryview(data)[written:], offset + written, how)
        file.node.made_as_long_as(offset + written)
        return written, bool(how & os.RWF_APPEND) and os.fstat(descriptor).st_size != offset + written

    def _goes_to_end(
        self, file: OpenFile[Node], offset: int, size: int, tid: int, appends: bool | None
    ) -> bool:
        """Whether a WRITE at `offset`, of a file that now has `size` bytes, goes to its end.

        Of O_APPEND the kernel tells, but not of what makes an exception for one call (RWF_APPEND, RWF_NOAPPEND). Where the two places are one
        that makes no difference; elsewhere the accessor is looked at.
        """
        flagged = file.appends if appends is None else appends
        if offset == size:
            return flagged
        # Not every engine tells what the page cache writes back: whole pages of what may be mapped, below the end.
        may_be_written_back = (
            appends is None and not offset % PAGE_SIZE and file.flags & os.O_ACCMODE == os.O_RDWR
        )
        if offset != file.node.told_size and (may_be_written_back or not flagged):
            return False
        seen = self._explainer.appends(file, tid)
        return flagged if seen is None else seen

    async def _pwrite(self, descriptor: int, data: Buffer, offset: int, how: int) -> int:
        if how & ~os.RWF_APPEND:
            return await trio.to_thread.run_sync(
                os.pwritev, descriptor, [data], offset, how, limiter=self._limiter
            )
        return os.pwritev(descriptor, [data], offset, how) if how else os.pwrite(descriptor, data, offset)

    async def allocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        await trio.to_thread.run_sync(
            syscalls.fallocate, descriptor, mode, offset, length, limiter=self._limiter
        )

    async def copy(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> int:
        """copy_file_range(2); returns how many bytes were copied."""
        self._overlay.before_placing(target)
        return await trio.to_thread.run_sync(
            syscalls.copy, source, source_offset, target, target_offset, length, limiter=self._limiter
        )
