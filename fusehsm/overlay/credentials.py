"""The accessor of a request, and operations on the backing in its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from fusehsm.linux import identity, proc


@dataclass(frozen=True, slots=True)
class Caller:
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

    def as_caller(self, caller: Caller | None) -> AbstractContextManager[None]:
        """Context manager in which this thread has the rights of `caller` (None: its own), and makes objects with exactly the mode that it gives.

        So the backing's kernel code checks what the caller may do, at the moment of the change: the directory may be another one than the kernel
        has checked, or have another owner. It also applies set-gid parents, quotas and ACLs, and no object belongs to root even for a
        moment. A mode comes with the caller's umask applied. A caller that cannot be looked at has no supplementary groups and no
        capabilities.
        """
        if caller is None or not self.privileged or (caller.uid == self._uid and caller.gid == self._gid):
            return _NoUmask()
        return self._acting(caller)

    @contextmanager
    def _acting(self, caller: Caller) -> Iterator[None]:
        groups, effective = proc.rights(caller.pid, caller.uid)
        with identity.acting_as(caller.uid, caller.gid, groups, effective), _NoUmask():
            yield

    def allows_suid(self, caller: Caller) -> bool:
        """Whether a new object may keep set-user-id and set-group-id bits. Not if it would belong to the server's user
        while another user controls its content."""
        return self.privileged or (caller.uid == self._uid)

    def is_ordinary(self, caller: Caller) -> bool:
        """Whether the server must clear bits as the kernel does for a caller without CAP_FSETID. An ordinary server need not:
        the kernel treats the server itself so."""
        return self.privileged and caller.uid != 0


class _NoUmask:
    """Context manager in which the umask is 0."""

    def __enter__(self) -> None:
        self._before = os.umask(0)

    def __exit__(self, *exception: object) -> None:
        os.umask(self._before)


def _may_switch() -> bool:
    try:
        with identity.acting_as(65534, 65534, [], 0):
            return True
    except OSError:
        return False
