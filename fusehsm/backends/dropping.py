"""Making a mount forget cached content, for a listener that has taken content away behind the kernel's back."""

import os

import trio

from fusehsm.backends.lookup import FoundObject, look_up
from fusehsm.control.client import ControlConnection
from fusehsm.control.protocol import Drop
from fusehsm.linux.mountinfo import Mount, mount_of_descriptor


async def drop(path: str | bytes | os.PathLike[str]) -> None:
    """Drop what the kernel has cached of a file on a fusehsm mount, so that its next access makes an event again.

    To be called after content was punched out of the file (FALLOC_FL_PUNCH_HOLE) through an event's descriptor or on the backing, when no
    mark changes that the mount would notice by itself. Waits until the pages have gone. On any other filesystem it does nothing: there the
    page cache is the file's own. Raises OSError as open(2) does, ENOTCONN when the mount's server is gone, and EBUSY when a page of the file
    waits for its listener for more than a second.
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
        # In a thread: close(2) of a mount's file may send it a request.
        await trio.to_thread.run_sync(os.close, found.descriptor)


def _find(path: str | bytes) -> tuple[FoundObject, Mount]:
    found = look_up(0, -1, path)
    try:
        return found, mount_of_descriptor(found.descriptor)
    except BaseException:
        os.close(found.descriptor)
        raise
