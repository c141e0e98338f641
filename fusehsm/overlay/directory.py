"""Reads a directory of the backing: entries with attributes, at offsets that stay valid while names are made and removed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Generator
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


class OpenStreams:
    """The streams that have their directory open now: at most `limit`. The one that was read least recently is closed for another."""

    def __init__(self, limit: int) -> None:
        # A reader must not lose its own.
        self._limit = max(limit, 8)
        self._streams: OrderedDict[DirectoryStream, None] = OrderedDict()

    def used(self, stream: DirectoryStream) -> None:
        """A stream has its directory open, and uses it."""
        self._streams[stream] = None
        self._streams.move_to_end(stream)
        while len(self._streams) > self._limit:
            self._streams.popitem(last=False)[0].suspend()

    def closed(self, stream: DirectoryStream) -> None:
        """A stream has closed its directory."""
        self._streams.pop(stream, None)


class DirectoryStream:
    """An open directory.

    Any user can hold any number of them open, so only those that were read last have a descriptor (`streams`). The others have their position, and
    open the directory again. `open_directory` gives a new descriptor of it, and raises OSError ESTALE where it has no name any more.

    Offsets are the backing's own (d_off of getdents64(2)). Filesystems keep them stable while names are made and removed,
    because NFS and telldir(3) need that. Reading on from the end of the last call makes no lseek(2).
    """

    def __init__(
        self, node: Node, open_directory: Callable[[], int], table: NodeTable, streams: OpenStreams
    ) -> None:
        self.node = node
        self.fd = open_directory()
        self._open_directory = open_directory
        self._table = table
        self._streams = streams
        self._entries: list[tuple[bytes, int, int, int]] = []
        self._index = 0
        self._offset = 0
        streams.used(self)

    def close(self) -> None:
        """Close the directory."""
        self._streams.closed(self)
        self.suspend()

    def suspend(self) -> None:
        """Close the descriptor; the next use opens the directory again, and goes on from the same place."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _resume(self) -> None:
        if self.fd < 0:
            try:
                self.fd = self._open_directory()
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                # The directory has been removed: what getdents64(2) says of one that is open.
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
            # Behind the entries that are in the buffer.
            os.lseek(self.fd, self._entries[-1][3] if self._entries else self._offset, os.SEEK_SET)
        self._streams.used(self)

    def synchronise(self, data_only: bool) -> None:
        """fsync(2) or fdatasync(2) of the directory."""
        self._resume()
        (os.fdatasync if data_only else os.fsync)(self.fd)

    def entries(self, offset: int, *, dots: bool = False) -> Generator[DirectoryEntry, None, None]:
        """The entries from `offset` (0 or a `next_offset`) on, without names that vanish; "." and ".." only with `dots`.

        An entry counts as a lookup of its node once `Overlay.remember` is called for it. Otherwise (it did not fit into the
        reply) its node may be dropped when the iteration continues or is closed, and the entry comes again next time.
        """
        self._resume()
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
