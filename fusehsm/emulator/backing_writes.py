"""Writes to the backing: finds where a WRITE goes, and runs in threads what may wait for a disk.

The kernel computes the offset of an appending write from the size that it has cached. The file may be longer by now: another process may have
written to it in SRC, or the listener that was asked about this write. So the backing finds the end of the file (RWF_APPEND, pwritev2(2)), and
the write overwrites nothing that another process has appended.
"""

import os
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

from fusehsm.emulator.explain import Explainer
from fusehsm.emulator.handles import OpenFile
from fusehsm.linux import syscalls
from fusehsm.linux.file_io import Buffer
from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.overlay.overlay import Caller, Node, Overlay

ResultT = TypeVar("ResultT")
ArgumentsT = TypeVarTuple("ArgumentsT")

_THREADS = 64  # calls that may wait for a disk at once


class BackingWriter:
    """Changes the content of backing files. The caller keeps the descriptors open during the call. Every method raises OSError."""

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
        caller: Caller,
    ) -> tuple[int, bool]:
        """Write `data` at `offset`, or at the end if it is appended, with the rights of `caller`. The other arguments are those of
        Content.write().

        Returns how many bytes were written, and whether they were written at another place than `offset`.
        """
        how = durable
        may_grow = False
        if not write_back:
            size = os.fstat(descriptor).st_size
            may_grow = offset + len(data) > size
            if await self._goes_to_end(file, offset, size, tid, appends):
                how |= os.RWF_APPEND
                may_grow = True
        if not how & os.RWF_APPEND:
            self._overlay.before_placing(descriptor)
        if durable:
            written = await self._in_thread(caller, os.pwritev, descriptor, [data], offset, how)
        else:
            written = self._overlay.write(file.node, caller, descriptor, data, offset, how, may_grow)
        if write_back:
            # No accessor continues a short write of the page cache. The next call raises the error, such as ENOSPC.
            while written < len(data):
                rest = memoryview(data)[written:]
                written += await self._in_thread(
                    caller, os.pwritev, descriptor, [rest], offset + written, how
                )
        file.node.made_as_long_as(offset + written)
        return written, bool(how & os.RWF_APPEND) and os.fstat(descriptor).st_size != offset + written

    async def _goes_to_end(
        self, file: OpenFile[Node], offset: int, size: int, tid: int, appends: bool | None
    ) -> bool:
        """Whether a WRITE at `offset` goes to the end of the file, which now has `size` bytes.

        The kernel reports O_APPEND, but not the flags of pwritev2(2) that override it for one call (RWF_APPEND, RWF_NOAPPEND). Those make no
        difference where `offset` is the end. Elsewhere the accessor's system call decides.
        """
        flagged = file.appends if appends is None else appends
        if offset == size:
            return flagged
        # Not every engine reports write-back. It consists of whole pages below the end, of a file that may be mapped for writing.
        may_be_written_back = (
            appends is None and not offset % PAGE_SIZE and file.flags & os.O_ACCMODE == os.O_RDWR
        )
        if offset != file.node.told_size and (may_be_written_back or not flagged):
            return False
        seen = await self._explainer.appends(file, tid)
        return flagged if seen is None else seen

    async def allocate(self, descriptor: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        """fallocate(2) with the rights of `caller`."""
        await self._in_thread(caller, syscalls.fallocate, descriptor, mode, offset, length)

    async def copy(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int, caller: Caller
    ) -> int:
        """copy_file_range(2) with the rights of `caller`; returns how many bytes were copied."""
        self._overlay.before_placing(target)
        return await self._in_thread(
            caller, syscalls.copy, source, source_offset, target, target_offset, length
        )

    async def _in_thread(
        self, caller: Caller, call: Callable[[*ArgumentsT], ResultT], *arguments: *ArgumentsT
    ) -> ResultT:
        def act() -> ResultT:
            # The user and the capabilities are those of this thread alone.
            with self._overlay.rights_of(caller):
                return call(*arguments)

        return await trio.to_thread.run_sync(act, limiter=self._limiter)
