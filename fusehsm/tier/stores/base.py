"""The interface of a store: a tree that can be listed, and files whose ranges can be read, each range in one known version.

Any number of threads may call every method at once. The ranges are then fetched at the same time, as far as the layer below permits: a local
directory, http and all asynchronous kinds of fsspec without limit, s3 up to 64, sftp up to 4, all others one after the other.

An unknown value is None, never a guess: an http server has no owners, a git repository has no times.
"""

import abc
import errno
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, Self

LARGEST_SIZE: Final = (1 << 63) - 1
"""Bytes: off_t."""

LARGEST_TIME: Final = (1 << 63) - 1
"""Nanoseconds since 1970: until the year 2262."""

_LARGEST_ID: Final = (1 << 32) - 2  # -1 as an uid_t means "leave it as it is" to chown(2)


class Kind(Enum):
    """The type of a path. OTHER: sockets, devices and FIFOs, which have no content to fetch."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    OTHER = "special file"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a tree."""

    # Relative to the store's root, components separated by "/", undecodable bytes as surrogates (os.fsdecode). The text comes
    # from the store and may be hostile: code that makes files from it must check it.
    path: str
    # Type.
    kind: Kind
    # Bytes.
    size: int | None = None
    # Permission bits.
    mode: int | None = None
    # Owner.
    uid: int | None = None
    # Group.
    gid: int | None = None
    # Modification time, nanoseconds since 1970.
    mtime_ns: int | None = None
    # Target of a symbolic link.
    target: str | None = None
    # The same for all names of one file with several names (hard links), else None.
    identity: Hashable = None
    # The version token for read().
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Rights:
    """The owner and permission bits of a file in the store."""

    # Owner.
    uid: int
    # Group, None if unknown.
    gid: int | None = None
    # Permission bits, None if unknown.
    mode: int | None = None


class StoreError(OSError):
    """A store does not answer, or its answer is wrong. `filename`: the path; `strerror`: the cause and the fix."""


class StoreChanged(StoreError):
    """A file does not have the requested version any more: it was changed, replaced or removed."""


def possible(entry: Entry) -> Entry:
    """The entry as a file can be: without an owner or a time that no file can have.

    Raises StoreError EINVAL for an impossible size: a store may tell any number, and the kernel's are of 63 bits.
    """
    size: object = entry.size  # a library may give anything
    if size is not None and not (isinstance(size, int) and 0 <= size <= LARGEST_SIZE):
        raise StoreError(
            errno.EINVAL, "has a size in the store that no file can have, so it is left out", entry.path
        )
    return replace(
        entry,
        uid=_within(entry.uid, 0, _LARGEST_ID),
        gid=_within(entry.gid, 0, _LARGEST_ID),
        mtime_ns=_within(entry.mtime_ns, -LARGEST_TIME, LARGEST_TIME),
    )


def _within(value: object, least: int, most: int) -> int | None:
    return value if isinstance(value, int) and least <= value <= most else None


def throw(error: StoreError) -> None:
    """Raise the error: the default for `on_error`."""
    raise error


class Store(abc.ABC):
    """A tree of files in another place. Opened by open_store() (tier/stores/open.py); a context manager that closes it."""

    name: str
    """How the user calls it, without passwords."""

    @abc.abstractmethod
    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """All entries below the root, without the root. A directory comes directly before its content. Names in a directory are in byte order,
        so that two runs over the same tree see the same order.

        Raises OSError if the root cannot be listed. For a failure below the root, `on_error` gets the error. It raises the error, or the listing
        goes on.
        """

    @abc.abstractmethod
    def version(self, path: str) -> str:
        """The file's present version: its ETag or object id, else its modification time and size. Raises OSError; ENOENT if there is no such file."""

    def rights(self, path: str) -> Rights | None:
        """The file's owner and mode, as in its Entry. None, without a request, from a store that has no owners. Raises as version()."""
        return None

    @abc.abstractmethod
    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """`length` bytes at `offset` of that version, fewer only at the file's end.

        Raises StoreChanged if the file does not have that version any more (or changes during the read), StoreError or another OSError if it
        cannot be read. The check is only as exact as the token: a file that is changed twice within one tick of its clock (nginx and sftp: a
        second), with the same size, looks unchanged.
        """

    def read_if(
        self, path: str, offset: int, length: int, is_wanted: Callable[[str], bool]
    ) -> tuple[str, bytes] | None:
        """version() and read() in one request: the file's present version and a range of it. None from a store for which this saves no work.

        `is_wanted` checks the version. Raises StoreChanged if it returns False, else as version() and read().
        """
        return None

    def data(self, path: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The extents of [offset, offset + length) that are no holes, as (offset, length), ascending; all of it if the store does not know holes.

        The answer is a hint for the file's present version: a caller that leaves holes out must check the version afterwards.
        """
        if length:
            yield offset, length

    def content(self, path: str, offset: int, length: int, version: str) -> Iterator[tuple[int, bytes]]:
        """The content of [offset, offset + length) in that version, as (offset, bytes), ascending; a range that is left out is a hole.

        Raises as read(), and StoreChanged if the file is shorter. The content is valid only after the iteration has ended without an error.
        """
        something = False
        for start, count in self.data(path, offset, length):
            something = True
            data = self.read(path, start, count, version)
            if len(data) != count:
                raise shorter(self, path)
            yield start, data
        if length and not something and self.version(path) != version:
            raise changed(self, path)

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close descriptors and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def changed(store: Store, path: str) -> StoreChanged:
    """The error for a file whose version is not the requested one."""
    return StoreChanged(
        errno.EIO,
        f"has changed in {store.name} since its stub was made; populate again",
        path,
    )


def shorter(store: Store, path: str) -> StoreChanged:
    """The error for a file that is shorter than its stub."""
    return StoreChanged(errno.EIO, f"is shorter in {store.name} than its stub", path)


def byte_order(name: str) -> bytes:
    """The sort key of the names in a directory."""
    return os.fsencode(name)
