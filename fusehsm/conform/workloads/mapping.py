"""Mappings."""

import ctypes
import mmap
import os
import signal
import threading
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "mapping")

# The functions run in an accessor: what they use are the names that accessor_worker.py gives them, not those of this module.


def map_and_touch(
    path: str, length: int, offset: int, touched: list[int], flags: int = os.O_RDONLY
) -> list[bytes]:
    descriptor = os.open(path, flags)
    mapping = mmap.mmap(descriptor, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=offset)
    return [mapping[at : at + 1] for at in touched]


def map_and_close(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
    os.close(descriptor)
    return mapping[0:1]


def map_and_write(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(
        descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=4096
    )
    mapping[0:3] = b"new"
    return mapping[0:5]


def map_twice(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    first = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=0)
    data = first[0:1] + first[5000:5001]
    second = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=8192)
    return data + second[0:1] + second[5000:5001]


def map_and_read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    return mapping[0:2] + os.pread(descriptor, 100, 5000) + mapping[5100:5101]


def map_in_thread(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
    data = []
    thread = threading.Thread(target=lambda: data.append(mapping[0:1]))
    thread.start()
    thread.join()
    return data[0]


def use_mapping_in_call(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
    reading, writing = os.pipe()
    os.write(writing, memoryview(mapping)[:100])  # the page fault happens inside write(2)
    return os.read(reading, 100)


def map_again(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    data = b""
    for _ in range(2):
        mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
        data += mapping[0:1] + mapping[5000:5001]
    return data


def map_in_two_opens(path: str) -> bytes:
    data = b""
    for _ in range(2):
        descriptor = os.open(path, os.O_RDONLY)
        mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
        data += mapping[0:1] + mapping[5000:5001]
        mapping.close()
        os.close(descriptor)
    return data


def map_shared_writable(path: str) -> None:
    mmap.mmap(os.open(path, os.O_RDONLY), 8192, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def map_shared(
    path: str, offset: int, length: int, touched: list[int], writes: list[int], flags: int = os.O_RDWR
) -> list[bytes]:
    descriptor = os.open(path, flags)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
    mapping = mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
    for at in writes:
        mapping[at : at + 3] = b"new"
    seen = [mapping[at : at + 1] for at in touched]
    if writes:
        mapping.flush()
    mapping.close()
    os.fsync(descriptor)
    return seen


def map_with(path: str, flags: int, protection: int, touch: bool) -> int:
    address = libc.mmap(None, 8192, protection, flags, os.open(path, os.O_RDONLY), 4096)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return ctypes.string_at(address, 1)[0] if touch else 0


def map_and_grow(path: str) -> bytes:
    address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, os.open(path, os.O_RDONLY), 0)
    first = ctypes.string_at(address, 1)
    address = libc.mremap(address, 4096, 16384, 1)  # MREMAP_MAYMOVE
    return first + ctypes.string_at(address + 12288, 1)


def map_in_child(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    child = os.fork()
    if child == 0:
        os._exit(mapping[5000])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def map_and_advise(path: str, advice: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    mapping.madvise(advice)
    return mapping[5000:5001]


def map_beyond_the_end(path: str, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
    return ctypes.string_at(address, 1)


def touch_beyond_the_end(path: str) -> bytes:
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    address = libc.mmap(None, 65536, mmap.PROT_READ, mmap.MAP_PRIVATE, os.open(path, os.O_RDONLY), 0)
    return ctypes.string_at(address + 40000, 1)


def map_with_length(path: str, length: int, offset: int = 0) -> int:
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, os.open(path, os.O_RDONLY), offset)
    return ctypes.get_errno() if address == ctypes.c_void_p(-1).value else 0


def lock_mapping(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(
        descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=4096
    )
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(8192)):
        raise OSError(1, "mlock")
    return mapping[0:1]


EXACT_SHARED = "shared mappings (exact)"
READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
PRIVATE, SHARED, POPULATE, LOCKED = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x8000, 0x2000
UNTOUCHED = "mappings ask when touched"
WORKLOADS = [
    row("all, touch all", map_and_touch, SIZE, 0, [0, 5000, 9000, 19999]),
    row("all, touch the first page", map_and_touch, SIZE, 0, [0]),
    row("all, touch the last page", map_and_touch, SIZE, 0, [19999]),
    row("large, touch the middle", map_and_touch, 5 * MIB, 0, [3 * MIB], size=5 * MIB),
    row("at an offset", map_and_touch, 2 * PAGE, PAGE, [0, 2 * PAGE - 1]),
    row("a byte", map_and_touch, 1, PAGE, [0]),
    row("opened for both", map_and_touch, 1, PAGE, [0], os.O_RDWR),
    row("touch twice", map_and_touch, SIZE, 0, [1, 1, 19999, 1]),
    row("and close", map_and_close),
    row("and write privately", map_and_write),
    row("two", map_twice),
    row("and read", map_and_read),
    row("touch in another thread", map_in_thread),
    row("touch inside a call", use_mapping_in_call),
    row("touch in a child", map_in_child, differs=UNTOUCHED),
    row("again", map_again, differs="pages in the cache"),
    row("in two opens", map_in_two_opens),
    row("and never touch", map_with, PRIVATE, READ, False, differs=UNTOUCHED),
    row("PROT_NONE", map_with, PRIVATE, 0, False, differs=UNTOUCHED),
    row("PROT_EXEC", map_with, PRIVATE, READ | EXECUTE, True),
    row("MAP_POPULATE", map_with, PRIVATE | POPULATE, READ, True),
    row("MAP_LOCKED", map_with, PRIVATE | LOCKED, READ, True),
    row("mlock", lock_mapping),
    row("MADV_WILLNEED", map_and_advise, 3),
    row("MADV_POPULATE_READ", map_and_advise, 22),
    row("grow with mremap", map_and_grow, differs=UNTOUCHED),
    row("longer than the file", map_beyond_the_end, 1 << 20),
    row("touch beyond the end", touch_beyond_the_end, differs=UNTOUCHED),
    row("shared, touch all", map_shared, 0, SIZE, [0, 5000, 9000, 19999], [], differs=EXACT_SHARED),
    row("shared, opened for reading", map_shared, PAGE, PAGE, [0], [], os.O_RDONLY, differs=EXACT_SHARED),
    row("shared, write", map_shared, PAGE, 2 * PAGE, [], [100], differs=EXACT_SHARED),
    row("shared, read and write", map_shared, 0, 4 * PAGE, [9000], [5000, 100], differs=EXACT_SHARED),
    row("what may not be", map_shared_writable, differs="calls that fail"),
    row("nothing", map_with_length, 0, differs="calls that fail"),
    row("at an odd offset", map_with_length, 100, 100),
]
