"""The FUSE requests about locks (GETLK, SETLK, SETLKW) of the engine `devfuse`: decodes each, and encodes its answer.

The kernel sends them if INIT asks for them (FUSE_POSIX_LOCKS, FUSE_FLOCK_LOCKS). Otherwise it keeps the locks of the mount by itself, and no process
outside of the mount sees them.
"""

import errno
import fcntl
import os

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.emulator.locks import LAST_BYTE, Lock
from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_operations import Method
from fusehsm.engines.fuse_protocol import Opcode, Request
from fusehsm.overlay.overlay import Node

_Asked = tuple[OpenFile[Node], int, Lock]


class LockOperations:
    """The requests about locks of one mount."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._locks = gate.locks

    def table(self) -> dict[int, Method]:
        """The method that answers each opcode."""
        return {Opcode.GETLK: self.getlk, Opcode.SETLK: self.setlk, Opcode.SETLKW: self.setlkw}

    def interrupt(self, request: Request) -> bool:
        """The accessor of a request has got a signal; returns whether that ends its wait for a lock."""
        return request.opcode == Opcode.SETLKW and self._locks.interrupt(request.unique)

    def _asked(self, request: Request) -> _Asked:
        handle, owner, start, end, kind, pid, flags, _ = protocol.LK_IN.unpack_from(request.body)
        if kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK) or not start <= end <= LAST_BYTE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file = self._gate.handles.get(handle)
        if flags & protocol.LK_FLOCK:
            return file, owner, Lock(kind, pid=pid, whole=True)
        return file, owner, Lock(kind, start, end, pid)

    def getlk(self, request: Request) -> bytes:
        file, owner, lock = self._asked(request)
        found = self._locks.get(file, owner, lock) or Lock(fcntl.F_UNLCK)
        return protocol.LK_OUT.pack(found.start, found.end, found.kind, found.pid)

    def setlk(self, request: Request) -> bytes:
        file, owner, lock = self._asked(request)
        self._locks.set(file, owner, lock, request.pid, request.uid)
        return b""

    async def setlkw(self, request: Request) -> bytes:
        file, owner, lock = self._asked(request)
        await self._locks.wait(file, owner, lock, request.pid, request.uid, request.unique)
        return b""
