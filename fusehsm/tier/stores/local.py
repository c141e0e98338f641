"""A local directory as a store. It has all attributes: modes, owners, links, holes. Any number of threads may read at once."""

import errno
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

from fusehsm.linux.beneath import Descent, open_beneath
from fusehsm.tier.stores.base import Entry, Kind, Rights, Store, StoreError, changed, shorter, throw

_SMALL = 1 << 16  # bytes
_READ = os.O_RDONLY | os.O_NONBLOCK  # O_NONBLOCK: a FIFO in the place of a file must not make us wait


class LocalStore(Store):
    """The tree below `root`. No symbolic link below it is followed."""

    def __init__(self, root: str) -> None:
        """Raises OSError if `root` is no readable directory."""
        self.name = root
        self.root = os.path.abspath(root)
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def tree(self, on_error: Callable[[StoreError], None] = throw) -> Iterator[Entry]:
        """As Store.tree(). It opens directories by descriptor, so that no rename and no link leads out of the tree."""

        def unlisted(error: OSError) -> None:
            path = os.fsdecode(error.filename or "")
            on_error(StoreError(error.errno, f"cannot be listed in {self.name}: {error.strerror}", path))

        descent = Descent(self._root_fd, unlisted)
        try:
            while (level := descent.here) is not None:
                if not level.names:
                    descent.leave()
                    continue
                name = level.names.pop()
                path = level.path_of(name)
                try:
                    status = os.stat(name, dir_fd=level.fd, follow_symlinks=False)
                    target = os.readlink(name, dir_fd=level.fd) if stat.S_ISLNK(status.st_mode) else None
                except FileNotFoundError:
                    continue  # removed since the directory was read
                except OSError as error:
                    what = f"cannot be looked up in {self.name}: {error.strerror}"
                    on_error(StoreError(error.errno, what, path))
                    continue
                entry = _entry(path, status, target)
                yield entry
                if entry.kind is Kind.DIRECTORY:
                    try:
                        descent.enter(name)
                    except OSError as error:
                        unlisted(OSError(error.errno, error.strerror, path))
        finally:
            descent.close()

    def version(self, path: str) -> str:
        """Modification time and size."""
        fd = self._open(path)
        try:
            return _version(os.fstat(fd))
        finally:
            os.close(fd)

    def rights(self, path: str) -> Rights:
        """Owner, group and mode."""
        fd = open_beneath(self._root_fd, path, os.O_PATH)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return Rights(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """Read the range; the version is checked before and after. A write meanwhile changes the modification time."""
        with self._opened(path, version) as fd:
            return _read(fd, offset, length)

    def content(self, path: str, offset: int, length: int, version: str) -> Iterator[tuple[int, bytes]]:
        """As Store.content(), with one open(2). Holes of small ranges are not searched: reading is faster."""
        with self._opened(path, version) as fd:
            parts: Iterable[tuple[int, int]] = ((offset, length),)
            if length > _SMALL:
                # The read-ahead of a new descriptor begins with small steps: announce the whole range.
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
                parts = _data(fd, offset, offset + length)
            for start, count in parts:
                data = _read(fd, start, count)
                if len(data) != count:
                    raise shorter(self, path)
                yield start, data

    def data(self, path: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The extents with data, by SEEK_DATA and SEEK_HOLE (lseek(2))."""
        fd = self._open(path)
        try:
            yield from _data(fd, offset, offset + length)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor of the root."""
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1

    @contextmanager
    def _opened(self, path: str, version: str) -> Iterator[int]:
        """A descriptor of the file. Raises StoreChanged if the file does not have that version before and after the body."""
        try:
            fd = self._open(path)
        except FileNotFoundError:
            raise changed(self, path) from None
        try:
            if _version(os.fstat(fd)) != version:
                raise changed(self, path)
            yield fd
            if _version(os.fstat(fd)) != version:
                raise changed(self, path)
        finally:
            os.close(fd)

    def _open(self, path: str) -> int:
        fd = open_beneath(self._root_fd, path, _READ)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise changed(self, path)
        return fd


def _read(fd: int, offset: int, length: int) -> bytes:
    """`length` bytes, fewer only at the file's end."""
    pieces = []
    while length and (piece := os.pread(fd, length, offset)):
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _data(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """The extents of [offset, end) that are no holes, as (offset, length) in bytes."""
    while offset < end:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole up to the end of the file
        if start >= end:
            return
        offset = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, offset - start


def _entry(path: str, status: os.stat_result, target: str | None) -> Entry:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), Kind.OTHER)
    is_file = kind is Kind.FILE
    identity: Hashable = (status.st_dev, status.st_ino) if is_file and status.st_nlink > 1 else None
    return Entry(
        path,
        kind,
        size=status.st_size if is_file else None,
        mode=None if kind is Kind.SYMLINK else stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        target=target,
        identity=identity,
        version=_version(status) if is_file else None,
    )


def _version(status: os.stat_result) -> str:
    return f"mtime {status.st_mtime_ns} size {status.st_size}"


_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
