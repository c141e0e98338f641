"""For a listener that punches out a file's content: leases the file, and drops a mount's cached pages of it.

No process has a leased file open or mapped, and a process that opens it waits.
"""

import abc
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from fusehsm.backends.lookup import FoundObject, look_up
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Drop, Lease, LeaseStatus, Unlease
from fusehsm.fanotify.rules import ObjectKind
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import Mount, mount_of_descriptor

# The longest wait, in seconds, for the end of a lease whose holder is cancelled or has failed.
_MOMENT = 2.0


class LeasedFile(abc.ABC):
    """A leased file. `descriptor` reads and writes its content, and is closed when the lease ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @abc.abstractmethod
    async def is_wanted(self) -> bool:
        """Whether a process waits for the lease to end, or has waited so long that the lease was broken.

        Ask before a punch that follows other work. Raises OSError ENOTCONN if the mount is gone.
        """

    @abc.abstractmethod
    async def _end(self) -> None:
        """Close the descriptor and give the lease back. Raises OSError ETIMEDOUT if the lease was broken."""


@asynccontextmanager
async def leased(path: str | bytes | os.PathLike[str] | int) -> AsyncIterator[LeasedFile]:
    """Lease a regular file: inside the block no process has it open, mapped or running, and one that opens or truncates it waits for the end.

        async with fusehsm.leased(path) as file:
            ...                                     # is it still as the store has it?
            punch_hole(file.descriptor, 0, size)    # fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

    `path` (symbolic links are followed) may be a descriptor. A descriptor without O_PATH keeps the file open, and then no lease is granted.

    Raises BlockingIOError (EAGAIN) while the file is open or leased, OSError EINVAL if it is no regular file. On a fusehsm mount: EOPNOTSUPP if
    the kernel opens files by itself (--events first-access with --cache private). Elsewhere: EACCES if the caller is not the file's owner and
    lacks CAP_LEASE. Else as open(2) for reading and writing.

    Keep the block short. When a process has waited for /proc/sys/fs/lease-break-time (45 seconds) the kernel or the mount breaks the lease, and
    the process goes on. The end of the block then raises OSError ETIMEDOUT, unless the block itself has raised an error. The lease of a holder
    that dies ends.

    On a fusehsm mount `file.descriptor` is open on the backing, so its use makes no events. The kernel's cached pages and attributes are dropped
    at the beginning and at the end. On any other filesystem `file.descriptor` is open on the leased file itself (F_SETLEASE with F_WRLCK,
    fcntl(2)), and fallocate(2), read(2) or write(2) of it make a PRE_ACCESS event, also for a group of the caller's own. No such event can be
    answered: a group of ours cannot open the leased file for it, so the call fails with EPERM (docs/facts.md, section 17). So set an ignore mark on
    the file first (FAN_MARK_IGNORED_MASK and FAN_MARK_IGNORED_SURV_MODIFY), and remove it afterwards. It does no harm on a mount.
    """
    target = path if isinstance(path, int) else os.fspath(path)
    found, mount = await trio.to_thread.run_sync(_find, target)
    try:
        if found.kind is not ObjectKind.REGULAR:
            raise OSError(errno.EINVAL, "only regular files can be leased", target)
        file = await (_lease_on_mount(found, mount) if mount.is_fusehsm else _lease_of_kernel(found))
        try:
            yield file
        except BaseException:
            with trio.move_on_after(_MOMENT, shield=True), suppress(OSError):
                await file._end()
            raise
        await file._end()
    finally:
        # In a thread: close(2) of a mount's file may send the mount a request.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, found.descriptor)


def _find(target: str | bytes | int) -> tuple[FoundObject, Mount]:
    found = look_up(0, -1, f"/proc/self/fd/{target}" if isinstance(target, int) else target)
    try:
        return found, mount_of_descriptor(found.descriptor)
    except BaseException:
        os.close(found.descriptor)
        raise


class _OnMount(LeasedFile):
    def __init__(self, descriptor: int, connection: ControlConnection) -> None:
        super().__init__(descriptor)
        self._connection = connection

    async def is_wanted(self) -> bool:
        result, _ = await self._connection.request(LeaseStatus())
        return bool(result.get("wanted"))

    async def _end(self) -> None:
        # First close it: otherwise the file is open, and the next holder gets no lease.
        os.close(self.descriptor)
        try:
            await self._connection.request(Unlease())
        finally:
            self._connection.close()


async def _lease_on_mount(found: FoundObject, mount: Mount) -> LeasedFile:
    connection = await ControlConnection.open(mount)
    try:
        _, descriptor = await connection.request(Lease(*found.device, found.inode))
        if descriptor is None:
            raise connection.gone()
    except BaseException:
        connection.close()
        raise
    return _OnMount(descriptor, connection)


class _OfKernel(LeasedFile):
    async def is_wanted(self) -> bool:
        return syscalls.lease_is_wanted(self.descriptor)

    async def _end(self) -> None:
        stood = syscalls.give_lease_back(self.descriptor)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, self.descriptor)
        if not stood:
            raise OSError(
                errno.ETIMEDOUT, "the lease was broken: an open(2) of the file had waited for too long"
            )


async def _lease_of_kernel(found: FoundObject) -> LeasedFile:
    # In a thread: this open(2) may wait for a listener's answer, or for a network.
    descriptor = await trio.to_thread.run_sync(partial(_open, found.descriptor))
    try:
        os.set_blocking(descriptor, True)
        # Not in a thread: no other task of this event loop runs between the grant and the caller's first step.
        syscalls.take_lease(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return _OfKernel(descriptor)


def _open(found: int) -> int:
    try:
        # O_NONBLOCK: do not wait for another holder's lease.
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ETXTBSY:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        raise


async def drop(path: str | bytes | os.PathLike[str]) -> None:
    """Drop the kernel's cached pages of a file on a fusehsm mount, so that its next access makes an event again.

    Call it after content was punched out of the file (FALLOC_FL_PUNCH_HOLE) through an event descriptor or on the backing, and no mark
    changes that the mount would notice by itself. It waits until the pages are gone. On any other filesystem it does nothing, because the page
    cache there is the file's own. Raises OSError as open(2) does, ENOTCONN if the mount's server is gone, EBUSY if a page of the file waits for
    its listener for more than a second.
    """
    found, mount = await trio.to_thread.run_sync(_find, os.fspath(path))
    try:
        if not mount.is_fusehsm:
            return
        connection = await ControlConnection.open(mount)
        try:
            await connection.request(Drop(*found.device, found.inode))
        finally:
            connection.close()
    finally:
        # In a thread: close(2) of a mount's file may send the mount a request.
        await trio.to_thread.run_sync(os.close, found.descriptor)
