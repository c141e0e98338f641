"""Finds the mount by which a thread accesses a file in the system call that it waits in.

FUSE names the file of a request and not the mount. The call's descriptor tells it, and for a call with a path the path as the thread sees it.
Nothing here sends a request to the file's server for a descriptor. A path may need requests, so it is for a thread.

Every function returns None if the mount cannot be told: io_uring, a page fault, a path through a magic link, a thread that may not be looked at.
"""

import errno
import os
import platform
from collections.abc import Collection
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import MountId
from fusehsm.linux.proc import descriptor_of, memory_at, string_at
from fusehsm.linux.system_call import PAGE_FAULT, SystemCall

# By the call's number: which of its arguments are descriptors of files that it accesses.
_DESCRIPTORS: Final[dict[str, dict[int, tuple[int, ...]]]] = {
    "x86_64": {
        **dict.fromkeys((0, 1, 17, 18, 19, 20, 295, 296, 327, 328), (0,)),  # read(2), write(2) and their kin
        **dict.fromkeys(
            (77, 78, 187, 217, 221, 285), (0,)
        ),  # ftruncate, getdents, readahead, fadvise64, fallocate
        40: (0, 1),  # sendfile
        275: (0, 2),  # splice
        326: (0, 2),  # copy_file_range
        9: (4,),  # mmap
    },
    "aarch64": {
        **dict.fromkeys((63, 64, 65, 66, 67, 68, 69, 70, 286, 287), (0,)),
        **dict.fromkeys((46, 47, 61, 213, 223), (0,)),
        71: (0, 1),
        76: (0, 2),
        285: (0, 2),
        222: (4,),
    },
}
# By the call's number: the arguments with the directory's descriptor (None: the working directory) and the path.
_PATHS: Final[dict[str, dict[int, tuple[int | None, int]]]] = {
    "x86_64": {
        2: (None, 0),  # open
        59: (None, 0),  # execve
        76: (None, 0),  # truncate
        85: (None, 0),  # creat
        257: (0, 1),  # openat
        322: (0, 1),  # execveat
        437: (0, 1),  # openat2
    },
    "aarch64": {45: (None, 0), 56: (0, 1), 221: (None, 0), 281: (0, 1), 437: (0, 1)},
}
_MACHINE: Final = platform.machine()
_LONGEST_PATH: Final = 4096
_O_PATH: Final = os.O_PATH | os.O_CLOEXEC

Device = tuple[int, int]


def by_descriptor(call: SystemCall, device: Device, inode: int) -> MountId | None:
    """The mount of the descriptor that the call accesses this file by."""
    if call.number == PAGE_FAULT:
        return None
    for argument in _DESCRIPTORS.get(_MACHINE, {}).get(call.number, ()):
        found = _mount_at(f"/proc/{call.tid}/fd/{call.arguments[argument] & 0xFFFF_FFFF}", device, {inode})
        if found is not None:
            return found
    return None


def has_path(call: SystemCall) -> bool:
    """Whether by_path() may find the mount of the call's file."""
    return call.number in _PATHS.get(_MACHINE, {})


def by_path(call: SystemCall, device: Device, inode: int, parents: Collection[int]) -> MountId | None:
    """The mount that the call's path leads to. `parents`: the directories with names of the file, which may not be there yet.

    Reads the thread's memory, and may wait for the servers of the directories on the way.
    """
    directory, pointer = _PATHS[_MACHINE][call.number]
    path = _path_at(call.tid, call.arguments[pointer])
    if not path:
        return None
    start = f"/proc/{call.tid}/root"
    resolve = syscalls.RESOLVE_IN_ROOT
    if not path.startswith(b"/"):
        number = -1 if directory is None else call.arguments[directory] & 0xFFFF_FFFF
        start = f"/proc/{call.tid}/" + ("cwd" if directory is None or number >> 31 else f"fd/{number}")
        # With another root an absolute symbolic link would lead elsewhere here.
        resolve = 0 if _has_our_root(call.tid) else syscalls.RESOLVE_BENEATH
    resolve |= syscalls.RESOLVE_NO_MAGICLINKS
    above = os.path.dirname(path.rstrip(b"/")) or (b"/" if path.startswith(b"/") else b".")
    try:
        base = os.open(start, _O_PATH)
    except OSError:
        return None
    try:
        # The first two need no server. The last one looks up no name in a directory that the call may have locked.
        return (
            _mount_of(base, path, resolve | syscalls.RESOLVE_CACHED, device, {inode})
            or _mount_of(base, above, resolve | syscalls.RESOLVE_CACHED, device, parents)
            or _mount_of(base, above, resolve, device, parents)
        )
    finally:
        os.close(base)


def _has_our_root(tid: int) -> bool:
    try:
        return os.readlink(f"/proc/{tid}/ns/mnt") == os.readlink("/proc/self/ns/mnt") and os.path.samefile(
            f"/proc/{tid}/root", "/"
        )
    except OSError:
        return False


def _mount_at(link: str, device: Device, inodes: Collection[int]) -> MountId | None:
    try:
        descriptor = os.open(link, _O_PATH)
    except OSError:
        return None
    return _checked(descriptor, device, inodes)


def _mount_of(
    base: int, path: bytes, resolve: int, device: Device, inodes: Collection[int]
) -> MountId | None:
    try:
        descriptor = syscalls.openat2(base, path, _O_PATH, resolve)
    except OSError:
        return None
    return _checked(descriptor, device, inodes)


def _checked(descriptor: int, device: Device, inodes: Collection[int]) -> MountId | None:
    """The mount of a descriptor, which is closed; None if it is of another file."""
    try:
        opened = descriptor_of(os.getpid(), descriptor)
        unique, found = syscalls.mount_and_device(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if opened is None or found != device or opened.inode not in inodes:
        return None
    return MountId(opened.mount_id, unique)


def _path_at(tid: int, address: int) -> bytes | None:
    """The path at an address of a thread's memory; None if it is not there, or too long."""

    def read(address: int, size: int) -> bytes:
        data = memory_at(tid, address, size)
        if data is None:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return data

    try:
        return string_at(read, address, _LONGEST_PATH)
    except OSError:
        return None
