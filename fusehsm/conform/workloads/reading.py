"""Ways to read a file."""

import ctypes
import mmap
import os
import threading
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "reading")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def pread(path: str, count: int, offset: int, flags: int = 0) -> bytes:
    return os.pread(os.open(path, os.O_RDONLY | flags), count, offset)


def preadv_huge(path: str) -> int:
    buffer = mmap.mmap(-1, 0x7FFFFFFF, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return os.preadv(os.open(path, os.O_RDONLY), [buffer], 0)


def pread_huge(path: str) -> int:
    buffer = mmap.mmap(-1, 0x7FFFFFFF, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    address = (ctypes.c_char * 1).from_buffer(buffer)
    length = ctypes.c_size_t(0x7FFFFFFF)
    descriptor = os.open(path, os.O_RDONLY)
    return int(libc.pread(descriptor, address, length, ctypes.c_long(0)))


def read_at_position(path: str, position: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, position, os.SEEK_SET)
    return os.read(descriptor, count)


def read_on(path: str, count: int, times: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    return b"".join(os.read(descriptor, count) for _ in range(times))


def readv(path: str, sizes: list[int]) -> bytes:
    buffers = [bytearray(size) for size in sizes]
    count = os.readv(os.open(path, os.O_RDONLY), buffers)
    return b"".join(buffers)[:count]


def preadv(path: str, sizes: list[int], offset: int, flags: int = 0) -> bytes:
    buffers = [bytearray(size) for size in sizes]
    count = os.preadv(os.open(path, os.O_RDONLY), buffers, offset, flags)
    return b"".join(buffers)[:count]


def preadv2_at_position(path: str, position: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, position, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(count)
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), count)
    got = libc.preadv2(descriptor, vector, 1, ctypes.c_long(-1), 0)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == position + got
    return bytes(buffer.raw[:got])


def read_direct(path: str, count: int, offset: int) -> bytes:
    buffer = mmap.mmap(-1, count)
    got = os.preadv(os.open(path, os.O_RDONLY | os.O_DIRECT), [buffer], offset)
    return buffer[:got]


def read_direct_oddly(path: str, count: int, offset: int, place: int) -> bytes:
    buffer = memoryview(mmap.mmap(-1, count + place))[place:]
    got = os.preadv(os.open(path, os.O_RDONLY | os.O_DIRECT), [buffer], offset)
    return bytes(buffer[:got])


def read_through_path_descriptor(path: str) -> bytes:
    return os.pread(os.open(path, os.O_PATH), 100, 5000)


def read_ahead(path: str, offset: int, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    if libc.readahead(descriptor, ctypes.c_int64(offset), ctypes.c_size_t(count)):
        raise OSError(ctypes.get_errno(), "readahead")
    return mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[offset : offset + 1]


def read_into_own_mapping(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    count = os.preadv(descriptor, [memoryview(mapping)[100:5000]], 9000)
    return mapping[: 100 + count]


def read_through_duplicate(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    other = os.dup(descriptor)
    os.close(descriptor)
    return os.pread(other, 100, 5000)


def read_in_thread(path: str, count: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    data = []
    thread = threading.Thread(target=lambda: data.append(os.pread(descriptor, count, 5000)))
    thread.start()
    thread.join()
    return data[0]


def open_in_thread(path: str, count: int) -> bytes:
    descriptors = []
    thread = threading.Thread(target=lambda: descriptors.append(os.open(path, os.O_RDONLY)))
    thread.start()
    thread.join()
    return os.pread(descriptors[0], count, 5000)


def bad_buffer(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    done = libc.pread(descriptor, ctypes.c_void_p(8), ctypes.c_size_t(100), ctypes.c_long(5000))
    return ctypes.get_errno() if done < 0 else 0


def read_nothing(path: str, offset: int) -> bytes:
    return os.pread(os.open(path, os.O_RDONLY), 0, offset)


def read_duplicate_and_original(path: str) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    other = os.dup(descriptor)
    return [os.read(each, 3000) for each in (descriptor, other, descriptor)]


def advise(path: str, advice: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 8192, advice)
    # posix_fadvise(2) does not wait for read-ahead. Touching a page does.
    return mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)[5000:5001]


def find_data(path: str) -> tuple[int, int]:
    descriptor = os.open(path, os.O_RDWR)
    os.ftruncate(descriptor, 0)
    os.ftruncate(descriptor, 1 << 20)
    os.pwrite(descriptor, b"x", 500000)
    return os.lseek(descriptor, 0, os.SEEK_HOLE), os.lseek(descriptor, 0, os.SEEK_END)


AHEAD = "read-ahead asks"
WORKLOADS = [
    *(
        row(f"pread {count}@{offset}", pread, count, offset)
        for count, offset in (
            (100, 10),
            (1, 4095),
            (2, 4095),
            (5000, 4000),
            (PAGE, PAGE),
            (2 * PAGE, PAGE),
            (100, SIZE),
            (100, SIZE - 50),
            (100000, 0),
            (PAGE, 10 * PAGE),
            (100, MIB + 5),
            (100, 2**63 - 201),
        )
    ),
    row("pread 4 MiB", pread, 4 * MIB, 0, size=5 * MIB),
    row("pread 4 MiB in odd places", pread, 4 * MIB, 10, size=5 * MIB),
    row("pread 4 MiB to the end", pread, 4 * MIB, 3 * MIB + 1, size=5 * MIB),
    row("pread of an empty file", pread, 100, 0, size=0),
    row("pread 2 GiB", pread_huge),
    row("preadv 2 GiB", preadv_huge),
    row("read at a position", read_at_position, 5000, 100),
    row("large read at a position", read_at_position, 5000, 3 * MIB, size=5 * MIB),
    row("read on", read_on, 5000, 3),
    row("read on by whole pages", read_on, PAGE, 2),
    row("read on to the end", read_on, 9000, 4),
    row("readv", readv, [3, 5000]),
    row("readv of 300", readv, [100] * 300),
    row("large readv of 300", readv, [10000] * 300, size=5 * MIB),
    row("preadv", preadv, [3, 5000], 5000),
    row("preadv of nothing", preadv, [0, 0], 5000),
    row("preadv2 RWF_HIPRI", preadv, [100], 5000, os.RWF_HIPRI),
    row("preadv2 RWF_NOWAIT", preadv, [100], 5000, os.RWF_NOWAIT, differs="RWF_NOWAIT"),
    row("preadv2 RWF_DONTCACHE", preadv, [100], 5000, 0x80, differs="RWF_NOWAIT"),
    row("preadv2 at a position", preadv2_at_position, 5000, 100),
    row("preadv2 with an unknown flag", preadv, [100], 5000, 0x10000, differs="RWF_NOWAIT"),
    row("O_DIRECT read", read_direct, PAGE, PAGE),
    row("O_DIRECT read to the end", read_direct, 2 * PAGE, 4 * PAGE),
    row("O_DIRECT read past the end", read_direct, PAGE, 8 * PAGE),
    row("O_DIRECT read at an odd place", read_direct_oddly, PAGE, 100, 0, differs="what ext4 refuses"),
    row("O_DIRECT read of an odd length", read_direct_oddly, 100, PAGE, 0, differs="what ext4 refuses"),
    row("O_DIRECT read into an odd buffer", read_direct_oddly, PAGE, PAGE, 3, differs="what ext4 refuses"),
    row("preadv2 RWF_SYNC", preadv, [100], 5000, os.RWF_SYNC),
    row("preadv2 RWF_APPEND", preadv, [100], 5000, os.RWF_APPEND),
    row("preadv2 RWF_ATOMIC", preadv, [100], 5000, 0x40, differs="calls that fail"),
    row("read through O_PATH", read_through_path_descriptor),
    row("read into an own mapping", read_into_own_mapping),
    row("readahead", read_ahead, 5000, 100, differs=AHEAD, unsteady=True),
    row("O_NONBLOCK read", pread, 100, 5000, os.O_NONBLOCK),
    row("read at offset -1", pread, 100, -1),
    row("read what is open for writing", pread, 100, 0, os.O_WRONLY),
    row("read through a duplicate", read_through_duplicate),
    row("read through both duplicates", read_duplicate_and_original),
    row("read in another thread", read_in_thread, 100),
    row("large read in another thread", read_in_thread, 3 * MIB, size=5 * MIB),
    row("opened in another thread", open_in_thread, 100),
    row("opened in another thread, large read", open_in_thread, 3 * MIB, size=5 * MIB),
    row("into nowhere", bad_buffer, differs="calls that fail"),
    row("nothing", read_nothing, 0, differs="empty reads and writes"),
    row("nothing within a page", read_nothing, 100, differs="empty reads and writes"),
    row("fadvise WILLNEED", advise, os.POSIX_FADV_WILLNEED, differs=AHEAD, unsteady=True),
    row("fadvise DONTNEED", advise, os.POSIX_FADV_DONTNEED),
    row("holes", find_data, differs="holes are data"),
]
