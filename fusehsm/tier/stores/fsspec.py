"""Any store that fsspec opens, with the attributes that fsspec itself gives. Kinds with more attributes have modules of their own.

Threads: asynchronous filesystems (s3, gcs, abfs, ...) take any number of calls at once. The others are not safe for threads (a tar file has one
position), so their calls wait for each other.
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

from fusehsm.tier.stores.base import (
    Entry,
    Kind,
    Rights,
    Store,
    StoreError,
    byte_order,
    changed,
    possible,
    throw,
)

PATIENCE: Final = 60.0  # seconds without a byte after which a request to an http server fails


def without_password(url: str) -> str:
    """The URL for messages, with *** as the password."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def store_error(error: Exception, path: str, what: str) -> OSError:
    """An exception of any library as an OSError: StoreError or FileNotFoundError. `path` and `what` are in the message."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "is not there", path)
    cause = str(error).strip() or type(error).__name__
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return StoreError(number, f"{what}: {cause}", path)


class FsspecStore(Store):
    """The tree below `root` in an fsspec filesystem."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        """`name`: the URL for messages, without password; `root`: path in the filesystem."""
        self.name = name
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._turn: AbstractContextManager[object] = (
            nullcontext() if filesystem.async_impl else threading.RLock()
        )

    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """As Store.tree(); lists one directory at a time."""
        return self.walk(lambda path: self._list(path, on_error), on_error)

    def walk(
        self, list_directory: Callable[[str], Iterable[Entry]], on_error: Callable[[StoreError], None]
    ) -> Iterator[Entry]:
        """tree() by means of `list_directory`, which gives the entries of a directory in any order."""

        def listed(path: str) -> list[Entry]:
            """The entries in reverse order, so that pop() takes the first."""
            entries = {entry.path: entry for entry in list_directory(path)}
            return sorted(entries.values(), key=lambda entry: byte_order(entry.path), reverse=True)

        with self.complaining("", "cannot be listed"):
            lists = [listed("")]
        while lists:
            if not lists[-1]:
                lists.pop()
                continue
            entry = lists[-1].pop()
            try:
                entry = possible(entry)
            except StoreError as error:
                on_error(error)
                continue
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
        """version_of() the file's information in fsspec."""
        with self.complaining(path, "cannot be looked up"), self._turn:
            return version_of(self._info(path))

    def rights(self, path: str) -> Rights | None:
        """The owner and mode in fsspec. Kinds without owners override this, so that they make no request."""
        with self.complaining(path, "cannot be looked up"), self._turn:
            information = self._info(path)
        uid, mode = information.get("uid"), information.get("mode")
        if uid is None:
            return None
        return Rights(uid, information.get("gid"), None if mode is None else stat.S_IMODE(mode))

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """Read the range; the version is checked before and after."""
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
        """The path in the fsspec filesystem."""
        return f"{self._root}/{path}" if path and self._root else path or self._root

    @contextmanager
    def complaining(self, path: str, what: str, *, reading: bool = False) -> Iterator[None]:
        """Raise any error of the body as StoreError or FileNotFoundError. `reading`: a missing file raises StoreChanged."""
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
        """The entries of the directory `path`, in any order."""
        full = self.full(path)
        with self._turn:
            if not path and self._filesystem.info(full)["type"] != "directory":
                raise NotADirectoryError(errno.ENOTDIR, "is no directory")
            listed = self._filesystem.ls(full, detail=True)
        for information in listed:
            name = str(information["name"]).rstrip("/").rpartition("/")[2]
            if str(information["name"]).strip("/") != full.strip("/"):  # some list the directory, too
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
        """The target of a symbolic link: in the information, or else the content."""
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
    """The version token of a file's fsspec information: an ETag or digest and the size, else the time and the size, else the size."""
    size = information.get("size")
    for name in _IDENTIFYING:
        if information.get(name) is not None:
            return f"{name} {information[name]} size {size}"
    for name in _MODIFIED:
        if information.get(name) is not None:
            # Some filesystems use one form of times in lists and another one for single files.
            return f"{name} {_nanoseconds(information[name]) or information[name]} size {size}"
    return f"size {size}"


def _mtime_ns(information: Mapping[str, Any]) -> int | None:
    times = (_nanoseconds(information.get(name)) for name in _MODIFIED if name != "created")
    return next((time for time in times if time is not None), None)


def _nanoseconds(value: object) -> int | None:
    """A time in any of fsspec's forms, as nanoseconds since 1970, exact to a microsecond; None for other values."""
    try:
        if isinstance(value, datetime):
            value = value.timestamp()
        if isinstance(value, int):
            return value * 1_000_000_000
        return round(value * 1_000_000) * 1000 if isinstance(value, float) else None
    except (OverflowError, ValueError):  # infinite, no number, or a year that this machine cannot count
        return None
