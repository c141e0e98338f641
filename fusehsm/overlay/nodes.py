"""The table of nodes: the inode of the backing for each node id of the kernel, and the names that lead to it.

A node holds no descriptor. It knows its (parent, name) links, newest first, and the (device, inode number) that
must be found at their end.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from fusehsm.linux import syscalls

ROOT_ID: Final = 1

# Node ids. On the root's device they are the inode numbers. Every other device has a range of its own from bit 62 on. Inodes
# that fit neither (numbers of more than 48 bits on those devices; 0, 1, 2**62 and more on the root's) are numbered in the last range.
_OWN_LIMIT: Final = 1 << 62
_DEVICE_SHIFT: Final = 48
_DEVICE_INODE_LIMIT: Final = 1 << _DEVICE_SHIFT
_LAST_DEVICE_INDEX: Final = (1 << 14) - 1

# One object for each kind, which all nodes of that kind share.
_KINDS: Final = {
    kind: kind
    for kind in (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    )
}


class Device:
    """A device (st_dev) seen under the source."""

    __slots__ = ("generation_of", "index", "number", "overwrites_in_place")

    def __init__(self, number: int, index: int) -> None:
        #: Its st_dev.
        self.number = number
        #: Its position in the order of discovery, which selects its range of node ids.
        self.index = index
        self.generation_of: Callable[[int, bytes], int] | None = None  # chosen at the first node
        #: Whether an overwrite takes no more space; None until it is asked for the first time.
        self.overwrites_in_place: bool | None = None


class Node:
    """One inode of the backing that the kernel (or a mark, or a handle) knows."""

    __slots__ = (
        "children",
        "device",
        "generation",
        "id",
        "inode",
        "kind",
        "linked",
        "lookups",
        "more_links",
        "name",
        "parent",
        "settled",
        "told_size",
    )

    def __init__(
        self,
        node_id: int,
        device: Device,
        inode: int,
        generation: int,
        kind: int,
        parent: Node | None,
        name: bytes,
    ) -> None:
        #: The FUSE node id, shown as st_ino.
        self.id = node_id
        #: The device of the inode.
        self.device = device
        #: The inode number on the backing.
        self.inode = inode
        #: Differs from that of an earlier file with the same inode number.
        self.generation = generation
        #: The S_IFMT bits of st_mode.
        self.kind = _KINDS.get(kind, kind)
        #: The directory of the newest link; None for the root. Without a link, that of the last one.
        self.parent = parent
        #: The name of that link.
        self.name = name
        self.more_links: list[tuple[Node, bytes]] | None = None  # hard links beyond (parent, name)
        #: References: those of the kernel and of users of the overlay.
        self.lookups = 0
        #: How many known links are in this directory.
        self.children = 0
        #: False once the last known name was removed through the mount.
        self.linked = True
        #: The size in bytes that the kernel takes it to have; -1 where it was told none.
        self.told_size = -1
        #: The inode's st_ctime in nanoseconds when its generation was last compared, if it was long past then; -1 otherwise.
        self.settled = -1

    def __repr__(self) -> str:
        return f"<Node {self.id} {self.name!r}{'' if self.linked else ' unlinked'}>"

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @property
    def is_regular(self) -> bool:
        return self.kind == stat.S_IFREG

    def made_as_long_as(self, end: int) -> None:
        """A write up to byte `end` is done, so the kernel takes the file to be at least that long."""
        self.told_size = max(self.told_size, end)

    def links(self) -> tuple[tuple[Node, bytes], ...]:
        """All known (directory, name) pairs, newest first; none for the root and for an unlinked node."""
        if self.parent is None or not self.linked:
            return ()
        if self.more_links is None:
            return ((self.parent, self.name),)
        return ((self.parent, self.name), *self.more_links)

    def parents(self) -> tuple[int, ...]:
        """Node ids of the directories of its known names, each once; of an unlinked node, the last one."""
        if self.parent is None:
            return ()
        if self.more_links is None:
            return (self.parent.id,)
        return tuple(dict.fromkeys([self.parent.id, *(parent.id for parent, _ in self.more_links)]))

    def is_file(self, device: tuple[int, int], inode: int) -> bool:
        """Whether this is the inode of that (major, minor) and number on the backing."""
        return self.inode == inode and self.device.number == os.makedev(*device)

    def matches(self, status: os.stat_result) -> bool:
        """Whether `status` belongs to this inode, or to a later one with its number: see NodeTable.is_node()."""
        return (
            status.st_ino == self.inode
            and status.st_dev == self.device.number
            and status.st_mode & 0o170000 == self.kind
        )


class NodeTable:
    """All known nodes, by id.

    `on_removed` is called with each node that leaves the table, also with one whose inode number was reused. In that case
    `on_reused` is called with (old, new), too.
    """

    def __init__(self, root_status: os.stat_result, on_removed: Callable[[Node], None]) -> None:
        self._nodes: dict[int, Node] = {}
        self._devices: dict[int, Device] = {}
        self._numbered: dict[tuple[int, int], int] = {}
        self._next_numbered = 0
        self._on_removed = on_removed
        self.on_reused: Callable[[Node, Node], None] | None = None
        self._handles = syscalls.FileHandles()
        self._own = self._device(root_status.st_dev)
        self._root_inode = root_status.st_ino
        self.root = Node(ROOT_ID, self._own, root_status.st_ino, 0, stat.S_IFDIR, None, b"")
        self.root.lookups = 1
        self._nodes[ROOT_ID] = self.root
        # Stands for directory entries of which stat(2) is not permitted. No request ever names it.
        unreadable_id = _OWN_LIMIT | _LAST_DEVICE_INDEX << _DEVICE_SHIFT | (_DEVICE_INODE_LIMIT - 1)
        self.unreadable = Node(unreadable_id, self._own, 0, 0, 0, None, b"")

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))

    def get(self, node_id: int) -> Node | None:
        return self._nodes.get(node_id)

    def known(self, status: os.stat_result, dir_fd: int, name: bytes) -> Node | None:
        """The node of the inode found as `name` in `dir_fd` (b"": open as `dir_fd`), which `status` describes, if there is one. Raises OSError."""
        node = self.known_as(status.st_dev, status.st_ino)
        return node if node is not None and self.is_node(node, status, dir_fd, name) else None

    def known_as(self, device: int, inode: int) -> Node | None:
        """The node of the inode with those st_dev and st_ino, or of an earlier one with that number, if there is one."""
        node_id = self._id_of(device, inode)
        return None if node_id is None else self._nodes.get(node_id)

    def is_node(self, node: Node, status: os.stat_result, dir_fd: int, name: bytes) -> bool:
        """Whether the inode found as `name` in `dir_fd` (b"": open as `dir_fd`), which `status` describes, is that of `node`. Raises OSError.

        Its number may be that of an earlier file. A new inode has a new st_ctime, which nobody can set, so the generation is compared only
        where that has changed.
        """
        if not node.matches(status):
            return False
        return node is self.root or self._has_generation(node, status.st_ctime_ns, dir_fd, name)

    def _has_generation(self, node: Node, changed_ns: int, dir_fd: int, name: bytes) -> bool:
        if changed_ns == node.settled:
            return True
        if node.generation != self._generation(node.device, dir_fd, name):
            return False
        node.settled = _settled(changed_ns)
        return True

    def enter(self, status: os.stat_result, parent: Node, name: bytes, dir_fd: int) -> Node:
        """The node of the inode that `status` describes, found as `name` in `parent` (open as `dir_fd`). Raises OSError.

        Makes the node with `lookups` 0 if it is unknown, adds the link, and detects a reused inode number.
        """
        device = self._devices.get(status.st_dev)
        if device is None:
            device = self._device(status.st_dev)
        inode = status.st_ino
        node_id = inode
        if device is not self._own or not 1 < inode < _OWN_LIMIT or inode == self._root_inode:
            node_id = self._mapped_id(device, inode)
        node = self._nodes.get(node_id)
        if node is None:
            kind = status.st_mode & 0o170000
            node = Node(node_id, device, inode, self._generation(device, dir_fd, name), kind, parent, name)
            node.settled = _settled(status.st_ctime_ns)
            parent.children += 1
            self._nodes[node_id] = node
            return node
        if node is self.root:
            return node
        if node.kind != status.st_mode & 0o170000 or not self._has_generation(
            node, status.st_ctime_ns, dir_fd, name
        ):
            return self._replace(node, status, parent, name, dir_fd)
        if node.parent is not parent or node.name != name or not node.linked:
            self.add_link(node, parent, name)
        return node

    def _replace(self, old: Node, status: os.stat_result, parent: Node, name: bytes, dir_fd: int) -> Node:
        """Replace a node whose inode number seems to be reused, after a second check through one descriptor: the name may also
        have changed between stat(2) and the reading of the file handle. Raises OSError ESTALE in that case."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            now = os.fstat(fd)
            generation = self._generation(old.device, fd, b"")
        finally:
            os.close(fd)
        if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)
        if generation == old.generation and stat.S_IFMT(now.st_mode) == old.kind:
            self.add_link(old, parent, name)
            return old
        return self._succeed(old, generation, now.st_mode & 0o170000, parent, name)

    def _succeed(self, old: Node, generation: int, kind: int, parent: Node, name: bytes) -> Node:
        new = Node(old.id, old.device, old.inode, generation, kind, parent, name)
        # The kernel counts the lookups of both under one id, and its FORGET names that id.
        new.lookups = old.lookups
        parent.children += 1
        self._nodes[new.id] = new
        old.lookups = 0
        self._on_removed(old)
        self._let_go(old)
        old.linked = False
        if self.on_reused is not None:
            self.on_reused(old, new)
        return new

    def enter_unnamed(self, status: os.stat_result, parent: Node, fd: int) -> Node:
        """A node, with `lookups` 0, of a new file without a name (O_TMPFILE) that was made in `parent` and is open as `fd`."""
        device = self._devices.get(status.st_dev) or self._device(status.st_dev)
        node_id = self._mapped_id(device, status.st_ino)
        generation, kind = self._generation(device, fd, b""), status.st_mode & 0o170000
        name = b"#%d" % status.st_ino  # as in /proc/PID/fd
        old = self._nodes.get(node_id)
        if old is not None:
            node = self._succeed(old, generation, kind, parent, name)
        else:
            node = Node(node_id, device, status.st_ino, generation, kind, parent, name)
            parent.children += 1
            self._nodes[node_id] = node
        node.linked = False
        return node

    # links

    def add_link(self, node: Node, parent: Node, name: bytes) -> None:
        """Make `name` in `parent`, where `node` was seen, its first link. A directory has only one link."""
        if node.parent is None:
            return
        if node.linked and node.parent is parent and node.name == name:
            return
        parent.children += 1
        if node.kind == stat.S_IFDIR:
            self._break_loop(node, parent)
        if not node.linked or node.kind == stat.S_IFDIR:
            former = node.parent
            node.parent, node.name, node.linked, node.more_links = parent, name, True, None
            self._child_gone(former)
            return
        others = [(node.parent, node.name), *(node.more_links or ())]
        kept = [link for link in others if not (link[0] is parent and link[1] == name)]
        node.parent, node.name, node.more_links = parent, name, kept or None
        if len(kept) != len(others):
            parent.children -= 1

    def _break_loop(self, node: Node, parent: Node) -> None:
        """`node` was just seen in `parent`. If the known links say that `parent` lies below `node`, directories were moved on
        the backing. Then the one of them that was directly in `node` is elsewhere now; its link is removed."""
        below: Node | None = parent
        while below is not None:
            if below.parent is node:
                below.parent, below.linked = self.root, False
                node.children -= 1
                self.root.children += 1
                return
            below = below.parent

    def drop_link(self, node: Node, parent: Node, name: bytes) -> None:
        """Remove the link `name` in `parent` from `node`. The last known link stays as `parent` and `name`, with `linked` False."""
        if node.parent is None or not node.linked:
            return
        if node.parent is parent and node.name == name:
            if node.more_links is None:
                node.linked = False
                return
            node.parent, node.name = node.more_links[0]
            node.more_links = node.more_links[1:] or None
        elif node.more_links is not None:
            kept = [link for link in node.more_links if not (link[0] is parent and link[1] == name)]
            if len(kept) == len(node.more_links):
                return
            node.more_links = kept or None
        else:
            return
        self._child_gone(parent)

    # lifetime

    def forget(self, node: Node, count: int) -> None:
        """Subtract `count` from a node's lookups. At 0, and without known children, it leaves the table."""
        node.lookups = max(0, node.lookups - count)
        self.collect(node)

    def collect(self, node: Node) -> None:
        """Remove `node`, and then its parents, if nothing refers to them any more."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if (
                node.lookups > 0
                or node.children > 0
                or node.parent is None
                or self._nodes.get(node.id) is not node
            ):
                continue
            del self._nodes[node.id]
            self._numbered.pop((node.device.number, node.inode), None)
            self._on_removed(node)
            waiting.extend(self._take_links(node))

    def _let_go(self, node: Node) -> None:
        for parent in self._take_links(node):
            self.collect(parent)

    @staticmethod
    def _take_links(node: Node) -> list[Node]:
        parents = [parent for parent, _ in node.more_links or ()]
        if node.parent is not None:
            parents.append(node.parent)
        node.more_links = None
        for parent in parents:
            parent.children -= 1
        return parents

    def _child_gone(self, parent: Node) -> None:
        parent.children -= 1
        if parent.children == 0 and parent.lookups == 0:
            self.collect(parent)

    # identity

    def _device(self, number: int) -> Device:
        device = Device(number, len(self._devices))
        self._devices[number] = device
        return device

    def _id_of(self, device_number: int, inode: int) -> int | None:
        device = self._devices.get(device_number)
        if device is None:
            return None
        if device is self._own and 1 < inode < _OWN_LIMIT and inode != self._root_inode:
            return inode
        if device is self._own and inode == self._root_inode:
            return ROOT_ID
        if device is not self._own and inode < _DEVICE_INODE_LIMIT and device.index < _LAST_DEVICE_INDEX:
            return _OWN_LIMIT | device.index << _DEVICE_SHIFT | inode
        return self._numbered.get((device_number, inode))

    def _mapped_id(self, device: Device, inode: int) -> int:
        node_id = self._id_of(device.number, inode)
        if node_id is None:
            node_id = _OWN_LIMIT | _LAST_DEVICE_INDEX << _DEVICE_SHIFT | self._next_numbered
            self._next_numbered += 1
            self._numbered[device.number, inode] = node_id
        return node_id

    # generations

    def _generation(self, device: Device, dir_fd: int, name: bytes) -> int:
        source = device.generation_of
        if source is None:
            source = device.generation_of = self._choose_generation(dir_fd, name)
        return source(dir_fd, name)

    def _choose_generation(self, dir_fd: int, name: bytes) -> Callable[[int, bytes], int]:
        """The function that distinguishes two files with the same inode number, one after the other, on this device.

        It uses the file handle, which contains the inode's generation on every filesystem that can be exported (measured:
        ext4, tmpfs, overlayfs with nfs_export). Otherwise it uses the birth time, except on overlayfs, where copy-up changes it.
        """
        try:
            self._handles.read(dir_fd, name)
            return self._handle_generation
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                raise
        fd = (
            os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd) if name else os.dup(dir_fd)
        )
        try:
            if syscalls.filesystem_type(fd) == syscalls.OVERLAYFS_SUPER_MAGIC:
                return _no_generation
        finally:
            os.close(fd)
        return _no_generation if syscalls.birth_time(dir_fd, name) is None else _birth_generation

    def _handle_generation(self, dir_fd: int, name: bytes) -> int:
        # A CRC of 32 bits differs for any two values of a 32-bit field when all other bytes are the same.
        return zlib.crc32(self._handles.read(dir_fd, name))


def _settled(changed_ns: int) -> int:
    """An st_ctime in nanoseconds, if a file that is made from now on has another; -1 otherwise."""
    # The kernel's clock for files is late by one tick. Old formats store whole seconds, or two.
    grain = 3_000_000_000 if changed_ns % 1_000_000_000 == 0 else 100_000_000
    return changed_ns if time.time_ns() - changed_ns > grain else -1


def _birth_generation(dir_fd: int, name: bytes) -> int:
    return zlib.crc32(syscalls.birth_time(dir_fd, name) or b"")


def _no_generation(dir_fd: int, name: bytes) -> int:
    return 0
