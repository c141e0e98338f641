"""Ways to write a file."""

import ctypes
import mmap
import os
import resource
import signal
import threading
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE
from fusehsm.conform.workload import one_call

row = partial(one_call, "writing")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def pwrite_only(path: str, count: int, offset: int, flags: int = os.O_WRONLY) -> tuple[int, int]:
    descriptor = os.open(path, flags)
    written = os.pwrite(descriptor, bytes(count), offset)
    return written, os.fstat(descriptor).st_size


def write_on(path: str, counts: list[int], flags: int = 0, position: int = 0) -> tuple[list[int], int]:
    descriptor = os.open(path, os.O_WRONLY | flags)
    os.lseek(descriptor, position, os.SEEK_SET)
    written = [os.write(descriptor, bytes(count)) for count in counts]
    return written, os.fstat(descriptor).st_size


def pwritev(path: str, sizes: list[int], offset: int, flags: int = 0) -> tuple[int, int]:
    descriptor = os.open(path, os.O_WRONLY)
    written = os.pwritev(descriptor, [bytes(size) for size in sizes], offset, flags)
    return written, os.fstat(descriptor).st_size


def writev(path: str, sizes: list[int]) -> tuple[int, int]:
    descriptor = os.open(path, os.O_WRONLY)
    written = os.writev(descriptor, [bytes(size) for size in sizes])
    return written, os.fstat(descriptor).st_size


def write_and_read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"new", 5000)
    return os.pread(descriptor, 3, 5000)


def write_in_thread(path: str, count: int) -> int:
    descriptor = os.open(path, os.O_WRONLY)
    thread = threading.Thread(target=lambda: os.pwrite(descriptor, bytes(count), 5000))
    thread.start()
    thread.join()
    return os.fstat(descriptor).st_size


def write_nothing(path: str) -> int:
    return os.pwrite(os.open(path, os.O_WRONLY), b"", 0)


def bad_buffer(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    done = libc.pwrite(descriptor, ctypes.c_void_p(8), ctypes.c_size_t(100), ctypes.c_long(5000))
    return ctypes.get_errno() if done < 0 else 0


def write_direct(path: str, count: int, offset: int) -> int:
    buffer = mmap.mmap(-1, count)
    return os.pwritev(os.open(path, os.O_WRONLY | os.O_DIRECT), [buffer], offset)


def write_direct_oddly(path: str, count: int, offset: int, place: int) -> int:
    buffer = memoryview(mmap.mmap(-1, count + place))[place:]
    return os.pwritev(os.open(path, os.O_WRONLY | os.O_DIRECT), [buffer], offset)


def pwritev2_at_position(path: str, position: int, count: int) -> tuple[int, int]:
    descriptor = os.open(path, os.O_WRONLY)
    os.lseek(descriptor, position, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(b"n" * count, count)
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), count)
    done = libc.pwritev2(descriptor, vector, 1, ctypes.c_long(-1), 0)
    return done, os.lseek(descriptor, 0, os.SEEK_CUR)


def pwritev_to_append(path: str, flags: int) -> tuple[int, int]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    return os.pwritev(descriptor, [bytes(100)], 5000, flags), os.fstat(descriptor).st_size


def write_from_own_mapping(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    return os.pwritev(descriptor, [memoryview(mapping)[9000:9100]], 100)


def write_back(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"new", 5000)
    return int(libc.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(8192), 7))


def write_beyond_the_limit(path: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return os.pwrite(os.open(path, os.O_WRONLY), bytes(100), 15000)


APPEND = os.O_APPEND
WORKLOADS = [
    *(
        row(f"pwrite {count}@{offset}", pwrite_only, count, offset)
        for count, offset in (
            (10, 100),
            (2, 4095),
            (5000, 4000),
            (PAGE, PAGE),
            (1, 100001),
            (4 * MIB, 0),
            (4 * MIB, 10),
        )
    ),
    row("write on", write_on, [5000, 5000]),
    row("large write", write_on, [3000000]),
    row("append", write_on, [10], APPEND),
    row("append after a seek", write_on, [10], APPEND, 9000),
    row("append twice", write_on, [10, 20], APPEND),
    row("append much, twice", write_on, [3000000, 3000000], APPEND),
    row("pwrite that appends", pwrite_only, 10, 100, os.O_WRONLY | APPEND),
    row("large pwrite that appends", pwrite_only, 3000000, 100, os.O_WRONLY | APPEND),
    row("pwritev RWF_APPEND", pwritev, [100], 5000, os.RWF_APPEND),
    row("large pwritev RWF_APPEND", pwritev, [3000000], 5000, os.RWF_APPEND),
    row("pwritev RWF_DSYNC", pwritev, [100], 5000, os.RWF_DSYNC),
    row("pwritev RWF_SYNC", pwritev, [100], 5000, os.RWF_SYNC),
    row("pwritev RWF_HIPRI", pwritev, [100], 5000, os.RWF_HIPRI),
    row("pwritev RWF_DONTCACHE", pwritev, [100], 5000, 0x80, differs="RWF_NOWAIT"),
    row("pwritev RWF_ATOMIC", pwritev, [PAGE], PAGE, 0x40, differs="calls that fail"),
    row("pwritev RWF_NOAPPEND", pwritev_to_append, 0x20),
    row("pwritev with an unknown flag", pwritev, [100], 5000, 0x10000, differs="RWF_NOWAIT"),
    row("pwritev2 at a position", pwritev2_at_position, 5000, 100),
    row("pwritev RWF_NOWAIT", pwritev, [100], 5000, os.RWF_NOWAIT, differs="RWF_NOWAIT"),
    row("pwritev of 300", pwritev, [100] * 300, 5000),
    row("large pwritev of 300", pwritev, [10000] * 300, 5000),
    row("writev", writev, [3, 5000]),
    row("O_SYNC", pwrite_only, 100, 5000, os.O_WRONLY | os.O_SYNC),
    row("O_DIRECT", write_direct, PAGE, PAGE),
    row("O_DIRECT at an odd place", write_direct_oddly, PAGE, 100, 0, differs="what ext4 refuses"),
    row("O_DIRECT of an odd length", write_direct_oddly, 100, PAGE, 0, differs="what ext4 refuses"),
    row("O_DIRECT from an odd buffer", write_direct_oddly, PAGE, PAGE, 3, differs="what ext4 refuses"),
    row("O_DSYNC", pwrite_only, 100, 5000, os.O_WRONLY | os.O_DSYNC),
    row("from an own mapping", write_from_own_mapping),
    row("and written back", write_back),
    row("in another thread", write_in_thread, 100),
    row("much in another thread", write_in_thread, 3000000),
    row("and read", write_and_read),
    row("at offset -1", pwrite_only, 10, -1),
    row("what is open for reading", pwrite_only, 10, 0, os.O_RDONLY),
    row("from nowhere", bad_buffer, differs="calls that fail"),
    row("nothing", write_nothing, differs="empty reads and writes"),
    row("beyond RLIMIT_FSIZE", write_beyond_the_limit, differs="calls that fail"),
]
