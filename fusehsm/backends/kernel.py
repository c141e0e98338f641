"""A group of the running kernel (fanotify_init(2), fanotify_mark(2))."""

import os
import select
import struct
from typing import Final

import trio

from fusehsm.backends.base import AT_FDCWD, AnyPath, Group, check_open_flags
from fusehsm.fanotify.abi import FAN_NONBLOCK, LINUX_6_14, Dialect, RawEvent
from fusehsm.linux import syscalls

# event_len, (vers, reserved, metadata_len, mask), fd, (pid) of struct fanotify_event_metadata
_HEAD: Final = struct.Struct("=I12xi4x")
_LEASED_AT_ONCE: Final = 64  # events of leased files that one read() passes over


class KernelGroup(Group):
    """A group of the running kernel. FAN_NONBLOCK is always added, because a task must not block its event loop.

    read() opens the events' files, so it would wait for a lease that any user holds on a file of theirs. So the files are opened with O_NONBLOCK: the
    access to a leased file fails with EPERM at once, and the lease is asked back (docs/facts.md, section 17). Descriptors lose the flag before they
    are returned, unless `event_f_flags` has it.

    `dialect` is the kernel's: it decides how events are read, not the kernel's behaviour. Raises OSError as fanotify_init(2): EPERM without
    CAP_SYS_ADMIN, EMFILE beyond fs.fanotify.max_user_groups.
    """

    def __init__(self, flags: int, event_f_flags: int, dialect: Dialect = LINUX_6_14) -> None:
        super().__init__(flags | FAN_NONBLOCK, event_f_flags, dialect)
        self._fd = syscalls.fanotify_init(self.flags, event_f_flags | os.O_NONBLOCK)

    def fileno(self) -> int:
        """The group's descriptor; -1 after close()."""
        return self._fd

    async def mark(
        self, flags: int, mask: int, dirfd: int = AT_FDCWD, path: str | bytes | None = None
    ) -> None:
        if path is None:
            syscalls.fanotify_mark(self._fd, flags, mask, dirfd)
            return
        # In a thread: to look the path up may wait for a filesystem's server, which may run in this same event loop.
        await trio.to_thread.run_sync(syscalls.fanotify_mark, self._fd, flags, mask, dirfd, os.fsencode(path))

    async def backing(self, path: AnyPath, flags: int = os.O_RDWR | os.O_CLOEXEC) -> int:
        check_open_flags(flags)
        # In a thread: this open(2) may wait for an answer of this same event loop.
        return await trio.to_thread.run_sync(os.open, path, flags)

    def read(self, size: int) -> bytes:
        """read(2). A file that is leased counts as one that cannot be opened, but without FAN_REPORT_FD_ERROR no error reports it."""
        data = self._read(size)
        if not self.event_f_flags & os.O_NONBLOCK:
            position = 0
            while position < len(data):
                length, fd = _HEAD.unpack_from(data, position)
                if fd >= 0:
                    os.set_blocking(fd, True)
                position += length
        return data

    def _read(self, size: int) -> bytes:
        # EAGAIN means an empty queue, or a leased file. A caller that is told of an empty queue may close the group.
        for _ in range(_LEASED_AT_ONCE):
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                if not self._has_event():
                    raise
        return os.read(self._fd, size)

    def _has_event(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def event_path(self, raw_event: RawEvent) -> str:
        """The path in the accessor's mount, with " (deleted)" if the file has no name left; the /proc link itself if the path is too long."""
        link = f"/proc/self/fd/{raw_event.fd}"
        try:
            return os.readlink(link)
        except OSError:
            return link

    async def wait_readable(self) -> None:
        if self._fd < 0:
            raise trio.ClosedResourceError
        await trio.lowlevel.wait_readable(self._fd)

    def close(self) -> None:
        if self._fd < 0:
            return
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self._fd)
        os.close(self._fd)
        self._fd = -1
