"""Finding the store's file and version that a stub stands for, and the check whether a stub's mark may be forged.

A mark is an attribute. Every user who may write to the file may set it. A fetch that runs as root asks the store with root's rights, so a forged mark
could show its author any file of the store. So root's fetch believes a mark only if its writer must be root or have a right to that file.
"""

import errno
import os
import stat
import threading
from dataclasses import dataclass

from fusehsm.text import shown
from fusehsm.tier.stores.base import Kind, Rights, Store, StoreChanged, StoreError
from fusehsm.tier.stubs.mark import StubMark, digest

_BY_GROUP = stat.S_IRGRP | stat.S_IWGRP
_BY_OTHERS = stat.S_IROTH | stat.S_IWOTH


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
        return StoreChanged(errno.EIO, f"is no longer in {self._store.name}", path)


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


def suspicion(status: os.stat_result, origin: Origin) -> str | None:
    """The reason, as "cause; fix", for which root must not fill the file from `origin`; None if it may. `status`: the file's fstat(2).

    Only root can make a file that root owns, and only root can give a file away. So the file's owner can have written the mark, and must be root or
    the owner of the file in the store. Other users who may write to the file can have written the mark, too. They must have a right to the store's
    file, or the file must be at the path that the mark names.
    """
    rights = origin.rights
    if status.st_uid != 0 and (rights is None or status.st_uid != rights.uid):
        told = (
            "the store tells no owners"
            if rights is None
            else f"the file that its mark names, {shown(origin.path)}, to user {rights.uid} in the store"
        )
        return f"belongs to user {status.st_uid}, and {told}: the mark may be forged; remove the file and populate again as root"
    if origin.is_renamed and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~_granted(status, rights):
        return f"others than its owner may write to it, so its mark, which names {shown(origin.path)}, may be forged; move it there, or chmod go-w"
    return None


def _granted(status: os.stat_result, rights: Rights | None) -> int:
    """The write permission bits of group and others whose users all have a right to the store's file."""
    granted = 0
    if rights is not None and rights.mode is not None:
        if rights.mode & _BY_OTHERS:
            granted = stat.S_IWGRP | stat.S_IWOTH
        elif rights.mode & _BY_GROUP and rights.gid == status.st_gid:
            granted = stat.S_IWGRP
    return granted
