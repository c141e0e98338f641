"""The event socket of a group on a fusehsm mount (control/protocol.py): events as they come, by the server's numbers.

What fanotify makes of them, descriptors' numbers that events are answered by, is for whoever hands them on: emulated.py, and the supervisor
of unmodified programs.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fusehsm.control.protocol import (
    ANSWER,
    CREDIT,
    LARGEST_EVENT_MESSAGE,
    MORE_CREDIT,
    encode_feedback,
    event_message_split,
)
from fusehsm.fanotify.abi import (
    EVENT_FD_OFFSET,
    EVENT_MASK_OFFSET,
    EVENT_PID_OFFSET,
    EVENT_PIDFD_OFFSET,
    FAN_EVENT_METADATA_LEN,
    FAN_NOFD,
    FAN_REPORT_FD_ERROR,
    NOTIFICATION_EVENTS,
    Dialect,
    has_pidfd,
)

_INT = struct.Struct("=i")
_MASK = struct.Struct("=Q")
_DESCRIPTORS = socket.CMSG_SPACE(2 * _INT.size)  # the file and the pidfd


@dataclass(slots=True)  # not frozen: one is made for every event, and that doubles the price
class Received:
    """An event that has left the socket: its bytes with this process's descriptors in them, the server's number, the accessor's path."""

    data: bytearray
    number: int
    fd: int
    mask: int
    path: bytes

    @property
    def pidfd(self) -> int:
        """The descriptor in its pidfd record; negative where there is none."""
        return int(_INT.unpack_from(self.data, EVENT_PIDFD_OFFSET)[0]) if has_pidfd(self.data) else FAN_NOFD

    def close(self) -> None:
        """Close its descriptors."""
        for descriptor in (self.fd, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)


class EventStream:
    """One group's event socket. Nothing here waits for the server; not to be used by two threads at once.

    `flags` of fanotify_init(2); `close_on_exec`: of the descriptors that events bring; `gone` makes what is raised when the mount is gone.
    """

    def __init__(
        self,
        events: socket.socket,
        flags: int,
        dialect: Dialect,
        gone: Callable[[], OSError],
        *,
        close_on_exec: bool,
    ) -> None:
        events.setblocking(False)
        self.socket = events
        self._gone = gone
        self._tells_errors = bool(flags & FAN_REPORT_FD_ERROR)
        self._permission_events = dialect.permission
        self._receive_flags = socket.MSG_CMSG_CLOEXEC if close_on_exec else 0
        self._message = bytearray(LARGEST_EVENT_MESSAGE)
        self._buffered: deque[Received] = deque()
        self._read_since_credit = 0
        self._merged = 0

    def take_merged(self) -> int:
        """How many events have gone into others since this was last asked."""
        merged, self._merged = self._merged, 0
        return merged

    @property
    def buffered(self) -> int:
        """How many events have left the socket and not been taken."""
        return len(self._buffered)

    def take(self) -> Received | None:
        """The next event, None when there is none. Raises the errno of an event that came without its descriptor (denied already), and
        ENOTCONN when the mount is gone."""
        if not self._buffered:
            received = self._receive()
            if received is None or not received.mask & NOTIFICATION_EVENTS:
                return received
            self._buffered.append(received)
        if self._buffered[0].mask & NOTIFICATION_EVENTS:
            self.receive_all()
        return self._buffered.popleft()

    @property
    def waits(self) -> bool:
        """Whether take() would find something."""
        if self._buffered:
            return True
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def put_back(self, received: Received) -> None:
        """Let an event that was taken be the next one again."""
        self._buffered.appendleft(received)

    def receive_all(self) -> None:
        """Receive what waits, and merge equal notifications as the kernel does (emulator/group.py): they travel ahead of being read."""
        with contextlib.suppress(OSError):  # a lost connection is told when nothing is left
            while (received := self._receive()) is not None:
                if not (received.mask & NOTIFICATION_EVENTS and self._merge(received)):
                    self._buffered.append(received)

    def delivered(self, received: Received) -> None:
        """An event has been read: the server may send another."""
        self._count_as_read()
        if has_pidfd(received.data):
            self._check_pidfd(received)

    def answer(self, number: int, error: int) -> None:
        """Allow (0) or deny (an errno) the event that the server knows by that number. Raises OSError ENOTCONN when the mount is gone."""
        self._send(encode_feedback(ANSWER, number, error))

    def close(self) -> None:
        """Close the socket and the descriptors of what has not been taken; closing twice does nothing."""
        self.socket.close()
        for received in self._buffered:
            received.close()
        self._buffered.clear()

    def _merge(self, received: Received) -> bool:
        for earlier in self._buffered:
            if _are_of_one(earlier, received):
                earlier.mask |= received.mask
                _MASK.pack_into(earlier.data, EVENT_MASK_OFFSET, earlier.mask)
                received.close()
                self._count_as_read()
                self._merged += 1
                return True
        return False

    def _receive(self) -> Received | None:
        try:
            length, ancillary, _, _ = self.socket.recvmsg_into(
                [self._message], _DESCRIPTORS, self._receive_flags
            )
        except BlockingIOError:
            return None
        except ConnectionError:
            length, ancillary = 0, []
        if not length:
            raise self._gone()
        descriptors = [number for _, _, data in ancillary for (number,) in _INT.iter_unpack(data)]
        split = event_message_split(self._message)
        return self._unpack(self._message[:split], bytes(self._message[split:length]), descriptors)

    def _unpack(self, data: bytearray, path: bytes, descriptors: list[int]) -> Received:
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
        return Received(data, number, fd, mask, path)

    def _without_descriptor(self, data: bytearray, number: int, mask: int, path: bytes) -> Received:
        """This process has no room for another descriptor: recvmsg(2) threw it away. As in the kernel, the access is denied with EPERM
        and read() fails, or with FAN_REPORT_FD_ERROR the event tells of it."""
        if mask & self._permission_events:
            self._send(encode_feedback(ANSWER, number, errno.EPERM))
        if not self._tells_errors:
            self._count_as_read()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        _INT.pack_into(data, EVENT_FD_OFFSET, -errno.EMFILE)
        if has_pidfd(data):
            _INT.pack_into(data, EVENT_PIDFD_OFFSET, FAN_NOFD)
        return Received(data, number, -errno.EMFILE, mask, path)

    def _check_pidfd(self, received: Received) -> None:
        """The process may have gone since the event was sent: the kernel looks when it is read."""
        (pidfd,) = _INT.unpack_from(received.data, EVENT_PIDFD_OFFSET)
        if pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            os.close(pidfd)
            gone = -errno.ESRCH if self._tells_errors else FAN_NOFD
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
                self.socket.send(message)
                return
            except BlockingIOError:
                # The server's loop never waits for a client, so this ends; write(2) to a real group does not wait either.
                writable = select.poll()
                writable.register(self.socket, select.POLLOUT)
                writable.poll()
            except ConnectionError:
                raise self._gone() from None


def _are_of_one(first: Received, second: Received) -> bool:
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
