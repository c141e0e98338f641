"""io_uring(7), with one entry at a time."""

import ctypes
import mmap
import os
import struct
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, PRE_GROUP, Scene
from fusehsm.conform.workload import Script, Workload, one_call
from fusehsm.fanotify.abi import FAN_REPORT_TID

row = partial(one_call, "uring")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def submit(
    path: str, opcode: int, offset: int, count: int, flags: int = 0, rw_flags: int = 0
) -> tuple[int, bytes]:
    """Submit one entry (io_uring.h) on the open file. Returns its result and the content of the buffer."""
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, parameters)  # io_uring_setup
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    _, sq_tail, sq_mask, _, _, _, sq_array = struct.unpack_from("=7I", parameters, 40)
    cq_head, _, cq_mask, _, _, cqes = struct.unpack_from("=6I", parameters, 80)
    submissions = mmap.mmap(ring, 4096, flags=mmap.MAP_SHARED | 0x8000, offset=0)
    completions = mmap.mmap(ring, 4096, flags=mmap.MAP_SHARED | 0x8000, offset=0x8000000)
    entries = mmap.mmap(ring, 4096, flags=mmap.MAP_SHARED | 0x8000, offset=0x10000000)
    descriptor = os.open(path, os.O_RDWR)
    buffer = ctypes.create_string_buffer(b"n" * count if opcode in (2, 23) else count, count)
    address, length, place = ctypes.addressof(buffer), count, offset
    halves = (ctypes.c_uint64 * 4)(address, count // 2, address + count // 2, count - count // 2)
    if opcode in (1, 2):  # READV and WRITEV
        address, length = ctypes.addressof(halves), 2
    if opcode == 17:  # FALLOCATE: the length is where the address is, the mode where the length is
        address, length = count, 0
    if opcode == 55:  # FTRUNCATE: only a length, in the place of the offset
        address, length = 0, 0
    if opcode == 24:  # FADVISE
        address = 0
    name = ctypes.create_string_buffer(os.fsencode(path))
    if opcode == 18:  # OPENAT
        address, length, place, descriptor = ctypes.addressof(name), 0, 0, -100
    struct.pack_into(
        "=BBHiQQIIQHHiQQ",
        entries,
        0,
        opcode,
        flags,
        0,
        descriptor,
        place,
        address,
        length,
        rw_flags,
        7,
        0,
        0,
        0,
        0,
        0,
    )
    (tail,) = struct.unpack_from("=I", submissions, sq_tail)
    (mask,) = struct.unpack_from("=I", submissions, sq_mask)
    struct.pack_into("=I", submissions, sq_array + 4 * (tail & mask), 0)
    struct.pack_into("=I", submissions, sq_tail, tail + 1)
    done = libc.syscall(426, ring, 1, 1, 1, None, 0)  # io_uring_enter, which waits for one
    if done < 0:
        raise OSError(ctypes.get_errno(), "io_uring_enter")
    (head,) = struct.unpack_from("=I", completions, cq_head)
    (mask,) = struct.unpack_from("=I", completions, cq_mask)
    _, result = struct.unpack_from("=Qi", completions, cqes + 16 * (head & mask))
    data = buffer.raw if opcode in (1, 22) else b""
    return min(result, 3) if opcode == 18 else result, data


def threads(opcode: int, flags: int = 0) -> Script:
    """The event's thread, for a group with FAN_REPORT_TID."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        await scene.listen(scene.everywhere(), flags=PRE_GROUP | FAN_REPORT_TID)
        await scene.call(submit, path, opcode, 5000, 100, flags)

    return script


READV, WRITEV = 1, 2
READ, WRITE, FALLOCATE, OPENAT, FADVISE, FTRUNCATE, ASYNC = 22, 23, 17, 18, 24, 55, 16
WORKLOADS = [
    row("READ", submit, READ, 5000, 100),
    row("READ of several pages", submit, READ, 4000, 9000),
    row("READ to the end", submit, READ, 19000, 5000),
    row("READV", submit, READV, 4000, 9000),
    row("WRITEV", submit, WRITEV, 4000, 9000),
    row(
        "READ of much",
        submit,
        READ,
        10,
        3 * MIB,
        size=5 * MIB,
        differs="asynchronous requests",
        unsteady=True,
    ),
    row("READ at the position", submit, READ, 2**64 - 1, 100),
    row("READ with RWF_NOWAIT", submit, READ, 5000, 100, 0, os.RWF_NOWAIT, differs="RWF_NOWAIT"),
    row("READ asynchronous", submit, READ, 5000, 100, ASYNC),
    row("WRITE", submit, WRITE, 5000, 100),
    row("WRITE asynchronous", submit, WRITE, 5000, 100, ASYNC),
    row("FALLOCATE", submit, FALLOCATE, 5000, PAGE, differs="fallocate"),
    row("FTRUNCATE", submit, FTRUNCATE, 5000, 0),
    row("OPENAT", submit, OPENAT, 0, 0),
    row("FADVISE", submit, FADVISE, 0, 8192),
    Workload("uring", "READ by thread", threads(READ)),
    Workload("uring", "READ asynchronous by thread", threads(READ, ASYNC), "pid"),
]
