"""What a store is: a tree that can be listed, and files of which ranges can be read, each range in one known version.

Every method may be called from any number of threads at once, and the ranges are then fetched at the same time as far as what lies below
permits (a local directory and everything asynchronous in fsspec: without limit; s3: 64; sftp: a few; the rest: one after the other).

What a store cannot tell is None, never a guess: an http server knows no owner, a git repository no times.
"""

import abc
import errno
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Self


class Kind(Enum):
    """What a path is. OTHER: sockets, devices and FIFOs, of which nothing can be fetched."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    OTHER = "special file"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a tree.

    `path`: relative to the store's root, components separated by "/", undecodable bytes as surrogates (os.fsdecode). It is what the store says
    and may be hostile: whoever makes files from it checks it. `size`: bytes. `mode`: permission bits. `mtime_ns`: nanoseconds since 1970.
    `target`: a symbolic link's. `identity`: the same for all names of one file with several (hard links), else None. `version`: what read() wants.
    """

    path: str
    kind: Kind
    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    target: str | None = None
    identity: Hashable = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Rights:
    """The owner and permission bits that a store names for a file. `gid`, `mode`: None where it does not tell."""

    uid: int
    gid: int | None = None
    mode: int | None = None


class StoreError(OSError):
    """A store does not answer, or not sensibly. `filename` is what was asked for, `strerror` the cause and the mend."""


class StoreChanged(StoreError):
    """A file has another version than the one that was asked for: it was changed, replaced or removed meanwhile."""


def throw(error: StoreError) -> None:
    """Raise it."""
    raise error


class Store(abc.ABC):
    """A tree of files somewhere else. Opened by open_store() (opening.py); a context manager that closes it."""

    name: str
    """How the user calls it, without passwords."""

    @abc.abstractmethod
    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """Everything below the root, which is left out itself: a directory right before all that it holds, names in one directory in the
        order of their bytes, so that two runs over the same tree see it in the same order.

        Raises OSError when the root cannot be listed. What cannot be listed below it is handed to `on_error`, which raises it or lets the rest
        go on: it is not silently missing.
        """

    @abc.abstractmethod
    def version(self, path: str) -> str:
        """The file's present version: its ETag or object id, else its modification time and size. Raises OSError (ENOENT: no such file)."""

    def rights(self, path: str) -> Rights | None:
        """The file's owner and mode, the same that its Entry has; None, without a request, from a store that tells no owners. Raises as version()."""
        return None

    @abc.abstractmethod
    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """`length` bytes at `offset`, fewer only at the file's end, all of that version.

        Raises StoreChanged when the file is not that version any more (or becomes another during the read), StoreError or another OSError
        when it cannot be read. As good as the token: a file changed twice within one tick of its clock (nginx and sftp: a second) with its size
        kept looks unchanged to everybody.
        """

    def read_if(
        self, path: str, offset: int, length: int, is_wanted: Callable[[str], bool]
    ) -> tuple[str, bytes] | None:
        """version() and read() in one request: the file's present version, and a range of it if `is_wanted` says yes to that version; None from a
        store for which that is no less work. Raises StoreChanged for an unwanted version, else what those two raise.
        """
        return None

    def data(self, path: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of [offset, offset + length) that are no holes, as (offset, length) in ascending order; all of it where the store cannot tell.

        A hint, which goes with the version that the file has now: who leaves holes out checks the version afterwards.
        """
        if length:
            yield offset, length

    def content(self, path: str, offset: int, length: int, version: str) -> Iterator[tuple[int, bytes]]:
        """What [offset, offset + length) holds in that version, as (offset, bytes) in ascending order; what is left out is a hole.

        Raises as read(), and StoreChanged where the file is shorter. Nothing of it is to be believed before the end has been reached.
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
        """Give back descriptors and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def changed(store: Store, path: str) -> StoreChanged:
    """The error for a file whose version is not the one wanted."""
    return StoreChanged(
        errno.EIO,
        f"has changed in {store.name} since its stub was made; populate again",
        path,
    )


def shorter(store: Store, path: str) -> StoreChanged:
    """The error for a file that ends before its stub does."""
    return StoreChanged(errno.EIO, f"is shorter in {store.name} than its stub", path)


def byte_order(name: str) -> bytes:
    """The sort key of a directory's names."""
    return os.fsencode(name)
