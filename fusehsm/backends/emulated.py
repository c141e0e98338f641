"""A group of a fusehsm mount for any process, over the mount's control socket (control/protocol.py)."""

import errno
import fcntl
import os
import select
import socket
import sys

import trio

from fusehsm.backends.backing import open_backing, root_of_backing
from fusehsm.backends.base import AT_FDCWD, AnyPath, Group, check_open_flags
from fusehsm.backends.lookup import look_up, mark_request
from fusehsm.control.client import ControlConnection
from fusehsm.control.event_stream import EventStream, Received
from fusehsm.control.protocol import VERSION, Hello, MarkRequest, Welcome
from fusehsm.events import Event
from fusehsm.fanotify import rules
from fusehsm.fanotify.abi import (
    DIALECTS,
    FAN_EVENT_METADATA_LEN,
    FAN_MARK_FLUSH,
    FAN_NONBLOCK,
    FAN_REPORT_PIDFD,
    Dialect,
    RawEvent,
    decode_events,
)
from fusehsm.linux.mountinfo import Mount

_ANSWERS_WITHIN = 0.2  # seconds; the event loop waits meanwhile

_ENCODING = sys.getfilesystemencoding()
_ENCODING_ERRORS = sys.getfilesystemencodeerrors()


class EmulatedGroup(Group):
    """A group of a fusehsm mount; connect() makes it.

    read() and take_events() wait for the server only if it may have more events than it has sent, for 0.2 seconds at most. Nothing else does.
    """

    def __init__(
        self,
        mount: Mount,
        connection: ControlConnection,
        events: socket.socket,
        flags: int,
        event_f_flags: int,
        welcome: Welcome,
    ) -> None:
        super().__init__(flags, event_f_flags, DIALECTS[welcome.dialect])
        self._mount = mount
        self._connection = connection
        self._stream = EventStream(
            events, flags, self.dialect, connection.gone, close_on_exec=bool(event_f_flags & os.O_CLOEXEC)
        )
        self._unanswered: rules.UnansweredEvents[int] = (
            rules.UnansweredEvents()
        )  # values: the server's numbers
        self._paths: dict[int, bytes] = {}
        self._poll: _Pollable | None = None
        self._root_asked = trio.Lock()
        self._root_fd = -1  # of the backing, once it is needed

    @classmethod
    async def connect(
        cls, mount: Mount, flags: int, event_f_flags: int, dialect: Dialect | None = None
    ) -> "EmulatedGroup":
        """Make a group of that mount. `dialect` defaults to the mount's.

        Raises OSError EINVAL as fanotify_init(2), ENOTCONN if no server serves the mount, EACCES for other users, EMFILE beyond the number of
        groups that a mount carries.
        """
        flags |= FAN_NONBLOCK
        rules.check_init(flags, event_f_flags)
        connection = await ControlConnection.open(mount)
        try:
            hello = Hello(VERSION, flags, event_f_flags, None if dialect is None else dialect.name)
            result, descriptor = await connection.request(hello)
            if descriptor is None:
                raise connection.gone()
            return cls(
                mount, connection, socket.socket(fileno=descriptor), flags, event_f_flags, Welcome(**result)
            )
        except BaseException:
            connection.close()
            raise

    def fileno(self) -> int:
        """An epoll descriptor. It is readable while read() would find an event, in the socket or among those received already."""
        if self._poll is None:
            self._poll = _Pollable(self._stream.socket)
            self._poll.set_buffered(bool(self._stream.buffered))
        return self._poll.fileno()

    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        """fanotify_mark(2). Additional error: EXDEV for a path that is not on this group's mount."""
        await self._mark(flags, mask, dirfd, path, every_mount=False)

    async def mark_every_mount(self, flags: int, mask: int, path: str) -> None:
        """mark() with FAN_MARK_MOUNT, which hears the accesses by every mount of the tree, whichever `path` leads to."""
        await self._mark(flags, mask, AT_FDCWD, path, every_mount=True)

    async def _mark(
        self, flags: int, mask: int, dirfd: int, path: str | bytes | None, *, every_mount: bool
    ) -> None:
        rules.check_mark(self.flags, self.dialect, flags, mask, None)
        if flags & FAN_MARK_FLUSH:
            await self._connection.request(MarkRequest(flags, mask, *self._mount.device, None))
            return
        # In a thread: the path may lead through a mount that this same event loop serves.
        found = await trio.to_thread.run_sync(look_up, flags, dirfd, path)
        try:
            rules.check_mark(self.flags, self.dialect, flags, mask, found.kind)
            try:
                await self._connection.request(mark_request(flags, mask, found, every_mount=every_mount))
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                where = "the descriptor" if path is None else os.fsdecode(path)
                message = f"{where}: not on the fusehsm mount {self._mount.mount_point} of this group"
                raise OSError(errno.EXDEV, message) from None
        finally:
            os.close(found.descriptor)

    async def backing(self, path: AnyPath, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        check_open_flags(flags)
        root_fd = await self._duplicate_of_root()
        try:
            return await open_backing(root_fd, self._mount.device, self._mount.mount_point, path, flags)
        finally:
            os.close(root_fd)

    async def _duplicate_of_root(self) -> int:
        # Shielded: a cancelled request would close the connection, and with it the group.
        with trio.CancelScope(shield=True):
            async with self._root_asked:
                if self._root_fd < 0:
                    root_fd = await root_of_backing(self._connection, self._mount.mount_point)
                    if self._stream.socket.fileno() < 0:  # the group was closed meanwhile
                        os.close(root_fd)
                        raise self._connection.gone()
                    self._root_fd = root_fd
        # Another task may close the group during the caller's open.
        return fcntl.fcntl(self._root_fd, fcntl.F_DUPFD_CLOEXEC, 0)

    def read(self, size: int) -> bytes:
        taken = bytearray()
        while True:
            try:
                received = self._stream.take()
            except OSError:
                if taken:
                    break  # the next read reports it; or it concerns one event, and then the kernel reports nothing here
                raise
            if received is None:
                if taken or self._is_drained():
                    break
                continue
            if len(taken) + len(received.data) > size:
                self._stream.put_back(received)
                break
            self._delivered(received)
            taken += received.data
            if len(taken) + FAN_EVENT_METADATA_LEN > size:
                break  # not even the shortest event fits
        if self._poll is not None:
            self._poll.set_buffered(bool(self._stream.buffered))
        if taken:
            return bytes(taken)
        number = errno.EINVAL if self._stream.buffered else errno.EAGAIN
        raise OSError(number, os.strerror(number))

    def write(self, data: bytes) -> int:
        response = rules.parse_response(data, self.flags, self.dialect)
        if response.probe:
            return response.length
        self._answer(response.fd, response.decision_errno)
        return response.length

    def take_events(self) -> list[Event]:
        # A shorter way to the base class's result, for the usual case.
        if self._stream.buffered or self.flags & FAN_REPORT_PIDFD:
            return super().take_events()
        while (received := self._stream.take()) is None:
            if self._is_drained():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self._poll is not None:
            self._poll.set_buffered(bool(self._stream.buffered))
        self._delivered(received)
        (raw,) = decode_events(self.dialect, received.data)
        path = received.path.decode(_ENCODING, _ENCODING_ERRORS) or self.event_path(raw)
        return [Event(raw.mask, raw.pid, raw.fd, path, raw.offset, raw.count, self.dialect)]

    def answer(self, event: Event, error: int) -> None:
        self._answer(event.fd, self.checked_errno(error))

    def event_path(self, raw_event: RawEvent) -> str:
        path = self._paths.get(raw_event.fd)
        if path:
            return os.fsdecode(path)
        link = f"/proc/self/fd/{raw_event.fd}"
        try:
            return os.readlink(link)
        except OSError:
            return link

    async def wait_readable(self) -> None:
        if self._stream.socket.fileno() < 0:
            raise trio.ClosedResourceError
        if self._stream.buffered:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(self._stream.socket)

    def _is_drained(self) -> bool:
        # A mount that this same process serves may need this event loop for its answer.
        return self._connection.is_served_here or self._stream.is_drained(_ANSWERS_WITHIN)

    def _answer(self, fd: int, error: int) -> None:
        self._stream.answer(self._unanswered.take(fd), error)

    def close(self) -> None:
        if self._stream.socket.fileno() >= 0 and trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self._stream.socket)
        self._stream.close()
        self._connection.close()
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1
        if self._poll is not None:
            self._poll.close()
            self._poll = None

    def _delivered(self, received: Received) -> None:
        self._stream.delivered(received)
        if received.fd < 0:
            return
        self._paths[received.fd] = received.path
        if received.mask & self.permission_events:
            self._unanswered.add(received.fd, received.number)


class _Pollable:
    """One descriptor for two sources: events that wait in the socket, and events that were received and not read."""

    def __init__(self, events: socket.socket) -> None:
        self._buffered = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._has_buffered = False
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._epoll.register(events, select.EPOLLIN)
        self._epoll.register(self._buffered, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def set_buffered(self, buffered: bool) -> None:
        if buffered == self._has_buffered:
            return
        self._has_buffered = buffered
        if buffered:
            os.eventfd_write(self._buffered, 1)
        else:
            os.eventfd_read(self._buffered)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._buffered)
