"""Reads a directory of the backing: entries with attributes, at offsets that stay valid while names are made and removed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.overlay.nodes import Node, NodeTable

_BUFFER_SIZE: Final = 32768  # bytes, as glibc's readdir(3)


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """One name of a directory.

    stat(2) of an entry may fail (EACCES in a directory that may be read but not searched). Its `status` then has mode 0,
    upon which the kernel lists the name and caches nothing, and its `node` stands for no file.
    """

    #: The name.
    name: bytes
    #: The node that it leads to.
    node: Node
    #: Its lstat(2).
    status: os.stat_result
    #: The offset at which reading continues after it.
    next_offset: int


class DirectoryStream:
    """An open directory.

    Offsets are the backing's own (d_off of getdents64(2)). Filesystems keep them stable while names are made and removed,
    because NFS and telldir(3) need that. Reading on from the end of the last call makes no lseek(2).
    """

    def __init__(self, node: Node, fd: int, table: NodeTable) -> None:
        self.node = node
        self.fd = fd
        self._table = table
        self._entries: list[tuple[bytes, int, int, int]] = []
        self._index = 0
        self._offset = 0

    def close(self) -> None:
        """Close the directory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def synchronise(self, data_only: bool) -> None:
        """fsync(2) or fdatasync(2) of the directory."""
        (os.fdatasync if data_only else os.fsync)(self.fd)

    def entries(self, offset: int, *, dots: bool = False) -> Generator[DirectoryEntry, None, None]:
        """The entries from `offset` (0 or a `next_offset`) on, without names that vanish; "." and ".." only with `dots`.

        An entry counts as a lookup of its node once `Overlay.remember` is called for it. Otherwise (it did not fit into the
        reply) its node may be dropped when the iteration continues or is closed, and the entry comes again next time.
        """
        self._seek(offset)
        buffer = ctypes.create_string_buffer(_BUFFER_SIZE)
        while True:
            if self._index >= len(self._entries):
                self._entries = syscalls.directory_entries(self.fd, buffer)
                self._index = 0
                if not self._entries:
                    return
            name, _, _, next_offset = self._entries[self._index]
            is_dot = name in (b".", b"..")
            if dots or not is_dot:
                entry = self._dot(name, next_offset) if is_dot else self._examine(name, next_offset)
                if entry is not None:
                    try:
                        yield entry
                    finally:
                        self._table.collect(entry.node)
            self._index += 1
            self._offset = next_offset

    def _seek(self, offset: int) -> None:
        if offset == 0:
            # rewinddir(3): the buffered entries may be old.
            os.lseek(self.fd, 0, os.SEEK_SET)
            self._entries, self._index, self._offset = [], 0, 0
            return
        if offset == self._offset:
            return
        for index in range(self._index, len(self._entries)):
            if self._entries[index][3] == offset:
                self._index, self._offset = index + 1, offset
                return
        os.lseek(self.fd, offset, os.SEEK_SET)
        self._entries, self._index, self._offset = [], 0, offset

    def _dot(self, name: bytes, next_offset: int) -> DirectoryEntry:
        """The entry of "." or "..". The kernel takes only its number and kind, for getdents64(2), but no attributes and no
        reference (fuse_direntplus_link() in the kernel)."""
        parent = self.node.parent
        node = self.node if name == b"." or parent is None else parent
        return DirectoryEntry(name, node, os.fstat(self.fd), next_offset)

    def _examine(self, name: bytes, next_offset: int) -> DirectoryEntry | None:
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            node = self._table.enter(status, self.node, name, self.fd)
        except FileNotFoundError:
            return None
        except OSError:
            return DirectoryEntry(name, self._table.unreadable, _NO_STATUS, next_offset)
        return DirectoryEntry(name, node, status, next_offset)


_NO_STATUS: Final = os.stat_result((0,) * 10 + (0.0,) * 3 + (0,) * 3 + (0, 0, 0))
