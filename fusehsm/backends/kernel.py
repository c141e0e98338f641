"""A group of the running kernel (fanotify_init(2), fanotify_mark(2))."""

import os

import trio

from fusehsm.backends.base import AT_FDCWD, AnyPath, Group, check_open_flags
from fusehsm.fanotify.abi import FAN_NONBLOCK, LINUX_6_14, Dialect, RawEvent
from fusehsm.linux import syscalls


class KernelGroup(Group):
    """A group of the running kernel. FAN_NONBLOCK is always added, because a task must not block its event loop.

    `dialect` is the kernel's: it decides how events are read, not the kernel's behaviour. Raises OSError as fanotify_init(2): EPERM without
    CAP_SYS_ADMIN, EMFILE beyond fs.fanotify.max_user_groups.
    """

    def __init__(self, flags: int, event_f_flags: int, dialect: Dialect = LINUX_6_14) -> None:
        super().__init__(flags | FAN_NONBLOCK, event_f_flags, dialect)
        self._fd = syscalls.fanotify_init(self.flags, event_f_flags)

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
        return os.read(self._fd, size)

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
