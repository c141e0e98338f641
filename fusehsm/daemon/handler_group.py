"""A group in the mount's own process, for its handler. It needs no socket and no bytes, and uses the mount's event loop."""

import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from fusehsm.backends.backing import open_backing
from fusehsm.backends.base import AT_FDCWD, AnyPath, Group, check_open_flags
from fusehsm.backends.lookup import look_up
from fusehsm.emulator import group
from fusehsm.emulator.group import Pending
from fusehsm.emulator.interface import GateFace
from fusehsm.events import Event
from fusehsm.fanotify import rules
from fusehsm.fanotify.abi import (
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_MARK_FLUSH,
    FAN_MARK_MOUNT,
    FAN_NONBLOCK,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    Dialect,
    RawEvent,
    parse_mask,
)
from fusehsm.handler import Handler, report_unopened, serve
from fusehsm.linux import proc

_ROOT_NODE = 1
_FLAGS = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS
_EVENT_F_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_LARGEFILE


async def serve_in_process(
    gate: GateFace,
    handler: Handler,
    *,
    limit: int = 64,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the whole mount with a handler, in the mount's default dialect, until cancelled; started when every access makes an event."""
    async with open_in_process(gate) as group_:
        # This group and its handler live as long as the mount, so no task that handles an event can outlive them.
        group_.takes_offers = True
        task_status.started()
        # Nor may the handler end the mount: the files beneath would then be read as they are, stubs as zeros.
        await serve(group_, handler, limit=limit, exits=False)


@asynccontextmanager
async def open_in_process(
    gate: GateFace,
    mask: int | Iterable[str] | None = None,
    *,
    dialect: Dialect | None = None,
    flags: int = _FLAGS,
    event_f_flags: int = _EVENT_F_FLAGS,
) -> AsyncIterator["InProcessGroup"]:
    """Open a group in this process with one mark, which covers the whole mount; the group is closed at the end of the `async with`.

    `mask` is an int, or names without FAN_, or None for all pre-content events of the dialect. `dialect` defaults to the mount's. `flags` and
    `event_f_flags` are those of fanotify_init(2). Raises OSError as fanotify_init(2) and fanotify_mark(2) do, and ValueError for a name that the
    dialect does not have.
    """
    async with InProcessGroup(gate, flags, event_f_flags, dialect or gate.default_dialect) as group_:
        if mask is not None and not isinstance(mask, int):
            mask = parse_mask(mask, group_.dialect)
        await group_.mark_whole_mount(mask)
        yield group_


class InProcessGroup(Group):
    """A group of the gate in this process. Use it in the gate's own event loop only."""

    def __init__(self, gate: GateFace, flags: int, event_f_flags: int, dialect: Dialect) -> None:
        super().__init__(flags | FAN_NONBLOCK, event_f_flags, dialect)
        self._gate = gate
        self._group = group.Group(self.flags, event_f_flags, dialect)
        self._paths: dict[int, bytes] = {}  # by descriptor, of the events that were read as bytes
        self._readers = trio.lowlevel.ParkingLot()
        self._eventfd: int | None = None
        self._closed = False
        #: The server of the group may handle events in the tasks of their accessors' requests.
        self.takes_offers = False
        self._group.listener_pid = os.getpid()
        self._group.readers[os.getpid()] = proc.started(os.getpid()) or 0
        self._group.on_readable = self._wake
        gate.add_group(self._group)

    def fileno(self) -> int:
        """The eventfd, made at the first call."""
        if self._eventfd is None:
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._show_readable()
        return self._eventfd

    async def mark_whole_mount(self, mask: int | None) -> None:
        """Mark the mount for `mask`; None means all pre-content events."""
        root = self._gate.overlay.node(_ROOT_NODE)
        flags = FAN_MARK_ADD | FAN_MARK_MOUNT
        await self._gate.mark(self._group, flags, self.dialect.pre_access if mask is None else mask, root)
        if mask is None and self.dialect.pre_modify:
            # No path is named here, so the rule that a directory's path cannot set FAN_PRE_MODIFY has nothing to apply to.
            self._group.marks.modify(flags, self.dialect.pre_modify, None, opened_for_write=False)

    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        """fanotify_mark(2). Additional error: EXDEV for a path that is not on the mount."""
        rules.check_mark(self.flags, self.dialect, flags, mask, None)
        if flags & FAN_MARK_FLUSH:
            await self._gate.mark(self._group, flags, mask, None)
            return
        # In threads: these calls send the mount requests, which this event loop answers.
        found = await trio.to_thread.run_sync(look_up, flags, dirfd, path)
        try:
            if found.device != await trio.to_thread.run_sync(self._device):
                where = "the descriptor" if path is None else os.fsdecode(path)
                raise OSError(
                    errno.EXDEV, f"{where}: not on the fusehsm mount {self._gate.destination} of this group"
                )
            await self._gate.mark(self._group, flags, mask, self._gate.overlay.node(found.inode))
        finally:
            # In a thread, too: close(2) of a mount's file may send the mount a request.
            await trio.to_thread.run_sync(os.close, found.descriptor)

    async def backing(self, path: AnyPath, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        self._check_open()
        check_open_flags(flags)
        device = await trio.to_thread.run_sync(self._device)
        root_fd = self._gate.overlay.open_root()
        try:
            return await open_backing(root_fd, device, self._gate.destination, path, flags)
        finally:
            os.close(root_fd)

    def read(self, size: int) -> bytes:
        self._check_open()
        try:
            return self._group.read(size, self._open_for_read, lambda pending: os.pidfd_open(pending.pid))
        finally:
            self._show_readable()

    def write(self, data: bytes) -> int:
        self._check_open()
        return self._group.write(data)

    def event_path(self, raw_event: RawEvent) -> str:
        return os.fsdecode(self._paths.get(raw_event.fd, b""))

    async def wait_readable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._group.queued_events:
            await trio.lowlevel.checkpoint()
            return
        await self._readers.park()
        if self._closed:
            raise trio.ClosedResourceError

    def take_events(self) -> list[Event]:
        self._check_open()
        pending = self._group.take()
        self._show_readable()
        if pending is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return [self._event(pending)]

    def _event(self, pending: Pending) -> Event:
        """The event as a value. Raises OSError as Group.open_file() does."""
        fd = self._group.open_file(pending, self._open)
        self._group.delivered(pending, fd)
        shape = pending.shape
        path = os.fsdecode(pending.path)
        pid = self._group.reported_pid(pending)
        return Event(shape.mask, pid, fd, path, shape.offset, shape.count, self.dialect)

    def offer(self, handle: Callable[[Event], Coroutine[Any, Any, None]]) -> None:
        if not self.takes_offers:
            return

        async def handled(pending: Pending) -> None:
            try:
                event = self._event(pending)
            except OSError as error:
                report_unopened(error.errno or 0)
            else:
                await handle(event)

        self._group.handle = handled

    def answer(self, event: Event, error: int) -> None:
        self._check_open()
        self._group.answer_descriptor(event.fd, self.checked_errno(error))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._group.handle = None
        self._group.on_readable = None
        self._gate.remove_group(self._group)
        self._readers.unpark_all()
        if self._eventfd is not None:
            os.close(self._eventfd)
            self._eventfd = None

    def _wake(self) -> None:
        if self._readers:
            self._readers.unpark()
        self._show_readable()

    def _show_readable(self) -> None:
        if self._eventfd is None:
            return
        if self._group.queued_events:
            os.eventfd_write(self._eventfd, 1)
        else:
            with suppress(BlockingIOError):
                os.eventfd_read(self._eventfd)

    def _device(self) -> tuple[int, int]:
        """(major, minor) of the mount's st_dev. Sends the mount a request."""
        own = os.stat(self._gate.destination).st_dev
        return os.major(own), os.minor(own)

    def _open(self, pending: Pending) -> int:
        fd = self._gate.open_event_fd(self._group, pending)
        if not self.event_f_flags & os.O_CLOEXEC:
            os.set_inheritable(fd, True)
        return fd

    def _open_for_read(self, pending: Pending) -> int:
        fd = self._open(pending)
        self._paths[fd] = pending.path
        return fd

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, "the group is closed")
