"""The listener's own view (`fusehsm run --listener`): a mount namespace in which each DIR is what the overlay covers for all others.

The listener then sees the files themselves: the same st_dev, inode, file handle, locks, ioctls and holes by its own path and through an event's
descriptor, and its own accesses make no events. Here its marks are taken to the overlays. launch.py makes the namespace.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fusehsm.backends.lookup import FoundObject
from fusehsm.control.protocol import MarkBacking, MarkRequest
from fusehsm.fanotify.abi import (
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE_BITS,
    FAN_MARK_MOUNT,
    FAN_MARK_TYPE_MASK,
)
from fusehsm.linux import mountinfo, syscalls
from fusehsm.linux.mountinfo import Mount

_DELETED: Final = b" (deleted)"

_log = logging.getLogger(__name__)


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
    #: A mount of the overlay itself that is to be marked; the numbers above are the overlay's own then.
    mount: mountinfo.MountId | None = None

    def request(self, flags: int, mask: int) -> MarkRequest | MarkBacking:
        """The request to the overlay's server for fanotify_mark(2) with these flags and this mask."""
        if self.mount is not None:
            return MarkRequest(flags, mask, *self.device, self.inode, self.mount.number, self.mount.unique)
        path = None if self.path is None else os.fsdecode(self.path)
        return MarkBacking(flags, mask, *self.device, self.inode, path)


class View:
    """The places of one command."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = {place.mount_id: place for place in places}
        # The mounts that the namespace had when the command began: their (major, minor) in the list of mounts, and their roots.
        self._began: dict[int, tuple[tuple[int, int], str]] = {}
        # The command's root directory when it began.
        self._root = b"/"
        self._lock = threading.Lock()
        # The mount points of the command's bind mounts that others see.
        self._shown: list[str] = []

    def begin(self, pid: int) -> None:
        """The command is about to begin in that process: whatever is mounted later, it mounts itself."""
        self._began = {mount.mount_id: (mount.device, mount.root) for mount in mountinfo.read_mounts(pid)}
        self._root = _root_of(pid)

    def close(self) -> None:
        """Unmount what was mounted for others."""
        for point in reversed(self._shown):
            with contextlib.suppress(OSError):
                syscalls.umount2(os.fsencode(point), syscalls.MNT_DETACH)

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
        mounts = {mount.mount_id: mount for mount in mountinfo.read_mounts(tid)}
        mount = mounts.get(mountinfo.id_of_descriptor(found.descriptor).number)
        only_ignores = flags & FAN_MARK_IGNORE_BITS and flags & FAN_MARK_TYPE_MASK == FAN_MARK_MOUNT
        if mount is None:  # a mount that the command has not attached
            return None if only_ignores else []
        if mount.mount_id in self._began:
            place, below = self._place_of(mount, mounts), ""
            top, root = "" if place is None else place.path, self._root
        else:
            place, below = self._bound(mount)
            top, root = mount.mount_point, _root_of(tid)
            if place is not None and flags & FAN_MARK_TYPE_MASK == FAN_MARK_MOUNT:
                return None if only_ignores else [self._show(place, below, mount)]
        if place is None:
            return None if only_ignores else []
        path = _inside(found.descriptor, root.rstrip(b"/") + os.fsencode(top))
        if path is not None and below:
            path = os.path.join(os.fsencode(below), path)
        return [Target(place.overlay, found.device, found.inode, path)]

    def _place_of(self, mount: Mount, mounts: dict[int, Mount]) -> Place | None:
        """The DIR of a mount in the listener's namespace: that mount, or the next one above that is a DIR's."""
        seen: set[int] = set()
        current: Mount | None = mount
        while current is not None and current.mount_id not in seen:
            if current.mount_id in self._places:
                return self._places[current.mount_id]
            seen.add(current.mount_id)
            current = mounts.get(current.parent_id)
        return None

    def _bound(self, mount: Mount) -> tuple[Place | None, str]:
        """The DIR of which a mount of the command shows a part, and the part's path below DIR."""
        for place in self._places.values():
            device, root = self._began.get(place.mount_id, (None, ""))
            top = root.rstrip("/") + "/"
            if mount.device == device and (mount.root + "/").startswith(top):
                return place, mount.root[len(top) :]
        return None, ""

    def _show(self, place: Place, below: str, mount: Mount) -> Target:
        """Mount for all others what the command has bound and marks: the same part of DIR, with the overlay. Raises OSError EOPNOTSUPP."""
        point = mount.mount_point
        with self._lock:
            try:
                if point not in self._shown:
                    # Where mounts are shared, the command's own mount stands here, and would get what is mounted over it.
                    with contextlib.suppress(OSError):
                        syscalls.mount(b"none", os.fsencode(point), None, syscalls.MS_PRIVATE)
                    source = os.fsencode(os.path.join(place.path, below))
                    syscalls.mount(source, os.fsencode(point), None, syscalls.MS_BIND)
                    self._shown.append(point)
                shown = mountinfo.id_at(point)
                status = os.stat(point)
            except OSError as error:
                _log.warning(
                    "%s: a mark on this mount, which others cannot be given: %s", point, error.strerror
                )
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
        return Target(place.overlay, place.overlay.device, status.st_ino, None, shown)


def _root_of(pid: int) -> bytes:
    """The root directory of a process in the listener's namespace, from the root of that namespace on: in a chroot it is not "/"."""
    return os.readlink(b"/proc/%d/root" % pid)


def _inside(descriptor: int, above: bytes) -> bytes | None:
    """The path of an open file below `above`; None if it has no name any more.

    Both are paths from the root of the listener's namespace on. The kernel shows them so from here, because that namespace's mounts are not
    below our root, and it also does if both processes are in a chroot.
    """
    path = os.readlink(b"/proc/self/fd/%d" % descriptor)
    if path.endswith(_DELETED) or not (path + b"/").startswith(above + b"/"):
        return None
    return path[len(above) + 1 :]
