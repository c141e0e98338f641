"""Changes attributes of an inode through a descriptor of it, so that no name can lead to another inode."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.overlay.credentials import Caller

TIME_NOW: Final = 1 << 80
"""In `atime_ns` and `mtime_ns`: the present, as UTIME_NOW."""

OWN_XATTRS: Final = (b"user.fusehsm.", b"trusted.fusehsm.")
"""Extended attributes in which fusehsm keeps on the backing what it knows of a file; nobody sees or changes them through a mount."""

_SUID_SGID: Final = stat.S_ISUID | stat.S_ISGID
_NOW_TOLERANCE: Final = 2_000_000_000  # nanoseconds


@dataclass(frozen=True, slots=True)
class AttributeChanges:
    """The changes of a SETATTR request. None leaves an attribute as it is."""

    #: Permission bits.
    mode: int | None = None
    #: The new owner.
    uid: int | None = None
    #: The new group.
    gid: int | None = None
    #: The new size, in bytes.
    size: int | None = None
    #: The new time of access, in nanoseconds since 1970 (negative: before), or TIME_NOW.
    atime_ns: int | None = None
    #: The new time of modification, as `atime_ns`.
    mtime_ns: int | None = None


def path_of(fd: int) -> bytes:
    """A path to the inode of `fd`. It goes through a magic link of /proc, so it leads to exactly that inode, also where
    the inode is a symbolic link."""
    return b"/proc/self/fd/%d" % fd


def apply(changes: AttributeChanges, fd: int, caller: Caller | None) -> None:
    """Change the inode of `fd` (any open file of it, or O_PATH). At no moment are there more rights than before or after.

    `caller`: the accessor, treated as the kernel treats a process without CAP_FSETID; None when the kernel does so itself.
    Raises OSError; BlockingIOError (EAGAIN) for a new size while a lease on the file is being broken.
    """
    path = path_of(fd)
    if changes.size is not None:
        if caller is not None:
            clear_privileges(fd, caller.in_group)
        if _writable(fd):
            os.ftruncate(fd, changes.size)
        elif changes.size < 0 or not stat.S_ISREG(os.fstat(fd).st_mode):  # truncate(2) refuses
            os.truncate(path, changes.size)
        else:
            # Unlike truncate(2), this does not wait for the end of a lease.
            writable = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.ftruncate(writable, changes.size)
            finally:
                os.close(writable)
    if changes.uid is not None or changes.gid is not None:
        if caller is not None:
            # chown_common() in the kernel: a set-gid bit without execute permission goes, too, unless the caller is in the group.
            clear_foreign_sgid(fd, caller)
        os.chown(path, -1 if changes.uid is None else changes.uid, -1 if changes.gid is None else changes.gid)
    if changes.mode is not None:
        mode = stat.S_IMODE(changes.mode)
        if caller is not None and mode & stat.S_ISGID and not caller.in_group(os.fstat(fd).st_gid):
            mode &= ~stat.S_ISGID  # setattr_prepare() in the kernel
        os.chmod(path, mode)
    if changes.atime_ns is not None or changes.mtime_ns is not None:
        _set_times(path, changes.atime_ns, changes.mtime_ns)


def hide_own(name: bytes, number: int) -> None:
    """Raise OSError with that errno if `name` is one of fusehsm's own extended attributes."""
    if name.startswith(OWN_XATTRS):
        raise OSError(number, os.strerror(number))


def _writable(fd: int) -> bool:
    # The descriptor may be any open file of the node, also one for reading, or only a path.
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_RDONLY


def _set_times(path: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    try:
        syscalls.set_times(path, atime_ns, mtime_ns, now=TIME_NOW)
    except PermissionError:
        # A process may touch(1) another user's writable file, but only with the time "now". pyfuse3 passes "now" as a
        # time, which must not become an error.
        if atime_ns is None or mtime_ns is None or abs(atime_ns - mtime_ns) > _NOW_TOLERANCE:
            raise
        if abs(time.time_ns() - atime_ns) > _NOW_TOLERANCE:
            raise
        syscalls.set_times(path, TIME_NOW, TIME_NOW, now=TIME_NOW)


def clear_privileges(fd: int, is_member: Callable[[int], bool]) -> bool:
    """Clear the bits that a write or truncation by an ordinary user clears; returns whether any was set.

    They are set-user-id, and set-group-id where the group may execute or the user is not in it: `is_member(gid)`
    (setattr_should_drop_sgid() in the kernel, which checks the rights of the server, not of the accessor). The kernel itself removes file
    capabilities at every write.
    """
    status = os.fstat(fd)
    mode = status.st_mode
    if mode & _SUID_SGID and stat.S_ISREG(mode):
        keeps_group = mode & stat.S_ISGID and not mode & stat.S_IXGRP and is_member(status.st_gid)
        kept = mode & ~(stat.S_ISUID if keeps_group else _SUID_SGID)
        if kept != mode:
            os.chmod(path_of(fd), stat.S_IMODE(kept))
            return True
    return False


def clear_foreign_sgid(fd: int, caller: Caller) -> None:
    """Clear set-group-id of a file that its group may not execute, unless `caller` is in that group."""
    status = os.fstat(fd)
    mode = status.st_mode
    if (
        stat.S_ISREG(mode)
        and mode & stat.S_ISGID
        and not mode & stat.S_IXGRP
        and not caller.in_group(status.st_gid)
    ):
        os.chmod(path_of(fd), stat.S_IMODE(mode & ~stat.S_ISGID))
