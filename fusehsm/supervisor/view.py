"""The listener's own view (`fusehsm run --listener`): a mount namespace in which each DIR is what the overlay covers for all others.

The listener then sees the files themselves: the same st_dev, inode, file handle, locks, ioctls and holes by its own path and through an event's
descriptor, and its own accesses make no events. Here its marks are taken to the overlays. launch.py makes the namespace.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fusehsm.backends.lookup import FoundObject
from fusehsm.fanotify.abi import (
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE_BITS,
    FAN_MARK_MOUNT,
    FAN_MARK_TYPE_MASK,
)
from fusehsm.linux import mountinfo
from fusehsm.linux.mountinfo import Mount

_DELETED: Final = b" (deleted)"


@dataclass(frozen=True, slots=True)
class Place:
    """One DIR."""

    #: The real path of DIR.
    path: str
    #: The number of the mount at DIR in the listener's namespace.
    mount_id: int
    #: (major, minor) of its st_dev.
    device: tuple[int, int]
    #: Its st_ino.
    inode: int
    #: The overlay that all others see there.
    overlay: Mount


@dataclass(frozen=True, slots=True)
class Target:
    """The object of a mark, as an overlay knows it."""

    #: The overlay.
    overlay: Mount
    #: (major, minor) of the object's st_dev on the backing.
    device: tuple[int, int]
    #: The object's st_ino on the backing.
    inode: int
    #: The object's path below DIR; None if it has no name any more.
    path: bytes | None


class View:
    """The places of one command."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = {place.mount_id: place for place in places}

    @classmethod
    def of(cls, copies: Sequence[tuple[str, int]]) -> "View":
        """The view for (DIR, descriptor of the root of its copy) when the overlays are mounted. The descriptors stay the caller's."""
        overlays = {mount.mount_point: mount for mount in mountinfo.read_mounts() if mount.is_fusehsm}
        places = []
        for path, descriptor in copies:
            status = os.fstat(descriptor)
            device = (os.major(status.st_dev), os.minor(status.st_dev))
            mount_id = mountinfo.id_of_descriptor(descriptor).number
            places.append(Place(path, mount_id, device, status.st_ino, overlays[path]))
        return cls(places)

    def targets(self, flags: int, found: FoundObject, tid: int) -> list[Target] | None:
        """What a mark of thread `tid` on an object of its namespace is to mark; empty if the object is in no DIR.

        A mark on a file system is one on each DIR of that file system. None: there is nothing to do, because the mark only ignores what comes
        through a mount that is not DIR's, and no event comes from there. Raises OSError if the thread has gone.
        """
        if flags & FAN_MARK_TYPE_MASK == FAN_MARK_FILESYSTEM:
            return [
                Target(place.overlay, place.device, place.inode, b"")
                for place in self._places.values()
                if place.device == found.device
            ]
        place = self._place_of(mountinfo.id_of_descriptor(found.descriptor).number, tid)
        if place is None:
            only_ignores = flags & FAN_MARK_IGNORE_BITS and flags & FAN_MARK_TYPE_MASK == FAN_MARK_MOUNT
            return None if only_ignores else []
        # The path leads through the listener's namespace, also as seen from here, because its mounts are not below our root.
        path = os.readlink(b"/proc/self/fd/%d" % found.descriptor)
        top = os.fsencode(place.path)
        if path.endswith(_DELETED) or not (path + b"/").startswith(top + b"/"):
            return [Target(place.overlay, found.device, found.inode, None)]
        return [Target(place.overlay, found.device, found.inode, path[len(top) + 1 :])]

    def _place_of(self, mount_id: int, tid: int) -> Place | None:
        """The DIR of a mount in the thread's namespace: that mount, or the next one above that is a DIR's."""
        if mount_id in self._places:
            return self._places[mount_id]
        parents = {mount.mount_id: mount.parent_id for mount in mountinfo.read_mounts(tid)}
        seen = set()
        while mount_id in parents and mount_id not in seen:
            if mount_id in self._places:
                return self._places[mount_id]
            seen.add(mount_id)
            mount_id = parents[mount_id]
        return None
