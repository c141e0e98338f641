"""The operations that all engines share: those on names, directories and new files that need more than one call of the overlay.

Node ids and handles are the numbers that the kernel uses. Every method raises OSError.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.handles import OpenFile
from fusehsm.events import AccessKind
from fusehsm.overlay import ioctls
from fusehsm.overlay.directory import DirectoryStream
from fusehsm.overlay.overlay import RENAME_EXCHANGE, Caller, Node

_SELINUX: Final = b"security.selinux"
_NOBODY: Final = -1  # for a thread id

Found = tuple[Node, os.stat_result]


class Filesystem:
    """The operations of one mount."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._overlay = gate.overlay
        # By handle: the stream, its node, and the thread that has opened it (_NOBODY: the kernel itself).
        self._directories: dict[int, tuple[DirectoryStream, Node, int]] = {}
        self._next_directory = 1
        self._has_selinux = os.path.isdir("/sys/fs/selinux")
        # An ordinary server cannot open a new file of mode 0444 for writing. It must create and open it in one call.
        self._opens_new_files = os.geteuid() == 0

    def lookup(self, parent_id: int, name: bytes) -> Found | None:
        """The node and status of a name; None for a name that does not exist."""
        try:
            return self._overlay.lookup(self._overlay.node(parent_id), name)
        except FileNotFoundError:
            return None

    def mknod(self, parent_id: int, name: bytes, mode: int, device: int, caller: Caller) -> Found:
        """Make a file, fifo, socket or device node."""
        try:
            return self._overlay.mknod(self._overlay.node(parent_id), name, mode, device, caller)
        except FileExistsError:
            if not stat.S_ISREG(mode):
                raise
            # It was made on the backing. This request may come from open(2) without O_EXCL (see create()): ESTALE makes the kernel look it up again.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None

    async def link(self, node_id: int, new_parent_id: int, new_name: bytes, caller: Caller) -> Found:
        """Give a file another name."""
        new_parent = self._overlay.node(new_parent_id)
        answer = self._overlay.link(self._overlay.node(node_id), new_parent, new_name, caller)
        await self._gate.moved(new_parent, new_name)
        return answer

    async def rename(
        self,
        old_parent_id: int,
        old_name: bytes,
        new_parent_id: int,
        new_name: bytes,
        flags: int,
        caller: Caller,
    ) -> None:
        """renameat2(2)."""
        old_parent, new_parent = self._overlay.node(old_parent_id), self._overlay.node(new_parent_id)
        self._overlay.rename(old_parent, old_name, new_parent, new_name, flags, caller)
        await self._gate.moved(new_parent, new_name)
        if flags & RENAME_EXCHANGE:
            await self._gate.moved(old_parent, old_name)

    async def create(
        self,
        parent_id: int,
        name: bytes,
        flags: int,
        mode: int,
        caller: Caller,
        inval_entry: Callable[[int, bytes], None],
    ) -> tuple[OpenFile[Node], bool, Found]:
        """Make and open a file; returns the open file, keep_cache (whether the kernel's pages of it may stay), and its node and status.

        `inval_entry` makes the kernel drop what it has cached of a name in a directory. It must not wait.
        """
        parent = self._overlay.node(parent_id)
        if self._opens_new_files and self._gate.may_deny_new(parent):
            # The kernel locks the directory until CREATE is answered (docs/facts.md, section 15). So this must not wait for a listener, whose
            # lookups would wait for the lock. After ENOSYS the kernel always makes files with MKNOD, and opens them without the lock.
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        node, status, descriptor = self._overlay.create(parent, name, flags, mode, caller)
        try:
            file, keep_cache = await self._gate.created(node, flags, descriptor, caller)
        except BaseException:
            # The kernel never learns of the node, so it will not send FORGET. It must also drop a cached negative entry of the name. It holds
            # the directory's lock until this request is answered.
            self._overlay.forget(node, 1)
            inval_entry(parent_id, name)
            raise
        return file, keep_cache, (node, status)

    def getxattr(self, node_id: int, name: bytes) -> bytes:
        """The value of an extended attribute."""
        try:
            return self._overlay.getxattr(self._overlay.node(node_id), name)
        except OSError as error:
            if error.errno == errno.ENODATA and name == _SELINUX and not self._has_selinux:
                # ls -l asks for it for each file, unless the filesystem does not support it (docs/facts.md, section 16). Without SELinux none does.
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
            raise

    async def ioctl(
        self, node_id: int, handle: int, command: int, argument: bytes, gives: int, caller: Caller
    ) -> bytes:
        """ioctl(2) of a file, through an open file where there is one (`handle` not 0), or of a directory; returns the bytes that it gives.

        `gives`: the most that its caller takes.
        """
        changes = ioctls.check(command, len(argument), gives)
        node = self._overlay.node(node_id)
        if handle:
            with self._gate.handles.backing(self._gate.handles.get(handle)) as descriptor:
                answer = ioctls.perform(descriptor, command, argument, caller)
        else:
            descriptor = self._overlay.open_for_event(node, os.O_RDONLY | os.O_NONBLOCK)
            try:
                answer = ioctls.perform(descriptor, command, argument, caller)
            finally:
                os.close(descriptor)
        if changes:
            await self._gate.attributes.changed(node)
        return answer

    # Directories

    async def opendir(self, node_id: int, tid: int, *, silent: bool = False) -> int:
        """Open a directory; returns its handle. `silent`: the kernel opens it for itself, and no event is made."""
        node = self._overlay.node(node_id)
        if not silent:
            await self._gate.open_directory(node, tid)
        handle = self._next_directory
        self._next_directory += 1
        self._directories[handle] = (self._overlay.opendir(node), node, _NOBODY if silent else tid)
        if not silent:
            self._gate.notify_of_directory(AccessKind.OPEN, node, tid)
        return handle

    async def readdir(self, handle: int, position: int, tid: int = 0) -> DirectoryStream:
        """Ask for permission to read entries of an open directory from `position` on; returns its stream.

        `tid` is the reading thread, 0 where the engine does not know it.
        """
        stream, node, opener = self._directory(handle)
        await self._gate.read_directory(node, position, tid or opener)
        # An empty answer at the end makes a notification, too (docs/facts.md, section 10).
        self._gate.notify_of_directory(AccessKind.READ_DIRECTORY, node, tid or opener)
        return stream

    def fsyncdir(self, handle: int, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2) of an open directory."""
        self._directory(handle)[0].synchronise(data_only)

    def releasedir(self, handle: int) -> None:
        """The kernel has closed a directory."""
        stream, node, opener = self._directory(handle)
        if opener != _NOBODY:
            self._gate.notify_of_directory(AccessKind.CLOSE, node, opener)
        del self._directories[handle]
        stream.close()

    def _directory(self, handle: int) -> tuple[DirectoryStream, Node, int]:
        try:
            return self._directories[handle]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
