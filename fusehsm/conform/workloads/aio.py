"""io_submit(2): asynchronous I/O as in libaio, with raw system calls."""

import ctypes
import mmap
import os
import struct
from collections.abc import Sequence
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE
from fusehsm.conform.workload import one_call

row = partial(one_call, "aio")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def submit(
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
WORKLOADS = [
    row("PREAD", submit, [(PREAD, 5000, 100)]),
    row("PREAD to the end", submit, [(PREAD, 19000, 5000)]),
    row("PREAD of much", submit, [(PREAD, 10, 3 * MIB)], size=5 * MIB, differs=PIECES, unsteady=True),
    row("PREADV", submit, [(PREADV, 4000, 9000)]),
    row("PWRITE", submit, [(PWRITE, 5000, 100)]),
    row("PWRITE beyond the end", submit, [(PWRITE, 30000, 100)]),
    row("PWRITEV", submit, [(PWRITEV, 4000, 9000)]),
    row("PWRITE that appends", submit, [(PWRITE, 0, 100)], os.O_WRONLY | os.O_APPEND, differs=PIECES),
    row(
        "PREAD with RWF_NOWAIT", submit, [(PREAD, 5000, 100)], os.O_RDWR, os.RWF_NOWAIT, differs="RWF_NOWAIT"
    ),
    row("PREAD of a direct file", submit, [(PREAD, PAGE, 2 * PAGE)], DIRECT),
    row("PWRITE of a direct file", submit, [(PWRITE, PAGE, 2 * PAGE)], DIRECT),
    row("PREAD of what is open for writing", submit, [(PREAD, 0, 100)], os.O_WRONLY),
    row("PREAD at a negative place", submit, [(PREAD, -1, 100)]),
    row("FSYNC", submit, [(FSYNC, 0, 0)]),
    row("FDSYNC", submit, [(FDSYNC, 0, 0)]),
    row("an unknown request", submit, [(99, 0, 100)]),
    row(
        "several",
        submit,
        [(PREAD, 5000, 100), (PWRITE, 0, 50), (PREAD, 16384, 100)],
        differs=TOGETHER,
        unsteady=True,
    ),
    row("several that fail", submit, [(PREAD, 0, 10), (PREAD, -1, 10), (PREAD, 8192, 10)]),
]
