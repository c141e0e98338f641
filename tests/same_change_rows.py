"""More calls and their events: writing, truncation, copies within the kernel, mappings (facts measured on Linux 6.18, ext4)."""

import ctypes
import errno
import mmap
import os
import socket
import threading
from dataclasses import replace

from tests.worlds import CONTENT, MIB, PAGE, SIZE, A, Expected, Failed, O, P, Row, bytes_at

# Writing. Most return how much was written, and the new size.


def pwrite_only(path: str, count: int, offset: int, flags: int = 0) -> tuple[int, int]:
    descriptor = os.open(path, os.O_WRONLY | flags)
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


def writing(count: int, offset: int, start: int, length: int, size: int = SIZE) -> Row:
    returned = (count, max(size, offset + count))
    return Row(
        f"pwrite {count}@{offset}", pwrite_only, (O, P(start, length)), returned, (count, offset), size
    )


APPEND = os.O_APPEND
WRITE_ROWS = [
    writing(10, 100, 0, PAGE),
    writing(2, 4095, 0, 2 * PAGE),
    writing(5000, 4000, 0, 3 * PAGE),
    writing(PAGE, PAGE, PAGE, PAGE),
    writing(1, 100001, 24 * PAGE, PAGE),
    writing(4 * MIB, 0, 0, 4 * MIB),
    writing(4 * MIB, 10, 0, 4 * MIB + PAGE),
    Row("write on", write_on, (O, P(0, 2 * PAGE), P(PAGE, 2 * PAGE)), ([5000, 5000], SIZE), ([5000, 5000],)),
    Row("large write", write_on, (O, P(0, 733 * PAGE)), ([3000000], 3000000), ([3000000],)),
    Row("append", write_on, (O, P(0, PAGE)), ([10], SIZE + 10), ([10], APPEND)),
    Row("append after a seek", write_on, (O, P(2 * PAGE, PAGE)), ([10], SIZE + 10), ([10], APPEND, 9000)),
    Row(
        "append twice",
        write_on,
        (O, P(0, PAGE), P(4 * PAGE, PAGE)),
        ([10, 20], SIZE + 30),
        ([10, 20], APPEND),
    ),
    Row(
        "append much, twice",
        write_on,
        (O, P(0, 733 * PAGE), P(737 * PAGE, 733 * PAGE)),
        ([3000000, 3000000], SIZE + 6000000),
        ([3000000, 3000000], APPEND),
    ),
    Row("pwrite that appends", pwrite_only, (O, P(0, PAGE)), (10, SIZE + 10), (10, 100, APPEND)),
    Row(
        "large pwrite that appends",
        pwrite_only,
        (O, P(0, 733 * PAGE)),
        (3000000, SIZE + 3000000),
        (3000000, 100, APPEND),
    ),
    Row("pwritev RWF_APPEND", pwritev, (O, P(PAGE, PAGE)), (100, SIZE + 100), ([100], 5000, os.RWF_APPEND)),
    Row(
        "large pwritev RWF_APPEND",
        pwritev,
        (O, P(PAGE, 733 * PAGE)),
        (3000000, SIZE + 3000000),
        ([3000000], 5000, os.RWF_APPEND),
    ),
    Row("pwritev RWF_DSYNC", pwritev, (O, P(PAGE, PAGE)), (100, SIZE), ([100], 5000, os.RWF_DSYNC)),
    Row("pwritev of 300", pwritev, (O, P(PAGE, 8 * PAGE)), (30000, 35000), ([100] * 300, 5000)),
    Row(
        "pwritev of 300, large",
        pwritev,
        (O, P(PAGE, 733 * PAGE)),
        (3000000, 3005000),
        ([10000] * 300, 5000),
    ),
    Row("writev", writev, (O, P(0, 2 * PAGE)), (5003, SIZE), ([3, 5000],)),
    Row("write in another thread", write_in_thread, (O, P(PAGE, PAGE)), SIZE, (100,)),
    Row("large write in another thread", write_in_thread, (O, P(PAGE, 733 * PAGE)), 3005000, (3000000,)),
    Row("write and read", write_and_read, (O, P(PAGE, PAGE), P(PAGE, PAGE), A), b"new"),
    Row("write at offset -1", pwrite_only, (O,), Failed(errno.EINVAL), (10, -1)),
]


# Truncation


def truncate(path: str, size: int) -> int:
    os.truncate(path, size)
    return os.stat(path).st_size


def ftruncate(path: str, size: int, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags)
    os.ftruncate(descriptor, size)
    return os.fstat(descriptor).st_size


def truncating(size: int, start: int, length: int) -> list[Row]:
    return [
        Row(f"truncate to {size}", truncate, (P(start, length),), size, (size,)),
        Row(f"ftruncate to {size}", ftruncate, (O, P(start, length)), size, (size,)),
    ]


TRUNCATE_ROWS = [
    *truncating(0, 0, 0),
    *truncating(100, 0, PAGE),
    *truncating(PAGE, PAGE, 0),
    *truncating(5000, PAGE, PAGE),
    *truncating(SIZE, 4 * PAGE, PAGE),
    *truncating(30000, 7 * PAGE, PAGE),
    *truncating(MIB, MIB, 0),
    Row("truncate to -1", truncate, (), Failed(errno.EINVAL), (-1,)),
    Row("ftruncate of what is open for reading", ftruncate, (O,), Failed(errno.EINVAL), (5, os.O_RDONLY)),
]


# Copies within the kernel


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


other = O.of("other")
COPY_ROWS = [
    Row("sendfile at an offset", send, (O, P(0, 3 * PAGE), A), CONTENT[100:10100], (100, 10000)),
    Row("sendfile of one page", send, (O, P(PAGE, PAGE), A), CONTENT[PAGE : 2 * PAGE], (PAGE, PAGE)),
    Row("sendfile at the position", send, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (None, 100, 5000)),
    Row("sendfile past the end", send, (O, P(4 * PAGE, 2 * PAGE), A), CONTENT[19000:SIZE], (19000, 5000)),
    Row(
        "sendfile to a file",
        send_to_file,
        (O, other, P(0, 49 * PAGE), A, P(0, 49 * PAGE, "other")),
        (200000, MIB),
        (200000,),
        MIB,
    ),
    Row("splice from a file", splice_from, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (5000, 100)),
    Row(
        "splice from the position", splice_from, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (None, 100, 5000)
    ),
    Row("splice to a file", splice_to, (O, P(PAGE, PAGE)), (100, SIZE), (5000, 100)),
    Row(
        "copy_file_range to another file",
        copy_range,
        (O, other, P(PAGE, 2 * PAGE), A, P(0, 2 * PAGE, "other")),
        (5000, SIZE),
        (5000, 100, 5000, "other"),
    ),
    Row(
        "copy_file_range within a file",
        copy_range,
        (O, O, P(2 * PAGE, PAGE), A, P(0, PAGE)),
        (100, SIZE),
        (9000, 100, 100, "file"),
    ),
    Row(
        "copy_file_range beyond the end",
        copy_range,
        (O, other, P(4 * PAGE, PAGE), A, P(0, PAGE, "other")),
        (1000, SIZE),
        (19000, 0, 5000, "other"),
    ),
]


# Mappings. On a real kernel the event comes at mmap(2), on the emulator when the mapping is first touched: all of them touch it.


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


MAP_ROWS = [
    Row(
        "map all, touch all",
        map_and_touch,
        (O, P(0, 5 * PAGE)),
        bytes_at(0, 5000, 9000, 19999),
        (SIZE, 0, [0, 5000, 9000, 19999]),
    ),
    Row(
        "map all, touch the last page",
        map_and_touch,
        (O, P(0, 5 * PAGE)),
        bytes_at(19999),
        (SIZE, 0, [19999]),
    ),
    Row(
        "map at an offset",
        map_and_touch,
        (O, P(PAGE, 2 * PAGE)),
        bytes_at(PAGE, 3 * PAGE - 1),
        (2 * PAGE, PAGE, [0, 2 * PAGE - 1]),
    ),
    Row("map a byte", map_and_touch, (O, P(PAGE, PAGE)), bytes_at(PAGE), (1, PAGE, [0])),
    Row("map, opened for both", map_and_touch, (O, P(PAGE, PAGE)), bytes_at(PAGE), (1, PAGE, [0], os.O_RDWR)),
    Row(
        "map and touch twice",
        map_and_touch,
        (O, P(0, 5 * PAGE)),
        bytes_at(1, 1, 19999, 1),
        (SIZE, 0, [1, 1, 19999, 1]),
    ),
    Row("map and close", map_and_close, (O, P(PAGE, 2 * PAGE)), CONTENT[PAGE : PAGE + 1]),
    Row(
        "map and write privately",
        map_and_write,
        (O, P(PAGE, 2 * PAGE)),
        b"new" + CONTENT[PAGE + 3 : PAGE + 5],
    ),
    Row(
        "two mappings",
        map_twice,
        (O, P(0, 2 * PAGE), P(2 * PAGE, 2 * PAGE)),
        b"".join(bytes_at(0, 5000, 8192, 13192)),
    ),
    Row(
        "a mapping and a read",
        map_and_read,
        (O, P(0, 2 * PAGE), P(PAGE, PAGE), A),
        CONTENT[0:2] + CONTENT[5000:5101],
    ),
    Row("touch in another thread", map_in_thread, (O, P(PAGE, 2 * PAGE)), CONTENT[PAGE : PAGE + 1]),
    Row("touch inside a call", use_mapping_in_call, (O, P(PAGE, 2 * PAGE)), CONTENT[PAGE : PAGE + 100]),
]


# What pages that are in the cache, odd buffers and odd files do.


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


def send_again(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    for _ in range(2):
        os.sendfile(theirs.fileno(), descriptor, 5000, 100)
    return ours.recv(200)


def bad_buffer(path: str, name: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDWR)
    function = getattr(libc, name)
    done = function(descriptor, ctypes.c_void_p(8), ctypes.c_size_t(100), ctypes.c_long(5000))
    return ctypes.get_errno() if done < 0 else 0


def read_nothing(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    return os.pread(descriptor, 0, 0) + os.pread(descriptor, 0, 100)


def write_nothing(path: str) -> int:
    return os.pwrite(os.open(path, os.O_WRONLY), b"", 0)


def map_shared_writable(path: str) -> None:
    mmap.mmap(os.open(path, os.O_RDONLY), 8192, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def unless(divergence: str, row: Row, *emulated: Expected, result: object = None) -> Row:
    """The row, where the emulator can only do this."""
    result = row.result if result is None else result
    return replace(row, divergence=divergence, emulated=emulated, emulated_result=result)


_EDGES = b"".join(bytes_at(4096, 9096))
ODD_ROWS = [
    unless(
        "pages in the cache",
        Row("map again", map_again, (O, P(PAGE, 2 * PAGE), P(PAGE, 2 * PAGE)), _EDGES * 2),
        *(O, P(PAGE, 2 * PAGE)),
    ),
    Row("map in two opens", map_in_two_opens, (O, P(PAGE, 2 * PAGE)) * 2, _EDGES * 2),
    unless(
        "sent from the cache",
        Row("sendfile again", send_again, (O, *(P(PAGE, PAGE), A) * 2), CONTENT[5000:5100] * 2),
        *(O, P(PAGE, PAGE), A),
    ),
    unless(
        "calls that fail",
        Row("read into nowhere", bad_buffer, (O, P(PAGE, PAGE), A), errno.EFAULT, ("pread",)),
        O,
    ),
    unless(
        "calls that fail",
        Row("write from nowhere", bad_buffer, (O, P(PAGE, PAGE)), errno.EFAULT, ("pwrite",)),
        O,
    ),
    unless(
        "calls that fail",
        Row("map what may not be", map_shared_writable, (O, P(0, 2 * PAGE)), Failed(errno.EACCES)),
        O,
    ),
    unless(
        "empty reads and writes",
        Row("read nothing", read_nothing, (O, P(0, 0), A, P(0, PAGE), A), b""),
        O,
    ),
    unless("empty reads and writes", Row("write nothing", write_nothing, (O, P(0, 0)), 0), O),
]

CHANGE_ROWS = [*ODD_ROWS, *WRITE_ROWS, *TRUNCATE_ROWS, *COPY_ROWS, *MAP_ROWS]
