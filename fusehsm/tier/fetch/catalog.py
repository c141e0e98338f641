"""Which file of the store a stub stands for, and in which version."""

import errno
import os
import threading
from dataclasses import dataclass

from fusehsm.text import shown
from fusehsm.tier.stores.base import Kind, Rights, Store, StoreChanged, StoreError
from fusehsm.tier.stubs.mark import StubMark, digest


@dataclass(frozen=True, slots=True)
class Origin:
    """The file of the store that a stub's mark names. `rights`: what the store says of it. `is_renamed`: it has another path than the stub."""

    path: str
    rights: Rights | None
    is_renamed: bool


class Catalog:
    """Asks the store. May be used by any number of threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._paths: dict[bytes, str] | None = None
        self._lock = threading.Lock()

    def origin(self, mark: StubMark, path: str) -> Origin:
        """What the stub at `path` (below the destination) was made of, as its mark says.

        A stub that has been renamed or linked is found by the store's list, which is asked for once. Raises StoreChanged when the file is gone,
        other OSErrors when the store does not answer.
        """
        is_renamed = digest(path) != mark.path
        if is_renamed:
            path = self._renamed(mark, path)
        try:
            return Origin(path, self._store.rights(path), is_renamed)
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None

    def version(self, mark: StubMark, path: str) -> str:
        """The version to read of the store's file at `path`: the one that the mark names. Raises as origin(), and StoreChanged for another one."""
        try:
            version = self._store.version(path)
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None
        if digest(version) != mark.version:
            raise self._changed(path)
        return version

    def version_and_range(
        self, mark: StubMark, path: str, offset: int, length: int
    ) -> tuple[str, bytes | None]:
        """The same, together with a range of it where the store has both for one request: a first read of a small file is then the only one."""
        try:
            found = self._store.read_if(path, offset, length, lambda version: digest(version) == mark.version)
        except StoreChanged:
            raise self._changed(path) from None
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None
        if found is None:
            return self.version(mark, path), None
        return found

    def _changed(self, path: str) -> StoreChanged:
        why = f"has changed in {self._store.name} since its stub was made; remove the stub and populate again"
        return StoreChanged(errno.EIO, why, path)

    def _renamed(self, mark: StubMark, path: str) -> str:
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
