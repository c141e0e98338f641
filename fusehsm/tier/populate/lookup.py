"""What the names in a destination lead to. A name is looked up once; all that follows is done on the descriptor.

Other users may own directories of the destination, and may put another file at a name between two calls. So a check of a name says nothing about
what the next call with that name finds.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.beneath import open_entry
from fusehsm.overlay.attributes import path_of

UNFINISHED: Final = ".fusehsm-unfinished"
"""The one name that is ours in every directory: what is being made where a file cannot be made without a name."""

REPLACED: Final = "was replaced while it was looked at; populate again"
"""The text of a Refusal: a name leads to another file than a moment before."""

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class Refusal(Exception):
    """An entry cannot be made. The text is "cause; fix"."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a name leads to."""

    # O_PATH descriptor. All that follows is done on it, because the name may lead to another file a moment later.
    fd: int
    # Its fstat(2).
    status: os.stat_result


@dataclass(slots=True)
class Opened:
    """A file that is open for reading."""

    # Descriptor.
    fd: int
    # fstat(2) from before its mode was changed for open(2).
    status: os.stat_result
    # The mode to restore, because it was changed for open(2). None: keep the present mode.
    mode: int | None = None


@contextmanager
def looked_up(dir_fd: int | None, name: str) -> Iterator[Found | None]:
    """What `name` in the directory leads to; a symbolic link is not followed. None if the name does not exist."""
    if dir_fd is None:
        yield None
        return
    try:
        fd = open_entry(dir_fd, name, os.O_PATH)
    except FileNotFoundError:
        yield None
        return
    try:
        yield Found(fd, os.fstat(fd))
    finally:
        os.close(fd)


def target_of(link: Found) -> str | None:
    """Where a symbolic link leads to; None for another file."""
    if not stat.S_ISLNK(link.status.st_mode):
        return None
    return os.readlink("", dir_fd=link.fd)


@contextmanager
def opened(found: Found, *, unchanged: bool) -> Iterator[Opened]:
    """Open a regular file for reading. A file of ours without read permission gets it meanwhile, unless `unchanged`."""
    mode = None
    try:
        fd = os.open(path_of(found.fd), _OPEN_FILE)
    except PermissionError:
        if unchanged or found.status.st_uid != os.geteuid():
            raise
        mode = stat.S_IMODE(found.status.st_mode)
        os.chmod(path_of(found.fd), mode | 0o400)
        fd = os.open(path_of(found.fd), _OPEN_FILE)
    try:
        file = Opened(fd, os.fstat(fd) if mode is None else found.status, mode)
        try:
            yield file
        finally:
            if file.mode is not None:
                os.fchmod(fd, file.mode)
    finally:
        os.close(fd)


def is_empty_and_ours(found: Found) -> bool:
    """Whether it is a directory of this process's user without entries: one that was just made, by this run or a killed one."""
    if not stat.S_ISDIR(found.status.st_mode) or found.status.st_uid != os.geteuid():
        return False
    fd = os.open(".", OPEN_DIRECTORY, dir_fd=found.fd)
    try:
        return not os.listdir(fd)
    finally:
        os.close(fd)


def replace(directory: int, name: str, replaced: Found) -> None:
    """Give the file UNFINISHED the name of the stub `replaced`, and remove that. Raises Refusal, and restores the names, if another file has
    that name by now: renameat2(2) replaces whatever is there."""
    old, new = os.fsencode(name), os.fsencode(UNFINISHED)
    try:
        syscalls.rename(directory, new, directory, old, syscalls.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise
        os.rename(
            new, old, src_dir_fd=directory, dst_dir_fd=directory
        )  # the file system cannot exchange names
        return
    with looked_up(directory, UNFINISHED) as found:
        is_it = found is not None and os.path.samestat(found.status, replaced.status)
    if not is_it:
        syscalls.rename(directory, new, directory, old, syscalls.RENAME_EXCHANGE)
    os.unlink(UNFINISHED, dir_fd=directory)
    if not is_it:
        raise Refusal(REPLACED)


def in_the_way(status: os.stat_result, wanted: str) -> Refusal:
    """The refusal for a name that has a file of another type than `wanted`."""
    what = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    found = what.get(stat.S_IFMT(status.st_mode), "a special file")
    return Refusal(f"is {found} here and {wanted} in the store; remove or rename it")
