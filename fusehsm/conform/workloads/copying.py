"""Copies within the kernel."""

import ctypes
import fcntl
import os
import socket
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "copying")

# The functions run in an accessor: what they use are the names that accessor_worker.py gives them, not those of this module.


def send(path: str, offset: int | None, count: int, position: int = 0) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, position, os.SEEK_SET)
    ours, theirs = socket.socketpair()
    sent = os.sendfile(theirs.fileno(), descriptor, offset, count)
    theirs.close()
    data = b""
    while piece := ours.recv(1 << 20):
        data += piece
    assert sent == len(data)
    return data


def send_to_memory(path: str, offset: int, count: int) -> bytes:
    target = os.memfd_create("target")
    sent = os.sendfile(target, os.open(path, os.O_RDONLY), offset, count)
    return os.pread(target, sent, 0)


def send_to_file(path: str, count: int) -> tuple[int, int]:
    source = os.open(path, os.O_RDONLY)
    target = os.open(os.path.dirname(path) + "/other", os.O_WRONLY)
    sent = os.sendfile(target, source, 0, count)
    return sent, os.fstat(target).st_size


def splice_from(path: str, offset: int | None, count: int, position: int = 0) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, position, os.SEEK_SET)
    reading, writing = os.pipe()
    more = {} if offset is None else {"offset_src": offset}
    moved = os.splice(descriptor, writing, count, **more)
    return os.read(reading, moved)


def splice_to(path: str, offset: int, count: int) -> tuple[int, int]:
    reading, writing = os.pipe()
    os.write(writing, b"w" * count)
    descriptor = os.open(path, os.O_RDWR)
    moved = os.splice(reading, descriptor, count, offset_dst=offset)
    return moved, os.fstat(descriptor).st_size


def copy_range(path: str, source_offset: int, target_offset: int, count: int, name: str) -> tuple[int, int]:
    source = os.open(path, os.O_RDWR)
    target = os.open(os.path.join(os.path.dirname(path), name), os.O_RDWR)
    moved = os.copy_file_range(source, target, count, source_offset, target_offset)
    return moved, os.fstat(target).st_size


def send_again(path: str, times: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    for _ in range(times):
        os.sendfile(theirs.fileno(), descriptor, 5000, 100)
    return ours.recv(100 * times)


def splice_again(path: str, times: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    reading, writing = os.pipe()
    data = b""
    for _ in range(times):
        os.splice(descriptor, writing, 100, offset_src=5000)
        data += os.read(reading, 100)
    return data


def send_through_two(path: str) -> bytes:
    ours, theirs = socket.socketpair()
    for descriptor in [os.open(path, os.O_RDONLY) for _ in range(2)]:
        os.sendfile(theirs.fileno(), descriptor, 5000, 100)
    return ours.recv(200)


def tee(path: str) -> bytes:
    first, second = os.pipe(), os.pipe()
    os.splice(os.open(path, os.O_RDONLY), first[1], 100, offset_src=5000)
    libc.tee(first[0], second[1], ctypes.c_size_t(100), 0)
    return os.read(second[0], 100)


def clone(path: str) -> None:
    source = os.open(path, os.O_RDONLY)
    fcntl.ioctl(os.open(path + ".clone", os.O_RDWR | os.O_CREAT), 0x40049409, source)


WORKLOADS = [
    row("sendfile at an offset", send, 100, 10000),
    row("sendfile of one page", send, PAGE, PAGE),
    row("sendfile at the position", send, None, 100, 5000),
    row("sendfile past the end", send, 19000, 5000),
    row("sendfile to a file", send_to_file, 200000, size=MIB),
    row("splice from a file", splice_from, 5000, 100),
    row("splice from the position", splice_from, None, 100, 5000),
    row("splice to a file", splice_to, 5000, 100),
    row("copy_file_range to another file", copy_range, 5000, 100, 5000, "other"),
    row("copy_file_range within a file", copy_range, 9000, 100, 100, "file"),
    row("copy_file_range beyond the end", copy_range, 19000, 0, 5000, "other"),
    row("copy_file_range of nothing", copy_range, 0, 0, 0, "other", differs="empty reads and writes"),
    row("copy_file_range from the end", copy_range, SIZE, 0, 5000, "other", differs="empty reads and writes"),
    row("copy_file_range over itself", copy_range, 0, 100, 5000, "file"),
    row("large copy_file_range", copy_range, 10, 5, 3 * MIB, "other", size=5 * MIB),
    row("sendfile again", send_again, 5, differs="sent from the cache"),
    row("splice again", splice_again, 5, differs="sent from the cache"),
    row(
        "sendfile through two descriptors",
        send_through_two,
        differs=("sent from the cache", "sent through another descriptor"),
    ),
    row("large sendfile", send_to_memory, 5000, MIB, size=2 * MIB),
    row("sendfile of nothing", send, 100, 0, differs="empty reads and writes"),
    row("tee", tee),
    row("FICLONE", clone),
]
