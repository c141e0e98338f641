"""Files whose names change while they are open."""

import ctypes
import mmap
import os
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.workload import one_call

row = partial(one_call, "names")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def read_renamed(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.rename(path, path + ".moved")
    return os.pread(descriptor, 100, 5000)


def read_unlinked(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.unlink(path)
    return os.pread(descriptor, 100, 5000)


def read_replaced(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.rename(os.path.dirname(path) + "/other", path)
    return os.pread(descriptor, 100, 5000)


def read_linked(path: str, name: str) -> bytes:
    other = os.path.join(os.path.dirname(path), name)
    os.makedirs(os.path.dirname(other), exist_ok=True)
    os.link(path, other)
    return os.pread(os.open(other, os.O_RDONLY), 100, 5000)


def read_through_all_links(path: str) -> bytes:
    data = b""
    for name in ("one", "two", "three"):
        os.link(path, path + name)
        data += os.pread(os.open(path + name, os.O_RDONLY), 10, 0)
    return data + os.pread(os.open(path, os.O_RDONLY), 10, 5000)


def move_directory(path: str) -> bytes:
    directory = os.path.dirname(path)
    os.makedirs(directory + "/deep/deeper")
    os.rename(path, directory + "/deep/deeper/file")
    descriptor = os.open(directory + "/deep/deeper/file", os.O_RDONLY)
    os.rename(directory + "/deep", directory + "/moved")
    return os.pread(descriptor, 100, 5000)


def exchange(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    other = os.path.join(os.path.dirname(path), "other")
    if libc.renameat2(-100, path.encode(), -100, other.encode(), 2):
        raise OSError(ctypes.get_errno(), "renameat2")
    return os.pread(descriptor, 100, 5000) + os.pread(os.open(path, os.O_RDONLY), 100, 5000)


def make_again(path: str) -> tuple[bytes, bytes]:
    first = os.open(path, os.O_RDONLY)
    os.unlink(path)
    second = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.write(second, b"the second")
    return os.pread(first, 100, 5000), os.pread(second, 100, 0)


def strange_name(path: str) -> bytes:
    strange = os.path.join(os.path.dirname(path), "a \n name\twith all\\ \udcff")
    os.rename(path, strange)
    return os.pread(os.open(strange, os.O_RDONLY), 100, 5000)


def truncate_renamed(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    os.rename(path, path + ".moved")
    os.ftruncate(descriptor, 5000)
    os.pwrite(descriptor, b"new", 100)
    return os.fstat(descriptor).st_size


def map_unlinked(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.unlink(path)
    return mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[5000:5001]


def write_unlinked(path: str) -> tuple[bytes, int]:
    descriptor = os.open(path, os.O_RDWR)
    os.unlink(path)
    os.pwrite(descriptor, b"new", 5000)
    os.ftruncate(descriptor, 9000)
    return os.pread(descriptor, 3, 5000), os.fstat(descriptor).st_size


def read_after_a_link_has_gone(path: str) -> bytes:
    os.link(path, path + ".link")
    descriptor = os.open(path + ".link", os.O_RDONLY)
    os.unlink(path + ".link")
    return os.pread(descriptor, 100, 5000) + os.pread(os.open(path, os.O_RDONLY), 100, 0)


def reopen_unlinked(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    os.unlink(path)
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    return os.pread(again, 100, 5000)


def link_unnamed(path: str) -> bytes:
    directory = os.path.dirname(path)
    descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(descriptor, b"unnamed no more")
    # By linkat(2): os.link does not follow the symbolic link.
    if libc.linkat(-100, f"/proc/self/fd/{descriptor}".encode(), -100, f"{directory}/named".encode(), 0x400):
        raise OSError(ctypes.get_errno(), "linkat")
    return os.pread(os.open(directory + "/named", os.O_RDONLY), 100, 0)


WORKLOADS = [
    row("write what has been unlinked", write_unlinked),
    row("open again what has been unlinked", reopen_unlinked),
    row("a hard link that has gone", read_after_a_link_has_gone, differs="paths of hard links"),
    row("give a name to what has none", link_unnamed, differs="O_TMPFILE"),
    row("read what has been renamed", read_renamed),
    row("read what has been unlinked", read_unlinked),
    row("read what has been replaced", read_replaced),
    row("map what has been unlinked", map_unlinked),
    row("truncate and write what has been renamed", truncate_renamed),
    row("a hard link", read_linked, "link"),
    row("a hard link in another directory", read_linked, "deep/link"),
    row("all of many hard links", read_through_all_links, differs="paths of hard links"),
    row("a directory that moves", move_directory),
    row("exchanged", exchange),
    row("removed and made again", make_again),
    row("a strange name", strange_name),
]
