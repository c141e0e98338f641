"""Calls on a file, and the events of each (facts measured on Linux 6.18, ext4). The functions here run in an accessor process."""

import ctypes
import errno
import fcntl
import mmap
import os
import threading

from tests.worlds import CONTENT, MIB, PAGE, SIZE, A, Failed, O, P, Row

# What the functions below use at run time is what accessor_worker.py gives them: os, mmap, ctypes and so on; not this module's names.


# Opening


def open_with(path: str, flags: int, name: str = "file") -> int:
    os.close(os.open(os.path.join(os.path.dirname(path), name), flags, 0o600))
    return os.path.getsize(os.path.join(os.path.dirname(path), name))


def reopen(path: str) -> None:
    descriptor = os.open(path, os.O_PATH)
    os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)


def open_link(path: str) -> None:
    os.symlink("file", path + ".symlink")
    os.close(os.open(path + ".symlink", os.O_RDONLY))


def do_nothing_to_content(path: str) -> None:
    directory = os.path.dirname(path)
    os.stat(path)
    os.access(path, os.R_OK)
    os.chmod(path, 0o640)
    os.chown(path, 0, 0)
    os.utime(path, (1, 2))
    os.setxattr(path, "user.name", b"value")
    assert os.getxattr(path, "user.name") == b"value"
    assert os.listxattr(path) == ["user.name"]
    os.removexattr(path, "user.name")
    os.link(path, path + ".link")
    os.rename(path + ".link", path + ".moved")
    os.unlink(path + ".moved")
    os.symlink("file", path + ".symlink")
    assert os.readlink(path + ".symlink") == "file"
    os.mkdir(directory + "/new")
    os.rmdir(directory + "/new")
    os.mkfifo(directory + "/fifo")
    assert sorted(os.listdir(directory)) == ["fifo", "file", "file.symlink", "other"]
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)


def do_nothing_to_open_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fstat(descriptor)
    os.lseek(descriptor, 0, os.SEEK_END)
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.fchmod(descriptor, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    os.close(os.dup(descriptor))
    os.close(descriptor)


def opened(name: str, flags: int, size: int | None = SIZE, file: str = "file") -> Row:
    return Row(name, open_with, (O.of(file),), size, (flags, file))


OPEN_ROWS = [
    opened("open for reading", os.O_RDONLY),
    opened("open for writing", os.O_WRONLY),
    opened("open for both", os.O_RDWR),
    opened("open to append", os.O_WRONLY | os.O_APPEND),
    opened("open, not blocking", os.O_RDONLY | os.O_NONBLOCK),
    opened("open, direct", os.O_RDONLY | os.O_DIRECT),
    opened("O_TRUNC makes no event of its own", os.O_WRONLY | os.O_TRUNC, 0),
    opened("O_TRUNC for both", os.O_RDWR | os.O_TRUNC, 0),
    opened("O_CREAT of what is there", os.O_RDWR | os.O_CREAT),
    opened("O_CREAT and O_TRUNC of what is there", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0),
    opened("O_CREAT of what is not", os.O_RDWR | os.O_CREAT, 0, "new"),
    opened("O_EXCL of what is not", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0, "new"),
    opened("creat", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0, "new"),
    Row(
        "O_EXCL of what is there",
        open_with,
        (),
        Failed(errno.EEXIST),
        (os.O_WRONLY | os.O_CREAT | os.O_EXCL,),
    ),
    Row("open of nothing", open_with, (), Failed(errno.ENOENT), (os.O_RDONLY, "missing")),
    Row("O_DIRECTORY of a file", open_with, (), Failed(errno.ENOTDIR), (os.O_RDONLY | os.O_DIRECTORY,)),
    Row("O_PATH", open_with, (), SIZE, (os.O_PATH,)),
    Row("open through /proc/self/fd", reopen, (O,)),
    Row("open through a symbolic link", open_link, (O,)),
    Row("names and attributes", do_nothing_to_content),
    Row("attributes and locks of an open file", do_nothing_to_open_file, (O,)),
]


# Reading


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
    return int(ctypes.CDLL(None).pread(descriptor, address, length, ctypes.c_long(0)))


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
    libc = ctypes.CDLL(None)
    got = libc.preadv2(descriptor, vector, 1, ctypes.c_long(-1), 0)
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == position + got
    return bytes(buffer.raw[:got])


def read_direct(path: str, count: int, offset: int) -> bytes:
    buffer = mmap.mmap(-1, count)
    got = os.preadv(os.open(path, os.O_RDONLY | os.O_DIRECT), [buffer], offset)
    return buffer[:got]


def read_through_duplicate(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    other = os.dup(descriptor)
    os.close(descriptor)
    return os.pread(other, 100, 5000)


def read_renamed(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.rename(path, path + ".moved")
    return os.pread(descriptor, 100, 5000)


def read_unlinked(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.unlink(path)
    return os.pread(descriptor, 100, 5000)


def read_replaced(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    os.rename(os.path.dirname(path) + "/other", path)
    return os.pread(descriptor, 100, 5000)


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


def reading(count: int, offset: int, start: int, length: int, size: int = SIZE) -> Row:
    return Row(
        f"pread {count}@{offset}",
        pread,
        (O, P(start, length), A),
        CONTENT[:size][offset : offset + count],
        (count, offset),
        size,
    )


READ_ROWS = [
    reading(100, 10, 0, PAGE),
    reading(1, 4095, 0, PAGE),
    reading(2, 4095, 0, 2 * PAGE),
    reading(5000, 4000, 0, 3 * PAGE),
    reading(PAGE, PAGE, PAGE, PAGE),
    reading(2 * PAGE, PAGE, PAGE, 2 * PAGE),
    reading(100, SIZE, 4 * PAGE, PAGE),
    reading(100, SIZE - 50, 4 * PAGE, PAGE),
    reading(100000, 0, 0, 25 * PAGE),
    reading(PAGE, 10 * PAGE, 10 * PAGE, PAGE),
    reading(100, MIB + 5, MIB, PAGE),
    reading(100, 2**63 - 201, 9223372036854771712, PAGE),
    reading(4 * MIB, 0, 0, 4 * MIB, 5 * MIB),
    reading(4 * MIB, 10, 0, 4 * MIB + PAGE, 5 * MIB),
    reading(4 * MIB, 3 * MIB + 1, 3 * MIB, 4 * MIB + PAGE, 5 * MIB),
    # Only what comes in vectors is cut to MAX_RW_COUNT before the event is made (measured on 6.18).
    Row("pread 2 GiB", pread_huge, (O, P(0, 1 << 31), A), SIZE),
    Row("preadv 2 GiB", preadv_huge, (O, P(0, (1 << 31) - PAGE), A), SIZE),
    Row("read at a position", read_at_position, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (5000, 100)),
    Row(
        "large read at a position",
        read_at_position,
        (O, P(PAGE, 3 * MIB + PAGE), A),
        CONTENT[5000 : 5000 + 3 * MIB],
        (5000, 3 * MIB),
        5 * MIB,
    ),
    Row(
        "read on",
        read_on,
        (O, P(0, 2 * PAGE), A, P(PAGE, 2 * PAGE), A, P(2 * PAGE, 2 * PAGE), A),
        CONTENT[:15000],
        (5000, 3),
    ),
    Row(
        "read on by whole pages",
        read_on,
        (O, P(0, PAGE), A, P(PAGE, PAGE), A),
        CONTENT[: 2 * PAGE],
        (PAGE, 2),
    ),
    Row("readv", readv, (O, P(0, 2 * PAGE), A), CONTENT[:5003], ([3, 5000],)),
    Row("readv of 300", readv, (O, P(0, 8 * PAGE), A), CONTENT[:SIZE], ([100] * 300,)),
    Row(
        "readv of 300, large",
        readv,
        (O, P(0, 733 * PAGE), A),
        CONTENT[:3000000],
        ([10000] * 300,),
        5 * MIB,
    ),
    Row("preadv", preadv, (O, P(PAGE, 2 * PAGE), A), CONTENT[5000:10003], ([3, 5000], 5000)),
    Row("preadv of nothing", preadv, (O,), b"", ([0, 0], 5000)),
    Row("preadv2 RWF_HIPRI", preadv, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], ([100], 5000, os.RWF_HIPRI)),
    Row(
        "preadv2 at a position",
        preadv2_at_position,
        (O, P(PAGE, PAGE), A),
        CONTENT[5000:5100],
        (5000, 100),
    ),
    Row(
        "preadv2 with an unknown flag",
        preadv,
        (O, P(PAGE, PAGE), A),
        Failed(errno.EOPNOTSUPP),
        ([100], 5000, 0x10000),
        divergence="RWF_NOWAIT",
        emulated=(O,),
        emulated_result=Failed(errno.EOPNOTSUPP),
    ),
    Row("O_DIRECT read", read_direct, (O, P(PAGE, PAGE), A), CONTENT[PAGE : 2 * PAGE], (PAGE, PAGE)),
    Row(
        "O_NONBLOCK read",
        pread,
        (O, P(PAGE, PAGE), A),
        CONTENT[5000:5100],
        (100, 5000, os.O_NONBLOCK),
    ),
    Row("read at offset -1", pread, (O,), Failed(errno.EINVAL), (100, -1)),
    Row("read what is open for writing", pread, (O,), Failed(errno.EBADF), (100, 0, os.O_WRONLY)),
    Row("read through a duplicate", read_through_duplicate, (O, P(PAGE, PAGE), A), CONTENT[5000:5100]),
    Row(
        "read what has been renamed",
        read_renamed,
        (O, P(PAGE, PAGE, "file.moved"), A.of("file.moved")),
        CONTENT[5000:5100],
    ),
    Row(
        "read what has been unlinked",
        read_unlinked,
        (O, P(PAGE, PAGE, "file (deleted)"), A.of("file (deleted)")),
        CONTENT[5000:5100],
    ),
    Row(
        "read what has been replaced",
        read_replaced,
        (O, P(PAGE, PAGE, "file (deleted)"), A.of("file (deleted)")),
        CONTENT[5000:5100],
    ),
    Row("read in another thread", read_in_thread, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (100,)),
    Row(
        "large read in another thread",
        read_in_thread,
        (O, P(PAGE, 3 * MIB + PAGE), A),
        CONTENT[5000 : 5000 + 3 * MIB],
        (3 * MIB,),
        5 * MIB,
    ),
    Row("opened in another thread", open_in_thread, (O, P(PAGE, PAGE), A), CONTENT[5000:5100], (100,)),
    Row(
        "opened in another thread, large read",
        open_in_thread,
        (O, P(PAGE, 3 * MIB + PAGE), A),
        CONTENT[5000 : 5000 + 3 * MIB],
        (3 * MIB,),
        5 * MIB,
    ),
]


ROWS = [*OPEN_ROWS, *READ_ROWS]
