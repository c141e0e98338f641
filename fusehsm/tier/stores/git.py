"""A commit of a local git repository as a store. It has modes and symbolic links, but no owners and no times. Submodules count as special files.

Every call looks the reference up, so a branch that moves changes the files. A version is the id of the object, so the content always is that of its
version. fsspec opens the repository. The look-up of a path is here, because fsspec's misreads a name with "@" or ":".
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final

import pygit2

from fusehsm.tier.stores.base import Entry, Kind, Rights, StoreError, changed
from fusehsm.tier.stores.fsspec import FsspecStore

_KINDS: Final = {0o100644: Kind.FILE, 0o100755: Kind.FILE, 0o120000: Kind.SYMLINK, 0o040000: Kind.DIRECTORY}


class GitStore(FsspecStore):
    """The tree below `root` in the repository. One call at a time: libgit2's objects are not safe for threads."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        super().__init__(name, filesystem, root)
        self._last: tuple[str, bytes] = ("", b"")  # version and content of the last blob, for its next range

    def version(self, path: str) -> str:
        """The id of the object."""
        with self.complaining(path, "cannot be looked up"), self._turn:
            return f"object {self._object(path).id}"

    def rights(self, path: str) -> Rights | None:
        """None: a repository has no owners."""
        return None

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """Read the object, if it still is at that path of the reference."""
        with self.complaining(path, "cannot be read", reading=True), self._turn:
            blob = self._object(path)
            if f"object {blob.id}" != version or not isinstance(blob, pygit2.Blob):
                raise changed(self, path)
            if self._last[0] != version:
                self._last = (version, blob.data)
            return self._last[1][offset : offset + length]

    def _object(self, path: str) -> Any:
        commit, _ = self._filesystem.repo.resolve_refish(self._filesystem.ref)
        found = commit.tree
        for name in filter(None, self.full(path).split("/")):
            if not isinstance(found, pygit2.Tree):
                raise FileNotFoundError(errno.ENOENT, "is not there")
            raw_name = os.fsencode(name)
            found = next((item for item in found if item.raw_name == raw_name), None)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "is not there")
        return found

    def _list(self, path: str, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
        prefix = f"{path}/" if path else ""
        with self._turn:
            tree = self._object(path)
            item: Any
            if not isinstance(tree, pygit2.Tree):
                raise NotADirectoryError(errno.ENOTDIR, "is no directory")
            for item in tree:
                kind = _KINDS.get(item.filemode, Kind.OTHER)
                is_file = kind is Kind.FILE
                yield Entry(
                    prefix + os.fsdecode(item.raw_name),
                    kind,
                    size=item.size if is_file else None,
                    mode=stat.S_IMODE(item.filemode) if is_file else None,
                    target=os.fsdecode(item.data) if kind is Kind.SYMLINK else None,
                    version=f"object {item.id}" if is_file else None,
                )
