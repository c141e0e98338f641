"""Opens files of a mount by path below its overlay, on the backing, where accesses make no events."""

import errno
import os

import trio

from fusehsm.backends.base import AnyPath
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Backing
from fusehsm.linux.beneath import open_beneath
from fusehsm.linux.mountinfo import mount_of_descriptor


async def root_of_backing(connection: ControlConnection, mount_point: str) -> int:
    """A descriptor of the root directory of a mount's backing; the caller closes it. Raises OSError ENOTCONN if the mount's server gives none."""
    root_fd = (await connection.request(Backing()))[1]
    if root_fd is None:
        raise OSError(errno.ENOTCONN, "its server does not show its backing", mount_point)
    return root_fd


async def open_backing(
    root_fd: int, device: tuple[int, int], mount_point: str, path: AnyPath, flags: int
) -> int:
    """open(2) of `path` on the backing with the root `root_fd`. `device`: (major, minor) of the mount's st_dev.

    Raises OSError as Group.backing().
    """

    def look_up_and_open() -> int:
        return open_beneath(root_fd, _path_below(path, flags, device, mount_point), flags)

    # In a thread: to look the path up sends the mount requests, which this same event loop may answer.
    return await trio.to_thread.run_sync(look_up_and_open)


def _path_below(path: AnyPath, flags: int, device: tuple[int, int], mount_point: str) -> str:
    """The path of a file of the mount from the root of its file system on, without symbolic links; "." for the root itself."""
    found = os.open(path, os.O_PATH | os.O_CLOEXEC | flags & os.O_NOFOLLOW)
    try:
        status = os.fstat(found)
        if (os.major(status.st_dev), os.minor(status.st_dev)) != device:
            raise OSError(
                errno.EXDEV, f"{os.fsdecode(path)}: not on the fusehsm mount {mount_point} of this group"
            )
        mount = mount_of_descriptor(found)
        # A bind mount shows a part of the file system at another place.
        inside = os.path.relpath(os.readlink(f"/proc/self/fd/{found}"), mount.mount_point)
        return os.path.normpath(os.path.join(mount.root, inside)).lstrip("/") or "."
    finally:
        os.close(found)
