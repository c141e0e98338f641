"""Whether a stub's mark may be somebody else's forgery.

A mark is an attribute that everybody may set who may write to the file. Root's fetch asks the store with root's rights, so a forged mark would show
its author any file of the store. So root's fetch believes a mark only if nobody can have written it but root or people who have that file anyway.
"""

import os
import stat

from fusehsm.text import shown
from fusehsm.tier.fetch.catalog import Origin
from fusehsm.tier.stores.base import Rights

_BY_GROUP = stat.S_IRGRP | stat.S_IWGRP
_BY_OTHERS = stat.S_IROTH | stat.S_IWOTH


def suspicion(status: os.stat_result, origin: Origin) -> str | None:
    """Why root must not fill the file of that status (fstat(2)) from there: "cause; mend"; None if it may.

    Only root can make a file of root's, and only root can give a file away. So the owner is who could have written the mark, and must be the owner of
    the file in the store, or root. Others who may write to the file could have written the mark, too. They must be those who have a right to the
    store's file; else the file must be at the path that the mark names.
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
    """The write permissions, of those that a file may have, that only people have who may use the store's file."""
    granted = 0
    if rights is not None and rights.mode is not None:
        if rights.mode & _BY_OTHERS:
            granted = stat.S_IWGRP | stat.S_IWOTH
        elif rights.mode & _BY_GROUP and rights.gid == status.st_gid:
            granted = stat.S_IWGRP
    return granted
