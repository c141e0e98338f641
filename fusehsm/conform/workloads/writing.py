"""Ways to write a file, to truncate it, and fallocate(2) in all modes."""

import ctypes
import mmap
import os
import resource
import signal
import threading
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import Need, needing, one_call

row = partial(one_call, "writing")
truncated = partial(one_call, "truncating")
allocated = partial(one_call, "allocating", differs="fallocate")

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
NOAPPEND = Need(
    "RWF_NOAPPEND of pwritev2(2)", pwritev_to_append, (0x20,), lambda result: isinstance(result, OSError)
)
WRITING = [
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
    needing(NOAPPEND, row("pwritev RWF_NOAPPEND", pwritev_to_append, 0x20)),
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


def truncate(path: str, size: int) -> int:
    os.truncate(path, size)
    return os.stat(path).st_size


def ftruncate(path: str, size: int, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags)
    os.ftruncate(descriptor, size)
    return os.fstat(descriptor).st_size


TRUNCATING = [
    *(
        truncated(f"{act.__name__} to {size}", act, size)
        for size in (0, 100, PAGE, 5000, SIZE, 30000, MIB)
        for act in (truncate, ftruncate)
    ),
    truncated("truncate to -1", truncate, -1),
    truncated("truncate of what is empty", truncate, 0, size=0),
    truncated("ftruncate of what is open for reading", ftruncate, 5, os.O_RDONLY),
    truncated("ftruncate of what appends", ftruncate, 5000, os.O_WRONLY | os.O_APPEND),
]


def fallocate(path: str, mode: int, offset: int, length: int, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags)
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")
    return os.fstat(descriptor).st_size


def posix_fallocate(path: str, offset: int, length: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    os.posix_fallocate(descriptor, offset, length)
    return os.fstat(descriptor).st_size


def allocate_in_child(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    child = os.fork()
    if child == 0:
        os._exit(libc.fallocate(descriptor, 0, ctypes.c_int64(5000), ctypes.c_int64(100)) != 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


MODES = ("fallocate", "fallocate modes")
ZEROS = ("fallocate", "zeros by fallocate")
KEEP, PUNCH, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 0x10, 0x20, 0x40  # linux/falloc.h
ALLOCATING = [
    allocated("within", fallocate, 0, 5000, 100),
    allocated("beyond the end", fallocate, 0, 5000, 95000),
    allocated("far beyond the end", fallocate, 0, MIB, 100),
    allocated("large", fallocate, 0, 100, 3 * MIB),
    allocated("keeping the size", fallocate, KEEP, 5000, 95000),
    allocated("a hole", fallocate, PUNCH | KEEP, PAGE, 2 * PAGE),
    allocated("a hole in odd places", fallocate, PUNCH | KEEP, 5000, 9000),
    allocated("a hole to beyond the end", fallocate, PUNCH | KEEP, 2 * PAGE, MIB),
    allocated("a hole at the end", fallocate, PUNCH | KEEP, SIZE, PAGE),
    allocated("zeros", fallocate, ZERO, 5000, 9000, differs=ZEROS),
    allocated("zeros beyond the end", fallocate, ZERO, 19000, 9000, differs=ZEROS),
    allocated("zeros keeping the size", fallocate, ZERO | KEEP, 19000, 9000, differs=ZEROS),
    allocated("collapse", fallocate, COLLAPSE, PAGE, PAGE, differs=MODES),
    allocated("insert", fallocate, INSERT, PAGE, PAGE, differs=MODES),
    allocated("unshare", fallocate, UNSHARE, PAGE, PAGE, differs=MODES),
    allocated("zeros on the device", fallocate, 0x80, PAGE, PAGE, differs=("fallocate", "calls that fail")),
    allocated("zeros on the device, keeping the size", fallocate, 0x80 | KEEP, PAGE, PAGE, differs=()),
    allocated("collapse to the end", fallocate, COLLAPSE, PAGE, 10 * PAGE, differs=MODES),
    allocated("insert beyond the end", fallocate, INSERT, 10 * PAGE, PAGE, differs=MODES),
    allocated("collapse in odd places", fallocate, COLLAPSE, 100, PAGE, differs=MODES),
    allocated("what appends", fallocate, 0, 5000, 95000, os.O_WRONLY | os.O_APPEND),
    allocated("a hole without keeping the size", fallocate, PUNCH, 0, PAGE, differs=()),
    allocated("an unknown mode", fallocate, 0x1000, 0, PAGE, differs=()),
    allocated("nothing", fallocate, 0, 0, 0, differs=()),
    allocated("less than nothing", fallocate, 0, 0, -1, differs=()),
    allocated("at a negative place", fallocate, 0, -1, PAGE, differs=()),
    allocated("more than can be", fallocate, 0, 2**63 - 10, 100, differs=("fallocate", "calls that fail")),
    allocated("what is open for reading", fallocate, 0, 0, PAGE, os.O_RDONLY, differs=()),
    allocated("posix_fallocate", posix_fallocate, 5000, 95000),
    allocated("in a child", allocate_in_child),
]
WORKLOADS = [*WRITING, *TRUNCATING, *ALLOCATING]
