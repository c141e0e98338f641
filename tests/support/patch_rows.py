"""Calls on a file, and the events that the patch series makes of each: derived from its hunks, as no kernel here runs it.

`hunk` is "patch number, file, function" of the second posting; those of the first make the same events. The functions here run in
an accessor process, and see only what accessor_worker.py imports. Every event carries the accessor's own range.
"""

import ctypes
import errno
import mmap
import os
import subprocess
from dataclasses import dataclass

from fusehsm.conform.workloads.copying import copy_range, send, splice_to
from fusehsm.conform.workloads.mapping import map_and_touch, map_twice
from fusehsm.conform.workloads.opening import do_nothing_to_open_file, open_with, reopen
from fusehsm.conform.workloads.reading import (
    pread,
    pread_huge,
    preadv,
    read_at_position,
    read_on,
    read_through_duplicate,
    readv,
)
from fusehsm.conform.workloads.writing import ftruncate, pwrite_only, pwritev, truncate, write_on
from tests.support.kernel_and_mount import CONTENT, MIB, PAGE, SIZE, A, Expected, Failed, O, P, Row, bytes_at

DO_OPEN = "03, fs/namei.c, do_open"
AREA_PERM = "02+03, include/linux/fsnotify.h, fsnotify_file_area_perm"
FILE_PERM = "03, include/linux/fsnotify.h, fsnotify_file_perm"
FILE_RANGE = "06, include/linux/fsnotify.h, fsnotify_file_range"
FAULT = "13, mm/filemap.c, filemap_maybe_emit_fsnotify_event; v1 10, mm/filemap.c, filemap_fault"
FILEMAP_FAULT = "13, mm/filemap.c, filemap_fault"
READ_AHEAD = "11, mm/filemap.c, do_sync_mmap_readahead"


def M(offset: int, count: int, file: str = "file") -> Expected:
    """A PRE_MODIFY event of `count` bytes at `offset`."""
    return Expected("PRE_MODIFY", offset, count, file)


def page(number: int) -> tuple[Expected, Expected]:
    """A fault that reads that page."""
    return A, P(number * PAGE, PAGE)


READING, WRITING = (O, P(0, 0)), (O, M(0, 0))  # what open(2) makes


@dataclass(frozen=True, slots=True)
class PatchRow(Row):
    """A row of kernel_and_mount.py, with the hunk that says so."""

    hunk: str = ""

    def __post_init__(self) -> None:
        Row.__post_init__(self)
        assert self.hunk, self.name


# Opening


def list_directory(path: str, size: int) -> list[int]:
    """getdents(2) into `size` bytes until there is no more; the directory's position before each call."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(size)
    positions = []
    while True:
        positions.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        got = libc.getdents64(descriptor, buffer, ctypes.c_size_t(size))
        if got < 0:
            raise OSError(ctypes.get_errno(), "getdents64")
        if not got:
            return positions


def open_directory(path: str) -> None:
    os.close(os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY))


def open_unnamed(path: str) -> int:
    descriptor = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o600)
    return os.write(descriptor, b"new")


def run_script(path: str) -> bytes:
    return subprocess.run([path], stdout=subprocess.PIPE, check=True).stdout


def opened(
    name: str,
    flags: int,
    *events: Expected,
    size: int | None = SIZE,
    file: str = "file",
    hunk: str = AREA_PERM,
) -> PatchRow:
    """open(2) with those flags; it returns the file's size."""
    return PatchRow(
        name, open_with, tuple(event.of(file) for event in events), size, (flags, file), hunk=hunk
    )


AFTER_TRUNCATION = DO_OPEN + ": at its end, after any truncation"
OPEN_ROWS = [
    opened("open for reading", os.O_RDONLY, *READING),
    opened("open for writing", os.O_WRONLY, *WRITING),
    opened("open for both", os.O_RDWR, *WRITING),
    opened("open to append", os.O_WRONLY | os.O_APPEND, *WRITING, hunk=FILE_PERM + ": f_pos, here 0"),
    opened("open for ioctl only", os.O_ACCMODE, *READING, hunk=AREA_PERM + ": FMODE_WRITER"),
    opened("O_TRUNC for writing", os.O_WRONLY | os.O_TRUNC, *WRITING, size=0, hunk=AFTER_TRUNCATION),
    opened("O_TRUNC for both", os.O_RDWR | os.O_TRUNC, *WRITING, size=0, hunk=AFTER_TRUNCATION),
    opened("O_TRUNC for reading", os.O_RDONLY | os.O_TRUNC, *READING, size=0, hunk=AREA_PERM),
    opened("O_CREAT of what is there", os.O_RDWR | os.O_CREAT, *WRITING),
    opened(
        "O_CREAT and O_TRUNC of what is there",
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        *WRITING,
        size=0,
        hunk=AFTER_TRUNCATION,
    ),
    opened("O_CREAT of what is not", os.O_RDWR | os.O_CREAT, *WRITING, size=0, file="new", hunk=DO_OPEN),
    opened(
        "O_CREAT of what is not, for reading",
        os.O_RDONLY | os.O_CREAT,
        *READING,
        size=0,
        file="new",
        hunk=DO_OPEN,
    ),
    opened(
        "O_EXCL of what is not",
        os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        *WRITING,
        size=0,
        file="new",
        hunk=DO_OPEN,
    ),
    opened(
        "creat", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, *WRITING, size=0, file="new", hunk=AFTER_TRUNCATION
    ),
    PatchRow(
        "O_EXCL of what is there",
        open_with,
        (),
        Failed(errno.EEXIST),
        (os.O_WRONLY | os.O_CREAT | os.O_EXCL,),
        hunk=DO_OPEN + ": if (!error)",
    ),
    PatchRow(
        "O_DIRECTORY of a file",
        open_with,
        (),
        Failed(errno.ENOTDIR),
        (os.O_RDONLY | os.O_DIRECTORY,),
        hunk=DO_OPEN + ": if (!error)",
    ),
    opened("O_PATH", os.O_PATH, hunk=DO_OPEN + ": not where O_PATH comes by"),
    PatchRow("open through /proc/self/fd", reopen, READING, hunk=DO_OPEN),
    PatchRow("attributes and locks of an open file", do_nothing_to_open_file, WRITING, hunk=AREA_PERM),
]


# Reading


def reading(count: int, offset: int, size: int = SIZE, hunk: str = FILE_RANGE) -> PatchRow:
    """One pread(2)."""
    data = CONTENT[:size][offset : offset + count]
    return PatchRow(
        f"pread {count}@{offset}",
        pread,
        (*READING, A, P(offset, count)),
        data,
        (count, offset),
        size,
        hunk=hunk,
    )


READ_ROWS = [
    reading(100, 5000, hunk=AREA_PERM),
    reading(1, 0),
    reading(PAGE, PAGE),
    reading(2, PAGE - 1),
    reading(SIZE + 1, 0),
    reading(100, SIZE - 10),
    reading(100, SIZE + 5000),
    reading(3 * MIB + 1, 4097, 5 * MIB),
    PatchRow(
        "pread of all that can be asked", pread_huge, (*READING, A, P(0, 0x7FFFFFFF)), SIZE, hunk=FILE_RANGE
    ),
    PatchRow(
        "read at the position",
        read_at_position,
        (*READING, A, P(4097, 10)),
        CONTENT[4097:4107],
        (4097, 10),
        hunk=FILE_RANGE,
    ),
    PatchRow(
        "read on",
        read_on,
        (*READING, A, P(0, 9000), A, P(9000, 9000), A, P(18000, 9000), A, P(SIZE, 9000)),
        CONTENT[:SIZE],
        (9000, 4),
        hunk=FILE_RANGE,
    ),
    PatchRow("readv", readv, (*READING, A, P(0, 333)), CONTENT[:333], ([100, 200, 33],), hunk=FILE_RANGE),
    PatchRow(
        "preadv",
        preadv,
        (*READING, A, P(4000, 333)),
        CONTENT[4000:4333],
        ([100, 200, 33], 4000),
        hunk=FILE_RANGE,
    ),
    PatchRow(
        "through a duplicate",
        read_through_duplicate,
        (*READING, A, P(5000, 100)),
        CONTENT[5000:5100],
        hunk=FILE_RANGE,
    ),
]


# Changing


def allocate(path: str, mode: int, offset: int, length: int) -> int:
    """fallocate(2); the file's size then, in bytes."""
    descriptor = os.open(path, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")
    return os.fstat(descriptor).st_size


def allocating(name: str, mode: int, offset: int, length: int, size: int) -> PatchRow:
    """fallocate(2) of a range; `size` is the file's afterwards."""
    return PatchRow(
        name,
        allocate,
        (*WRITING, M(offset, length)),
        size,
        (mode, offset, length),
        divergence="fallocate",
        emulated=WRITING,
        emulated_result=Failed(errno.EOPNOTSUPP),
        hunk=AREA_PERM + ": MAY_WRITE, as vfs_fallocate() asks",
    )


NO_HOOK = "02, include/linux/fsnotify.h: no hook in any truncation"
KEEP_SIZE, PUNCH_HOLE = 1, 2
CHANGE_ROWS = [
    PatchRow("pwrite", pwrite_only, (*WRITING, M(5001, 300)), (300, SIZE), (300, 5001), hunk=AREA_PERM),
    PatchRow(
        "pwrite of a page",
        pwrite_only,
        (*WRITING, M(PAGE, PAGE)),
        (PAGE, SIZE),
        (PAGE, PAGE),
        hunk=FILE_RANGE,
    ),
    PatchRow(
        "pwrite past the end", pwrite_only, (*WRITING, M(30000, 7)), (7, 30007), (7, 30000), hunk=FILE_RANGE
    ),
    PatchRow(
        "large pwrite",
        pwrite_only,
        (*WRITING, M(4097, 3 * MIB + 1)),
        (3 * MIB + 1, 5 * MIB),
        (3 * MIB + 1, 4097),
        5 * MIB,
        hunk=FILE_RANGE,
    ),
    PatchRow(
        "write at the position",
        write_on,
        (*WRITING, M(4097, 10), M(4107, 20)),
        ([10, 20], SIZE),
        ([10, 20], 0, 4097),
        hunk=FILE_RANGE,
    ),
    PatchRow(
        "O_APPEND asks for the position",
        write_on,
        (*WRITING, M(0, 10), M(SIZE + 10, 20)),
        ([10, 20], SIZE + 30),
        ([10, 20], os.O_APPEND),
        hunk=FILE_RANGE + ": ppos, before the write moves it",
    ),
    PatchRow(
        "pwritev", pwritev, (*WRITING, M(4000, 333)), (333, SIZE), ([100, 200, 33], 4000), hunk=FILE_RANGE
    ),
    PatchRow("truncate", truncate, (), 5000, (5000,), hunk=NO_HOOK),
    PatchRow("truncate to more", truncate, (), 50000, (50000,), hunk=NO_HOOK),
    PatchRow("ftruncate", ftruncate, WRITING, 5000, (5000,), hunk=NO_HOOK),
    allocating("fallocate", 0, 5001, 300, SIZE),
    allocating("fallocate past the end", 0, 19001, 3000, 22001),
    allocating("fallocate keeping the size", KEEP_SIZE, 19001, 3000, SIZE),
    allocating("a hole punched", KEEP_SIZE | PUNCH_HOLE, 5001, 300, SIZE),
]


# Copies within the kernel

PAGES = "page cache (patch-v1, patch-v2)"
COPY_ROWS = [
    PatchRow(
        "sendfile",
        send,
        (*READING, A, P(5001, 300)),
        CONTENT[5001:5301],
        (5001, 300),
        divergence=PAGES,
        emulated=(*READING, A, P(PAGE, PAGE)),
        emulated_result=CONTENT[5001:5301],
        hunk=AREA_PERM + ": MAY_READ, as do_sendfile() asks",
    ),
    PatchRow(
        "sendfile of a page",
        send,
        (*READING, A, P(PAGE, PAGE)),
        CONTENT[PAGE : 2 * PAGE],
        (PAGE, PAGE),
        hunk=AREA_PERM,
    ),
    PatchRow(
        "splice to a file",
        splice_to,
        (*WRITING, M(5001, 300)),
        (300, SIZE),
        (5001, 300),
        hunk=AREA_PERM + ": MAY_WRITE, as do_splice() asks",
    ),
    PatchRow(
        "copy_file_range",
        copy_range,
        (*WRITING, *(event.of("other") for event in WRITING), A, P(2 * PAGE, PAGE), M(101, PAGE, "other")),
        (PAGE, SIZE),
        (2 * PAGE, 101, PAGE, "other"),
        hunk=AREA_PERM + ": both sides, as vfs_copy_file_range() asks",
    ),
    PatchRow(
        "copy_file_range beyond the end",
        copy_range,
        (*WRITING, *(event.of("other") for event in WRITING), A, P(4 * PAGE, 3616), M(0, 3616, "other")),
        (3616, SIZE),
        (4 * PAGE, 0, 5000, "other"),
        divergence="copies (patch-v1, patch-v2)",
        emulated=(
            *WRITING,
            *(event.of("other") for event in WRITING),
            *page(4),
            M(0, 3616, "other"),
        ),
        emulated_result=(3616, SIZE),
        hunk=AREA_PERM + ": of what generic_copy_file_checks() has left",
    ),
]


# Mappings


def map_only(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()


def map_and_execute(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
    return mapping[0:1]


def map_populated(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(
        descriptor, 12288, flags=mmap.MAP_PRIVATE | 0x8000, prot=mmap.PROT_READ
    )  # MAP_POPULATE
    return mapping[8192:8193]


def write_from_mapping(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    reader, writer = os.pipe()
    mapping = mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.write(writer, memoryview(mapping)[4095:4097])
    return os.read(reader, 2)


def map_shared(path: str, touched: list[int]) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 16384, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return [mapping[at : at + 1] for at in touched]


def map_and_change(path: str, places: list[int]) -> list[bytes]:
    """Write into a shared mapping from the second page on; what read(2) of the mapping's own bytes shows."""
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(
        descriptor, 8192, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=4096
    )
    for place in places:
        mapping[place : place + 1] = b"!"
    mapping.flush()
    return [mapping[place : place + 2] for place in places]


NO_SHARED = "shared mappings (exact)"
MAP_ROWS = [
    PatchRow("mmap alone", map_only, READING, hunk=FAULT + ": mmap(2) has no hook"),
    PatchRow(
        "each page that is touched",
        map_and_touch,
        (*READING, *page(0), *page(2)),
        bytes_at(0, 2 * PAGE + 5),
        (3 * PAGE, 0, [0, 2 * PAGE + 5]),
        hunk=FAULT + ": PAGE_SIZE at the faulting page; no read-ahead: " + READ_AHEAD,
    ),
    PatchRow(
        "a page once",
        map_and_touch,
        (*READING, *page(1)),
        bytes_at(PAGE, PAGE + 1, 2 * PAGE - 1),
        (2 * PAGE, PAGE, [0, 1, PAGE - 1]),
        hunk=FAULT + ": FAULT_FLAG_TRIED",
    ),
    PatchRow(
        "the last page is a whole one",
        map_and_touch,
        (*READING, *page(4)),
        bytes_at(SIZE - 1),
        (SIZE, 0, [SIZE - 1]),
        hunk=FAULT + ": PAGE_SIZE, whatever the file's",
    ),
    PatchRow(
        "two mappings",
        map_twice,
        (*READING, *page(0), *page(1), *page(2), *page(3)),
        b"".join(bytes_at(0, 5000, 8192, 13192)),
        hunk=FAULT,
    ),
    PatchRow(
        "MAP_POPULATE",
        map_populated,
        (*READING, *page(0), *page(1), *page(2)),
        bytes_at(2 * PAGE)[0],
        hunk=FAULT + ": a fault for each page, with FAULT_FLAG_ALLOW_RETRY",
    ),
    PatchRow(
        "a mapping in a call",
        write_from_mapping,
        (*READING, *page(0), *page(1)),
        CONTENT[PAGE - 1 : PAGE + 1],
        hunk=FAULT,
    ),
    PatchRow("a mapping of code", map_and_execute, (*READING, *page(0)), bytes_at(0)[0], hunk=FAULT),
    PatchRow(
        "a shared mapping that reads",
        map_shared,
        (*READING, *page(3), *page(1)),
        bytes_at(3 * PAGE, PAGE),
        ([3 * PAGE, PAGE],),
        divergence=NO_SHARED,
        emulated=READING,
        emulated_result=Failed(errno.ENODEV),
        hunk=FAULT,
    ),
    PatchRow(
        "a shared mapping that writes",
        map_and_change,
        (*WRITING, M(PAGE, PAGE), M(2 * PAGE, PAGE)),
        [b"!" + CONTENT[PAGE + 6 : PAGE + 7], b"!" + CONTENT[2 * PAGE + 1 : 2 * PAGE + 2]],
        ([5, PAGE],),
        divergence=NO_SHARED,
        emulated=WRITING,
        emulated_result=Failed(errno.ENODEV),
        hunk=FAULT + ": FAULT_FLAG_WRITE",
    ),
]

ROWS = [*OPEN_ROWS, *READ_ROWS, *CHANGE_ROWS, *COPY_ROWS, *MAP_ROWS]
