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


def apply(changes: AttributeChanges, fd: int, *, through: bool = False) -> None:
    """Change the inode of `fd` (any open file of it, or O_PATH) with this thread's rights.

    `through`: a new size is set through `fd`, if that is open for writing. Then it needs no permission to open the file.
    Raises OSError; BlockingIOError (EAGAIN) for a new size while a lease on the file is being broken.
    """
    path = path_of(fd)
    if changes.size is not None:
        if through and _writable(fd):
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
        os.chown(path, -1 if changes.uid is None else changes.uid, -1 if changes.gid is None else changes.gid)
    elif changes == AttributeChanges():
        _drop_privileges(path)
    if changes.mode is not None:
        os.chmod(path, stat.S_IMODE(changes.mode))
    if changes.atime_ns is None and changes.mtime_ns is None:
        return
    try:
        _set_times(path, changes.atime_ns, changes.mtime_ns)
    except PermissionError:
        # ftruncate(2) asks for the present time of modification, too, and has just set it. One who does not own the file may not.
        if changes.size is None or changes.atime_ns is not None or not _is_now(changes.mtime_ns):
            raise


def _drop_privileges(path: bytes) -> None:
    """Answer a request without any change, which the kernel makes where set-id bits or capabilities may have to go (FUSE_HANDLE_KILLPRIV_V2,
    fuse_setattr() in fs/fuse/dir.c): before a write, which then takes them away itself, and for chown(2) to the same owner and group."""
    try:
        os.chown(path, -1, -1)
    except PermissionError:
        # Only the owner may use chown(2) so. One who may write is about to do it.
        if not os.access(path, os.W_OK, effective_ids=True):
            raise


def only_drops_set_id(fd: int, mode: int) -> bool:
    """Whether `mode` differs from the mode of the inode at most in fewer set-id bits."""
    present = stat.S_IMODE(os.fstat(fd).st_mode)
    return (present | _SUID_SGID) == (stat.S_IMODE(mode) | _SUID_SGID) and not stat.S_IMODE(mode) & ~present


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
        if atime_ns is None or mtime_ns is None or not (_is_now(atime_ns) and _is_now(mtime_ns)):
            raise
        syscalls.set_times(path, TIME_NOW, TIME_NOW, now=TIME_NOW)


def _is_now(time_ns: int | None) -> bool:
    return time_ns is not None and (time_ns == TIME_NOW or abs(time.time_ns() - time_ns) <= _NOW_TOLERANCE)


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
