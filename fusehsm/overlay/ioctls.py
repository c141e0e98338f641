"""The ioctl(2) calls on files and directories that are passed on to the backing, each with the accessor's rights and not the server's.

They are those of lsattr(1), chattr(1) and the project ids of quotas (ioctl_fs(2)), the inode's generation, and the file system's label. Every
other call is refused with ENOTTY: the server may be root, and the backing would do anything for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Final

from fusehsm.overlay.credentials import Caller

# linux/fs.h; the numbers of 32-bit programs are others.
FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820
FS_IOC_GETVERSION: Final = 0x80087601
FS_IOC_GETFSLABEL: Final = 0x81009431
FS_IOC32_GETFLAGS: Final = 0x80046601
FS_IOC32_SETFLAGS: Final = 0x40046602
FS_IOC32_GETVERSION: Final = 0x80047601

_APPEND, _IMMUTABLE, _JOURNAL_DATA = 0x20, 0x10, 0x4000  # FS_*_FL
# The flags that can be changed: s, u, c, S, i, a, d, A, m, t, D, T, C, x, P and j of chattr(1). The others change how names or content are stored.
_CHANGEABLE: Final = 0x1 | 0x2 | 0x4 | 0x8 | _IMMUTABLE | _APPEND | 0x40 | 0x80 | 0x400 | _JOURNAL_DATA | (
    0x8000 | 0x10000 | 0x20000 | 0x800000 | 0x2000000 | 0x20000000
)  # fmt: skip
_XFLAG_IMMUTABLE, _XFLAG_APPEND = 0x8, 0x10
_CAP_FOWNER, _CAP_LINUX_IMMUTABLE, _CAP_SYS_RESOURCE = 3, 9, 24  # linux/capability.h

_FLAGS: Final = struct.Struct("=I")
_FSXATTR: Final = struct.Struct("=IIIII8x")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize


@dataclass(frozen=True, slots=True)
class _Call:
    """One call that is passed on."""

    #: Its number on the backing.
    number: int
    #: The bytes that it takes.
    takes: int
    #: The bytes that it gives.
    gives: int


_CALLS: Final = {
    FS_IOC_GETFLAGS: _Call(FS_IOC_GETFLAGS, 0, _FLAGS.size),
    FS_IOC_SETFLAGS: _Call(FS_IOC_SETFLAGS, _FLAGS.size, 0),
    FS_IOC_FSGETXATTR: _Call(FS_IOC_FSGETXATTR, 0, _FSXATTR.size),
    FS_IOC_FSSETXATTR: _Call(FS_IOC_FSSETXATTR, _FSXATTR.size, 0),
    FS_IOC_GETVERSION: _Call(FS_IOC_GETVERSION, 0, _FLAGS.size),
    FS_IOC_GETFSLABEL: _Call(FS_IOC_GETFSLABEL, 0, 256),
    FS_IOC32_GETFLAGS: _Call(FS_IOC_GETFLAGS, 0, _FLAGS.size),
    FS_IOC32_SETFLAGS: _Call(FS_IOC_SETFLAGS, _FLAGS.size, 0),
    FS_IOC32_GETVERSION: _Call(FS_IOC_GETVERSION, 0, _FLAGS.size),
}
_CHANGES: Final = (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR)


def check(command: int, takes: int, gives: int) -> bool:
    """Whether an ioctl(2) of that number changes the inode. `takes`, `gives`: the sizes in bytes that its caller names.

    Raises OSError ENOTTY for a call that is not passed on.
    """
    call = _CALLS.get(command)
    if call is None or takes < call.takes or gives < call.gives:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
    return call.number in _CHANGES


def perform(fd: int, command: int, argument: bytes, caller: Caller) -> bytes:
    """Make an ioctl(2) that check() has accepted on any open file of an inode; returns the bytes that it gives. Raises OSError.

    The kernel checks the accessor's rights itself from Linux 5.13 on (vfs_fileattr_set()).
    """
    call = _CALLS[command]
    given = argument[: call.takes]
    if call.number == FS_IOC_SETFLAGS:
        _check_flags(fd, _FLAGS.unpack(given)[0], caller)
    elif call.number == FS_IOC_FSSETXATTR:
        _check_fsxattr(fd, given, caller)
    # The number of FS_IOC_GETFLAGS and FS_IOC_GETVERSION says 8 bytes; file systems write 4.
    answer = fcntl.ioctl(fd, call.number, given.ljust(max(8, call.gives), b"\0"))
    return answer[: call.gives]


def _refuse(number: int = errno.EPERM) -> OSError:
    return OSError(number, os.strerror(number))


def _check_owner(fd: int, caller: Caller) -> None:
    """inode_owner_or_capable() in the kernel."""
    if caller.uid != os.fstat(fd).st_uid and not caller.has_capability(_CAP_FOWNER):
        raise _refuse()


def _check_flags(fd: int, flags: int, caller: Caller) -> None:
    """The checks of FS_IOC_SETFLAGS: vfs_fileattr_set() and ext4_ioctl_setflags() in the kernel."""
    _check_owner(fd, caller)
    (present,) = _FLAGS.unpack_from(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
    changed = present ^ flags
    if changed & (_IMMUTABLE | _APPEND) and not caller.has_capability(_CAP_LINUX_IMMUTABLE):
        raise _refuse()
    if changed & _JOURNAL_DATA and not caller.has_capability(_CAP_SYS_RESOURCE):
        raise _refuse()
    if changed & ~_CHANGEABLE:
        raise _refuse(errno.EOPNOTSUPP)


def _check_fsxattr(fd: int, given: bytes, caller: Caller) -> None:
    """The checks of FS_IOC_FSSETXATTR: fileattr_set_prepare() in the kernel."""
    _check_owner(fd, caller)
    present = _FSXATTR.unpack_from(fcntl.ioctl(fd, FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
    wanted = _FSXATTR.unpack(given)
    if (present[0] ^ wanted[0]) & (_XFLAG_IMMUTABLE | _XFLAG_APPEND) and not caller.has_capability(
        _CAP_LINUX_IMMUTABLE
    ):
        raise _refuse()
    if present[3] != wanted[3] and not caller.is_of_this_user_namespace():
        raise _refuse(errno.EINVAL)
