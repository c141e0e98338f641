"""A fanotify group as the processes of the command share it: the events of all mounts on which it has marks, with one set of descriptor numbers."""

import contextlib
import enum
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusehsm.backends.lookup import FoundObject, mark_request
from fusehsm.control.event_stream import Received
from fusehsm.control.protocol import MarkBacking, MarkRequest, Reader
from fusehsm.fanotify import rules
from fusehsm.fanotify.abi import (
    FAN_CLASS_CONTENT,
    FAN_CLASS_PRE_CONTENT,
    FAN_EVENT_METADATA_LEN,
    FAN_MARK_ADD,
    FAN_MARK_DONT_FOLLOW,
    FAN_MARK_FLUSH,
    FAN_MARK_INODE,
    FAN_MARK_TYPE_MASK,
    FAN_NONBLOCK,
    LINUX_6_14,
    PATCH_V2,
    Dialect,
)
from fusehsm.linux import proc, syscalls
from fusehsm.linux.mountinfo import Mount, read_mounts
from fusehsm.supervisor.readiness import Bell
from fusehsm.supervisor.sources import Outstanding, Source, refused
from fusehsm.supervisor.view import Target

_ANSWERS_WITHIN = 1.0  # seconds; a mount's server never waits for a client

_log = logging.getLogger(__name__)


class Leaving(enum.Enum):
    """The result of the end of the last descriptor."""

    #: The group is over.
    OVER = enum.auto()
    #: The group stays after all, or is over already.
    STAYS = enum.auto()
    #: Ask again later.
    LATER = enum.auto()


class SupervisedGroup:
    """A group of the command. Any number of threads may use it at once.

    No method touches the command's memory. Only mark() may wait for others for long. `nonblocking` is O_NONBLOCK. `dialect` None: none was chosen;
    the group then speaks mainline's dialect and refuses masks that have another meaning in another dialect.
    """

    def __init__(
        self,
        flags: int,
        event_f_flags: int,
        dialect: Dialect | None,
        bell: Bell,
        on_left: Callable[[], None],
    ) -> None:
        """`on_left` is called when leave() is to be asked again. Raises OSError EINVAL as fanotify_init(2)."""
        rules.check_init(flags, event_f_flags)
        self.flags = flags
        self.event_f_flags = event_f_flags
        self.dialect = dialect or LINUX_6_14
        self.bell = bell
        self._on_left = on_left
        self.nonblocking = bool(flags & FAN_NONBLOCK)
        self._told_dialect = dialect is not None
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._sources: list[Source] = []
        # By the descriptor's number in the command. The event's own number is its server's.
        self._unanswered: rules.UnansweredEvents[tuple[Source, int]] = rules.UnansweredEvents()
        # The same events by their numbers, to find out which wait for long.
        self._outstanding: dict[tuple[Source, int], Outstanding] = {}
        # Those that a reader is being told of, which waits for as long as its memory does.
        self._in_hand: dict[tuple[Source, int], Outstanding] = {}
        self._readers: dict[int, None] = {}
        self._users = 0
        self._left = False
        self._closed = False
        self._over = False  # no process has it any more, and none can get it
        self._settled = threading.Event()  # set when, after the close, no event waits for an answer any more

    # Marks

    def mark(
        self,
        flags: int,
        mask: int,
        look_up: Callable[[], FoundObject],
        *,
        privileged: Callable[[], bool],
        targets: Callable[[FoundObject], list[Target] | None],
    ) -> None:
        """fanotify_mark(2). `look_up` finds the object. `privileged`: the caller may mark more than single files.

        `targets`: the object as the overlays know it, if the caller has found it below them (View.targets()).

        Raises OSError as the kernel does; for an object on no fusehsm mount, the errno of this kernel.
        """
        self._check_dialect(mask)
        rules.check_mark(self.flags, self.dialect, flags, mask, None)
        if flags & FAN_MARK_TYPE_MASK != FAN_MARK_INODE and not privileged():
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if flags & FAN_MARK_FLUSH:
            for source in list(self._sources):
                self._request(source, MarkRequest(flags, mask, *source.mount.device, None))
            return
        found = look_up()
        try:
            below = targets(found)
            if below is not None and not below:
                self._mark_found(flags, mask, found)
                return
            rules.check_mark(self.flags, self.dialect, flags, mask, found.kind)
            for target in below or ():
                self._request(self._source(target.overlay, flags), target.request(flags, mask))
        finally:
            os.close(found.descriptor)

    def _mark_found(self, flags: int, mask: int, found: FoundObject) -> None:
        """Mark an object that the caller has found as everybody sees it."""
        mount = _mount_of(found.device)
        message = mark_request(flags, mask, found)
        if mount is not None:
            rules.check_mark(self.flags, self.dialect, flags, mask, found.kind)
            self._request(self._source(mount, flags), message)
        elif not self._marked_on_backing(message):
            raise self._elsewhere(flags, mask, found)

    def _marked_on_backing(self, mark: MarkRequest) -> bool:
        """Make the mark if it names a file of a mount by its backing, as through an event descriptor. Returns whether it does."""
        for source in list(self._sources):
            try:
                self._request(source, mark)
                return True
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        return False

    def _check_dialect(self, mask: int) -> None:
        old = PATCH_V2.pre_access
        if mask & old and not self._told_dialect:
            raise refused(
                errno.EINVAL,
                f"a mark with {old:#x}, FAN_PRE_ACCESS in patch-v2 and patch-v1 only: say which it is, with --abi patch-v2 or --abi patch-v1",
            )

    def _request(self, source: Source, mark: MarkRequest | MarkBacking) -> None:
        try:
            source.connection.request(mark)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            # When a file system is unmounted, its marks go, too.
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    def _source(self, mount: Mount, flags: int) -> Source:
        with self._connecting:
            for source in self._sources:
                if source.mount.device == mount.device:
                    return source
            if not flags & FAN_MARK_ADD:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            source = Source.connect(
                mount,
                self.flags,
                self.event_f_flags,
                self.dialect,
                self.bell,
                told_dialect=self._told_dialect,
            )
            with self._lock:
                if self._closed:
                    source.close()
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._sources.append(source)
                self._wake_readers()
            return source

    def _elsewhere(self, flags: int, mask: int, found: FoundObject) -> OSError:
        """The error of this kernel for the mark."""
        try:
            probe = syscalls.fanotify_init(
                self.flags & (FAN_CLASS_PRE_CONTENT | FAN_CLASS_CONTENT), os.O_RDONLY | os.O_CLOEXEC
            )
        except OSError as error:
            return error
        try:
            path = os.fsencode(f"/proc/self/fd/{found.descriptor}")
            # Nothing may come between these calls: an accessor of the marked object waits for this same thread.
            syscalls.fanotify_mark(probe, flags & ~FAN_MARK_DONT_FOLLOW, mask, path=path)
        except OSError as error:
            return error
        finally:
            os.close(probe)
        major, minor = found.device
        return refused(
            errno.EOPNOTSUPP,
            f"a mark on an object on no fusehsm mount (device {major}:{minor}), which only the kernel could watch: give its directory to --mount",
        )

    # Events

    def take(self, size: int, *, drain: bool = False) -> tuple[Source, Received]:
        """The next event, of at most `size` bytes. `drain`: also one that a mount has not sent yet, because it sends a limited number ahead.

        Raises BlockingIOError if there is none, OSError EINVAL if it does not fit (it stays), and the errno of an event that came
        without its descriptor.
        """
        with self._lock:
            while True:
                taken = self._take(size)
                if taken is not None:
                    return taken
                if not drain or all(source.stream.is_drained(_ANSWERS_WITHIN) for source in self._sources):
                    break
            self.bell.tidy(self._something_waits)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _take(self, size: int) -> tuple[Source, Received] | None:
        for source in list(self._sources):
            try:
                received = source.stream.take()
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    self.bell.take(1 + source.stream.take_merged())
                    raise
                self._drop(source)
                continue
            if received is None:
                continue
            if len(received.data) > size:
                source.stream.put_back(received)
                self._wake_for_buffered()
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            source.stream.delivered(received)
            self.bell.take(1 + source.stream.take_merged())
            if received.fd >= 0 and received.mask & self.dialect.permission:
                self._in_hand[source, received.number] = Outstanding(source, received, time.monotonic())
            # The next event comes from another mount, if that has one.
            self._sources.append(self._sources.pop(self._sources.index(source)))
            self._wake_for_buffered()
            return source, received
        return None

    def _drop(self, source: Source) -> None:
        """Remove a mount that is gone; no accessor waits there any more. A listener may still answer an event of it: see respond()."""
        self._sources.remove(source)
        source.close()

    def handed_over(self, source: Source, received: Received, number: int, tid: int) -> None:
        """Note that thread `tid` is about to read the event, with that descriptor number."""
        if received.mask & self.dialect.permission:
            if tid not in source.readers:
                self._tell_reader(source, tid)
            with self._lock:
                self._in_hand.pop((source, received.number), None)
                self._unanswered.add(number, (source, received.number))
                self._outstanding[source, received.number] = Outstanding(source, received, time.monotonic())

    def _tell_reader(self, source: Source, tid: int) -> None:
        source.readers.add(tid)
        process = proc.process_of(tid)
        if (started := proc.started(process)) is not None:
            # The mount may be gone.
            with contextlib.suppress(OSError):
                source.connection.request(Reader(process, started))

    def take_back(self, source: Source, received: Received, number: int) -> None:
        """Queue an event again that the process has not read, for another reader."""
        with self._lock:
            self._in_hand.pop((source, received.number), None)
            self._unanswered.remove(number, (source, received.number))
            self._outstanding.pop((source, received.number), None)
            if self._closed or source not in self._sources:
                received.close()
            else:
                source.stream.put_back(received)
                self.bell.ring()
                self._wake_for_buffered()

    def refuse(self, source: Source, received: Received) -> None:
        """Deny an event with EPERM because no process can be told of it, as the kernel does."""
        if received.mask & self.dialect.permission:
            with self._lock, contextlib.suppress(OSError):
                self._in_hand.pop((source, received.number), None)
                source.stream.answer(received.number, errno.EPERM)

    def respond(self, data: bytes) -> int:
        """write(2) of one response; returns the bytes taken. Raises OSError EINVAL or ENOENT as the kernel does."""
        response = rules.parse_response(data, self.flags, self.dialect)
        if response.probe:
            return response.length
        with self._lock:
            source, number = self._unanswered.take(response.fd)
            self._outstanding.pop((source, number), None)
            # The mount may be gone. The kernel, too, takes an answer that no accessor waits for.
            with contextlib.suppress(OSError):
                source.stream.answer(number, response.decision_errno)
        return response.length

    # Waits for the listener itself

    def sources(self) -> list[Source]:
        """The mounts on which it has marks."""
        return list(self._sources)

    def listeners(self) -> set[int]:
        """The threads that have read permission events of these mounts."""
        return set().union(*(source.readers for source in self.sources()))

    def owes(self) -> bool:
        """Whether an access waits for the command: for an answer, or for a read of its event."""
        return bool(self._outstanding) or (bool(self.listeners()) and self._something_waits())

    def asks_about(self, process: int) -> bool:
        """Whether an event of that process waits for the command."""
        return bool(self.accesses_of(process))

    def accesses_of(self, process: int) -> list[Outstanding]:
        """The permission events of that process that wait for the command: those that it has read, is about to read, and has not read."""
        with self._lock:
            events = (*self._outstanding.values(), *self._in_hand.values(), *self._unread())
            return [event for event in events if event.received.pid == process]

    def overdue(self, seconds: float, processes: set[int]) -> list[Outstanding]:
        """The events that the command read so long ago and has not answered, and those unread ones that its own `processes` wait for."""
        before = time.monotonic() - seconds
        with self._lock:
            read = [event for event in self._outstanding.values() if event.since <= before]
            own = [event for event in self._unread() if event.received.pid in processes]
        return [*read, *own]

    def _unread(self) -> list[Outstanding]:
        """The permission events that the command has not read. They stay."""
        unread = [
            Outstanding(source, received, 0)
            for source in self._sources
            for received in source.stream.waiting()
            if received.mask & self.dialect.permission
        ]
        # A reader that waits for the sockets would miss what has left them.
        self._wake_for_buffered()
        return unread

    def deny(self, event: Outstanding, number: int) -> None:
        """Deny an event of overdue() or accesses_of() with that errno. An answer that the command gives later has no effect."""
        with self._lock, contextlib.suppress(OSError):
            self._outstanding.pop((event.source, event.received.number), None)
            event.source.stream.answer(event.received.number, number)
            if not event.since and event.source.stream.discard(event.received):
                self.bell.take(1)

    @property
    def queued_bytes(self) -> int:
        """The answer to ioctl(FIONREAD): 24 bytes an event, whatever its length (docs/facts.md, section 7).

        Of each mount it counts at most as many events as a socket may hold.
        """
        with self._lock:
            for source in self._sources:
                source.stream.receive_all()
                self.bell.take(source.stream.take_merged())
            self._wake_for_buffered()
            return FAN_EVENT_METADATA_LEN * sum(source.stream.buffered for source in self._sources)

    def _something_waits(self) -> bool:
        return any(source.stream.waits for source in self._sources)

    # Users, and the end

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the group during a call, even if its last descriptor is closed meanwhile, as in the kernel. Use it with `with`.

        Raises OSError EBADF if the group is over.
        """
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                left = self._left and not self._users
                if left:
                    self._left = False
            if left:
                self._on_left()

    def leave(self) -> Leaving:
        """End the group, because its last descriptor is reported closed, unless it is still in use.

        A running call keeps the group (`on_left` is called at its end), and may have made another descriptor of it.
        """
        with self._lock:
            if self._users:
                self._left = True
                return Leaving.LATER
            if self._over or not self.bell.is_unheard:
                return Leaving.STAYS
            self._over = True
            sources = self._end()
        self.bell.close()
        self._finish(sources)
        return Leaving.OVER

    def begin_waiting(self, wake: int) -> list[int]:
        """Register a thread that waits for events. The eventfd(2) `wake` tells it to look again. Returns descriptors that events make readable."""
        with self._lock:
            self._readers[wake] = None
            if self._closed:
                self._wake_readers()
            self._wake_for_buffered()
            return [source.stream.socket.fileno() for source in self._sources]

    def end_waiting(self, wake: int) -> None:
        """Unregister a thread that waits no more."""
        with self._lock:
            self._readers.pop(wake, None)

    def _wake_for_buffered(self) -> None:
        """Wake the readers for events that have left a socket: those make no socket readable."""
        if any(source.stream.buffered for source in self._sources):
            self._wake_readers()

    def _wake_readers(self) -> None:
        for wake in self._readers:
            os.eventfd_write(wake, 1)

    @property
    def closed(self) -> bool:
        """Whether the group is over."""
        return self._closed

    def close(self) -> None:
        """Close the group, even if a process still holds it: its marks go, its unanswered events are allowed (fanotify(7)).

        A second call only waits for the first.
        """
        with self._lock:
            closing = self._closed
            sources = self._end()
        if closing:  # another thread closes it already
            self._settled.wait()
        else:
            self._finish(sources)

    def _finish(self, sources: list[Source]) -> None:
        for source in sources:
            source.finish()
        self._settled.set()

    def _end(self) -> list[Source]:
        self._closed = True
        sources = list(self._sources)
        self._sources.clear()
        self._unanswered.clear()
        self._outstanding.clear()
        self._wake_readers()
        return sources


def _mount_of(device: tuple[int, int]) -> Mount | None:
    return next((mount for mount in read_mounts() if mount.is_fusehsm and mount.device == device), None)
