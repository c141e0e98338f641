"""What a mount may not do because the mounts below it may not: noexec, nosuid, nodev, nosymfollow, ro.

Otherwise a mount would give back what an administrator has taken away from the users of SRC or DST.
"""

import os
from collections.abc import Collection
from typing import Final

# A bit of f_flag of statvfs(3), the option that sets the restriction, the option that lifts it.
_RESTRICTIONS: Final = (
    (os.ST_RDONLY, "ro", "rw"),
    (os.ST_NOSUID, "nosuid", "suid"),
    (os.ST_NODEV, "nodev", "dev"),
    (os.ST_NOEXEC, "noexec", "exec"),
    (0x2000, "nosymfollow", "symfollow"),  # ST_NOSYMFOLLOW (linux/statfs.h), which Python does not name
)
# What mount(2) of a FUSE filesystem sets unless it is lifted.
_DEFAULTS: Final = {"nosuid", "nodev"}


def options(source: int | str, destination: str, given: Collection[str], *, in_place: bool) -> set[str]:
    """The mount options that take over the restrictions of SRC's mount and of DST's; `given` are those of the command line.

    Root's mount in place also keeps set-user-ID programs and device nodes working where they work below it. fusermount3 lets ordinary users
    neither lift a restriction nor set nosymfollow. Raises ValueError, with one line, where `given` lifts a restriction; OSError as
    statvfs(2).
    """
    is_root = os.geteuid() == 0
    below = (("SRC", os.statvfs(source).f_flag), ("DST", os.statvfs(destination).f_flag))
    added = set()
    for bit, setting, lifting in _RESTRICTIONS:
        restricted = [name for name, flags in below if flags & bit]
        if restricted and lifting in given:
            raise ValueError(f"-o {lifting}: {restricted[0]} lies on a mount with {setting}; leave it out")
        if restricted and (is_root or setting != "nosymfollow"):
            added.add(setting)
        elif not restricted and setting in _DEFAULTS and in_place and is_root and setting not in given:
            added.add(lifting)
    return added
