"""Opens files below a directory by relative path. No symbolic link is followed, so a path never leaves the directory."""

import errno
import os
from collections.abc import Callable, Sequence
from typing import Final

from fusehsm.linux import syscalls

_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_LIMIT: Final = 4095  # bytes; PATH_MAX counts the final NUL


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
