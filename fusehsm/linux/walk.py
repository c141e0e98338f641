"""Walks a tree of any depth: without recursion, with few descriptors, and with a limit.

A user may nest directories to any depth. One descriptor a level would use up the process's limit, and one function call a level would end in
RecursionError.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from fusehsm.linux.beneath import open_beneath

LONGEST_PATH: Final = 1 << 14
"""Bytes of a path below the root; what lies deeper is left out. (open(2) takes paths of 4,095 bytes, and programs get deeper step by step.)"""

MOST_OPEN: Final = 16
"""Directories on the way down that are open at a time."""

LIST: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Identity = tuple[int, int]  # device, inode


@dataclass(slots=True)
class Level:
    """A directory on the way down."""

    #: Its path below the root.
    path: str
    #: A descriptor for reading; -1 while it is closed, until the walk comes back.
    fd: int
    #: Device and inode.
    identity: Identity
    #: The names in it that the walk has not seen yet; the next one is last.
    names: list[str]

    def path_of(self, name: str) -> str:
        """The path of the entry `name` in this directory."""
        return f"{self.path}/{name}" if self.path else name


class Descent:
    """The state of a walk: the directories from the root down.

    `left_out` gets an error for each directory that the walk cannot find again on the way back, because it was moved. Raises OSError if the root
    cannot be listed. The caller must call close().
    """

    def __init__(self, root_fd: int, left_out: Callable[[OSError], None]) -> None:
        self._root_fd = root_fd
        self._left_out = left_out
        self._levels: list[Level] = []
        self._append("", os.open(".", LIST, dir_fd=root_fd))

    @property
    def here(self) -> Level | None:
        """The innermost directory, which is open; None at the end of the walk."""
        return self._levels[-1] if self._levels else None

    def enter(self, name: str, fd: int | None = None) -> Level:
        """Go down to a directory in the innermost one. `fd`: a descriptor of it for reading; the walk owns it from now on.

        Raises OSError if the directory cannot be listed, ENAMETOOLONG if its path has more than LONGEST_PATH bytes.
        """
        above = self._levels[-1]
        path = above.path_of(name)
        try:
            if len(os.fsencode(path)) > LONGEST_PATH:
                why = f"lies too deep: its path has more than {LONGEST_PATH:,} bytes"
                raise OSError(errno.ENAMETOOLONG, why, path)
            if fd is None:
                fd = os.open(name, LIST, dir_fd=above.fd)
        except OSError:
            if fd is not None:
                os.close(fd)
            raise
        self._append(path, fd)
        # The root stays open: all other directories can be found from it.
        if len(self._levels) > MOST_OPEN + 1:
            parked = self._levels[-MOST_OPEN - 1]
            os.close(parked.fd)
            parked.fd = -1
        return self._levels[-1]

    def leave(self) -> None:
        """Go back to the directory above, or to the nearest one that can be found again."""
        left = self._levels.pop()
        try:
            while self._levels and self._levels[-1].fd < 0:
                level = self._levels[-1]
                try:
                    level.fd = reopened(self._root_fd, level.path, level.identity, left.fd)
                except OSError as error:
                    self._levels.pop()
                    self._left_out(error)
        finally:
            os.close(left.fd)

    def close(self) -> None:
        """Close all descriptors. A second call does nothing."""
        while self._levels:
            level = self._levels.pop()
            if level.fd >= 0:
                os.close(level.fd)

    def _append(self, path: str, fd: int) -> None:
        try:
            names = sorted(os.listdir(fd), key=os.fsencode, reverse=True)
            self._levels.append(Level(path, fd, identity_of(fd), names))
        except BaseException:
            os.close(fd)
            raise


def directories(root_fd: int, left_out: Callable[[OSError], None]) -> Iterator[tuple[int, list[str]]]:
    """Every directory of a tree, the root included: its descriptor, which the walk owns, and the names in it that are not directories.

    `left_out` gets an error for each directory that cannot be listed. Raises OSError if the root cannot be listed.
    """
    descent = Descent(root_fd, left_out)
    try:
        level = descent.here
        new = True
        while level is not None:
            if new:
                yield level.fd, _keep_directories(level)
            if not level.names:
                descent.leave()
                new = False
            else:
                name = level.names.pop()
                try:
                    descent.enter(name)
                    new = True
                except OSError as error:
                    left_out(OSError(error.errno, error.strerror, level.path_of(name)))
                    new = False
            level = descent.here
    finally:
        descent.close()


def _keep_directories(level: Level) -> list[str]:
    """Keep only directories in a level's names; returns the other names."""
    with os.scandir(level.fd) as entries:
        inner = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    others = [name for name in level.names if name not in inner]
    level.names = [name for name in level.names if name in inner]
    return others


def identity_of(fd: int) -> Identity:
    """The device and inode of a directory."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def reopened(root_fd: int, path: str, identity: Identity, inner_fd: int | None) -> int:
    """A descriptor for reading of the directory that was at `path` below `root_fd`. `inner_fd`: a directory that was in it, or None.

    Raises OSError ESTALE if it is found neither above `inner_fd` nor at `path`.
    """
    by_path = partial(open_beneath, root_fd, path, LIST)
    ways = [by_path] if inner_fd is None else [partial(os.open, "..", LIST, dir_fd=inner_fd), by_path]
    for way in ways:
        try:
            fd = way()
        except OSError:
            continue
        try:
            if identity_of(fd) == identity:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.ESTALE, "was moved while what is below it was looked at", path)
