"""Finding the store's file and version that a stub stands for."""

import errno
import os
import threading
from dataclasses import dataclass

from fusehsm.text import shown
from fusehsm.tier.stores.base import Kind, Rights, Store, StoreChanged, StoreError
from fusehsm.tier.stubs.mark import StubMark, digest


@dataclass(frozen=True, slots=True)
class Origin:
    """The file of the store that a stub's mark names."""

    # In the store.
    path: str
    # Owner, group and mode in the store; None if the store has none.
    rights: Rights | None
    # The stub has another path than the store's file.
    is_renamed: bool


class Catalog:
    """Finds the files of a store. Safe for any number of threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._paths: dict[bytes, str] | None = None
        self._lock = threading.Lock()

    def origin(self, mark: StubMark, path: str) -> Origin:
        """The store's file that the mark of the stub at `path` (below the destination) names.

        For a stub that has been renamed or linked, the catalog searches the store's list, which it reads once. Raises StoreChanged if the file is
        gone from the store, other OSErrors if the store does not answer.
        """
        is_renamed = digest(path) != mark.path
        if is_renamed:
            path = self._renamed(mark, path)
        try:
            return Origin(path, self._store.rights(path), is_renamed)
        except (FileNotFoundError, NotADirectoryError):
            raise self._gone(path) from None

    def version(self, mark: StubMark, path: str) -> str:
        """The version of the store's file at `path`. Raises as origin(), and StoreChanged if it is not the version that the mark names."""
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
        """As version(), with a range (bytes) if the store gives both in one request, else None. A small file then takes one request in all."""
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
    """Ignore a directory that cannot be listed: _renamed() reports the file that it does not find."""


def below(root: str, path: str) -> str | None:
    """`path` relative to the absolute path `root`; None if it is not below it."""
    prefix = root.rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def where(error: OSError) -> str:
    """An error in one line: the file and the cause."""
    name = shown(os.fsdecode(error.filename)) + ": " if error.filename else ""
    return f"{name}{error.strerror or error}"
