"""Opening what lies below a directory, by its relative path, without following any symbolic link and so without leaving the directory."""

import errno
import os
from typing import Final

from fusehsm.linux import syscalls

_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_LIMIT: Final = 4095  # bytes; PATH_MAX counts the final NUL


def components(path: str) -> list[str]:
    """The names in a relative path. Raises ValueError, which says why, for one that no directory entry can have or that leads elsewhere."""
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
    """open(2) of `path` below `root_fd` (close-on-exec, nothing is followed). ELOOP or ENOTDIR at a symbolic link, EXDEV at "..".

    The path is one that components() accepts.
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    name = os.fsencode(path)
    if len(name) <= _PATH_LIMIT:
        try:
            return syscalls.openat2(root_fd, name, flags, _RESOLVE)
        except OSError as error:
            # Old kernels lack it, old container filters forbid it; a real EPERM comes again below.
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
    *parents, last = components(path)
    base = root_fd
    try:
        for parent in parents:
            below = os.open(parent, _DIRECTORY, dir_fd=base)
            if base != root_fd:
                os.close(base)
            base = below
        return os.open(last, flags, dir_fd=base)
    finally:
        if base != root_fd:
            os.close(base)
