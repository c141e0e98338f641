"""Inventory of a tree: one Item for each regular file, whether or not a fetch serves it."""

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterator, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Final

from fusehsm.linux.beneath import LIST, Descent, components, open_beneath, open_entry
from fusehsm.tier.stubs.mark import Key, key_of
from fusehsm.tier.stubs.stub import StubFile, Unbelieved, mark_of
from fusehsm.tier.stubs.tree import Tree

_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK_SIZE: Final = 1 << 20  # for files without a record; any value does, as no block of them is here
_MOST_LOOKED_AT: Final = 10_000  # files


@dataclass(frozen=True, slots=True)
class Item:
    """One regular file."""

    # Below the destination.
    path: str
    # Bytes.
    size: int
    # Bytes that are here.
    resident: int
    # Bytes on the disk.
    disk: int
    # Made by populate; False: the user's own.
    stub: bool
    # The user has changed it, or may have.
    modified: bool
    # Its content must stay.
    pinned: bool
    # The last known time of use, nanoseconds since 1970.
    used_ns: int


class Abandoned(Exception):
    """Ends a walk for whose result nothing waits any more."""


class Look:
    """The place of a walk, which another thread watches, and the files that the walk leaves out because they do not answer."""

    def __init__(self, without: Set[str] = frozenset(), without_users: Set[int] = frozenset()) -> None:
        """`without`: paths; `without_users`: owners of files."""
        # Number of files and directories that the walk has come to.
        self.count = 0
        # The path where the walk is, and its owner once that is known.
        self.path = ""
        self.uid = -1
        # Nothing waits for the walk any more.
        self.is_abandoned = False
        # The walk has ended.
        self.has_ended = False
        self._without = without
        self._without_users = without_users

    def __call__(self, path: str, uid: int = -1) -> bool:
        """Note that the walk is at `path`, of user `uid`. Returns whether to look at it. Raises Abandoned."""
        if self.is_abandoned:
            raise Abandoned
        self.count += 1
        self.path, self.uid = path, uid
        return path not in self._without and uid not in self._without_users


def items(
    root_fd: int,
    path: str,
    known: Callable[[Key], StubFile | None],
    left_out: Callable[[OSError], None],
    tree: Tree,
    look: Look | None = None,
) -> Iterator[Item]:
    """The regular files at or below `path` ("": all), in byte order of the names; each inode once. No symbolic link is followed.

    `known`: finds the stubs that are served now. `left_out`: called with the error of each directory that cannot be read. `look`: knows where the
    walk is, and what it leaves out. Raises OSError ENOENT if `path` does not exist, ValueError for a path that leads elsewhere. Files that cannot be
    opened are left out.
    """
    look = look or Look()
    if path:
        components(path)
        fd = open_beneath(root_fd, path, _FILE)
    else:
        fd = os.open(".", LIST, dir_fd=root_fd)
    try:
        status = os.fstat(fd)
        if not look(path, status.st_uid):
            return
        if stat.S_ISREG(status.st_mode):
            key = key_of(fd, status)
            yield _item(fd, path, status, known(key), tree)
        elif stat.S_ISDIR(status.st_mode):
            yield from _below(fd, path, known, left_out, tree, look)
    finally:
        os.close(fd)


def _below(
    root_fd: int,
    above: str,
    known: Callable[[Key], StubFile | None],
    left_out: Callable[[OSError], None],
    tree: Tree,
    look: Look,
) -> Iterator[Item]:
    """The items below the directory `root_fd`, whose path is `above`."""
    prefix = f"{above}/" if above else ""
    seen: set[Key] = set()
    for fd, path, status in _files(root_fd, prefix, left_out, look):
        key = key_of(fd, status)
        if key not in seen:
            seen.add(key)
            yield _item(fd, path, status, known(key), tree)


def _files(
    root_fd: int, prefix: str, left_out: Callable[[OSError], None], look: Look
) -> Generator[tuple[int, str, os.stat_result]]:
    """The regular files below the directory `root_fd`: descriptor (closed by this function), path beginning with `prefix`, and fstat(2)."""

    def leave_out(error: OSError) -> None:
        left_out(OSError(error.errno, error.strerror, prefix + os.fsdecode(error.filename or "")))

    descent = Descent(root_fd, leave_out)
    try:
        while (level := descent.here) is not None:
            if not level.names:
                descent.leave()
                continue
            name = level.names.pop()
            full = prefix + level.path_of(name)
            if not look(full):
                continue
            try:
                fd = open_entry(level.fd, name, _FILE)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    leave_out(OSError(error.errno, error.strerror, level.path_of(name)))
                continue  # a symbolic link, a socket, removed, or not readable for us
            is_kept = False
            try:
                status = os.fstat(fd)
                if not look(full, status.st_uid):
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield fd, full, status
                elif stat.S_ISDIR(status.st_mode):
                    is_kept = True
                    try:
                        descent.enter(name, fd)
                    except OSError as error:
                        leave_out(OSError(error.errno, error.strerror, level.path_of(name)))
            finally:
                if not is_kept:
                    os.close(fd)
    finally:
        descent.close()


def has_unbelieved(root_fd: int, tree: Tree, look: Look) -> bool:
    """Whether the first file with a mark has one that root does not believe; False if the first files have no mark at all. `look`: as of items()."""
    with closing(_files(root_fd, "", lambda error: None, look)) as files:
        for fd, path, status in islice(files, _MOST_LOOKED_AT):
            try:
                if mark_of(fd, status, path, tree) is not None:
                    return False
            except Unbelieved:
                return True
    return False


def _item(fd: int, path: str, status: os.stat_result, file: StubFile | None, tree: Tree) -> Item:
    if file is None:
        try:
            file = StubFile.recover(fd, path, tree, _BLOCK_SIZE)
        except Exception:
            file = None  # its owner may have written any value into its attributes; go on with other files
    used_ns = status.st_atime_ns if file is None else max(file.used_ns, status.st_atime_ns)
    disk = status.st_blocks * 512
    if file is None:
        return Item(path, status.st_size, status.st_size, disk, False, False, False, used_ns)
    return Item(path, status.st_size, file.resident, disk, True, file.modified, file.pinned, used_ns)
