"""Root takes over the marks of an ordinary user, or of an older fusehsm, which are in user.* (tier/stubs/tree.py). Nothing is fetched."""

import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import Final

from fusehsm.tier.populate.lookup import Refusal
from fusehsm.tier.stores.base import Entry
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.mark import StubMark, digest
from fusehsm.tier.stubs.record import Record
from fusehsm.tier.stubs.stub import TICK, TRIES, is_pinned
from fusehsm.tier.stubs.tree import Namespace

_MARK: Final = "has a mark of an ordinary user or an older fusehsm, which"
_OLD: Final = frozenset((Namespace.USER.stub, Namespace.USER.resident, Namespace.USER.pinned))
_FIX: Final = "save what you need of it, remove it, and populate again"


def take_over(fd: int, entry: Entry, namespace: Namespace, *, dry_run: bool) -> StubMark | None:
    """Move the attributes of the file `fd` from user.* to `namespace`. Returns the mark; None if the file has none there. Raises Refusal.

    Every user who may write to the file may have written the mark. So it must say what the store says, and the file's owner must be root or the
    owner in the store. Then it gives nobody more than they have. `dry_run`: check only.

    Both marks are there for a moment, so that a kill leaves no file without one. On ext4 with inodes of 256 bytes the new one gets a block of 4 KiB.
    """
    mark = stub_mark.read(fd, Namespace.USER)
    status = os.fstat(fd)
    if mark is None or (mark.inode, mark.generation) != (status.st_ino, stub_mark.generation(fd)):
        return None
    if (mark.path, mark.version, mark.size) != (digest(entry.path), digest(entry.version or ""), entry.size):
        raise Refusal(f"{_MARK} does not name this file of the store as it is now; {_FIX}")
    if status.st_uid not in (0, entry.uid):
        raise Refusal(f"{_MARK} may be forged, as the file belongs to user {status.st_uid}; {_FIX}")
    if dry_run:
        return mark
    record = residency.read(fd, mark, Namespace.USER)
    # The mark comes last of the new attributes: a killed run leaves either the old mark, or a new one with all that belongs to it.
    if record is not None:
        record.write(fd, namespace)
    if is_pinned(fd, Namespace.USER):
        os.setxattr(fd, namespace.pinned, b"")
    mark.write(fd, namespace)
    remove_old(fd)
    if record is not None and record.settled(status.st_ctime_ns):
        _settle(fd, record, namespace)
    return mark


def remove_old(fd: int) -> None:
    """Remove the attributes in user.*, which a killed run may have left beside root's. They take space and prove nothing."""
    for name in os.listxattr(fd):
        if name in _OLD:
            with suppress(OSError):
                os.removexattr(fd, name)


def _settle(fd: int, record: Record, namespace: Namespace) -> None:
    """Write a record again, with the change time that this run has caused: otherwise the change would count as a user's."""
    for _ in range(TRIES):
        record = replace(record, recorded_ns=time.time_ns() - TICK)
        record.write(fd, namespace)
        if record.settled(os.fstat(fd).st_ctime_ns):
            break
