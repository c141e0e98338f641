"""Accesses and the events of the mainline dialect that they make: one table for our rules and for the real kernel.

`test_events.py` holds the rows against `shapes()`, `test_kernel_events.py` does the same accesses on a real file.
"""

from dataclasses import dataclass

from fusehsm.events import Access, AccessKind
from fusehsm.fanotify.abi import FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_OPEN_PERM, LINUX_6_14

PAGE = 4096
OFFSET_LIMIT = 2**63 - 1
P, A, O, X = LINUX_6_14.pre_access, FAN_ACCESS_PERM, FAN_OPEN_PERM, FAN_OPEN_EXEC_PERM  # noqa: E741 (the names of the facts)
MIB = 1 << 20

Expected = tuple[int, int | None, int | None]


@dataclass(frozen=True, slots=True)
class EventRow:
    """A call on a file of 1 MiB (or on a directory): `operation` names the function of test_kernel_events.py that makes it, with
    `arguments`; `accesses` is how the gate would describe it."""

    name: str
    operation: str
    arguments: tuple[int, ...]
    accesses: tuple[Access, ...]
    expected: tuple[Expected, ...]


def _pre(offset: int, count: int) -> Expected:
    return P, offset, count


_A: Expected = (A, None, None)
_O: Expected = (O, None, None)
_X: Expected = (X, None, None)


def _read(offset: int, count: int, start: int, length: int) -> EventRow:
    access = Access(AccessKind.READ, offset, count)
    return EventRow(f"pread {count}@{offset}", "pread", (offset, count), (access,), (_pre(start, length), _A))


def _one(
    name: str, operation: str, arguments: tuple[int, ...], access: Access, start: int, length: int
) -> EventRow:
    return EventRow(name, operation, arguments, (access,), (_pre(start, length),))


def _write(offset: int, count: int, start: int, length: int) -> EventRow:
    access = Access(AccessKind.WRITE, offset, count)
    return _one(f"pwrite {count}@{offset}", "pwrite", (offset, count), access, start, length)


def _truncate(size: int, start: int, length: int) -> EventRow:
    return _one(f"truncate {size}", "truncate", (size,), Access(AccessKind.TRUNCATE, size), start, length)


def _fallocate(mode: int, offset: int, count: int, start: int, length: int) -> EventRow:
    access = Access(AccessKind.FALLOCATE, offset, count)
    return _one(
        f"fallocate {mode:#x} {count}@{offset}", "fallocate", (mode, offset, count), access, start, length
    )


def _map(offset: int, count: int, length: int) -> EventRow:
    access = Access(AccessKind.MAP, offset, count)
    return _one(f"mmap {count}@{offset}", "mmap", (offset, count), access, offset, length)


_OPEN = Access(AccessKind.OPEN)
_OPEN_WRITABLE = Access(AccessKind.OPEN, writable=True)
_OPEN_DIRECTORY = Access(AccessKind.OPEN, directory=True)
_LIST = Access(AccessKind.READ_DIRECTORY, directory=True)

EVENT_ROWS = [
    _read(4095, 1, 0, 4096),
    _read(4095, 2, 0, 8192),
    _read(4000, 5000, 0, 12288),
    _read(0, 0, 0, 0),
    _read(100, 0, 0, 4096),
    _read(4096, 0, 4096, 0),
    _read(10, 100, 0, 4096),
    _read(MIB, 100, MIB, 4096),
    _read(MIB + 5, 4096, MIB, 8192),
    _read(0, 0x7FFFFFFF, 0, 2147483648),
    _read(2**63 - 201, 100, 9223372036854771712, 4096),
    _write(0, 0, 0, 0),
    _write(100, 10, 0, 4096),
    _write(4000, 5000, 0, 12288),
    _write(2 * MIB + 1, 1, 2 * MIB, 4096),
    _truncate(0, 0, 0),
    _truncate(4096, 4096, 0),
    _truncate(MIB, MIB, 0),
    _truncate(5000, 4096, 4096),
    _truncate(2 * MIB + 1, 2 * MIB, 4096),
    _fallocate(0, 0, 4096, 0, 4096),
    _fallocate(1, 100, 8192, 0, 12288),
    _fallocate(3, 4096, 1, 4096, 4096),
    _map(0, MIB, MIB),
    _map(4096, 1, 4096),
    _map(0, 2 * MIB + 1, 2 * MIB + 4096),
    EventRow("readv 3 + 5000", "readv", (3, 5000), (Access(AccessKind.READ, 0, 5003),), (_pre(0, 8192), _A)),
    EventRow("append 10, position 0", "append", (10,), (Access(AccessKind.WRITE, 0, 10),), (_pre(0, 4096),)),
    EventRow("ftruncate 100", "ftruncate", (100,), (Access(AccessKind.TRUNCATE, 100),), (_pre(0, 4096),)),
    EventRow("open for reading", "open_reading", (), (_OPEN,), (_O,)),
    EventRow("open for writing", "open_writing", (), (_OPEN_WRITABLE,), (_O,)),
    EventRow("open with O_TRUNC", "open_truncating", (), (_OPEN_WRITABLE,), (_O,)),
    EventRow("check execution", "check_execution", (), (Access(AccessKind.OPEN, exec=True),), (_X, _O)),
    EventRow(
        "list a directory of few entries",
        "list_directory",
        (),
        (_OPEN_DIRECTORY, _LIST, _LIST),  # the last getdents(2) finds the end
        (_O, _A, _A),
    ),
    EventRow("lseek, fsync, fstat, fadvise", "no_access", (), (), ()),
]
