"""Drops a mount's cached pages of a file, for a listener that has punched out content behind the kernel's back."""

import os

import trio

from fusehsm.backends.lookup import FoundObject, look_up
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Drop
from fusehsm.linux.mountinfo import Mount, mount_of_descriptor


async def drop(path: str | bytes | os.PathLike[str]) -> None:
    """Drop the kernel's cached pages of a file on a fusehsm mount, so that its next access makes an event again.

    Call it after content was punched out of the file (FALLOC_FL_PUNCH_HOLE) through an event descriptor or on the backing, and no mark
    changes that the mount would notice by itself. It waits until the pages are gone. On any other filesystem it does nothing, because the page
    cache there is the file's own. Raises OSError as open(2) does, ENOTCONN if the mount's server is gone, EBUSY if a page of the file waits for
    its listener for more than a second.
    """
    found, mount = await trio.to_thread.run_sync(_find, os.fspath(path))
    try:
        if not mount.is_fusehsm:
            return
        connection = await ControlConnection.open(mount)
        try:
            await connection.request(Drop(*found.device, found.inode))
        finally:
            connection.close()
    finally:
        # In a thread: close(2) of a mount's file may send the mount a request.
        await trio.to_thread.run_sync(os.close, found.descriptor)


def _find(path: str | bytes) -> tuple[FoundObject, Mount]:
    found = look_up(0, -1, path)
    try:
        return found, mount_of_descriptor(found.descriptor)
    except BaseException:
        os.close(found.descriptor)
        raise
