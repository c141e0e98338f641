"""A group of a fusehsm mount, from any process, over the mount's control socket (protocol.py)."""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import sys
from collections import deque
from dataclasses import dataclass

import trio

from fusehsm import rules
from fusehsm.abi import (
    DIALECTS,
    EVENT_FD_OFFSET,
    EVENT_MASK_OFFSET,
    EVENT_PID_OFFSET,
    EVENT_PIDFD_OFFSET,
    FAN_EVENT_METADATA_LEN,
    FAN_MARK_FLUSH,
    FAN_NOFD,
    FAN_NONBLOCK,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    NOTIFICATION_EVENTS,
    Dialect,
    RawEvent,
    decode_events,
    has_pidfd,
)
from fusehsm.backends.base import AT_FDCWD, Group
from fusehsm.backends.connection import ControlConnection
from fusehsm.backends.lookup import look_up
from fusehsm.events import Event
from fusehsm.mountinfo import Mount
from fusehsm.protocol import (
    ANSWER,
    CREDIT,
    LARGEST_EVENT_MESSAGE,
    MORE_CREDIT,
    VERSION,
    Hello,
    Mark,
    Welcome,
    encode_feedback,
    event_message_split,
)

_ENCODING = sys.getfilesystemencoding()
_ENCODING_ERRORS = sys.getfilesystemencodeerrors()
_INT = struct.Struct("=i")
_MASK = struct.Struct("=Q")
_DESCRIPTORS = socket.CMSG_SPACE(2 * _INT.size)  # the file and the pidfd


@dataclass(slots=True)  # not frozen: one is made for every event, and that doubles the price
class _Received:
    """An event that has left the socket: its bytes with this process's descriptors in them, the server's number, the accessor's path."""

    data: bytearray
    number: int
    fd: int
    mask: int
    path: bytes


class EmulatedGroup(Group):
    """A group of a fusehsm mount. Made by connect(); read() and write() never wait for the server."""

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
        self._events = events
        events.setblocking(False)
        self._receive_flags = socket.MSG_CMSG_CLOEXEC if event_f_flags & os.O_CLOEXEC else 0
        self._message = bytearray(LARGEST_EVENT_MESSAGE)
        self._buffered: deque[_Received] = deque()
        # The server's number of the unanswered event with that descriptor, and of those read later that have the same.
        self._numbers: dict[int, int] = {}
        self._later_numbers: dict[int, deque[int]] = {}
        self._paths: dict[int, bytes] = {}
        self._read_since_credit = 0
        self._poll: _Pollable | None = None

    @classmethod
    async def connect(
        cls, mount: Mount, flags: int, event_f_flags: int, dialect: Dialect | None = None
    ) -> "EmulatedGroup":
        """A new group of that mount, in the mount's own dialect unless one is given.

        Raises OSError: EINVAL as fanotify_init(2), ENOTCONN where nobody serves the mount, EACCES for other users, EMFILE beyond the
        number of groups that a mount carries.
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
        """An epoll descriptor; readable as long as read() finds something, also what it has not taken of what it had received."""
        if self._poll is None:
            self._poll = _Pollable(self._events)
            self._poll.set_buffered(bool(self._buffered))
        return self._poll.fileno()

    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        """fanotify_mark(2). Additional error: EXDEV for a path that is not on this group's mount."""
        rules.check_mark(self.flags, self.dialect, flags, mask, None)
        major, minor = self._mount.device
        if flags & FAN_MARK_FLUSH:
            await self._connection.request(Mark(flags, mask, major, minor, None))
            return
        # In a thread: the path may lead through a mount that this very event loop serves.
        found = await trio.to_thread.run_sync(look_up, flags, dirfd, path)
        try:
            rules.check_mark(self.flags, self.dialect, flags, mask, found.kind)
            if found.device != self._mount.device:
                where = "the descriptor" if path is None else os.fsdecode(path)
                raise OSError(
                    errno.EXDEV, f"{where}: not on the fusehsm mount {self._mount.mount_point} of this group"
                )
            await self._connection.request(Mark(flags, mask, major, minor, found.inode))
        finally:
            os.close(found.descriptor)

    def read(self, size: int) -> bytes:
        taken = bytearray()
        while True:
            try:
                received = self._next_event()
            except OSError:
                if taken:
                    break  # told by the next read, or a single event's trouble, which the kernel drops silently here
                raise
            if received is None:
                break
            if len(taken) + len(received.data) > size:
                self._buffered.appendleft(received)
                break
            self._delivered(received)
            taken += received.data
            if len(taken) + FAN_EVENT_METADATA_LEN > size:
                break  # not even the shortest event fits
        if self._poll is not None:
            self._poll.set_buffered(bool(self._buffered))
        if taken:
            return bytes(taken)
        number = errno.EINVAL if self._buffered else errno.EAGAIN
        raise OSError(number, os.strerror(number))

    def write(self, data: bytes) -> int:
        response = rules.parse_response(data, self.flags, self.dialect)
        if response.probe:
            return response.length
        self._answer(response.fd, response.decision_errno)
        return response.length

    def take_events(self) -> list[Event]:
        # The short way, for the usual case, to what the base class makes of read().
        if self._buffered or self.flags & FAN_REPORT_PIDFD:
            return super().take_events()
        received = self._next_event()
        if received is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self._poll is not None:
            self._poll.set_buffered(bool(self._buffered))
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
        if self._events.fileno() < 0:
            raise trio.ClosedResourceError
        if self._buffered:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(self._events)

    def _answer(self, fd: int, error: int) -> None:
        number = self._numbers.pop(fd, None)
        if number is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        # A reused descriptor number names several events: the kernel answers them in the order read.
        later = self._later_numbers.get(fd)
        if later:
            self._numbers[fd] = later.popleft()
            if not later:
                del self._later_numbers[fd]
        self._send(encode_feedback(ANSWER, number, error))

    def close(self) -> None:
        if self._events.fileno() >= 0 and trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self._events)
        self._events.close()
        self._connection.close()
        for received in self._buffered:
            _close_all(_descriptors_of(received))
        self._buffered.clear()
        if self._poll is not None:
            self._poll.close()
            self._poll = None

    def _next_event(self) -> _Received | None:
        """The next event, None when there is none. Raises the errno of an event that came without its descriptor (denied already)."""
        if not self._buffered:
            received = self._receive()
            if received is None or not received.mask & NOTIFICATION_EVENTS:
                return received
            self._buffered.append(received)
        if self._buffered[0].mask & NOTIFICATION_EVENTS:
            self._receive_all()
        return self._buffered.popleft()

    def _receive_all(self) -> None:
        """Receive what waits, and merge equal notifications as the kernel does (group.py): they travel ahead of being read."""
        with contextlib.suppress(OSError):  # a lost connection is told when nothing is left
            while (received := self._receive()) is not None:
                if not (received.mask & NOTIFICATION_EVENTS and self._merge(received)):
                    self._buffered.append(received)

    def _merge(self, received: _Received) -> bool:
        for earlier in self._buffered:
            if _are_of_one(earlier, received):
                earlier.mask |= received.mask
                _MASK.pack_into(earlier.data, EVENT_MASK_OFFSET, earlier.mask)
                _close_all(_descriptors_of(received))
                self._count_as_read()
                return True
        return False

    def _receive(self) -> _Received | None:
        try:
            length, ancillary, _, _ = self._events.recvmsg_into(
                [self._message], _DESCRIPTORS, self._receive_flags
            )
        except BlockingIOError:
            return None
        except ConnectionError:
            length, ancillary = 0, []
        if not length:
            raise self._connection.gone()
        descriptors = [number for _, _, data in ancillary for (number,) in _INT.iter_unpack(data)]
        split = event_message_split(self._message)
        return self._unpack(self._message[:split], bytes(self._message[split:length]), descriptors)

    def _unpack(self, data: bytearray, path: bytes, descriptors: list[int]) -> _Received:
        (mask,) = _MASK.unpack_from(data, EVENT_MASK_OFFSET)
        (number,) = _INT.unpack_from(data, EVENT_FD_OFFSET)
        fd = number
        if number >= 0:
            if not descriptors:
                return self._without_descriptor(data, number, mask, path)
            fd = descriptors[0]
            _INT.pack_into(data, EVENT_FD_OFFSET, fd)
            del descriptors[0]
        if has_pidfd(data) and _INT.unpack_from(data, EVENT_PIDFD_OFFSET)[0] >= 0:
            _INT.pack_into(data, EVENT_PIDFD_OFFSET, descriptors[0] if descriptors else FAN_NOFD)
        return _Received(data, number, fd, mask, path)

    def _without_descriptor(self, data: bytearray, number: int, mask: int, path: bytes) -> _Received:
        """This process has no room for another descriptor: recvmsg(2) threw it away. As in the kernel, the access is denied with EPERM
        and read() fails, or with FAN_REPORT_FD_ERROR the event tells of it."""
        if mask & self.permission_events:
            self._send(encode_feedback(ANSWER, number, errno.EPERM))
        if not self.flags & FAN_REPORT_FD_ERROR:
            self._count_as_read()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        _INT.pack_into(data, EVENT_FD_OFFSET, -errno.EMFILE)
        if has_pidfd(data):
            _INT.pack_into(data, EVENT_PIDFD_OFFSET, FAN_NOFD)
        return _Received(data, number, -errno.EMFILE, mask, path)

    def _delivered(self, received: _Received) -> None:
        self._count_as_read()
        if has_pidfd(received.data):
            self._check_pidfd(received)
        if received.fd < 0:
            return
        self._paths[received.fd] = received.path
        if not received.mask & self.permission_events:
            return
        if received.fd in self._numbers:
            self._later_numbers.setdefault(received.fd, deque()).append(received.number)
        else:
            self._numbers[received.fd] = received.number

    def _check_pidfd(self, received: _Received) -> None:
        """The process may have gone since the event was sent: the kernel looks when it is read."""
        (pidfd,) = _INT.unpack_from(received.data, EVENT_PIDFD_OFFSET)
        if pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            os.close(pidfd)
            gone = -errno.ESRCH if self.flags & FAN_REPORT_FD_ERROR else FAN_NOFD
            _INT.pack_into(received.data, EVENT_PIDFD_OFFSET, gone)
        except PermissionError:
            pass

    def _count_as_read(self) -> None:
        self._read_since_credit += 1
        if self._read_since_credit >= CREDIT // 2:
            with contextlib.suppress(OSError):  # the next read tells
                self._send(encode_feedback(MORE_CREDIT, 0, self._read_since_credit))
            self._read_since_credit = 0

    def _send(self, message: bytes) -> None:
        while True:
            try:
                self._events.send(message)
                return
            except BlockingIOError:
                # The server's loop never waits for a client, so this ends; write(2) to a real group does not wait either.
                writable = select.poll()
                writable.register(self._events, select.POLLOUT)
                writable.poll()
            except ConnectionError:
                raise self._connection.gone() from None


class _Pollable:
    """One descriptor over two sources: what waits in the socket, and what has been received and not been read."""

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


def _are_of_one(first: _Received, second: _Received) -> bool:
    """Whether two are notifications of the same file by the same name, and of the same process."""
    if first.path != second.path or not first.mask & NOTIFICATION_EVENTS:
        return False
    if (
        first.data[EVENT_PID_OFFSET:FAN_EVENT_METADATA_LEN]
        != second.data[EVENT_PID_OFFSET:FAN_EVENT_METADATA_LEN]
    ):
        return False
    if first.fd < 0 or second.fd < 0:
        return first.fd == second.fd
    # What is replaced by another file keeps its name.
    return os.path.sameopenfile(first.fd, second.fd)


def _descriptors_of(received: _Received) -> list[int]:
    found = [received.fd]
    if has_pidfd(received.data):
        found.append(_INT.unpack_from(received.data, EVENT_PIDFD_OFFSET)[0])
    return [descriptor for descriptor in found if descriptor >= 0]


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
