"""Owners and modes of the entries that populate makes: as in the store, as far as this process may set them."""

import errno
import os
import stat
from contextlib import suppress
from typing import Final, TypeAlias

from fusehsm.overlay.attributes import path_of
from fusehsm.tier.stores.base import Entry, Kind

# EINVAL: an id that the user namespace does not map.
_NOT_PERMITTED: Final = frozenset((errno.EPERM, errno.EINVAL))

Movers: TypeAlias = frozenset[int] | None
"""The users, root apart, who may change the names in a directory; None: they are not known."""


def movers_in(status: os.stat_result) -> Movers:
    """The users who may rename entries of others in the directory of that status, root apart."""
    sticky = status.st_mode & stat.S_ISVTX
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid != 0
    if (by_group or status.st_mode & stat.S_IWOTH) and not sticky:
        return None
    return frozenset((status.st_uid,)) - {0}


class Ownership:
    """Computes and sets the owner and mode of an entry, with the rights of this process."""

    def __init__(self) -> None:
        self.is_root = os.geteuid() == 0
        self._groups = {os.getegid(), *os.getgroups()}
        # umask(2) can be read only by setting it.
        self._umask = os.umask(0o077)
        os.umask(self._umask)

    def default(self, kind: Kind) -> int:
        """The mode of a new entry without a mode in the store."""
        return (0o777 if kind is Kind.DIRECTORY else 0o666) & ~self._umask

    def differs(self, entry: Entry, status: os.stat_result) -> bool:
        """Whether owner or mode need a change that is permitted."""
        owner = self._owner(entry, status)
        if owner != (status.st_uid, status.st_gid):
            return True
        mode = stat.S_IMODE(status.st_mode)
        return entry.kind is not Kind.SYMLINK and _mode(entry, *owner, mode) != mode

    def may_be_anothers(self, movers: Movers, status: os.stat_result) -> bool:
        """Whether the entry of that status, in a directory of those movers, may be another one than the store's, put there by a user who does not
        own it. As root, owner and mode are not set then: that would give away its content. An ordinary user changes only entries of their own.
        """
        return self.is_root and (movers is None or not movers <= {status.st_uid})

    def apply(self, entry: Entry, fd: int, default: int) -> None:
        """Set the owner, then the mode (chown(2) clears set-user-id), of a file or directory. `default`: the mode if the store has none."""
        status = os.fstat(fd)
        owner = self._owner(entry, status)
        if owner != (status.st_uid, status.st_gid):
            try:
                os.fchown(fd, *owner)
            except OSError as error:
                if error.errno not in _NOT_PERMITTED:
                    raise
            status = os.fstat(fd)
        mode = _mode(entry, status.st_uid, status.st_gid, default)
        if mode != stat.S_IMODE(status.st_mode):
            os.fchmod(fd, mode)

    def apply_to_link(self, entry: Entry, fd: int) -> None:
        """Set the owner of the symbolic link `fd` (O_PATH), as far as this process may; a link has no mode.

        Raises OSError, but not EPERM or EACCES: the link then keeps its owner.
        """
        status = os.fstat(fd)
        owner = self._owner(entry, status)
        if owner != (status.st_uid, status.st_gid):
            with suppress(PermissionError):
                os.chown(path_of(fd), *owner)  # chown(2) does not follow it further

    def _owner(self, entry: Entry, status: os.stat_result) -> tuple[int, int]:
        uid, gid = status.st_uid, status.st_gid
        if self.is_root and entry.uid is not None:
            uid = entry.uid
        if entry.gid is not None and (self.is_root or entry.gid in self._groups):
            gid = entry.gid
        return uid, gid


def _mode(entry: Entry, uid: int, gid: int, default: int) -> int:
    """The mode of an entry that belongs to `uid` and `gid`."""
    if entry.mode is None:
        return default
    mode = entry.mode & 0o7777
    if entry.kind is Kind.FILE:
        # A program must not run with the rights of a user or group who does not own it in the store, or whom the store does not name.
        if uid != entry.uid:
            mode &= ~stat.S_ISUID
        if gid != entry.gid:
            mode &= ~stat.S_ISGID
    return mode
