"""zip and tar files as stores, from any place that fsspec reads. Opening one reads its list once, which has modes, times and links.

An archive has one position, so ranges are read one after the other. A range in a compressed file costs unpacking the file from its beginning. The
archive itself must not change: its version is checked before and after each range.
"""

import errno
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any, Final

from fusehsm.linux.beneath import components
from fusehsm.tier.stores.base import Entry, Kind, Rights, StoreError, changed
from fusehsm.tier.stores.filesystems import filesystem_of
from fusehsm.tier.stores.fsspec import FsspecStore, version_of

_UNIX: Final = 3  # ZipInfo.create_system


class ArchiveStore(FsspecStore):
    """The common part of both kinds: an index of the members, and a container that must not change."""

    def __init__(self, name: str, filesystem: Any, root: str, url: str) -> None:
        super().__init__(name, filesystem, root)
        self._container, self._container_path = filesystem_of(url.partition("::")[2])
        self._container_version = version_of(self._container.info(self._container_path))
        self._entries: dict[str, Entry] = {}
        self._children: dict[str, list[Entry]] = {"": []}
        self._strange: list[Entry] = []
        """Names that no directory can have or that lead out of the tree; tree() lists them, and populate refuses them."""

    def tree(self, on_error: Callable[[StoreError], None] | None = None) -> Iterator[Entry]:
        """As Store.tree(), from the index."""
        yield from self._strange
        yield from super().tree(*(() if on_error is None else (on_error,)))

    def version(self, path: str) -> str:
        """The file's version, as in the index. Raises StoreChanged if the archive has changed since it was opened, FileNotFoundError for no file."""
        entry = self._file(path)
        self._expect_same_container(path)
        assert entry.version is not None
        return entry.version

    def rights(self, path: str) -> Rights | None:
        """The file's owner and mode, as in the index; None in a zip file. Raises FileNotFoundError for no file."""
        entry = self._file(path)
        return None if entry.uid is None else Rights(entry.uid, entry.gid, entry.mode)

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """As Store.read(). The archive's version is checked before and after; StoreChanged if it is another."""
        with self.complaining(path, "cannot be read", reading=True), self._turn:
            entry = self._file(path)
            if entry.version != version:
                raise changed(self, path)
            self._expect_same_container(path)
            assert entry.size is not None
            length = max(0, min(length, entry.size - offset))
            data = b""
            if length:
                with self._open(path) as file:
                    file.seek(offset)
                    data = file.read(length)
            self._expect_same_container(path)
        if len(data) != length:
            raise StoreError(
                errno.EIO, f"{self.name} gave {len(data)} bytes where {length} were asked for", path
            )
        return data

    def _open(self, path: str) -> Any:
        raise NotImplementedError

    def _file(self, path: str) -> Entry:
        entry = self._entries.get(path)
        if entry is None or entry.kind is not Kind.FILE:
            raise FileNotFoundError(errno.ENOENT, f"is not in {self.name}", path)
        return entry

    def _expect_same_container(self, path: str) -> None:
        with self.complaining(path, "cannot be read", reading=True):
            now = version_of(self._container.info(self._container_path))
        if now != self._container_version:
            raise changed(self, path)

    def _list(self, path: str, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
        if path not in self._children and self._entries.get(path) is None:
            raise FileNotFoundError(errno.ENOENT, "no such directory in the archive")
        yield from self._children.get(path, ())

    def _index(self, entries: dict[str, Entry]) -> None:
        """Index the members below the root. A directory above a member needs no member of its own. Raises FileNotFoundError if there is no root."""
        prefix = f"{self._root}/" if self._root else ""
        for path, entry in entries.items():
            if not path.startswith(prefix):
                continue
            relative = path[len(prefix) :]
            try:
                names = components(relative)
            except ValueError:
                self._strange.append(replace(entry, path=relative))
                continue
            self._entries[relative] = replace(entry, path=relative)
            for depth in range(1, len(names)):
                above = "/".join(names[:depth])
                if above not in self._entries and prefix + above not in entries:
                    self._entries[above] = Entry(above, Kind.DIRECTORY)
        for path, entry in self._entries.items():
            self._children.setdefault(path.rpartition("/")[0], []).append(entry)
        if self._root and not self._entries and self._root not in entries:
            raise FileNotFoundError(errno.ENOENT, "is not in the archive", self.name)


def _tidy(name: str) -> str:
    """A member's name without empty and "." components: "./a//b/" is "a/b", "." is ""."""
    names = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + "/".join(names)


class ZipStore(ArchiveStore):
    """A zip file. Its members have no owners. Their times have no zone and are taken as local times, as unzip does."""

    def __init__(self, name: str, filesystem: Any, root: str, url: str) -> None:
        super().__init__(name, filesystem, root, url)
        self._members = {_tidy(member.filename): member for member in filesystem.zip.infolist()}
        self._members.pop("", None)
        self._index({path: self._entry_of(path, member) for path, member in self._members.items()})

    def _entry_of(self, path: str, member: zipfile.ZipInfo) -> Entry:
        mode = member.external_attr >> 16 if member.create_system == _UNIX else 0
        kind = Kind.DIRECTORY if member.is_dir() else Kind.FILE
        target = None
        if stat.S_ISLNK(mode):
            kind, target = Kind.SYMLINK, self._filesystem.zip.read(member).decode("utf-8", "surrogateescape")
        return Entry(
            path,
            kind,
            size=member.file_size if kind is Kind.FILE else None,
            mode=stat.S_IMODE(mode) or None,
            mtime_ns=int(time.mktime((*member.date_time, 0, 0, -1))) * 1_000_000_000,
            target=target,
            version=f"crc {member.CRC:08x} size {member.file_size}" if kind is Kind.FILE else None,
        )

    def _open(self, path: str) -> Any:
        return self._filesystem.zip.open(self._members[self.full(path)])


class TarStore(ArchiveStore):
    """A tar file, compressed or not. It has all attributes; holes only of members that are stored as sparse."""

    def __init__(self, name: str, filesystem: Any, root: str, url: str) -> None:
        super().__init__(name, filesystem, root, url)
        self._members: dict[str, tarfile.TarInfo] = {}
        linked = set()
        for member in filesystem.tar.getmembers():
            path = _tidy(member.name)
            if path:
                original = self._members.get(_tidy(member.linkname)) if member.islnk() else member
                # A hard link without its original stays a link: a special file, which cannot be fetched.
                self._members[path] = original or member
                if member.islnk() and original is not None:
                    linked.add(id(original))
        entries = {}
        for path, member in self._members.items():
            entry = _tar_entry(path, member)
            entries[path] = replace(entry, identity=id(member)) if id(member) in linked else entry
        self._index(entries)

    def data(self, path: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The extents that a sparse member lists."""
        member = self._members[self.full(path)]
        pieces: Any = member.sparse if member.issparse() else [(0, member.size)]
        for start, size in pieces:
            first, end = max(start, offset), min(start + size, offset + length)
            if first < end:
                yield first, end - first

    def _open(self, path: str) -> Any:
        return self._filesystem.tar.extractfile(self._members[self.full(path)])


def _tar_entry(path: str, member: tarfile.TarInfo) -> Entry:
    if member.isreg():
        kind = Kind.FILE
    elif member.isdir():
        kind = Kind.DIRECTORY
    else:
        kind = Kind.SYMLINK if member.issym() else Kind.OTHER
    told = member.pax_headers.get("mtime")
    mtime_ns = int(Decimal(told if told is not None else member.mtime) * 1_000_000_000)
    is_file = kind is Kind.FILE
    return Entry(
        path,
        kind,
        size=member.size if is_file else None,
        mode=None if kind is Kind.SYMLINK else stat.S_IMODE(member.mode),
        uid=member.uid,
        gid=member.gid,
        mtime_ns=mtime_ns,
        target=member.linkname if kind is Kind.SYMLINK else None,
        version=f"mtime {mtime_ns} size {member.size}" if is_file else None,
    )
