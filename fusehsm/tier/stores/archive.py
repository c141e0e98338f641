"""zip and tar files as stores, from any place that fsspec reads. Opening one reads its list once, which has modes, times and links.

An archive has one position, so ranges are read one after the other. A range in a compressed file costs unpacking the file from its beginning. The
archive itself must not change: its version is checked before and after each range.

An archive may be made by anybody, so every number and name in it is checked before it is used. A member that makes no sense goes to `on_error` of
tree() with a line, and is left out; the others are served.
"""

import errno
import lzma
import os
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final, TypeVar

from fusehsm.linux.beneath import LONGEST_PATH, components
from fusehsm.tier.stores.base import (
    LARGEST_SIZE,
    LARGEST_TIME,
    Entry,
    Kind,
    Rights,
    StoreError,
    changed,
    possible,
    throw,
)
from fusehsm.tier.stores.filesystems import filesystem_of
from fusehsm.tier.stores.fsspec import FsspecStore, version_of

_UNIX: Final = 3  # ZipInfo.create_system
_LONGEST_TARGET: Final = 4095  # bytes of a symbolic link's target: PATH_MAX counts the final NUL
_LONGEST_TIME: Final = (
    64  # characters of a time; more digits or a large exponent would take minutes to convert
)

_MOST_COMPONENTS: Final = 2048  # as many as a path of PATH_MAX bytes can have
_MOST_IMPLIED: Final = 1 << 27  # characters in the paths of all directories that no member stands for
_SHOWN: Final = 200  # characters of a name that is too long

MemberT = TypeVar("MemberT", zipfile.ZipInfo, tarfile.TarInfo)


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
        self._senseless: dict[str, str] = {}
        """Members that are left out, and why; tree() gives them to `on_error`."""

    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """As Store.tree(), from the index."""
        prefix = f"{self._root}/" if self._root else ""
        for path, why in self._senseless.items():
            if path.startswith(prefix):
                on_error(StoreError(errno.EINVAL, f"is left out: {why}", path[len(prefix) :]))
        yield from self._strange
        yield from super().tree(on_error)

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
        room = _MOST_IMPLIED
        for path, entry in entries.items():
            if not path.startswith(prefix):
                continue
            relative = path[len(prefix) :]
            try:
                names = components(relative)
            except ValueError:
                self._strange.append(replace(entry, path=relative))
                continue
            above = relative
            for _ in names[1:]:
                above = above.rpartition("/")[0]
                if above in self._entries or prefix + above in entries:
                    break
                room -= len(above)
                self._entries[above] = Entry(above, Kind.DIRECTORY)
            if room < 0:
                raise StoreError(errno.E2BIG, "has too many directories that it does not list", self.name)
            self._entries[relative] = replace(entry, path=relative)
        for path, entry in self._entries.items():
            self._children.setdefault(path.rpartition("/")[0], []).append(entry)
        if self._root and not self._entries and self._root not in entries:
            raise FileNotFoundError(errno.ENOENT, "is not in the archive", self.name)

    def _understood(
        self, members: Mapping[str, MemberT], entry_of: Callable[[str, MemberT], Entry]
    ) -> dict[str, Entry]:
        """The entries of those members that make sense."""
        entries = {}
        for path, member in members.items():
            try:
                _check_path(path)
                entries[path] = possible(entry_of(path, member))
            except _Senseless as error:
                self._senseless[path if len(path) <= LONGEST_PATH else path[:_SHOWN] + "..."] = str(error)
        return entries


class _Senseless(Exception):
    """A member has a name or a number that no file can have. The text is the cause."""


def _check_path(path: str) -> None:
    """Raise _Senseless for a path that is too deep or too long for what comes after: each directory above it gets an entry."""
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise _Senseless(f"its name has more than {LONGEST_PATH:,} bytes")
    if path.count("/") >= _MOST_COMPONENTS:
        raise _Senseless(f"its name has more than {_MOST_COMPONENTS:,} components")


def _size(told: object) -> int:
    """A size or an offset in bytes, as it stands in the archive. Raises _Senseless."""
    if not isinstance(told, int) or not 0 <= told <= LARGEST_SIZE:
        raise _Senseless("it has an impossible size")
    return told


def _link_target(told: str | bytes) -> str:
    """The target of a symbolic link. Raises _Senseless for one that no link can have."""
    target = told if isinstance(told, str) else told.decode("utf-8", "surrogateescape")
    try:
        length = len(os.fsencode(target))
    except UnicodeEncodeError:
        length = 0
    if not 0 < length <= _LONGEST_TARGET or "\0" in target:
        raise _Senseless("it is a symbolic link with an impossible target")
    return target


def _nanoseconds(seconds: object) -> int | None:
    """A time in nanoseconds since 1970; None for text and numbers that are no time of a file."""
    if len(text := str(seconds)) > _LONGEST_TIME:
        return None
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    if not value.is_finite() or abs(value.adjusted()) > _LONGEST_TIME:
        return None  # before the multiplication: its result may have a million digits
    time_ns = int(value * 1_000_000_000)
    return time_ns if abs(time_ns) <= LARGEST_TIME else None


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
        self._index(self._understood(self._members, self._entry_of))

    def _entry_of(self, path: str, member: zipfile.ZipInfo) -> Entry:
        mode = member.external_attr >> 16 if member.create_system == _UNIX else 0
        kind = Kind.DIRECTORY if member.is_dir() else Kind.FILE
        target = None
        if stat.S_ISLNK(mode):
            kind, target = Kind.SYMLINK, _link_target(self._content_of_link(member))
        return Entry(
            path,
            kind,
            size=_size(member.file_size) if kind is Kind.FILE else None,
            mode=stat.S_IMODE(mode) or None,
            mtime_ns=_local_time(member.date_time),
            target=target,
            version=f"crc {member.CRC:08x} size {member.file_size}" if kind is Kind.FILE else None,
        )

    def _content_of_link(self, member: zipfile.ZipInfo) -> bytes:
        """The target of a symbolic link, and a byte more if it is too long. Its size in the list may be a lie: 800 MB of zeros take little room."""
        try:
            with self._filesystem.zip.open(member) as file:
                content: bytes = file.read(_LONGEST_TARGET + 1)
        except _UNREADABLE as error:
            raise _Senseless(f"it is a symbolic link that cannot be read: {error}") from error
        return content

    def _open(self, path: str) -> Any:
        return self._filesystem.zip.open(self._members[self.full(path)])


def _local_time(date_time: tuple[int, int, int, int, int, int]) -> int | None:
    """A time in a zip file, which has no zone; None for one that no calendar has."""
    try:
        datetime(*date_time)
        return int(time.mktime((*date_time, 0, 0, -1))) * 1_000_000_000
    except (ValueError, OverflowError):
        return None


# What zipfile raises for a damaged, encrypted or unknown member.
_UNREADABLE: Final = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


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

        def entry_of(path: str, member: tarfile.TarInfo) -> Entry:
            entry = _tar_entry(path, member)
            return replace(entry, identity=id(member)) if id(member) in linked else entry

        self._index(self._understood(self._members, entry_of))

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
    mtime_ns = _nanoseconds(told if told is not None else member.mtime)
    is_file = kind is Kind.FILE
    size = _size(member.size)
    pieces: Any = member.sparse
    for start, length in pieces or ():
        _size(_size(start) + _size(length))
    return Entry(
        path,
        kind,
        size=size if is_file else None,
        mode=None if kind is Kind.SYMLINK else member.mode & 0o7777,
        uid=member.uid,
        gid=member.gid,
        mtime_ns=mtime_ns,
        target=_link_target(member.linkname) if kind is Kind.SYMLINK else None,
        version=f"mtime {mtime_ns} size {size}" if is_file else None,
    )
