"""The server's end of the event socket (control/protocol.py): sends a group's events to its client and takes the answers."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator

import trio

from fusehsm.control import protocol
from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import CREDIT
from fusehsm.emulator.group import Group, Pending
from fusehsm.emulator.interface import GateFace
from fusehsm.fanotify.abi import FAN_CLASS_PRE_CONTENT

_FEEDBACK_AT_ONCE = 64  # messages that are read from one client before other clients get their turn
_IN_FLIGHT_SHORTAGE = (
    0.01  # seconds to wait when too many descriptors are on their way to clients (ETOOMANYREFS, unix(7))
)
_LARGEST_NUMBER = 0x7FFF_FFFF


class EventChannel:
    """Sends a group's events to its client and takes the answers."""

    def __init__(
        self,
        gate: GateFace,
        group: Group,
        channel: socket.socket,
        disconnect: Callable[[], None],
        doorbell: int | None,
    ) -> None:
        self.group = group
        self._disconnect = disconnect
        self._doorbell = doorbell
        self._gate = gate
        self._socket = channel
        self._credit = CREDIT
        self._sent = 0
        self._numbers = _numbers()
        self._waiting: dict[int, Pending] = {}  # permission events, by the number in the client's answer
        # EDEADLK: `fusehsm run` gives it for a listener that waits for itself.
        self._errnos = {0, errno.EDEADLK} | (
            set(group.dialect.deny_errnos) if group.flags & FAN_CLASS_PRE_CONTENT else {errno.EPERM}
        )
        self._stuck: tuple[list[bytes], list[int]] | None = (
            None  # the message, and its descriptors, that the socket had no room for
        )
        self._is_stuck = trio.Event()
        self._open = True
        group.on_readable = self.push

    def push(self) -> None:
        """Send the queued events, as far as the credit and the socket's room allow. Never blocks."""
        while self._credit and self._stuck is None and self._open:
            pending = self.group.take()
            if pending is None:
                return
            try:
                prepared = self._prepare(pending)
            except OSError:
                continue  # its file cannot be opened: the access is denied, and the client gets no event
            self._credit -= 1
            self._sent += 1
            if not self._transmit(*prepared):
                self._stuck = prepared
                self._is_stuck.set()

    def _prepare(self, pending: Pending) -> tuple[list[bytes], list[int]]:
        """The message of an event and its descriptors. Raises OSError as Group.open_file() does."""
        descriptors: list[int] = []
        fd = self.group.open_file(pending, self._open_file)
        if fd >= 0:
            descriptors.append(fd)
            fd = next(self._numbers)
            if pending.permission:
                self._waiting[fd] = pending
        pidfd = self.group.open_process(pending, _open_process)
        if pidfd is not None and pidfd >= 0:
            descriptors.append(pidfd)
            pidfd = 0  # "the last descriptor of the message"
        event = self.group.encode(pending, fd, pidfd)
        return [event, pending.path if len(pending.path) <= protocol.LARGEST_PATH else b""], descriptors

    def _open_file(self, pending: Pending) -> int:
        return self._gate.open_event_fd(self.group, pending)

    def _transmit(self, buffers: list[bytes], descriptors: list[int]) -> bool:
        """Send a message and close our copies of its descriptors; False if there is no room for it now."""
        try:
            self._socket.sendmsg(buffers, control_socket.rights(descriptors))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                return False
            # The client has gone, or reads no more. Then it owes no answer.
            self._open = False
            self._disconnect()
        else:
            if self._doorbell is not None:
                with contextlib.suppress(
                    OSError
                ):  # the pipe is full, which wakes the reader too, or has no reader any more
                    os.write(self._doorbell, b"!")
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    async def send_the_stuck(self) -> None:
        """Send each message that found no room, as soon as there is room."""
        while True:
            await self._is_stuck.wait()
            self._is_stuck = trio.Event()
            assert self._stuck is not None
            while True:
                await trio.lowlevel.wait_writable(self._socket)
                if self._transmit(*self._stuck):
                    break
                await trio.sleep(_IN_FLIGHT_SHORTAGE)
            self._stuck = None
            self.push()

    async def listen(self) -> None:
        """Take answers and credit until the client hangs up or breaks the protocol."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(_FEEDBACK_AT_ONCE):
                try:
                    message = self._socket.recv(protocol.FEEDBACK_SIZE + 1)
                except BlockingIOError:
                    break
                if not message or not self._take(message):
                    return
                if not self._waiting:
                    break  # most likely no more will come, and a read in vain costs time

    def _take(self, message: bytes) -> bool:
        try:
            kind, number, value = protocol.decode_feedback(message)
        except ValueError:
            return False
        if kind == protocol.MORE_CREDIT:
            self._credit = min(CREDIT, self._credit + value)
            self.push()
        elif kind == protocol.SYNC:
            self._synchronise(value)
        elif value in self._errnos:
            # Any other answer has not passed the client's own checks. As after a bad write(2), the event goes on waiting.
            pending = self._waiting.pop(number, None)
            if pending is not None and not self.group.closed:
                self.group.answer(pending, value)
        return True

    def _synchronise(self, received: int) -> None:
        """Answer a client that has received so many events and found no more."""
        self.push()
        if protocol.count_of(self._sent) != received or not self._open:
            return  # an event is on its way
        # There is room in the socket of a client that has received everything. One that has not gets no answer.
        with contextlib.suppress(OSError):
            self._socket.send(protocol.caught_up(received))

    def close(self) -> None:
        """Take the answers that the client has given, then close the socket. Later acts of the client do not take an answer back."""
        self._open = False
        self.group.on_readable = None
        self._take_the_rest()
        if self._stuck is not None:
            for descriptor in self._stuck[1]:
                os.close(descriptor)
            self._stuck = None
        self._socket.close()

    def _take_the_rest(self) -> None:
        """Take all messages that are in the socket."""
        with contextlib.suppress(OSError):
            # Otherwise a client that goes on writing would keep this loop running.
            self._socket.shutdown(socket.SHUT_RDWR)
        while True:
            try:
                message = self._socket.recv(protocol.FEEDBACK_SIZE + 1)
            except ConnectionResetError:
                continue  # the client closed with unread events: the socket reports this once, before the client's messages
            except OSError:
                return
            if not message or not self._take(message):
                return


def _open_process(pending: Pending) -> int:
    return os.pidfd_open(pending.pid)


def _numbers() -> Iterator[int]:
    """Numbers for events. They are positive, and each is used again only after 2,000 million others."""
    while True:
        yield from range(1, _LARGEST_NUMBER)
