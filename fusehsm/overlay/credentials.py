"""The accessor of a request, and operations on the backing in its name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import NamedTuple

from fusehsm.linux import identity, proc
from fusehsm.linux.file_io import Buffer

#: The errors of a write by which a file system says that its user may not take more space.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
#: The capabilities that hold for single inodes: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID and CAP_SETFCAP.
_OVER_AN_INODE = sum(1 << number for number in (0, 1, 2, 3, 4, 31))
_CAP_FOWNER = 1 << 3


class Caller(NamedTuple):
    """The accessor of one request, as in the FUSE header."""

    #: The user for file access (fsuid).
    uid: int
    #: The group for file access (fsgid).
    gid: int
    #: The thread, 0 if there is none.
    pid: int
    #: For information only: the mode of a new object arrives with it applied, unless FUSE_DONT_MASK was negotiated.
    umask: int = 0

    def in_group(self, gid: int) -> bool:
        """Whether `gid` is the accessor's own or a supplementary group (in_group_p() in the kernel).

        A process that cannot be read counts as no member. The answer only decides whether a set-gid bit may stay.
        """
        return gid == self.gid or proc.is_member(self.pid, gid)

    def has_capability(self, number: int) -> bool:
        """Whether the accessor has that effective capability (linux/capability.h), in this process's user namespace.

        A process that cannot be read has none.
        """
        return self.pid > 0 and proc.has_capability(self.pid, number)

    def is_of_this_user_namespace(self) -> bool:
        """Whether the accessor is in the same user namespace as this process. False for a process that cannot be read."""
        return self.pid > 0 and proc.shares_our_user_namespace(self.pid)


class Impersonation:
    """Lets the server act in a caller's name where it may do so, and tells where it may not."""

    def __init__(self) -> None:
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self.privileged = self._uid == 0 and _may_switch()
        """May this server act for others?"""
        self._writer = identity.Writer() if self.privileged else None

    def as_caller(self, caller: Caller | None) -> AbstractContextManager[None]:
        """rights_of(), in which this thread makes objects with exactly the mode that it gives. Only one thread may use it, because the umask is
        that of all threads. A mode comes with the caller's umask applied."""
        return _NoUmask(self.rights_of(caller))

    def rights_of(self, caller: Caller | None, about: int | None = None) -> AbstractContextManager[None]:
        """Context manager in which this thread has the rights of `caller` (None: its own). Any thread may use it.

        `about`: a descriptor of the only inode that is changed. The capabilities of a container's root hold for inodes whose owner and group
        exist in the container, and for no others.

        So the backing's kernel code checks what the caller may do, at the moment of the change: the directory may be another one than the kernel
        has checked, or have another owner. It also applies set-gid parents, quotas, reserved space and ACLs, and no object belongs to root
        even for a moment. A caller that cannot be looked at has no supplementary groups and no capabilities.
        """
        if caller is None or not self.privileged or (caller.uid == self._uid and caller.gid == self._gid):
            return nullcontext()
        return self._acting(caller, about)

    @contextmanager
    def _acting(self, caller: Caller, about: int | None) -> Iterator[None]:
        groups, effective = proc.rights(caller.pid, caller.uid)
        if effective and not caller.is_of_this_user_namespace():
            effective &= _over(caller, about) if about is not None else 0
        with identity.acting_as(caller.uid, caller.gid, groups, effective):
            yield

    def is_own(self, caller: Caller) -> bool:
        """Whether a caller's content is written as the server itself: it is the server's user, or the server may not act for others."""
        return self._writer is None or caller.uid == self._uid

    def write(self, caller: Caller, descriptor: int, data: Buffer, offset: int, how: int) -> int:
        """pwritev2(2) in the caller's name, for the thread that has made this object; returns the number of bytes written. `how`: RWF_* flags.

        File systems ask at write(2) whether the user may use reserved space, and whose quota ends. Raises OSError. Not for callers of whom
        is_own() is true.
        """
        assert self._writer is not None
        try:
            return self._writer.pwrite(caller.uid, descriptor, data, offset, how)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
        # Groups and capabilities are looked up only here, where they may give the caller more.
        with self.rights_of(caller):
            return os.pwritev(descriptor, [data], offset, how)

    def allows_suid(self, caller: Caller) -> bool:
        """Whether a new object may keep set-user-id and set-group-id bits. Not if it would belong to the server's user
        while another user controls its content."""
        return self.privileged or (caller.uid == self._uid)

    def is_ordinary(self, caller: Caller) -> bool:
        """Whether the server must clear bits as the kernel does for a caller without CAP_FSETID. An ordinary server need not:
        the kernel treats the server itself so."""
        return self.privileged and caller.uid != 0


class _NoUmask:
    """Context manager in which the umask is 0, inside another one."""

    def __init__(self, inner: AbstractContextManager[None]) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._before = os.umask(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.umask(self._before)
        self._inner.__exit__(kind, error, trace)


def _over(caller: Caller, fd: int) -> int:
    """The capabilities that hold for an inode if a caller in another user namespace has them (capabilities(7))."""
    status = os.fstat(fd)
    if not proc.has_user(caller.pid, status.st_uid):
        return 0
    # Whether its group must exist, too: inode_owner_or_capable() and capable_wrt_inode_uidgid() in the kernel.
    return _OVER_AN_INODE if proc.has_group(caller.pid, status.st_gid) else _CAP_FOWNER


def _may_switch() -> bool:
    try:
        with identity.acting_as(65534, 65534, [], 0):
            return True
    except OSError:
        return False
