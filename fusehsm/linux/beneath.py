"""Opens files below a directory, and walks a tree of any depth.

No symbolic link is followed, so a path never leaves the directory.

A user may nest directories to any depth. So a walk uses no recursion, few descriptors, and a limit: one descriptor a level would use up the
process's limit, and one function call a level would end in RecursionError.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from fusehsm.linux import mountinfo, syscalls

_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_LIMIT: Final = 4095  # bytes; PATH_MAX counts the final NUL
LONGEST_PATH: Final = 1 << 14
"""Bytes of a path below the root; what lies deeper is left out. (open(2) takes paths of 4,095 bytes, and programs get deeper step by step.)"""

_MOST_LINKS: Final = 40  # MAXSYMLINKS, linux/namei.h
MOST_OPEN: Final = 16
"""Directories on the way down that are open at a time."""

LIST: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Identity = tuple[int, int, bytes | None]
"""Device, inode and birth time of a directory. The kernel gives an inode's number to another file as soon as the first is gone."""


def components(path: str) -> list[str]:
    """Split a relative path into its names.

    Raises ValueError with the cause, for a name that no directory entry can have and for a path that leads elsewhere.
    """
    if path.startswith("/"):
        raise ValueError("an absolute path")
    if "\0" in path:
        raise ValueError("a NUL in it")
    names = path.split("/")
    for name in names:
        if not name:
            raise ValueError("an empty name in it")
        if name in (".", ".."):
            raise ValueError(f'"{name}" in it')
    return names


def open_beneath(root_fd: int, path: str, flags: int) -> int:
    """open(2) of `path` below `root_fd`, with O_CLOEXEC; no symbolic link is followed.

    `path` is one that components() accepts. Raises OSError ELOOP or ENOTDIR at a symbolic link, EXDEV at "..".
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    names = os.fsencode(path).split(b"/")
    try:
        return walk(root_fd, names, flags)
    except OSError as error:
        # Old kernels lack openat2(2), old container filters forbid it (EPERM). A real EPERM comes again below.
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    components(path)  # without openat2(2) only this check keeps ".." from leading out
    return walk(root_fd, names, flags, openat2=False)


def open_entry(directory: int, name: str, flags: int) -> int:
    """open(2) of the entry `name` (one component) of a directory, with O_CLOEXEC; a symbolic link is not followed.

    Where another user has mounted a filesystem there, that user's process would have to answer, or would not answer: raises OSError EXDEV. Other
    mounts are entered. Old kernels (before openat2(2)) enter all.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    path = os.fsencode(name)
    try:
        return syscalls.openat2(directory, path, flags, _RESOLVE | syscalls.RESOLVE_NO_XDEV)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EPERM):
            raise
        if error.errno != errno.EXDEV:
            return os.open(path, flags, dir_fd=directory)
    # O_PATH sends no request to the server of a mount's root.
    point = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        owner = mountinfo.mount_of_descriptor(point).owner_uid
        if owner not in (0, os.geteuid()):
            raise OSError(errno.EXDEV, f"is a mount of user {owner}, which is not entered", name)
        return os.open(f"/proc/self/fd/{point}", flags & ~os.O_NOFOLLOW)
    finally:
        os.close(point)


def follow(path: str, *, last: bool = True) -> tuple[int, list[tuple[str, os.stat_result]]]:
    """Follow a path, also over symbolic links (the last component only if `last`), but not into mounts of other users (open_entry()).

    Returns an O_PATH descriptor of the file, and the way to it: the real path and the status of each directory from / down, and of the file. Raises
    OSError as open(2), with the path as its filename; EXDEV for a mount of another user.
    """
    names = _names(os.path.abspath(path))
    fd = os.open("/", _DIRECTORY)
    way = [("/", os.fstat(fd))]
    links = 0
    try:
        while names:
            name = names.pop()
            if name == "..":
                inner = os.open("..", _DIRECTORY, dir_fd=fd)
                way = way[:-1] or way
            else:
                inner = open_entry(fd, name, os.O_PATH)
                status = os.fstat(inner)
                if not stat.S_ISLNK(status.st_mode) or not (names or last):
                    way.append((os.path.join(way[-1][0], name), status))
                else:
                    target = _target(inner)
                    links += 1
                    if links > _MOST_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    names += _names(target)
                    if not target.startswith("/"):
                        continue
                    inner = os.open("/", _DIRECTORY)
                    del way[1:]
            os.close(fd)
            fd = inner
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, path) from None
    return fd, way


def _names(path: str) -> list[str]:
    """The names in a path, the first one last."""
    return [name for name in path.split("/") if name not in ("", ".")][::-1]


def _target(link: int) -> str:
    """Where a symbolic link (O_PATH) leads to; closes the descriptor."""
    try:
        return os.readlink("", dir_fd=link)
    finally:
        os.close(link)


def walk(
    base: int,
    names: Sequence[bytes],
    flags: int,
    *,
    openat2: bool = True,
    recover: Callable[[OSError, int], None] | None = None,
) -> int:
    """open(2) of the file at the end of `names` below the directory `base`; no symbolic link on the way is followed.

    openat2(2) opens pieces of at most PATH_MAX; without it each name is opened by itself. `recover` gets an error and the directory where it
    occurred: it raises the error, or returns to have the open repeated.
    """
    directory, ours = base, False
    try:
        while True:
            count = _names_at_once(names) if openat2 else 1
            piece, names = b"/".join(names[:count]), names[count:]
            opened = _open(directory, piece, _DIRECTORY if names else flags, openat2, recover)
            if not names:
                return opened
            if ours:
                os.close(directory)
            directory, ours = opened, True
    finally:
        if ours:
            os.close(directory)


def _open(
    directory: int, path: bytes, flags: int, openat2: bool, recover: Callable[[OSError, int], None] | None
) -> int:
    while True:
        try:
            if openat2:
                return syscalls.openat2(directory, path, flags, _RESOLVE)
            return os.open(path, flags, dir_fd=directory)
        except OSError as error:
            if recover is None:
                raise
            recover(error, directory)


def _names_at_once(names: Sequence[bytes]) -> int:
    """The number of names that fit into one path, at least one."""
    length = -1
    for count, name in enumerate(names):
        length += 1 + len(name)
        if length > _PATH_LIMIT:
            return max(count, 1)
    return len(names)


@dataclass(slots=True)
class Level:
    """A directory on the way down."""

    #: Its path below the root.
    path: str
    #: A descriptor for reading; -1 while it is closed, until the walk comes back.
    fd: int
    #: To find it again while it is closed.
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
    """The identity of an open directory; its birth time is None where the file system keeps none."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, syscalls.birth_time(fd, b"")


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
    raise OSError(errno.ESTALE, "was moved during a look at the files below it", path)
