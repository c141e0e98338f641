"""Delivers events to a process of the command: their bytes into its memory, their descriptors into its table."""

import contextlib
import errno
import os
import select
import struct
from dataclasses import dataclass, field
from typing import Final

from fusehsm.control.event_stream import Received
from fusehsm.fanotify.abi import (
    EVENT_FD_OFFSET,
    EVENT_PIDFD_OFFSET,
    FAN_EVENT_METADATA_LEN,
    FAN_NOFD,
    FAN_REPORT_FD_ERROR,
)
from fusehsm.supervisor import tasks
from fusehsm.supervisor.groups import SupervisedGroup
from fusehsm.supervisor.notifier import CallIsOver, Notifier, TrappedCall
from fusehsm.supervisor.parked import Parked, ParkedCalls
from fusehsm.supervisor.sources import Source

_INT: Final = struct.Struct("=i")


@dataclass(slots=True)
class Reading:
    """One read(2) of a group by a thread of the command.

    The events that it has taken count only after settle(). A call that is over has read nothing, and undo() gives the events back.
    """

    #: Where the call came from.
    notifier: Notifier
    #: The calls that wait.
    parked: ParkedCalls
    #: The call.
    call: TrappedCall
    #: The group that is read.
    group: SupervisedGroup
    #: Whether the call may wait for events.
    may_wait: bool
    #: Each event that was taken, with its mount and its descriptor's number in the process.
    _taken: list[tuple[Source, Received, int]] = field(default_factory=list)

    def into(self, parts: list[tuple[int, int]]) -> int:
        """Read into the (address, size) parts of a buffer; returns the number of bytes. Raises OSError as read(2) does, CallIsOver.

        The next part is used only if the one before is filled to its last byte (docs/facts.md, section 7).
        """
        total = 0
        for address, size in parts:
            try:
                filled = self._fill(address, size)
            except OSError:
                if total:
                    break
                raise
            total += filled
            if filled != size:
                break
        return total

    def _fill(self, address: int, size: int) -> int:
        if (address + size) >> 63:
            # The kernel checks the pointer first. It finds a bad one in the program's own half only when it has an event.
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        filled = 0
        while True:
            try:
                source, received = self.group.take(size - filled, drain=self.group.nonblocking and not filled)
            except BlockingIOError:
                if filled:
                    return filled
                if self.group.nonblocking:
                    raise
                if not self.may_wait:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
                self._wait()
                continue
            except OSError:
                if filled:
                    return filled
                raise
            try:
                self._deliver(source, received, address + filled)
            except OSError:
                if filled:
                    return filled
                raise
            filled += len(received.data)
            if size - filled < FAN_EVENT_METADATA_LEN:
                return filled

    def _wait(self) -> None:
        """Wait until there may be events. Raises CallIsOver, OSError for a signal."""
        wake = self.parked.wake()
        verdict: list[int | None] = []

        def end(number: int | None) -> None:
            verdict.append(number)
            os.eventfd_write(wake, 1)

        parked = Parked(self.call, end, interruptible=True)
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for descriptor in self.group.begin_waiting(wake):
            poll.register(descriptor, select.POLLIN)
        self.parked.park(parked)
        try:
            poll.poll()
        finally:
            self.parked.unpark(parked)
            self.group.end_waiting(wake)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wake)
        if verdict:
            if verdict[0] is None:
                raise CallIsOver
            raise OSError(verdict[0], "a signal")
        if self.group.closed:  # the supervisor ends
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _deliver(self, source: Source, received: Received, address: int) -> None:
        """Deliver one event. Raises OSError EFAULT or EMFILE, and then the event has been denied."""
        try:
            number = self._hand_over(received, address)
        except CallIsOver:
            self.group.take_back(source, received, FAN_NOFD)
            raise
        except OSError:
            self.group.refuse(source, received)
            received.close()
            raise
        if number < 0 and received.fd >= 0:
            self.group.refuse(source, received)
        elif number >= 0:
            self.group.handed_over(source, received, number, self.call.tid)
        self._taken.append((source, received, number))

    def _hand_over(self, received: Received, address: int) -> int:
        """Put an event into the process. Returns its descriptor's number there, or the error that stands in its place."""
        tid = self.call.tid
        data = bytearray(received.data)
        pidfd = received.pidfd
        if received.fd >= 0:
            # First without descriptors: if the memory is not there, they could not be taken back.
            _INT.pack_into(data, EVENT_FD_OFFSET, FAN_NOFD)
        if pidfd >= 0:
            _INT.pack_into(data, EVENT_PIDFD_OFFSET, FAN_NOFD)
        self.notifier.check(self.call)
        try:
            tasks.write_memory(tid, address, data)
            number = received.fd
            if number >= 0:
                number = self._add(received.fd, bool(self.group.event_f_flags & os.O_CLOEXEC))
                tasks.write_memory(tid, address + EVENT_FD_OFFSET, _INT.pack(number))
            if pidfd >= 0:
                tasks.write_memory(tid, address + EVENT_PIDFD_OFFSET, _INT.pack(self._add(pidfd, True)))
        except ProcessLookupError:
            raise CallIsOver from None
        return number

    def _add(self, descriptor: int, close_on_exec: bool) -> int:
        try:
            return self.notifier.add_descriptor(self.call, descriptor, close_on_exec=close_on_exec)
        except OSError as error:
            if not self.group.flags & FAN_REPORT_FD_ERROR:
                raise
            return -(error.errno or errno.EMFILE)

    def settle(self) -> None:
        """Note that the call has returned what was read."""
        for _, received, _ in self._taken:
            received.close()
        self._taken.clear()

    def undo(self) -> None:
        """Give the events back: the call is over, and has returned nothing."""
        for source, received, number in reversed(self._taken):
            with contextlib.suppress(OSError):
                self.group.take_back(source, received, number)
        self._taken.clear()
