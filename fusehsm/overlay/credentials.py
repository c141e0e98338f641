"""Who asks for an operation, and doing it in his name."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fusehsm.linux import syscalls


@dataclass(frozen=True, slots=True)
class Caller:
    """The accessor of one request, as the FUSE header names him. `umask` is informative: the mode of a new
    object arrives with it applied (the kernel does that unless FUSE_DONT_MASK was negotiated)."""

    uid: int
    gid: int
    pid: int
    umask: int = 0

    def in_group(self, gid: int) -> bool:
        """Is `gid` his own or a supplementary group? (in_group_p() in the kernel.) A process that cannot be read
        counts as not being a member: the answer only ever decides whether a set-gid bit may stay."""
        if gid == self.gid:
            return True
        if self.pid <= 0:
            return False
        try:
            with open(f"/proc/{self.pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"Groups:"):
                        return gid in {int(word) for word in line.split()[1:]}
        except OSError:
            pass
        return False


class Impersonation:
    """Creates things in a caller's name where the server may, and says where it may not."""

    def __init__(self) -> None:
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self.privileged = self._uid == 0 and _may_switch()
        """May this server create files that belong to others?"""

    def as_caller(self, caller: Caller) -> AbstractContextManager[None]:
        """While it lasts, what this thread creates belongs to `caller`: the backing's own kernel code then gives
        set-gid parents, quotas and ACLs their due, and no object is ever root's for a moment."""
        if not self.privileged or (caller.uid == self._uid and caller.gid == self._gid):
            return nullcontext()
        return syscalls.filesystem_identity(caller.uid, caller.gid)

    def allows_suid(self, caller: Caller) -> bool:
        """May a new object keep set-user-id and set-group-id bits? Not where it would belong to the server's user
        although someone else decides on its content."""
        return self.privileged or (caller.uid == self._uid)

    def is_ordinary(self, caller: Caller) -> bool:
        """Must the server do what the kernel does for a caller without CAP_FSETID? An ordinary server need not:
        the kernel does it to the server itself."""
        return self.privileged and caller.uid != 0


def _may_switch() -> bool:
    try:
        with syscalls.filesystem_identity(65534, 65534):
            return True
    except OSError:
        return False
