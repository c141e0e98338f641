"""Ways to map a file."""

import ctypes
import mmap
import os
import signal
import threading
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE, Scene
from fusehsm.conform.workload import Need, Script, Workload, needing, one_call

row = partial(one_call, "mapping")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


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


def map_and_advise(path: str, advice: int, protection: int = mmap.PROT_READ) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_PRIVATE, prot=protection)
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


def map_shared_with(
    path: str, flags: int, protection: int, mode: int, touched: list[int], written: list[int]
) -> bytes:
    address = libc.mmap(None, 16384, protection, flags, os.open(path, mode), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    for at in written:
        ctypes.memmove(address + at, b"new", 3)
    return b"".join(ctypes.string_at(address + at, 1) for at in touched)


def map_shared_and_grow(path: str) -> bytes:
    address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, os.open(path, os.O_RDWR), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    address = libc.mremap(address, 4096, 16384, 1)  # MREMAP_MAYMOVE
    return ctypes.string_at(address + 12288, 1)


def map_shared_in_child(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    child = os.fork()
    if child == 0:
        mapping[5000:5003] = b"new"
        os._exit(0)
    os.waitpid(child, 0)
    return mapping[5000:5003]


def map_and_protect(path: str) -> bytes:
    address = libc.mmap(None, 8192, 0, mmap.MAP_PRIVATE, os.open(path, os.O_RDONLY), 4096)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(8192), mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")
    return ctypes.string_at(address + 5000, 1)


def map_and_forget(path: str) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096)
    seen = [mapping[5000:5001]]
    mapping.madvise(mmap.MADV_DONTNEED)
    return [*seen, mapping[5000:5001]]


def map_over_another(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, 8192, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
    fixed = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
    libc.mmap(ctypes.c_void_p(address), 4096, mmap.PROT_READ, fixed, descriptor, 8192)
    return ctypes.string_at(address, 1) + ctypes.string_at(address + 4096, 1)


def read_mapping_as_another(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, 8192, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 4096)
    buffer = ctypes.create_string_buffer(100)
    ours = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 100)
    theirs = (ctypes.c_uint64 * 2)(address + 5000, 100)
    pid, one, none = os.getpid(), ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.process_vm_readv(pid, ours, one, theirs, one, none) < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return buffer.raw


def map_reordered(path: str) -> bytes:
    address = libc.mmap(None, 8192, mmap.PROT_READ, mmap.MAP_SHARED, os.open(path, os.O_RDWR), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    length, page, none = ctypes.c_size_t(4096), ctypes.c_size_t(2), 0
    if libc.remap_file_pages(ctypes.c_void_p(address), length, none, page, none):
        raise OSError(ctypes.get_errno(), "remap_file_pages")
    return ctypes.string_at(address, 1) + ctypes.string_at(address + 4096, 1)


def write_shared_and_close(path: str, sync: bool) -> int:
    descriptor = os.open(path, os.O_RDWR)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, 4096, protection, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.memmove(address, b"new", 3)
    os.close(descriptor)
    return int(libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(4096), 4)) if sync else 0


def mapped_still(sync: bool) -> Script:
    """Bytes that were written to a shared mapping, as the backing file has them while the file is still mapped."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        listener = await scene.listen(scene.everywhere())
        await scene.call(write_shared_and_close, path, sync)
        listener.close()
        scene.say("meanwhile", "file holds", scene.content())

    return script


UNWRITTEN, EXT4 = "pages not yet written", "what ext4 refuses"
EXACT_SHARED = "shared mappings (exact)"
READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
PRIVATE, SHARED, POPULATE, LOCKED = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x8000, 0x2000
POPULATES = Need(
    "MADV_POPULATE_READ of madvise(2)", map_and_advise, (22,), lambda result: isinstance(result, OSError)
)
UNTOUCHED, FAIL = "mappings ask when touched", "calls that fail"
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
    needing(POPULATES, row("MADV_POPULATE_READ", map_and_advise, 22)),
    row("grow with mremap", map_and_grow, differs=UNTOUCHED),
    row("longer than the file", map_beyond_the_end, 1 << 20),
    row("touch beyond the end", touch_beyond_the_end, differs=UNTOUCHED),
    row("shared, touch all", map_shared, 0, SIZE, [0, 5000, 9000, 19999], [], differs=EXACT_SHARED),
    row("shared, opened for reading", map_shared, PAGE, PAGE, [0], [], os.O_RDONLY, differs=EXACT_SHARED),
    row("shared, write", map_shared, PAGE, 2 * PAGE, [], [100], differs=EXACT_SHARED),
    row("shared, read and write", map_shared, 0, 4 * PAGE, [9000], [5000, 100], differs=EXACT_SHARED),
    row("shared, opened for writing", map_shared_with, SHARED, READ, os.O_WRONLY, [0], [], differs=FAIL),
    row(
        *("shared, write only", map_shared_with, SHARED, WRITE, os.O_RDWR, [], [5000]),
        differs=(UNWRITTEN, EXACT_SHARED),
    ),
    row(
        *("shared, MAP_POPULATE", map_shared_with, SHARED | POPULATE, READ, os.O_RDWR, [5000], []),
        differs=EXACT_SHARED,
    ),
    row(
        *("shared, PROT_EXEC", map_shared_with, SHARED, READ | EXECUTE, os.O_RDWR, [5000], []),
        differs=EXACT_SHARED,
    ),
    row("MAP_SHARED_VALIDATE", map_shared_with, 3, READ, os.O_RDWR, [5000], [], differs=EXACT_SHARED),
    row("MAP_SYNC", map_shared_with, 3 | 0x80000, READ, os.O_RDWR, [5000], [], differs=FAIL),
    row(
        *("MAP_SYNC without validation", map_shared_with, SHARED | 0x80000, READ, os.O_RDWR, [0], []),
        differs=(EXT4, EXACT_SHARED),
    ),
    row("an unknown flag, validated", map_shared_with, 3 | 1 << 25, READ, os.O_RDWR, [0], [], differs=FAIL),
    row("an unknown flag", map_shared_with, PRIVATE | 1 << 25, READ, os.O_RDWR, [0], []),
    row(
        *("shared, and never touched", map_shared_with, SHARED, READ, os.O_RDWR, [], []),
        differs=(UNTOUCHED, EXACT_SHARED),
    ),
    row("shared, grow with mremap", map_shared_and_grow, differs=(UNTOUCHED, EXACT_SHARED)),
    row("shared with a child that writes", map_shared_in_child, differs=(UNTOUCHED, EXACT_SHARED)),
    row("shared, pages in another order", map_reordered, differs=(UNTOUCHED, EXACT_SHARED)),
    needing(POPULATES, row("MADV_POPULATE_WRITE", map_and_advise, 23, READ | WRITE)),
    row("mprotect", map_and_protect),
    row("MADV_DONTNEED and again", map_and_forget),
    row("MAP_FIXED over another", map_over_another, differs=UNTOUCHED),
    row("process_vm_readv", read_mapping_as_another),
    Workload("mapping", "shared, written and closed", mapped_still(False), (UNWRITTEN, EXACT_SHARED)),
    Workload("mapping", "shared, written, closed and msync", mapped_still(True), EXACT_SHARED),
    row("what may not be", map_shared_writable, differs="calls that fail"),
    row("nothing", map_with_length, 0, differs="calls that fail"),
    row("at an odd offset", map_with_length, 100, 100),
]
