"""Any store that fsspec opens, as far as fsspec itself tells about it; kinds that tell more have modules of their own.

Threads: filesystems that are asynchronous inside (s3, gcs, abfs, ...) take any number of calls at once; the others are not made for threads
(a tar file has one position), so their calls wait for each other.
"""

import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any, Final

from fusehsm.tier.stores.base import Entry, Kind, Rights, Store, StoreError, byte_order, changed, throw

PATIENCE: Final = 60.0  # seconds without a byte after which an http server is given up on


def without_password(url: str) -> str:
    """The URL for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def store_error(error: Exception, path: str, what: str) -> OSError:
    """An exception of any library as an OSError: StoreError, or FileNotFoundError. `path`, `what`: the words of the message."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "is not there", path)
    cause = str(error).strip() or type(error).__name__
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return StoreError(number, f"{what}: {cause}", path)


class FsspecStore(Store):
    """The tree at `root` in an fsspec filesystem."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        """`name`: the URL for messages."""
        self.name = name
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._turn: AbstractContextManager[object] = (
            nullcontext() if filesystem.async_impl else threading.RLock()
        )

    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """Depth first, a directory's list at a time."""
        return self.walk(lambda path: self._list(path, on_error), on_error)

    def walk(
        self, list_directory: Callable[[str], Iterable[Entry]], on_error: Callable[[StoreError], None]
    ) -> Iterator[Entry]:
        """tree(), where `list_directory` tells what a directory holds, in any order."""

        def listed(path: str) -> list[Entry]:
            """The last first."""
            entries = {entry.path: entry for entry in list_directory(path)}
            return sorted(entries.values(), key=lambda entry: byte_order(entry.path), reverse=True)

        with self.complaining("", "cannot be listed"):
            lists = [listed("")]
        while lists:
            if not lists[-1]:
                lists.pop()
                continue
            entry = lists[-1].pop()
            yield entry
            if entry.kind is Kind.DIRECTORY:
                try:
                    with self.complaining(entry.path, "cannot be listed"):
                        lists.append(listed(entry.path))
                except StoreError as error:
                    on_error(error)
                except OSError as error:
                    on_error(StoreError(error.errno, f"cannot be listed: {error.strerror}", entry.path))

    def version(self, path: str) -> str:
        """As version_of() finds it in what fsspec tells."""
        with self.complaining(path, "cannot be looked up"), self._turn:
            return version_of(self._info(path))

    def rights(self, path: str) -> Rights | None:
        """As fsspec tells; kinds of which it is known that they tell no owners do not ask."""
        with self.complaining(path, "cannot be looked up"), self._turn:
            information = self._info(path)
        uid, mode = information.get("uid"), information.get("mode")
        if uid is None:
            return None
        return Rights(uid, information.get("gid"), None if mode is None else stat.S_IMODE(mode))

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """The version is looked up before and after."""
        with self.complaining(path, "cannot be read", reading=True), self._turn:
            information = self._info(path)
            if version_of(information) != version:
                raise changed(self, path)
            end = min(offset + length, int(information["size"]))
            data: bytes = b""
            if offset < end:
                data = self._filesystem.cat_file(self.full(path), start=offset, end=end)
            if version_of(self._info(path)) != version:
                raise changed(self, path)
        if len(data) != max(0, end - offset):
            raise StoreError(
                errno.EIO, f"{self.name} gave {len(data)} bytes where {end - offset} were asked for", path
            )
        return data

    def full(self, path: str) -> str:
        """The path as fsspec takes it."""
        return f"{self._root}/{path}" if path and self._root else path or self._root

    @contextmanager
    def complaining(self, path: str, what: str, *, reading: bool = False) -> Iterator[None]:
        """Make one of our errors of whatever is raised inside; `reading`: a file that has gone is one that has changed."""
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            if reading:
                raise changed(self, path) from error
            raise FileNotFoundError(errno.ENOENT, f"is not in {self.name}", path or self.name) from error
        except Exception as error:
            raise store_error(error, path or self.name, what) from error

    def _info(self, path: str) -> Mapping[str, Any]:
        information: Mapping[str, Any] = self._filesystem.info(self.full(path))
        return information

    def _list(self, path: str, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
        """What the directory `path` holds, in any order."""
        full = self.full(path)
        with self._turn:
            if not path and self._filesystem.info(full)["type"] != "directory":
                raise NotADirectoryError(errno.ENOTDIR, "is no directory")
            listed = self._filesystem.ls(full, detail=True)
        for information in listed:
            name = str(information["name"]).rstrip("/").rpartition("/")[2]
            if str(information["name"]).strip("/") != full.strip("/"):  # some list the directory itself, too
                yield self._entry(f"{path}/{name}" if path else name, information)

    def _entry(self, path: str, information: Mapping[str, Any]) -> Entry:
        kind = _KINDS.get(information["type"], Kind.OTHER)
        mode = information.get("mode")
        if mode is not None and stat.S_ISLNK(mode):
            kind = Kind.SYMLINK
        permissions = stat.S_IMODE(mode) if mode is not None else None
        return Entry(
            path,
            kind,
            size=information.get("size") if kind is Kind.FILE else None,
            mode=None if kind is Kind.SYMLINK else permissions or None,
            uid=information.get("uid"),
            gid=information.get("gid"),
            mtime_ns=_mtime_ns(information),
            target=self._target(path, information) if kind is Kind.SYMLINK else None,
            version=version_of(information) if kind is Kind.FILE else None,
        )

    def _target(self, path: str, information: Mapping[str, Any]) -> str | None:
        """Where a symbolic link leads to: some tell it, for others it is the content."""
        told = information.get("destination")
        if told is not None:
            return os.fsdecode(told)
        with self._turn:
            return os.fsdecode(self._filesystem.cat_file(self.full(path)))


_KINDS: Final = {"file": Kind.FILE, "directory": Kind.DIRECTORY, "link": Kind.SYMLINK}
_IDENTIFYING: Final = ("ETag", "etag", "sha", "md5Hash", "md5", "Content-MD5", "CRC")
_MODIFIED: Final = (
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "modified",
    "updated",
    "created",
)


def version_of(information: Mapping[str, Any]) -> str:
    """The version token in what fsspec tells of a file: a name for its content where there is one, else its time, and its size."""
    size = information.get("size")
    for name in _IDENTIFYING:
        if information.get(name) is not None:
            return f"{name} {information[name]} size {size}"
    for name in _MODIFIED:
        if information.get(name) is not None:
            # Some tell times in one form in lists and in another of single files.
            return f"{name} {_nanoseconds(information[name]) or information[name]} size {size}"
    return f"size {size}"


def _mtime_ns(information: Mapping[str, Any]) -> int | None:
    times = (_nanoseconds(information.get(name)) for name in _MODIFIED if name != "created")
    return next((time for time in times if time is not None), None)


def _nanoseconds(value: object) -> int | None:
    """A time in one of the forms that fsspec's filesystems use, as nanoseconds since 1970; no finer than microseconds."""
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, int):
        return value * 1_000_000_000
    return round(value * 1_000_000) * 1000 if isinstance(value, float) else None
