"""Opens nodes on the backing: from the source's root, by name, and never through a symbolic link.

The inode at the end of the names must be that of the node. If it is another, the error is ESTALE, upon which the kernel
looks the names up again. So no rename and no symbolic link in the backing leads outside of it or to another file.

A file that has no name any more but that the kernel still knows is pinned. Without a pin its content would be gone. A descriptor pins a file, but
descriptors are few: the limit of a process may be 1024. Beyond them a mapping pins a regular file. It needs no descriptor, and
/proc/self/map_files/ leads back from it to the file. Only processes with CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE may use that (proc(5)).
Without these, the files that have had no name for the longest are given up.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.beneath import walk
from fusehsm.overlay.nodes import Node, NodeTable

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ANYTHING: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# The errors of opening a chain of names when one of them is gone, or is another kind of file now.
_GONE: Final = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ESTALE, errno.EAGAIN))


def stale(name: bytes | None = None) -> OSError:
    """An OSError ESTALE to raise: the kernel then looks the name up again. `name` is the error's file name."""
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)


class Reach:
    """Keeps descriptors of directories, and of files whose names are gone. Their number is limited.

    `directories`: how many directory descriptors are kept. `pins`: how many removed but still known files keep a
    descriptor. `trust_seconds`: how long a kept directory is used without walking its names again. If
    it has moved within the backing, it is still the same directory.
    """

    def __init__(self, source: str | bytes, *, directories: int, pins: int, trust_seconds: float) -> None:
        if not os.path.isdir("/proc/self/fd"):
            raise OSError(
                errno.ENOENT,
                "/proc is not mounted, and files are reached through /proc/self/fd: mount it",
                "/proc",
            )
        self.root_fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._limit = max(4, directories)
        self._trust_seconds = trust_seconds
        self._openat2 = syscalls.have_openat2()
        # By node: descriptor, and when its names were last walked (monotonic seconds). The most recently used is last.
        self._directories: OrderedDict[Node, tuple[int, float]] = OrderedDict()
        self._pins = Pins(pins)
        self.table = NodeTable(os.fstat(self.root_fd), self.release)
        self._root = self.table.root
        self.open_fd_of: Callable[[Node], int | None] | None = None
        """Who else may hold a descriptor of a node without a name (the open files); it stays the provider's."""

    def close(self) -> None:
        """Close every descriptor."""
        for fd, _ in self._directories.values():
            os.close(fd)
        self._directories.clear()
        self._pins.close()
        if self.root_fd >= 0:
            os.close(self.root_fd)
            self.root_fd = -1

    def release(self, node: Node) -> None:
        """Close the descriptors that are kept for `node`."""
        kept = self._directories.pop(node, None)
        if kept is not None:
            os.close(kept[0])
        self._pins.drop(node)

    # directories

    def directory_fd(self, node: Node) -> int:
        """A descriptor (O_PATH) of that directory, valid until the next call. Raises OSError ESTALE when it is not there any more."""
        kept = self._directories.get(node)
        if kept is not None and time.monotonic() - kept[1] < self._trust_seconds:
            self._directories.move_to_end(node)
            return kept[0]
        if node is self._root:
            return self.root_fd
        if node.kind != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), node.name)
        return self._open_directory(node)

    def _open_directory(self, node: Node) -> int:
        if not node.linked:
            pin = self._pins.get(node)
            if pin is None:
                raise stale(node.name)
            return pin
        now = time.monotonic()
        names = [node.name]
        base = self.root_fd
        above = node.parent
        while above is not None and above is not self._root:
            kept_above = self._directories.get(above)
            if kept_above is not None and now - kept_above[1] < self._trust_seconds:
                base = kept_above[0]
                break
            if not above.linked:
                raise stale(above.name)
            names.append(above.name)
            above = above.parent
        names.reverse()
        try:
            fd = walk(base, names, _DIRECTORY, openat2=self._openat2, recover=self._make_room)
        except OSError as error:
            if error.errno in _GONE:
                raise stale(node.name) from None
            raise
        if not self._is(node, fd):
            os.close(fd)
            raise stale(node.name)
        kept = self._directories.get(node)  # the walk may have closed it to make room
        if kept is not None:
            # The same directory: code that still uses the older descriptor may go on.
            os.close(fd)
            fd = kept[0]
        self._directories[node] = (fd, now)
        self._directories.move_to_end(node)
        if len(self._directories) > self._limit:
            _, (oldest, _) = self._directories.popitem(last=False)
            os.close(oldest)
        return fd

    def open(self, path: bytes, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> int:
        """open(2), which closes kept directories when the process has no free descriptor. Raises OSError."""
        while True:
            try:
                return os.open(path, flags, mode, dir_fd=dir_fd)
            except OSError as error:
                self._make_room(error, dir_fd)

    def _duplicate(self, fd: int) -> int:
        while True:
            try:
                return os.dup(fd)
            except OSError as error:
                self._make_room(error, fd)

    def _make_room(self, error: OSError, in_use: int | None) -> None:
        """After EMFILE, close half of the kept directories, the least recently used. Raises every other error, and EMFILE
        when there is nothing to close."""
        oldest = list(self._directories.items())[: len(self._directories) // 2]
        unused = [(node, fd) for node, (fd, _) in oldest if fd != in_use]
        if error.errno != errno.EMFILE or not unused:
            raise error
        for node, fd in unused:
            del self._directories[node]
            os.close(fd)

    # any node

    def status(self, node: Node) -> os.stat_result:
        """lstat(2) of the node. Raises OSError ESTALE when nothing leads to it any more."""
        if node is self._root:
            return os.fstat(self.root_fd)
        for parent, name in node.links():
            try:
                dir_fd = self.directory_fd(parent)
                status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
                if self.table.is_node(node, status, dir_fd, name):
                    return status
            except OSError as error:
                if error.errno not in _GONE:
                    raise
            self._forget_link(node, parent, name)
        fd = self._nameless_fd(node)
        if fd is None:
            raise stale(node.name)
        return os.fstat(fd)

    def path_fd(self, node: Node) -> int:
        """A new descriptor (O_PATH, or a duplicate of an open one) of exactly this inode, which the caller closes.

        Raises OSError ESTALE when nothing leads to it any more.
        """
        if node.kind == stat.S_IFDIR:
            return self._duplicate(self.directory_fd(node))
        for parent, name in node.links():
            try:
                fd = self.open(name, _ANYTHING, dir_fd=self.directory_fd(parent))
            except OSError as error:
                if error.errno not in _GONE:
                    raise
            else:
                if self._is(node, fd):
                    return fd
                os.close(fd)
            self._forget_link(node, parent, name)
        kept = self._nameless_fd(node)
        if kept is None:
            raise stale(node.name)
        return self._duplicate(kept)

    def _is(self, node: Node, fd: int) -> bool:
        try:
            return self.table.is_node(node, os.fstat(fd), fd, b"")
        except BaseException:
            os.close(fd)
            raise

    def _forget_link(self, node: Node, parent: Node, name: bytes) -> None:
        # The last link stays: the name may come back, and parents and paths are taken from it.
        if node.more_links is not None:
            self.table.drop_link(node, parent, name)

    def _nameless_fd(self, node: Node) -> int | None:
        fd = self._pins.get(node)
        if fd is None and self.open_fd_of is not None:
            fd = self.open_fd_of(node)
            if fd is not None and not node.matches(os.fstat(fd)):
                return None
        return fd

    # removal

    def pin(self, node: Node, fd: int) -> None:
        """Keep `fd` (O_PATH) to reach a node whose last known name has just been removed."""
        self._pins.keep(node, fd)

    def is_pinned(self, node: Node) -> bool:
        """Whether the node can be reached although it has no name."""
        return node in self._pins

    def unpin(self, node: Node) -> None:
        """The node has a name again."""
        self._pins.drop(node)


class Pins:
    """The pins, one for each pinned node. At most `limit` of them hold a descriptor."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._descriptors: OrderedDict[Node, int] = OrderedDict()  # the most recently used last; O_PATH
        self._mappings: dict[Node, int] = {}  # addresses

    def __contains__(self, node: Node) -> bool:
        return node in self._descriptors or node in self._mappings

    def keep(self, node: Node, descriptor: int) -> None:
        """Pin a node by a descriptor (O_PATH) of it. The table owns the descriptor from now on."""
        self.drop(node)
        self._descriptors[node] = descriptor
        while len(self._descriptors) > self._limit:
            oldest, its_descriptor = self._descriptors.popitem(last=False)
            address = _mapped(its_descriptor)
            os.close(its_descriptor)
            if address:
                self._mappings[oldest] = address

    def get(self, node: Node) -> int | None:
        """A descriptor (O_PATH) of a pinned node, valid until the next call; None for other nodes."""
        descriptor = self._descriptors.get(node)
        if descriptor is not None:
            self._descriptors.move_to_end(node)
            return descriptor
        address = self._mappings.get(node)
        if address is None:
            return None
        descriptor = os.open(_name_of(address), os.O_PATH | os.O_CLOEXEC)
        self.keep(node, descriptor)
        return descriptor

    def drop(self, node: Node) -> None:
        """Remove the pin of a node, if it has one."""
        descriptor = self._descriptors.pop(node, None)
        if descriptor is not None:
            os.close(descriptor)
        address = self._mappings.pop(node, None)
        if address is not None:
            syscalls.unmap_page(address)

    def close(self) -> None:
        """Remove all pins."""
        for node in [*self._descriptors, *self._mappings]:
            self.drop(node)


def _mapped(descriptor: int) -> int:
    """Map a file, and return the address from which it can be opened again; 0 where that is impossible."""
    try:
        # Regular files only: open(2) of others may wait, or have an effect.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        address = syscalls.map_page(readable)
    except OSError:
        return 0
    finally:
        os.close(readable)
    with suppress(OSError):
        os.close(os.open(_name_of(address), os.O_PATH | os.O_CLOEXEC))
        return address
    syscalls.unmap_page(address)
    return 0


def _name_of(address: int) -> str:
    return f"/proc/self/map_files/{address:x}-{address + syscalls.PAGE_SIZE:x}"
