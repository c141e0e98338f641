"""One emulated fanotify group: its queue, the events that wait for a response, overflow and close.

Sources: fanotify(7); ``fsnotify_insert_event``, ``fanotify_read``, ``process_access_response`` and ``fanotify_release`` of
the kernel; measured on 6.18 (docs/facts.md, sections 6 to 8). This module never waits and does no I/O: callbacks open files.
"""

from __future__ import annotations

import enum
import errno
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fusehsm.events import EventShape
from fusehsm.fanotify.abi import (
    FAN_CLASS_CONTENT,
    FAN_CLASS_PRE_CONTENT,
    FAN_ENABLE_AUDIT,
    FAN_EVENT_METADATA_LEN,
    FAN_NOFD,
    FAN_Q_OVERFLOW,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_FID_BITS,
    FAN_REPORT_MNT,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    FAN_UNLIMITED_QUEUE,
    O_LARGEFILE,
    Dialect,
    encode_event,
    event_length,
)
from fusehsm.fanotify.marks import MarkTable
from fusehsm.fanotify.rules import UnansweredEvents, check_init, fill_buffer, parse_response

#: sysctl fs.fanotify.max_queued_events
MAX_QUEUED_EVENTS: Final = 16384

_OVERFLOW_SHAPE: Final = EventShape(FAN_Q_OVERFLOW, None, None)


class PendingState(enum.Enum):
    """The state of an event."""

    #: In the queue, not read yet.
    QUEUED = enum.auto()
    #: Read; its accessor waits for the response.
    REPORTED = enum.auto()
    #: Read, and it needs no response: a notification or an overflow.
    DELIVERED = enum.auto()
    #: Allowed or denied.
    ANSWERED = enum.auto()
    #: Its accessor waits no more.
    CANCELLED = enum.auto()


class Pending:
    """One event of one group, from put() to its answer."""

    __slots__ = (
        "created",
        "errno",
        "fd",
        "on_answer",
        "path",
        "permission",
        "pid",
        "shape",
        "state",
        "target",
        "tid",
    )

    def __init__(
        self,
        shape: EventShape,
        pid: int,
        tid: int,
        target: object,
        path: bytes,
        permission: bool,
        created: float,
        on_answer: Callable[[Pending], None] | None = None,
    ) -> None:
        #: Mask and range.
        self.shape = shape
        #: The accessor's process.
        self.pid = pid
        #: The accessor's thread.
        self.tid = tid
        #: The object that the caller of put() gave: the file of the event.
        self.target = target
        #: The path of the file.
        self.path = path
        #: Whether the event needs a response.
        self.permission = permission
        #: When it was made, in seconds of the group's clock.
        self.created = created
        #: How far it has come.
        self.state = PendingState.QUEUED
        #: The answer: 0 for allowed, or an errno.
        self.errno = 0
        #: The number of the event fd, once the event is read.
        self.fd: int | None = None
        #: Called once, when the event is answered. Never called after a withdrawal, or after the group is closed.
        self.on_answer = on_answer

    def __repr__(self) -> str:
        return f"<Pending {self.shape} pid {self.pid} {self.path!r} {self.state.name}>"


class Group:
    """One fanotify group. Two threads must not use it at once."""

    def __init__(
        self,
        flags: int,
        event_f_flags: int,
        dialect: Dialect,
        *,
        max_queued_events: int = MAX_QUEUED_EVENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises OSError EINVAL as fanotify_init(2) does; EOPNOTSUPP for a group that reports by file handle or mounts."""
        check_init(flags, event_f_flags)
        if flags & (FAN_REPORT_FID_BITS | FAN_REPORT_MNT):
            message = f"fanotify_init flags {flags:#x}: groups with FAN_REPORT_*FID or FAN_REPORT_MNT are not emulated"
            raise OSError(errno.EOPNOTSUPP, message)
        #: `flags` and `event_f_flags` of fanotify_init(2).
        self.flags = flags
        self.event_f_flags = event_f_flags
        #: The pre-content ABI that its listener uses.
        self.dialect = dialect
        self.marks = MarkTable(dialect)
        #: 2 FAN_CLASS_PRE_CONTENT, 1 FAN_CLASS_CONTENT, 0 FAN_CLASS_NOTIF. Groups of a higher priority are asked first.
        self.priority = 2 if flags & FAN_CLASS_PRE_CONTENT else 1 if flags & FAN_CLASS_CONTENT else 0
        #: Called whenever an event has been queued.
        self.on_readable: Callable[[], None] | None = None
        #: Handles an event in the task that asks, past the queue. put_taken() is for such events.
        self.handle: Callable[[Pending], Coroutine[Any, Any, None]] | None = None
        #: The listener's process, 0 when it is not known.
        self.listener_pid = 0
        #: The processes that read its events, each with its proc.started(), the latest last.
        self.readers: dict[int, int] = {}
        #: Whether close() was called.
        self.closed = False
        self._max_queued = None if flags & FAN_UNLIMITED_QUEUE else max_queued_events
        self._clock = clock
        # Keyed by the event: a killed accessor's event is removed from the middle of the queue.
        self._queue: OrderedDict[Pending, None] = OrderedDict()
        self._overflow: Pending | None = None
        # The queued notifications, by what new ones must share to be merged into them.
        self._notifications: dict[tuple[object, bytes, int], Pending] = {}
        self._outstanding: dict[Pending, None] = {}
        self._by_fd: UnansweredEvents[Pending] = UnansweredEvents()
        self._counts = dict.fromkeys(
            ("queued", "allowed", "denied", "withdrawn", "overflowed", "unopened"), 0
        )

    # The accessor's side

    def put(
        self,
        shape: EventShape,
        *,
        pid: int,
        tid: int,
        target: object,
        path: bytes,
        permission: bool = True,
        on_answer: Callable[[Pending], None] | None = None,
    ) -> Pending | None:
        """Queue an event; returns it, or None if the group is closed or its queue is full. The access is allowed then; for a full queue, an
        overflow event tells the listener.

        ``permission`` False: a notification. It is merged into a queued one, wherever in the queue, of the same target by the same
        name and with the same reported pid (``fanotify_merge`` in the kernel; docs/facts.md, section 7). ``on_answer`` may be called
        before this returns: the transport to the listener may find at once that it cannot open the event's file.
        """
        if self.closed:
            return None
        if self._max_queued is not None and len(self._queue) >= self._max_queued:
            self._put_overflow()
            return None
        pending = Pending(shape, pid, tid, target, path, permission, self._clock(), on_answer)
        if not permission:
            # The check for a full queue comes first: it takes no notification, not even one that could be merged.
            known = self._notifications.setdefault(self._merge_key(pending), pending)
            if known is not pending:
                known.shape = EventShape(known.shape.mask | shape.mask, None, None)
                return known
        self._queue[pending] = None
        self._counts["queued"] += 1
        if self.on_readable is not None:
            self.on_readable()
        return pending

    def _merge_key(self, pending: Pending) -> tuple[object, bytes, int]:
        return pending.target, pending.path, self.reported_pid(pending)

    def put_taken(
        self,
        shape: EventShape,
        *,
        pid: int,
        tid: int,
        target: object,
        path: bytes,
        on_answer: Callable[[Pending], None] | None = None,
    ) -> Pending | None:
        """put() and take() in one, past the queue, for a permission event. Returns None if the group is closed."""
        if self.closed:
            return None
        pending = Pending(shape, pid, tid, target, path, True, self._clock(), on_answer)
        pending.state = PendingState.REPORTED
        self._outstanding[pending] = None
        self._counts["queued"] += 1
        return pending

    def _put_overflow(self) -> None:
        self._counts["overflowed"] += 1
        if self._overflow is not None:
            return
        # It may exceed the queue's limit. It is the only event without a file.
        self._overflow = Pending(_OVERFLOW_SHAPE, 0, 0, None, b"", False, self._clock())
        self._queue[self._overflow] = None
        if self.on_readable is not None:
            self.on_readable()

    def withdraw(self, pending: Pending) -> None:
        """Cancel an event whose accessor waits no more (it was killed, or timed out). Does nothing if it was answered already.

        A queued event is removed. One that was read can still be answered once, without effect (docs/facts.md, section 8).
        """
        if pending.state is PendingState.QUEUED:
            self._queue.pop(pending, None)
        elif pending.state is not PendingState.REPORTED:
            return
        pending.state = PendingState.CANCELLED
        self._counts["withdrawn"] += 1

    # The listener's side

    @property
    def queued_events(self) -> int:
        """How many events wait to be read."""
        return len(self._queue)

    @property
    def queued_bytes(self) -> int:
        """The result of ioctl(FIONREAD): 24 bytes an event, whatever its real length (docs/facts.md, section 7)."""
        return FAN_EVENT_METADATA_LEN * len(self._queue)

    @property
    def outstanding_events(self) -> int:
        """How many events have been read and not answered."""
        return len(self._outstanding)

    @property
    def shown_flags(self) -> int:
        """The flags of fanotify_init(2) as /proc/PID/fdinfo shows them: without FAN_ENABLE_AUDIT (measured)."""
        return self.flags & ~FAN_ENABLE_AUDIT

    @property
    def event_flags(self) -> int:
        """The flags of open(2) with which event fds are made, as /proc/PID/fdinfo shows them: O_LARGEFILE always."""
        return self.event_f_flags | O_LARGEFILE

    @property
    def statistics(self) -> dict[str, int]:
        """Counts since the group was made."""
        return dict(self._counts)

    def reported_pid(self, pending: Pending) -> int:
        """The value of the event's pid field: the process id, with FAN_REPORT_TID the thread id."""
        return pending.tid if self.flags & FAN_REPORT_TID else pending.pid

    def length(self, pending: Pending) -> int:
        """Length in bytes of the event as read() gives it."""
        has_pidfd = bool(self.flags & FAN_REPORT_PIDFD)
        return event_length(self.dialect, has_range=pending.shape.offset is not None, has_pidfd=has_pidfd)

    def take(self) -> Pending | None:
        """The next event, None when there is none. A permission event then waits for its response."""
        if not self._queue:
            return None
        pending = self._queue.popitem(last=False)[0]
        if pending.permission:
            pending.state = PendingState.REPORTED
            self._outstanding[pending] = None
        else:
            pending.state = PendingState.DELIVERED
            if pending is self._overflow:
                self._overflow = None
            else:
                del self._notifications[self._merge_key(pending)]
        return pending

    def answer(self, pending: Pending, error: int) -> None:
        """Allow (0) or deny (an errno) an event that has been read, and call its ``on_answer``. Raises OSError ENOENT when it is not
        read yet, or answered already."""
        if pending not in self._outstanding:
            raise OSError(errno.ENOENT, "fanotify response: no such event waits for an answer")
        if pending.fd is not None:
            self._by_fd.remove(pending.fd, pending)
        self._finish(pending, error)

    def answer_descriptor(self, fd: int, error: int) -> None:
        """answer() the event that was delivered with that descriptor number. If there are several, it is the one read first (docs/facts.md,
        section 6). Raises OSError ENOENT when there is none."""
        self._finish(self._by_fd.take(fd), error)

    def _finish(self, pending: Pending, error: int) -> None:
        del self._outstanding[pending]
        if pending.state is PendingState.CANCELLED:
            return
        pending.state = PendingState.ANSWERED
        pending.errno = error
        self._counts["denied" if error else "allowed"] += 1
        if pending.on_answer is not None:
            pending.on_answer(pending)

    def read(
        self,
        size: int,
        open_fd: Callable[[Pending], int],
        open_pidfd: Callable[[Pending], int] | None = None,
    ) -> bytes:
        """read(2) of the group: as many whole events as fit into ``size`` bytes (docs/facts.md, section 7).

        ``open_fd`` opens an event's file for the listener and ``open_pidfd`` (for FAN_REPORT_PIDFD) its process; either
        may raise OSError. An event whose file cannot be opened is denied with EPERM. With FAN_REPORT_FD_ERROR it is
        delivered with -errno as its fd. Without that flag it is dropped and ends the read.

        Raises BlockingIOError when nothing is queued, OSError EINVAL when the first event does not fit (it stays), and
        the errno of ``open_fd`` when the first event's file cannot be opened.
        """
        data = bytearray()
        for _ in range(fill_buffer(map(self.length, self._queue), size)):
            pending = self.take()
            assert pending is not None
            try:
                data += self._deliver(pending, open_fd, open_pidfd)
            except OSError:
                if not data:
                    raise
                break
        return bytes(data)

    def _deliver(
        self,
        pending: Pending,
        open_fd: Callable[[Pending], int],
        open_pidfd: Callable[[Pending], int] | None,
    ) -> bytes:
        fd = self.open_file(pending, open_fd)
        self.delivered(pending, fd)
        return self.encode(pending, fd, self.open_process(pending, open_pidfd))

    def delivered(self, pending: Pending, fd: int) -> None:
        """Record that the listener has the event, with the descriptor that open_file() returned. It answers the event by that number."""
        if pending.permission and fd >= 0:
            pending.fd = fd
            self._by_fd.add(fd, pending)

    def open_file(self, pending: Pending, open_fd: Callable[[Pending], int]) -> int:
        """Open the file of an event that has just been taken; returns the descriptor that ``open_fd`` gives.

        When ``open_fd`` raises OSError, the event is denied with EPERM and counted as unopened. With FAN_REPORT_FD_ERROR this then
        returns -errno. Without that flag it raises the OSError, and the event is dropped. An overflow event has no file: this
        returns FAN_NOFD, or -EBADF with FAN_REPORT_FD_ERROR.
        """
        tells_errors = self.flags & FAN_REPORT_FD_ERROR
        if pending.shape.mask & FAN_Q_OVERFLOW:
            return -errno.EBADF if tells_errors else FAN_NOFD
        try:
            return open_fd(pending)
        except OSError as error:
            if pending.permission:
                self._counts["unopened"] += 1
                self._finish(pending, errno.EPERM)
            if not tells_errors:
                raise
            return -(error.errno or errno.EIO)

    def open_process(
        self, pending: Pending, open_pidfd: Callable[[Pending], int] | None = None
    ) -> int | None:
        """The value of the event's pidfd record: the descriptor that ``open_pidfd`` gives. On failure FAN_NOPIDFD, or -errno with
        FAN_REPORT_FD_ERROR. None where the group has no such records."""
        if not self.flags & FAN_REPORT_PIDFD:
            return None
        number = errno.ESRCH
        # The process may be dead by now, or not visible to the listener.
        if pending.pid and open_pidfd is not None:
            try:
                return open_pidfd(pending)
            except OSError as error:
                number = error.errno or number
        return -number if self.flags & FAN_REPORT_FD_ERROR else FAN_NOFD

    def encode(self, pending: Pending, fd: int, pidfd: int | None) -> bytes:
        """The event's bytes as read(2) gives them, with these descriptors for its file and its process."""
        shape = pending.shape
        range_ = None if shape.offset is None or shape.count is None else (shape.offset, shape.count)
        pid = self.reported_pid(pending)
        return encode_event(self.dialect, shape.mask, fd, pid, range_=range_, pidfd=pidfd)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """write(2) of one response; returns the number of bytes taken. Raises OSError EINVAL for a bad response (the event continues
        to wait) and ENOENT for an fd that belongs to no waiting event (docs/facts.md, section 6)."""
        response = parse_response(data, self.flags, self.dialect)
        if not response.probe:
            self.answer_descriptor(response.fd, response.decision_errno)
        return response.length

    def close(self) -> list[Pending]:
        """Close the group, because its last descriptor is closed or its listener died. Drops its marks and its queue.

        Returns every permission event whose accessor still waits, those that were read first. The kernel allows them;
        here the caller decides. Their ``on_answer`` is not called. A second call returns an empty list.
        """
        self.closed = True
        unanswered = [pending for pending in self._outstanding if pending.state is PendingState.REPORTED]
        unanswered += [pending for pending in self._queue if pending.permission]
        self._outstanding.clear()
        self._by_fd.clear()
        self._queue.clear()
        self._notifications.clear()
        self._overflow = None
        self.marks.clear()
        return unanswered
