"""The check whether a stub's mark may be forged.

A mark is an attribute. Every user who may write to the file may set it. A fetch that runs as root asks the store with root's rights, so a forged mark
could show its author any file of the store. So root's fetch believes a mark only if its writer must be root or have a right to that file.
"""

import os
import stat

from fusehsm.text import shown
from fusehsm.tier.fetch.catalog import Origin
from fusehsm.tier.stores.base import Rights

_BY_GROUP = stat.S_IRGRP | stat.S_IWGRP
_BY_OTHERS = stat.S_IROTH | stat.S_IWOTH


def suspicion(status: os.stat_result, origin: Origin) -> str | None:
    """The reason, as "cause; fix", for which root must not fill the file from `origin`; None if it may. `status`: the file's fstat(2).

    Only root can make a file that root owns, and only root can give a file away. So the file's owner can have written the mark, and must be root or
    the owner of the file in the store. Other users who may write to the file can have written the mark, too. They must have a right to the store's
    file, or the file must be at the path that the mark names.
    """
    rights = origin.rights
    if status.st_uid != 0 and (rights is None or status.st_uid != rights.uid):
        told = (
            "the store tells no owners"
            if rights is None
            else f"what its mark names, {shown(origin.path)}, to user {rights.uid} in the store"
        )
        return f"belongs to user {status.st_uid}, and {told}: the mark may be forged; remove the file and populate again as root"
    if origin.is_renamed and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~_granted(status, rights):
        return f"others than its owner may write to it, so its mark, which names {shown(origin.path)}, may be forged; move it there, or chmod go-w"
    return None


def _granted(status: os.stat_result, rights: Rights | None) -> int:
    """The write permission bits of group and others whose users all have a right to the store's file."""
    granted = 0
    if rights is not None and rights.mode is not None:
        if rights.mode & _BY_OTHERS:
            granted = stat.S_IWGRP | stat.S_IWOTH
        elif rights.mode & _BY_GROUP and rights.gid == status.st_gid:
            granted = stat.S_IWGRP
    return granted
