"""The tables of event_rows.py and hearing_rows.py on the running kernel: where we differ, it is right.

The same rows are held against fusehsm in test_events.py and test_marks.py.
"""

import os
import platform
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor, Zygote
from fusehsm.fanotify.abi import LINUX_6_14, RawEvent
from fusehsm.fanotify.marks import MarkTable
from tests.support.event_rows import EVENT_ROWS, MIB, EventRow
from tests.support.hearing_model import predicted, set_mark
from tests.support.hearing_rows import (
    ARMING_ROWS,
    DIRECTORIES,
    HEARING_ROWS,
    LETTERS,
    PARENTS,
    ArmingRow,
    HearingRow,
)
from tests.support.kernel_groups import KernelGroup, allow_until
from tests.support.requirements import require
from tests.support.row_tests import error_of, row_names
from tests.support.rule_rows import (
    ADD,
    ALL_PERM,
    CONTENT,
    EOC,
    FLUSH,
    FS,
    IGNORE_SURV,
    IGNORED,
    MOUNT,
    ONDIR,
    PRE,
    REMOVE,
    SURV,
    A,
    O,
    P,
)

pytestmark = pytest.mark.kernel
EXECVEAT = {"x86_64": 322, "aarch64": 281}


@pytest.fixture(scope="module")
def process(zygote: Zygote) -> Iterator[Accessor]:
    """The accessor of all rows."""
    with Accessor(zygote) as accessor:
        yield accessor


# What one access makes. These functions travel to the accessor: nothing from around them can be used.


def _mmap(fd: int, path: str, offset: int, count: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # type: ignore[name-defined] # noqa: F821
    size = ctypes.c_size_t(count)  # type: ignore[name-defined] # noqa: F821
    libc.mmap.restype = ctypes.c_void_p  # type: ignore[name-defined] # noqa: F821
    place = libc.mmap(None, size, 1, 2, fd, ctypes.c_long(offset))  # type: ignore[name-defined] # noqa: F821
    libc.munmap(ctypes.c_void_p(place), size)  # type: ignore[name-defined] # noqa: F821


def _fallocate(fd: int, path: str, mode: int, offset: int, count: int) -> None:
    long = ctypes.c_long  # type: ignore[name-defined] # noqa: F821
    assert ctypes.CDLL(None).fallocate(fd, mode, long(offset), long(count)) == 0  # type: ignore[name-defined] # noqa: F821


def _no_access(fd: int, path: str) -> None:
    os.lseek(fd, 0, os.SEEK_DATA)
    os.lseek(fd, 0, os.SEEK_END)
    os.fsync(fd)
    os.fstat(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)


def _check_execution(fd: int, path: str, execveat: int) -> None:
    # AT_EXECVE_CHECK: all that execve(2) checks, and no execution.
    empty = (ctypes.c_char_p * 1)()  # type: ignore[name-defined] # noqa: F821
    assert ctypes.CDLL(None).syscall(execveat, -100, path.encode(), empty, empty, 0x10000) == 0  # type: ignore[name-defined] # noqa: F821


#: How the file is opened before (None: not at all), and what then is done with (descriptor, path, *arguments).
OPERATIONS: dict[str, tuple[int | None, Callable[..., Any]]] = {
    "pread": (os.O_RDONLY, lambda fd, path, offset, count: os.pread(fd, count, offset) and None),
    "readv": (
        os.O_RDONLY,
        lambda fd, path, first, second: os.readv(fd, [bytearray(first), bytearray(second)]),
    ),
    "pwrite": (os.O_WRONLY, lambda fd, path, offset, count: os.pwrite(fd, bytes(count), offset)),
    "append": (os.O_WRONLY | os.O_APPEND, lambda fd, path, count: os.write(fd, bytes(count))),
    "truncate": (None, lambda fd, path, size: os.truncate(path, size)),
    "ftruncate": (os.O_WRONLY, lambda fd, path, size: os.ftruncate(fd, size)),
    "fallocate": (os.O_WRONLY, _fallocate),
    "mmap": (os.O_RDONLY, _mmap),
    "open_reading": (None, lambda fd, path: os.close(os.open(path, os.O_RDONLY))),
    "open_writing": (None, lambda fd, path: os.close(os.open(path, os.O_RDWR))),
    "open_truncating": (None, lambda fd, path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))),
    "check_execution": (None, _check_execution),
    "list_directory": (None, lambda fd, path: os.listdir(path)),
    "no_access": (os.O_RDONLY, _no_access),
}


@pytest.fixture(scope="module")
def place(kernel_events: Path) -> Path:
    """A directory on the ext4 image."""
    place = kernel_events / "events"
    place.mkdir()
    return place


@contextmanager
def group_with(group_class: int) -> Iterator[KernelGroup]:
    group = KernelGroup(group_class)
    try:
        yield group
    finally:
        group.close()


@pytest.mark.parametrize("row", EVENT_ROWS, ids=row_names)
def test_access(row: EventRow, place: Path, process: Accessor) -> None:
    file = place / "file"
    file.write_bytes(bytes(MIB))
    file.chmod(0o755)
    arguments: tuple[object, ...] = row.arguments
    if row.operation == "check_execution":
        require(platform.machine() in EXECVEAT, f"needs the number of execveat(2) on {platform.machine()}")
        arguments = (EXECVEAT[platform.machine()],)
    with group_with(PRE) as group:
        if row.operation == "list_directory":
            group.mark(ADD, O | A | ONDIR, place)
        else:
            group.mark(ADD, ALL_PERM, file)
        opening, operation = OPERATIONS[row.operation]
        target = str(place if row.operation == "list_directory" else file)
        descriptor = -1
        if opening is not None:
            opened = process.start("open", target, opening)
            allow_until(lambda: opened.done, group)
            descriptor = opened.result()
        call = process.start(operation, descriptor, target, *arguments)
        (events,) = allow_until(lambda: call.done, group)
        call.result()
        if descriptor >= 0:
            process.call("close", descriptor)
    assert [(event.mask, event.offset, event.count) for event in events] == list(row.expected)
    assert {event.pid for event in events} <= {process.pid}


# Which marks hear an access


@pytest.fixture(scope="module")
def tree(place: Path) -> dict[str, Path]:
    """The targets of hearing_rows.py."""
    paths: dict[str, Path] = {}
    for name, parent in {"top": None, **PARENTS}.items():
        path = place / name if parent is None else paths[parent] / name
        if name in DIRECTORIES:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(bytes(100))
        paths[name] = path
    return paths


def _read(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.pread(fd, 10, 0)
    os.close(fd)


def _write(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"written", 0)
    os.close(fd)


def _list(path: str) -> None:
    os.listdir(path)


ACCESSES: dict[str, Callable[[str], None]] = {"read": _read, "write": _write, "list": _list}


def told(group: KernelGroup, process: Accessor, access: str, path: Path) -> str:
    """The events of an access, as letters."""
    letters = ""
    for part in access.split(", "):
        call = process.start(ACCESSES[part], str(path))
        (events,) = allow_until(lambda call=call: call.done, group)  # type: ignore[misc]
        call.result()
        letters += as_letters(events)
    return letters


def as_letters(events: list[RawEvent]) -> str:
    return "".join(LETTERS[event.mask] for event in events)


@pytest.mark.parametrize("row", HEARING_ROWS, ids=row_names)
def test_hearing(row: HearingRow, tree: dict[str, Path], process: Accessor) -> None:
    with group_with(row.group_class) as group:
        for flags, mask, target in row.marks:
            group.mark(flags, mask, tree[target])
        assert told(group, process, row.access, tree[row.target]) == row.expected


@pytest.mark.parametrize("row", ARMING_ROWS, ids=row_names)
def test_arming(row: ArmingRow, tree: dict[str, Path], process: Accessor) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(group_with(row.group_class))
        for flags, mask, target in row.before:
            first.mark(flags, mask, tree[target])
        opened = process.start("open", str(tree["child"]), os.O_RDWR)
        allow_until(lambda: opened.done, first)
        descriptor = opened.result()
        second = stack.enter_context(group_with(PRE))
        second.mark(ADD | FS, ALL_PERM, tree["top"])
        groups = [second, first]
        if row.closed:
            first.close()
            groups.remove(first)
        read = process.start("pread", descriptor, 10, 0)
        heard_of_read = allow_until(lambda: read.done, *groups)[0]
        cut = process.start("ftruncate", descriptor, 100)
        heard_of_truncation = allow_until(lambda: cut.done, *groups)[0]
        for call in (read, cut):
            call.result()
        process.call("close", descriptor)
    assert (as_letters(heard_of_read), as_letters(heard_of_truncation)) == (row.read, "P")


def _random_mark(chance: random.Random) -> tuple[int, int, str]:
    flags = chance.choice([ADD, ADD, ADD, ADD, ADD, REMOVE, FLUSH])
    flags |= chance.choice([0, 0, 0, MOUNT, FS])
    if not flags & FLUSH:
        flags |= chance.choice([0, 0, 0, IGNORED, IGNORED | SURV, IGNORE_SURV])
    bits = [P, P, O, A, EOC, EOC] if chance.random() < 0.6 else [O, A, ONDIR, EOC]
    mask = 0
    for bit in chance.sample(bits, chance.choice([1, 2, 2, 3, 4])):
        mask |= bit
    return flags, mask, chance.choice(list(PARENTS))


@pytest.mark.parametrize("seed", range(6))
def test_hearing_at_random(seed: int, tree: dict[str, Path], process: Accessor) -> None:
    """A dozen groups with marks of any kind, a few accesses of each: every one makes the events that our rules say."""
    chance = random.Random(seed)
    ways = [("read", "file"), ("read", "child"), ("write, read", "child"), ("list", "sub"), ("list", "dir")]
    for _ in range(12):
        group_class = chance.choice([PRE, PRE, PRE, CONTENT])
        table = MarkTable(LINUX_6_14)
        log: list[object] = [group_class]
        with group_with(group_class) as group:
            for _ in range(chance.randrange(1, 7)):
                mark = _random_mark(chance)
                theirs = error_of(group.mark, mark[0], mark[1], tree[mark[2]])
                log.append((*mark, theirs))
                assert error_of(set_mark, table, group_class, mark) == theirs, log
            for access, target in chance.sample(ways, 3):
                log.append((access, target))
                assert told(group, process, access, tree[target]) == predicted(table, access, target), log
