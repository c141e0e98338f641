"""Having a file to oneself for a moment, to take its content away: nobody has it open or mapped, and whoever opens it meanwhile waits."""

import abc
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from fusehsm.backends.lookup import FoundObject, look_up
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Lease, LeaseStatus, Unlease
from fusehsm.fanotify.rules import ObjectKind
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import Mount, mount_of_descriptor

# How long the end of a lease may take when its holder is being cancelled, or has failed; seconds.
_MOMENT = 2.0


class LeasedFile(abc.ABC):
    """A file that is leased. `descriptor`, for reading and writing, is its content's: closed when the lease ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @abc.abstractmethod
    async def is_wanted(self) -> bool:
        """Whether somebody waits for the lease to end, or has waited for so long that it was broken: to be asked before punching, where
        other work came first. Raises OSError ENOTCONN when the mount is gone."""

    @abc.abstractmethod
    async def _end(self) -> None:
        """Close the descriptor and give the lease back. Raises OSError ETIMEDOUT when it was broken."""


@asynccontextmanager
async def leased(path: str | bytes | os.PathLike[str] | int) -> AsyncIterator[LeasedFile]:
    """Lease a regular file: inside the block nobody has it open, mapped or running, and whoever opens or truncates it waits until the end.

        async with fusehsm.leased(path) as file:
            ...                                     # is it still as the store has it?
            punch_hole(file.descriptor, 0, size)    # fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

    `path` (symbolic links are followed) may be a descriptor; one that is more than O_PATH keeps the file open, and the lease from being
    granted. Raises BlockingIOError (EAGAIN) while anybody has the file open or leased, EINVAL where it is no regular file; on a fusehsm mount
    EOPNOTSUPP where the kernel opens files by itself (--events first-access with --cache private), elsewhere EACCES for who is neither the
    file's owner nor has CAP_LEASE; else as open(2) for reading and writing.

    Hold it for as short as possible: when somebody has waited for /proc/sys/fs/lease-break-time (45 seconds) the lease is broken, and he goes
    on. The end of the block then raises OSError ETIMEDOUT, unless the block has raised something itself. A holder that dies has given it back.

    On a fusehsm mount `file.descriptor` is open on the backing, so what is done through it makes no events; pages and attributes that the
    kernel has cached are dropped at the beginning and at the end. On any other filesystem it is the leased one (F_SETLEASE with F_WRLCK,
    fcntl(2)) on the file itself, and fallocate(2), read(2) or write(2) of it make a PRE_ACCESS event like any other, also for a group of the
    caller's own. No such event can be answered: reading it opens the file, which waits for the lease to break, or fails the call with EPERM
    where event_f_flags have O_NONBLOCK (measured on 6.18). So set an ignore mark on the file first (FAN_MARK_IGNORED_MASK and
    FAN_MARK_IGNORED_SURV_MODIFY), which does no harm on a mount either, and take it away again.
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
        # In a thread: close(2) of a mount's file may send it a request.
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
        # First: for who leases the file next it would be open.
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
            raise OSError(errno.ETIMEDOUT, "the lease was broken: somebody had waited for too long")


async def _lease_of_kernel(found: FoundObject) -> LeasedFile:
    # In a thread: a listener may have to be asked for this open(2), or a network to answer.
    descriptor = await trio.to_thread.run_sync(partial(_open, found.descriptor))
    try:
        os.set_blocking(descriptor, True)
        # Not in a thread: nothing else of this event loop comes between the grant and what the caller does first.
        syscalls.take_lease(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return _OfKernel(descriptor)


def _open(found: int) -> int:
    try:
        # Not to wait for somebody else's lease.
        return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ETXTBSY:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        raise
