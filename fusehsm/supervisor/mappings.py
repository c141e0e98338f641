"""Asks for mmap(2) of files on fusehsm mounts: makes the event at the call, as a real kernel does. A denial is the call's error.

FUSE sends its server no request for mmap(2) (docs/facts.md, section 11). Without this the event comes with the first page that is touched.
"""

import errno
import mmap
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fusehsm.control.blocking_client import BlockingConnection
from fusehsm.control.protocol import Map
from fusehsm.linux import proc
from fusehsm.linux.mountinfo import Mount
from fusehsm.supervisor import tasks
from fusehsm.supervisor.notifier import CallIsOver, TrappedCall
from fusehsm.supervisor.parked import Parked, ParkedCalls

_PROT_WRITE: Final = mmap.PROT_WRITE
_KIND: Final = 0x0F  # MAP_TYPE
_PRIVATE: Final = mmap.MAP_PRIVATE
_AT_ONCE: Final = 64  # the most mappings that may wait on one mount; further ones wait for these
_CANNOT_TELL: Final = frozenset((errno.ENOTCONN, errno.ESTALE, errno.EXDEV))


class Mappings:
    """The mmap(2) calls of the command. Any number of threads may use it at once."""

    def __init__(self, parked: ParkedCalls) -> None:
        self._parked = parked
        self._mounts = _KnownMounts()
        self._servers: dict[tuple[int, int], _Server] = {}
        self._lock = threading.Lock()

    def ask(self, call: TrappedCall, *, may_wait: bool = True) -> None:
        """Ask for an mmap(2), if it makes an event. The call may go on when this returns.

        With `may_wait` false nothing is asked here: the event comes when a page is touched. Raises OSError with the denial's errno, CallIsOver.
        """
        _, length, protection, flags, _, offset = call.arguments
        number = call.signed(4)
        opened = proc.descriptor_of(call.tid, number) if number >= 0 else None
        if opened is None or opened.flags & os.O_PATH or offset % mmap.PAGESIZE:
            return  # the call fails before it makes an event
        mount = self._mounts.get(call.tid, opened.mount_id)
        if mount is None or not may_wait:
            return
        inode = opened.inode or os.stat(f"/proc/{call.tid}/fd/{number}").st_ino
        writable = bool(protection & _PROT_WRITE and flags & _KIND != _PRIVATE)
        request = Map(
            *mount.device, inode, offset, length, opened.flags & 0xFFFF_FFFF, call.tid, int(writable)
        )
        try:
            self._request(call, mount, request)
        except OSError as error:
            if error.errno not in _CANNOT_TELL:
                raise

    def _request(self, call: TrappedCall, mount: Mount, request: Map) -> None:
        with self._lock:
            server = self._servers.setdefault(mount.device, _Server(mount))
        over = False
        with server.connection() as connection:

            def end(number: int | None) -> None:
                nonlocal over
                over = True
                connection.hang_up()

            parked = Parked(call, end, interruptible=False)
            self._parked.park(parked)
            try:
                connection.request(request)
            except OSError:
                if over:
                    raise CallIsOver from None
                raise
            finally:
                self._parked.unpark(parked)


class _Server:
    """The connections to one mount's server: one for each mapping that waits."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._room = threading.Semaphore(_AT_ONCE)
        self._idle: list[BlockingConnection] = []

    @contextmanager
    def connection(self) -> Iterator[BlockingConnection]:
        """A connection that no other thread uses meanwhile. Raises OSError ENOTCONN."""
        with self._room:
            connection = self._idle_one() or BlockingConnection(self._mount)
            try:
                yield connection
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    connection.close()
                else:
                    self._idle.append(connection)
                raise
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)

    def _idle_one(self) -> BlockingConnection | None:
        while self._idle:
            with suppress(IndexError):  # another thread has taken it
                connection = self._idle.pop()
                if connection.is_alive:
                    return connection
                connection.close()
        return None


class _KnownMounts:
    """The fusehsm mounts, by the mount numbers in fdinfo. The list is read again after any mount or unmount."""

    def __init__(self) -> None:
        self._changes = open("/proc/self/mounts", "rb", buffering=0)  # noqa: SIM115 (for as long as we live)
        self._poll = select.poll()
        self._poll.register(self._changes, select.POLLPRI)
        self._known: dict[int, Mount | None] = {}
        self._lock = threading.Lock()  # two threads must not poll at once: select.poll raises RuntimeError

    def get(self, tid: int, mount_id: int) -> Mount | None:
        """The mount of that number if it is a fusehsm mount, else None."""
        with self._lock:
            if self._poll.poll(0):
                self._known = {}
            known = self._known
        if mount_id not in known:
            mount = tasks.mount_of(tid, mount_id)
            known[mount_id] = mount if mount is not None and mount.is_fusehsm else None
        return known[mount_id]
