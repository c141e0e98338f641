"""Finds the object that fanotify_mark(2) is to mark, with the caller's own root, working directory, descriptors and rights."""

import errno
import fcntl
import os
import stat
from dataclasses import dataclass

from fusehsm.control.protocol import MarkRequest
from fusehsm.fanotify.abi import FAN_MARK_DONT_FOLLOW, FAN_MARK_MOUNT, FAN_MARK_ONLYDIR, FAN_MARK_TYPE_MASK
from fusehsm.fanotify.rules import ObjectKind
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import id_of_descriptor


@dataclass(frozen=True, slots=True)
class FoundObject:
    """The object to mark."""

    #: Keeps the node alive until the mark is in effect; the caller of look_up() closes it.
    descriptor: int
    #: (major, minor) of st_dev.
    device: tuple[int, int]
    #: st_ino.
    inode: int
    #: The kind of the object.
    kind: ObjectKind


def mark_request(flags: int, mask: int, found: FoundObject, *, every_mount: bool = False) -> MarkRequest:
    """The request for a mark on an object. `every_mount`: a mount mark hears the accesses by every mount of the tree. Raises OSError."""
    if every_mount or flags & FAN_MARK_TYPE_MASK != FAN_MARK_MOUNT:
        return MarkRequest(flags, mask, *found.device, found.inode)
    mount = id_of_descriptor(found.descriptor)
    return MarkRequest(flags, mask, *found.device, found.inode, mount.number, mount.unique)


def look_up(flags: int, dirfd: int, path: str | bytes | None) -> FoundObject:
    """The object of `dirfd` and `path`. Raises OSError with the errnos of the kernel's fanotify_find_path().

    Blocks as long as the filesystems on the way do.
    """
    return found(
        flags, _duplicate(dirfd) if path is None else os.open(path, _open_flags(flags), dir_fd=dirfd)
    )


def look_up_in_root(flags: int, root: int, path: bytes) -> FoundObject:
    """The object of a path from the directory `root`, as chroot(2) would find it, but through no magic link. Raises OSError as look_up()."""
    return found(flags, syscalls.openat2(root, path, _open_flags(flags), syscalls.RESOLVE_IN_ROOT))


def found(flags: int, descriptor: int) -> FoundObject:
    """The object of a descriptor, which it owns from now on. Makes the kernel's checks of the object. Raises OSError."""
    try:
        status = os.fstat(descriptor)
        if flags & FAN_MARK_ONLYDIR and not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not syscalls.may_read(descriptor):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        device = (os.major(status.st_dev), os.minor(status.st_dev))
        return FoundObject(descriptor, device, status.st_ino, _kind(status.st_mode))
    except BaseException:
        os.close(descriptor)
        raise


def _duplicate(dirfd: int) -> int:
    # An O_PATH descriptor is refused here, as fget() refuses it; so is AT_FDCWD.
    if dirfd < 0 or fcntl.fcntl(dirfd, fcntl.F_GETFL) & os.O_PATH:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return fcntl.fcntl(dirfd, fcntl.F_DUPFD_CLOEXEC, 0)


def _open_flags(flags: int) -> int:
    open_flags = os.O_PATH | os.O_CLOEXEC
    if flags & FAN_MARK_DONT_FOLLOW:
        open_flags |= os.O_NOFOLLOW
    if flags & FAN_MARK_ONLYDIR:
        open_flags |= os.O_DIRECTORY
    return open_flags


def _kind(mode: int) -> ObjectKind:
    if stat.S_ISREG(mode):
        return ObjectKind.REGULAR
    return ObjectKind.DIRECTORY if stat.S_ISDIR(mode) else ObjectKind.OTHER
