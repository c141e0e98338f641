"""Asynchronous I/O with raw system calls: io_submit(2) as in libaio, and io_uring(7) with one entry at a time."""

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Sequence
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, PRE_GROUP, Scene
from fusehsm.conform.workload import Need, Script, Workload, needing, one_call
from fusehsm.fanotify.abi import FAN_REPORT_TID

aio = partial(one_call, "aio")
uring = partial(one_call, "uring")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def submit_requests(
    path: str, requests: Sequence[tuple[int, int, int]], flags: int = os.O_RDWR, rw_flags: int = 0
) -> tuple[object, ...]:
    """Submit requests (opcode, offset, count) together. Returns the number taken, the result of each, and the bytes that were read."""
    setup, getevents, submitting = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}[os.uname().machine]
    context = ctypes.c_ulong()
    if libc.syscall(setup, 8, ctypes.byref(context)):
        raise OSError(ctypes.get_errno(), "io_setup")
    descriptor = os.open(path, flags)
    buffers, vectors, blocks = [], [], []
    for number, (opcode, offset, count) in enumerate(requests):
        buffer = mmap.mmap(-1, max(count, 1))
        if opcode in (1, 8):
            buffer.write(bytes([97 + number]) * count)
        buffers.append(buffer)
        address, length = ctypes.addressof(ctypes.c_char.from_buffer(buffer)), count
        if opcode in (7, 8):  # vectors
            half = count // 2
            vectors.append((ctypes.c_uint64 * 4)(address, half, address + half, count - half))
            address, length = ctypes.addressof(vectors[-1]), 2
        if opcode in (2, 3):  # fsync and fdatasync
            address, length = 0, 0
        fields = (number, 0, rw_flags, opcode, 0, descriptor, address, length, offset, 0, 0, 0)
        blocks.append(ctypes.create_string_buffer(struct.pack("=QIiHhiQQqQII", *fields), 64))
    addresses = (ctypes.c_void_p * len(blocks))(*map(ctypes.addressof, blocks))
    taken = libc.syscall(submitting, context, ctypes.c_long(len(blocks)), addresses)
    if taken < 0:
        raise OSError(ctypes.get_errno(), "io_submit")
    events = ctypes.create_string_buffer(32 * len(blocks))
    done = libc.syscall(getevents, context, ctypes.c_long(taken), ctypes.c_long(taken), events, None)
    results = {
        number: result for number, _, result, _ in struct.iter_unpack("=QQqq", events.raw[: 32 * done])
    }
    read = b"".join(
        buffers[number][: max(results.get(number, 0), 0)]
        for number, (opcode, _, _) in enumerate(requests)
        if opcode in (0, 7)
    )
    return taken, sorted(results.items()), read


DIRECT = os.O_RDWR | os.O_DIRECT
PREAD, PWRITE, FSYNC, FDSYNC, PREADV, PWRITEV = 0, 1, 2, 3, 7, 8  # linux/aio_abi.h
TOGETHER, PIECES = "requests submitted together", "asynchronous requests"
AIO = [
    aio("PREAD", submit_requests, [(PREAD, 5000, 100)]),
    aio("PREAD to the end", submit_requests, [(PREAD, 19000, 5000)]),
    aio(
        "PREAD of much", submit_requests, [(PREAD, 10, 3 * MIB)], size=5 * MIB, differs=PIECES, unsteady=True
    ),
    aio("PREADV", submit_requests, [(PREADV, 4000, 9000)]),
    aio("PWRITE", submit_requests, [(PWRITE, 5000, 100)]),
    aio("PWRITE beyond the end", submit_requests, [(PWRITE, 30000, 100)]),
    aio("PWRITEV", submit_requests, [(PWRITEV, 4000, 9000)]),
    aio(
        "PWRITE that appends", submit_requests, [(PWRITE, 0, 100)], os.O_WRONLY | os.O_APPEND, differs=PIECES
    ),
    aio(
        "PREAD with RWF_NOWAIT",
        submit_requests,
        [(PREAD, 5000, 100)],
        os.O_RDWR,
        os.RWF_NOWAIT,
        differs="RWF_NOWAIT",
    ),
    aio("PREAD of a direct file", submit_requests, [(PREAD, PAGE, 2 * PAGE)], DIRECT),
    aio("PWRITE of a direct file", submit_requests, [(PWRITE, PAGE, 2 * PAGE)], DIRECT),
    aio("PREAD of what is open for writing", submit_requests, [(PREAD, 0, 100)], os.O_WRONLY),
    aio("PREAD at a negative place", submit_requests, [(PREAD, -1, 100)]),
    aio("FSYNC", submit_requests, [(FSYNC, 0, 0)]),
    aio("FDSYNC", submit_requests, [(FDSYNC, 0, 0)]),
    aio("an unknown request", submit_requests, [(99, 0, 100)]),
    aio(
        "several",
        submit_requests,
        [(PREAD, 5000, 100), (PWRITE, 0, 50), (PREAD, 16384, 100)],
        differs=TOGETHER,
        unsteady=True,
    ),
    aio("several that fail", submit_requests, [(PREAD, 0, 10), (PREAD, -1, 10), (PREAD, 8192, 10)]),
]


def submit_entry(
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
        await scene.call(submit_entry, path, opcode, 5000, 100, flags, what="submit")

    return script


READV, WRITEV = 1, 2
READ, WRITE, FALLOCATE, OPENAT, FADVISE, FTRUNCATE, ASYNC = 22, 23, 17, 18, 24, 55, 16
IO_URING = Need("io_uring(7)", submit_entry, (READ, 0, 100), lambda result: isinstance(result, OSError))
TRUNCATES = Need(
    "IORING_OP_FTRUNCATE of io_uring(7)",
    submit_entry,
    (FTRUNCATE, 5000, 0),
    lambda result: isinstance(result, OSError) or result == (-errno.EINVAL, b""),
)
URING = [
    uring("READ", submit_entry, READ, 5000, 100),
    uring("READ of several pages", submit_entry, READ, 4000, 9000),
    uring("READ to the end", submit_entry, READ, 19000, 5000),
    uring("READV", submit_entry, READV, 4000, 9000),
    uring("WRITEV", submit_entry, WRITEV, 4000, 9000),
    uring(
        "READ of much",
        submit_entry,
        READ,
        10,
        3 * MIB,
        size=5 * MIB,
        differs="asynchronous requests",
        unsteady=True,
    ),
    uring("READ at the position", submit_entry, READ, 2**64 - 1, 100),
    uring("READ with RWF_NOWAIT", submit_entry, READ, 5000, 100, 0, os.RWF_NOWAIT, differs="RWF_NOWAIT"),
    uring("READ asynchronous", submit_entry, READ, 5000, 100, ASYNC),
    uring("WRITE", submit_entry, WRITE, 5000, 100),
    uring("WRITE asynchronous", submit_entry, WRITE, 5000, 100, ASYNC),
    uring("FALLOCATE", submit_entry, FALLOCATE, 5000, PAGE, differs="fallocate"),
    needing(TRUNCATES, uring("FTRUNCATE", submit_entry, FTRUNCATE, 5000, 0)),
    uring("OPENAT", submit_entry, OPENAT, 0, 0),
    uring("FADVISE", submit_entry, FADVISE, 0, 8192),
    Workload("uring", "READ by thread", threads(READ)),
    Workload("uring", "READ asynchronous by thread", threads(READ, ASYNC), "pid"),
]
WORKLOADS = [*AIO, *(workload if workload.needs else needing(IO_URING, workload) for workload in URING)]
