"""Walking a tree of any depth: without recursion, with few descriptors, and not without end.

Whoever may make directories may nest them as deep as they like. A descriptor for each level would use up all that a process may have, and a function
call for each level ends in RecursionError.
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
    """A directory on the way down. `path`: below the root. `names`: what is in it and has not been seen, the next one last. `fd` -1: it is closed
    until the walk comes back to it."""

    path: str
    fd: int
    identity: Identity
    names: list[str]

    def path_of(self, name: str) -> str:
        """The path of what has that name in it."""
        return f"{self.path}/{name}" if self.path else name


class Descent:
    """Where a walk is: the directories from the root down. `left_out` hears of each that cannot be found again on the way back, as it has been moved.

    Raises OSError where the root cannot be listed. close() must be called.
    """

    def __init__(self, root_fd: int, left_out: Callable[[OSError], None]) -> None:
        self._root_fd = root_fd
        self._left_out = left_out
        self._levels: list[Level] = []
        self._append("", os.open(".", LIST, dir_fd=root_fd))

    @property
    def here(self) -> Level | None:
        """The innermost directory, which is open; None when the walk is over."""
        return self._levels[-1] if self._levels else None

    def enter(self, name: str, fd: int | None = None) -> Level:
        """Go down to a directory in the innermost one. `fd`: a descriptor of it for reading, which is owned from now on. Raises OSError where it
        cannot be listed, ENAMETOOLONG where it lies too deep."""
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
        # The root stays: it is what all others can be found from.
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
        """Close all that is open; closing twice does nothing."""
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
    """A descriptor of every directory of a tree, the root included, and the names of what is in it and is no directory. The descriptor is the walk's.

    `left_out` hears of those that cannot be listed. Raises OSError where the root cannot be listed.
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
    """Leave only directories in a level's names; the others."""
    with os.scandir(level.fd) as entries:
        inner = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    others = [name for name in level.names if name not in inner]
    level.names = [name for name in level.names if name in inner]
    return others


def identity_of(fd: int) -> Identity:
    """Which directory it is."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def reopened(root_fd: int, path: str, identity: Identity, inner_fd: int | None) -> int:
    """A descriptor for reading of the directory that was at `path` below `root_fd`. `inner_fd`: of a directory that was in it, if there is one.

    Raises OSError ESTALE where it is in neither place any more.
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
