"""Lets one thread act on file systems with another process's rights (credentials(7), capabilities(7)): its file system user and group, its
supplementary groups, its capabilities.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from fusehsm.linux.file_io import Buffer

# PyDLL: to release the interpreter lock costs more than these calls, which touch kernel memory only.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_setfsuid: Final[Any] = _libc.setfsuid
_setfsuid.argtypes = [ctypes.c_uint32]
_setfsgid: Final[Any] = _libc.setfsgid
_setfsgid.argtypes = [ctypes.c_uint32]
_capget: Final[Any] = _libc.capget
_capget.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
_capset: Final[Any] = _libc.capset
_capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_syscall: Final[Any] = _libc.syscall
_syscall.restype = ctypes.c_long
# setgroups(2): libc's function changes the groups of all threads.
_SYS_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}.get(platform.machine())

_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
_CAPABILITIES: Final = struct.Struct("=6I")  # two each of effective, permitted, inheritable
_WORD: Final = 0xFFFF_FFFF
_CAP_FSETID: Final = 1 << 4  # linux/capability.h
_UNCHANGED: Final = 0xFFFF_FFFF


@contextmanager
def acting_as(uid: int, gid: int, groups: Sequence[int], effective: int) -> Iterator[None]:
    """Act in this thread with that file system user and group, these supplementary groups, and of its capabilities only those in `effective`.

    `effective`: a bit for each capability (linux/capability.h), as CapEff in /proc/PID/status. Raises PermissionError if this thread may not
    change its ids, and OSError EOPNOTSUPP on a machine whose setgroups(2) is not known here.
    """
    if _SYS_SETGROUPS is None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    buffer = ctypes.create_string_buffer(_CAPABILITIES.size)
    if _capget(_HEADER, buffer) < 0:
        raise _error()
    own = buffer.raw
    low, permitted_low, inheritable_low, high, permitted_high, inheritable_high = _CAPABILITIES.unpack(own)
    own_groups = os.getgroups()
    own_gid = _setfsgid(gid)
    own_uid = _setfsuid(uid)
    are_effective = own_uid == os.geteuid() and own_gid == os.getegid()
    try:
        # setfsuid(2) does not report a failure. A second call with -1 changes nothing and returns the present id.
        if (
            _setfsuid(_UNCHANGED) != ctypes.c_int(uid).value
            or _setfsgid(_UNCHANGED) != ctypes.c_int(gid).value
        ):
            raise PermissionError(errno.EPERM, "this process may not act for other users")
        if groups or own_groups:
            _set_groups(groups)
        acting = _CAPABILITIES.pack(
            low & effective & _WORD,
            permitted_low,
            inheritable_low,
            high & effective >> 32,
            permitted_high,
            inheritable_high,
        )
        if _capset(_HEADER, acting) < 0:
            raise _error()
        yield
    finally:
        if not are_effective:
            _capset(_HEADER, own)  # changing to other ids needs CAP_SETUID and CAP_SETGID
        _setfsgid(ctypes.c_uint32(own_gid).value)
        # Back at user 0 the kernel raises file capabilities from the permitted set. Those that were not effective must not stay.
        _setfsuid(ctypes.c_uint32(own_uid).value)
        _capset(_HEADER, own)
        # Last: it fails where a user namespace forbids it, and then nothing has changed the groups.
        if groups or own_groups:
            _set_groups(own_groups)


class Writer:
    """Lets the thread that makes it write content in another user's name, at a fraction of the price of acting_as().

    File systems decide by the user and CAP_SYS_RESOURCE who may use the space that is reserved, and whose quota ends. A member of the reserve's
    group has to use acting_as(). Raises OSError as acting_as().
    """

    def __init__(self) -> None:
        buffer = ctypes.create_string_buffer(_CAPABILITIES.size)
        if _capget(_HEADER, buffer) < 0:
            raise _error()
        self._own = buffer.raw
        low, permitted_low, inheritable_low, _, permitted_high, inheritable_high = _CAPABILITIES.unpack(
            self._own
        )
        # With CAP_FSETID the kernel takes no set-id bits away: the caller has decided about them, and knows the accessor's groups.
        self._writing = _CAPABILITIES.pack(
            low & _CAP_FSETID, permitted_low, inheritable_low, 0, permitted_high, inheritable_high
        )
        # The group 0 is never that of a reserve.
        groups = os.getgroups()
        self._groups = groups if any(groups) else []
        self._uid = _setfsuid(_UNCHANGED)

    def pwrite(self, uid: int, descriptor: int, data: Buffer, offset: int, how: int) -> int:
        """pwritev2(2) of `data` (`how`: RWF_*) as that user, with no groups and without CAP_SYS_RESOURCE; returns the number of bytes written.

        Raises OSError.
        """
        if uid == _UNCHANGED:
            # setfsuid(2) would take it as a question.
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        try:
            if self._groups:
                _set_groups(())
            _setfsuid(uid)
            if _capset(_HEADER, self._writing) < 0:
                raise _error()
            return os.pwritev(descriptor, [data], offset, how) if how else os.pwrite(descriptor, data, offset)
        finally:
            _setfsuid(self._uid)
            if _capset(_HEADER, self._own) < 0:
                raise _error()
            if self._groups:
                _set_groups(self._groups)


def _set_groups(groups: Sequence[int]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _syscall(ctypes.c_long(_SYS_SETGROUPS or 0), ctypes.c_long(len(groups)), array) < 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
