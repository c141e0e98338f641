"""Reads the event socket of a group on a fusehsm mount (control/protocol.py). Events have the server's numbers here.

fanotify answers an event by its descriptor's number. The callers translate: backends/emulated.py, and the supervisor of unmodified programs.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fusehsm.control.protocol import (
    ANSWER,
    CAUGHT_UP_SIZE,
    CREDIT,
    LARGEST_EVENT_MESSAGE,
    MORE_CREDIT,
    SYNC,
    count_of,
    decode_caught_up,
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
# So many bytes of events may have filled the socket, and the mount may still have to notice that there is room again.
_MANY_BYTES: Final = 16 * 1024
_DESCRIPTORS = socket.CMSG_SPACE(2 * _INT.size)  # the file and the pidfd


@dataclass(slots=True, eq=False)  # not frozen: one is made for each event, and frozen doubles the cost
class Received:
    """An event that has left the socket."""

    #: fanotify's bytes, with this process's descriptors in them.
    data: bytearray
    #: The server's number of the event.
    number: int
    #: The event descriptor; negative if there is none.
    fd: int
    #: The event's mask.
    mask: int
    #: The path that the accessor used.
    path: bytes

    @property
    def pidfd(self) -> int:
        """The descriptor in the event's pidfd record; negative if there is none."""
        return int(_INT.unpack_from(self.data, EVENT_PIDFD_OFFSET)[0]) if has_pidfd(self.data) else FAN_NOFD

    @property
    def pid(self) -> int:
        """The accessor's process, as the event reports it."""
        return int(_INT.unpack_from(self.data, EVENT_PID_OFFSET)[0])

    def close(self) -> None:
        """Close the event's descriptors."""
        for descriptor in (self.fd, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)


class EventStream:
    """One group's event socket. Only is_drained() waits for the server. Two threads must not use it at once.

    `flags`: those of fanotify_init(2). `gone` makes the error to raise when the mount is gone. `close_on_exec`: set on the descriptors of events.
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
        self._received = 0
        # What was received when the mount last had no more events and all the credit, and the bytes received since.
        self._drained_at = 0
        self._bytes_since = 0

    def take_merged(self) -> int:
        """The number of events that were merged into others since the last call."""
        merged, self._merged = self._merged, 0
        return merged

    @property
    def buffered(self) -> int:
        """The number of events that have left the socket and were not taken."""
        return len(self._buffered)

    def take(self) -> Received | None:
        """The next event; None if there is none.

        Raises the OSError of an event that came without its descriptor (it is denied already), and OSError ENOTCONN if the mount is gone.
        """
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
        """Whether take() would find something: an event, or the end of the mount."""
        if self._buffered:
            return True
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def is_drained(self, patience: float) -> bool:
        """Whether the mount has no event left, after take() has found none; False: take() again.

        The mount sends a limited number of events ahead (CREDIT), and may have more. Only if that is possible, this asks, and waits for the answer
        for `patience` seconds at most; True without an answer.
        """
        if self._buffered:
            return False
        if self._received - self._drained_at < CREDIT and self._bytes_since < _MANY_BYTES:
            return True  # it had credit and room for every event at the moment when that was made
        try:
            self._send_credit()
            self._send(encode_feedback(SYNC, 0, count_of(self._received)))
        except OSError:
            return False  # take() reports it
        return self._is_caught_up(time.monotonic() + patience)

    def _is_caught_up(self, until: float) -> bool:
        readable = select.poll()
        readable.register(self.socket, select.POLLIN)
        while True:
            if not readable.poll(max(0.0, 1000 * (until - time.monotonic()))):
                return True
            try:
                message = self.socket.recv(CAUGHT_UP_SIZE + 1, socket.MSG_PEEK)
            except OSError:
                return False
            if len(message) != CAUGHT_UP_SIZE:
                return False
            self.socket.recv(CAUGHT_UP_SIZE)
            if decode_caught_up(message) == count_of(self._received):
                self._drained_at, self._bytes_since = self._received, 0
                return True

    def put_back(self, received: Received) -> None:
        """Put an event back that was taken, as the next one."""
        self._buffered.appendleft(received)

    def receive_all(self) -> None:
        """Receive all events that wait. Merge equal notifications as the kernel does (emulator/group.py): events travel ahead of the reads."""
        with contextlib.suppress(OSError):  # a lost connection is reported when no event is left
            while (received := self._receive()) is not None:
                if not (received.mask & NOTIFICATION_EVENTS and self._merge(received)):
                    self._buffered.append(received)

    def waiting(self) -> list[Received]:
        """The events that wait to be taken. They stay."""
        self.receive_all()
        return list(self._buffered)

    def discard(self, received: Received) -> bool:
        """Drop one of the events that wait; returns whether it was there."""
        for position, other in enumerate(self._buffered):
            if other is received:
                del self._buffered[position]
                received.close()
                self._count_as_read()
                return True
        return False

    def delivered(self, received: Received) -> None:
        """Note that the listener has read an event, so that the server may send another."""
        self._count_as_read()
        if has_pidfd(received.data):
            self._check_pidfd(received)

    def answer(self, number: int, error: int) -> None:
        """Allow (`error` 0) or deny (an errno) the event with the server's number `number`. Raises OSError ENOTCONN if the mount is gone."""
        self._send(encode_feedback(ANSWER, number, error))

    def close(self) -> None:
        """Close the socket and the descriptors of all events that were not taken. A second call does nothing."""
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
        if length == CAUGHT_UP_SIZE:
            return self._receive()  # it has come too late
        self._received += 1
        self._bytes_since += length
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
        """Handle an event whose descriptor recvmsg(2) threw away, because this process has no room for another.

        As in the kernel, the access is denied with EPERM and read() fails; with FAN_REPORT_FD_ERROR the event carries the error.
        """
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
        """Check that the process still exists: the kernel makes the pidfd when the event is read, and the event was sent earlier."""
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
            with contextlib.suppress(OSError):  # the next read reports it
                self._send_credit()

    def _send_credit(self) -> None:
        credit, self._read_since_credit = self._read_since_credit, 0
        if credit:
            self._send(encode_feedback(MORE_CREDIT, 0, credit))

    def _send(self, message: bytes) -> None:
        while True:
            try:
                self.socket.send(message)
                return
            except BlockingIOError:
                # The server's loop never waits for a client, so this wait ends. write(2) to a real group does not wait either.
                writable = select.poll()
                writable.register(self.socket, select.POLLOUT)
                writable.poll()
            except ConnectionError:
                raise self._gone() from None


def _are_of_one(first: Received, second: Received) -> bool:
    """Whether two events are notifications of the same file by the same name, and of the same process."""
    if first.path != second.path or not first.mask & NOTIFICATION_EVENTS:
        return False
    if (
        first.data[EVENT_PID_OFFSET:FAN_EVENT_METADATA_LEN]
        != second.data[EVENT_PID_OFFSET:FAN_EVENT_METADATA_LEN]
    ):
        return False
    if first.fd < 0 or second.fd < 0:
        return first.fd == second.fd
    # Two files can have had the same name, one after the other.
    return os.path.sameopenfile(first.fd, second.fd)
