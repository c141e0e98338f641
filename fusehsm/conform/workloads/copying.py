"""System calls that copy inside the kernel."""

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "copying")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


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


def clone_range(path: str, offset: int, count: int) -> None:
    source = os.open(path, os.O_RDONLY)
    target = os.open(os.path.dirname(path) + "/other", os.O_RDWR)
    fcntl.ioctl(target, 0x4020940D, struct.pack("=qQQQ", source, offset, count, 0))


def dedupe_range(path: str, offset: int, count: int) -> tuple[int, int]:
    source = os.open(path, os.O_RDONLY)
    target = os.open(os.path.dirname(path) + "/other", os.O_RDWR)
    head = struct.pack("=QQHHI", offset, count, 1, 0, 0)
    asked = head + struct.pack("=qQQiI", target, offset, 0, 0, 0)
    _, _, deduped, status, _ = struct.unpack("=qQQiI", fcntl.ioctl(source, 0xC0189436, asked)[24:])
    return deduped, status


def vmsplice(path: str, offset: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    reading, writing = os.pipe()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + offset
    vector = (ctypes.c_uint64 * 2)(address, count)
    moved = libc.vmsplice(writing, vector, ctypes.c_ulong(1), 0)
    if moved < 0:
        raise OSError(ctypes.get_errno(), "vmsplice")
    return os.read(reading, moved)


def splice_between(path: str, count: int) -> tuple[int, int]:
    source = os.open(path, os.O_RDONLY)
    target = os.open(os.path.dirname(path) + "/other", os.O_WRONLY)
    reading, writing = os.pipe()
    into = os.splice(source, writing, count, offset_src=5000)
    return into, os.splice(reading, target, into, offset_dst=100)


def splice_to_position(path: str, position: int, count: int, flags: int = 0) -> tuple[int, int]:
    reading, writing = os.pipe()
    os.write(writing, b"w" * count)
    descriptor = os.open(path, os.O_RDWR | flags)
    os.lseek(descriptor, position, os.SEEK_SET)
    moved = os.splice(reading, descriptor, count)
    return moved, os.lseek(descriptor, 0, os.SEEK_CUR)


def copy_to_memory(path: str, count: int) -> int:
    return os.copy_file_range(os.open(path, os.O_RDONLY), os.memfd_create("target"), count, 0, 0)


def copy_at_positions(path: str, position: int, count: int) -> tuple[int, int, int]:
    source = os.open(path, os.O_RDONLY)
    target = os.open(os.path.dirname(path) + "/other", os.O_RDWR)
    os.lseek(source, position, os.SEEK_SET)
    moved = os.copy_file_range(source, target, count)
    return moved, os.lseek(source, 0, os.SEEK_CUR), os.lseek(target, 0, os.SEEK_CUR)


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
    row("FICLONERANGE", clone_range, PAGE, 2 * PAGE),
    row("FICLONERANGE at an odd place", clone_range, 100, 200),
    row("FIDEDUPERANGE", dedupe_range, PAGE, 2 * PAGE),
    row("vmsplice", vmsplice, 5000, 100),
    row("splice from file to file", splice_between, 5000),
    row("splice to a position", splice_to_position, 5000, 100),
    row("splice to what appends", splice_to_position, 5000, 100, os.O_APPEND),
    row("copy_file_range to another file system", copy_to_memory, 5000),
    row("copy_file_range at the positions", copy_at_positions, 5000, 100),
]
