"""System calls that Python does not have, for fanotify(7) and mounting: one small function each, raising OSError with the kernel's errno."""

import ctypes
import errno
import os
from typing import Any, Final

AT_FDCWD: Final = -100

MS_BIND: Final = 0x1000  # mount(2)
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2  # umount2(2)

_SYS_FACCESSAT2: Final = 439  # on every architecture; Linux 5.8
_AT_EACCESS: Final = 0x200
_AT_EMPTY_PATH: Final = 0x1000

_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)
_fanotify_init: Final[Any] = _libc.fanotify_init
_fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
_fanotify_mark: Final[Any] = _libc.fanotify_mark
_fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]
_mount: Final[Any] = _libc.mount
_mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_umount2: Final[Any] = _libc.umount2
_umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def _check(result: int, path: bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def fanotify_init(flags: int, event_f_flags: int) -> int:
    """fanotify_init(2): the new group's descriptor."""
    return _check(_fanotify_init(flags, event_f_flags))


def fanotify_mark(fd: int, flags: int, mask: int, dirfd: int = AT_FDCWD, path: bytes | None = None) -> None:
    """fanotify_mark(2); `path` None means what `dirfd` refers to."""
    _check(_fanotify_mark(fd, flags, mask, dirfd, path), path)


def mount(
    source: bytes, target: bytes, filesystem_type: bytes | None, flags: int, data: bytes | None = None
) -> None:
    """mount(2)."""
    _check(_mount(source, target, filesystem_type, flags, data), target)


def umount2(target: bytes, flags: int) -> None:
    """umount2(2)."""
    _check(_umount2(target, flags), target)


def may_read(descriptor: int) -> bool:
    """Whether the calling thread, by its effective rights, may read what a descriptor (O_PATH will do) is open on."""
    if _libc.syscall(_SYS_FACCESSAT2, descriptor, b"", os.R_OK, _AT_EACCESS | _AT_EMPTY_PATH) == 0:
        return True
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return os.access(f"/proc/self/fd/{descriptor}", os.R_OK, effective_ids=True)
    return False


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _check(_libc.prctl(option, value, 0, 0, 0))
