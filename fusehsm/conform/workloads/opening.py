"""Ways to open a file, and calls that do not touch content."""

import ctypes
import fcntl
import os
import struct
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import EVERYTHING, PRE_ACCESS
from fusehsm.conform.workload import one_call
from fusehsm.fanotify.abi import FAN_ONDIR

row = partial(one_call, "opening")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def open_with(path: str, flags: int, name: str = "file") -> int:
    os.close(os.open(os.path.join(os.path.dirname(path), name), flags, 0o600))
    return os.path.getsize(os.path.join(os.path.dirname(path), name))


def reopen(path: str) -> None:
    descriptor = os.open(path, os.O_PATH)
    os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)


def open_link(path: str) -> None:
    os.symlink("file", path + ".symlink")
    os.close(os.open(path + ".symlink", os.O_RDONLY))


def do_nothing_to_content(path: str) -> None:
    directory = os.path.dirname(path)
    os.stat(path)
    os.access(path, os.R_OK)
    os.chmod(path, 0o640)
    os.chown(path, 0, 0)
    os.utime(path, (1, 2))
    os.setxattr(path, "user.name", b"value")
    assert os.getxattr(path, "user.name") == b"value"
    assert os.listxattr(path) == ["user.name"]
    os.removexattr(path, "user.name")
    os.link(path, path + ".link")
    os.rename(path + ".link", path + ".moved")
    os.unlink(path + ".moved")
    os.symlink("file", path + ".symlink")
    assert os.readlink(path + ".symlink") == "file"
    os.mkdir(directory + "/new")
    os.rmdir(directory + "/new")
    os.mkfifo(directory + "/fifo")
    assert sorted(os.listdir(directory)) == ["fifo", "file", "file.symlink", "other"]
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)


def do_nothing_to_open_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fstat(descriptor)
    os.lseek(descriptor, 0, os.SEEK_END)
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.fchmod(descriptor, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    os.close(os.dup(descriptor))
    os.close(descriptor)


def open_by_handle(path: str) -> bytes:
    handle = ctypes.create_string_buffer(8 + 128)
    struct.pack_into("=I", handle, 0, 128)
    mount_id = ctypes.c_int()
    if libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    mount = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    descriptor = libc.open_by_handle_at(mount, handle, os.O_RDONLY)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return os.pread(descriptor, 10, 5000)


def openat2(path: str, flags: int, resolve: int) -> int:
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)
    os.stat(path)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    descriptor = libc.syscall(437, directory, os.path.basename(path).encode(), how, 24)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "openat2")
    return os.fstat(descriptor).st_size


def unnamed(path: str) -> bytes:
    descriptor = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(descriptor, b"unnamed")
    return os.pread(descriptor, 10, 0)


def open_many_times(path: str, times: int) -> None:
    for _ in range(times):
        os.close(os.open(path, os.O_RDONLY))


def list_directory(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


WORKLOADS = [
    row("for reading", open_with, os.O_RDONLY),
    row("for writing", open_with, os.O_WRONLY),
    row("for both", open_with, os.O_RDWR),
    row("for both and neither", open_with, os.O_ACCMODE),
    row("to append", open_with, os.O_WRONLY | os.O_APPEND),
    row("not blocking", open_with, os.O_RDONLY | os.O_NONBLOCK),
    row("direct", open_with, os.O_RDONLY | os.O_DIRECT),
    row("synchronous", open_with, os.O_WRONLY | os.O_SYNC),
    row("without times", open_with, os.O_RDONLY | os.O_NOATIME),
    row("not following", open_with, os.O_RDONLY | os.O_NOFOLLOW),
    row("O_TRUNC", open_with, os.O_WRONLY | os.O_TRUNC),
    row("O_TRUNC for both", open_with, os.O_RDWR | os.O_TRUNC),
    row("O_TRUNC of what is empty", open_with, os.O_RDWR | os.O_TRUNC, size=0),
    row("O_CREAT of what is there", open_with, os.O_RDWR | os.O_CREAT),
    row("O_CREAT and O_TRUNC of what is there", open_with, os.O_RDWR | os.O_CREAT | os.O_TRUNC),
    row("O_CREAT of what is not", open_with, os.O_RDWR | os.O_CREAT, "new"),
    row("O_EXCL of what is not", open_with, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "new"),
    row("creat", open_with, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "new"),
    row("O_EXCL of what is there", open_with, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
    row("of nothing", open_with, os.O_RDONLY, "missing"),
    row("O_DIRECTORY of a file", open_with, os.O_RDONLY | os.O_DIRECTORY),
    row("O_PATH", open_with, os.O_PATH),
    row("O_TMPFILE", unnamed, differs="O_TMPFILE"),
    row("through proc", reopen),
    row("through a symbolic link", open_link),
    row("by handle", open_by_handle, needs_root=True),
    row("openat2", openat2, os.O_RDONLY, 8),
    row("openat2 from what is cached", openat2, os.O_RDONLY, 0x20),
    row("a hundred times", open_many_times, 100),
    row("a directory", list_directory),
    row("a directory, watched", list_directory, mask=EVERYTHING & ~PRE_ACCESS | FAN_ONDIR),
    row("names and attributes", do_nothing_to_content, needs_root=True),
    row("attributes and locks of an open file", do_nothing_to_open_file),
]
