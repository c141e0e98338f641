"""Which file of the store a stub stands for, and in which version."""

import errno
import os
import threading

from fusehsm.tier.store import Kind, Store, StoreChanged, StoreError, shown
from fusehsm.tier.stub_mark import Mark, digest


class Catalog:
    """Asks the store. May be used by any number of threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._paths: dict[bytes, str] | None = None
        self._lock = threading.Lock()

    def origin(self, mark: Mark, path: str) -> tuple[str, str]:
        """The path in the store and the version to read of what the stub at `path` (below the destination) was made of.

        A stub that has been renamed or linked is found by the store's list, which is asked for once. Raises StoreChanged when the file is gone or
        another version now, other OSErrors when the store does not answer.
        """
        path = self._path(mark, path)
        try:
            version = self._store.version(path)
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None
        if digest(version) != mark.version:
            raise self._changed(path)
        return path, version

    def origin_and_range(
        self, mark: Mark, path: str, offset: int, length: int
    ) -> tuple[tuple[str, str], bytes | None]:
        """The same, together with a range of it where the store has both for one request: a first read of a small file is then the only one."""
        path = self._path(mark, path)
        try:
            found = self._store.read_if(path, offset, length, lambda version: digest(version) == mark.version)
        except StoreChanged:
            raise self._changed(path) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None
        if found is None:
            return self.origin(mark, path), None
        version, data = found
        return (path, version), data

    def _path(self, mark: Mark, path: str) -> str:
        return path if digest(path) == mark.path else self._renamed(mark, path)

    def _changed(self, path: str) -> StoreChanged:
        why = f"has changed in {self._store.name} since its stub was made; remove the stub and populate again"
        return StoreChanged(errno.EIO, why, path)

    def _renamed(self, mark: Mark, path: str) -> str:
        with self._lock:
            if self._paths is None:
                self._paths = {
                    digest(entry.path): entry.path
                    for entry in self._store.tree(_pass_over)
                    if entry.kind is Kind.FILE
                }
        try:
            return self._paths[mark.path]
        except KeyError:
            raise self._gone(path) from None

    def _gone(self, path: str) -> StoreChanged:
        return StoreChanged(errno.EIO, f"is not in {self._store.name} any more", path)


def _pass_over(_: StoreError) -> None:
    """What cannot be listed is not found, which is then said of the file that wants it."""


def below(root: str, path: str) -> str | None:
    """`path` relative to the absolute path `root`; None if it is not below it."""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def where(error: OSError) -> str:
    """An error in a line: what, and why."""
    name = shown(os.fsdecode(error.filename)) + ": " if error.filename else ""
    return f"{name}{error.strerror or error}"
