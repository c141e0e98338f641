"""The series' own rules, derived hunk by hunk from its patches: no kernel here runs them, so each row cites the hunk that says so.

`hunk` is "patch number, file, function or definition" of the second posting (16 patches, August 2024), "v1" before those of the first
(10 patches, July 2024). Numbers and layouts are written out here, and not taken from fusehsm.fanotify.abi, which is what is tested.
"""

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from fusehsm.emulator.group import Group
from fusehsm.events import Access, AccessKind, Armed, arm, heard_when, shapes
from fusehsm.fanotify.abi import DIALECTS, Dialect, decode_events, encode_event
from fusehsm.fanotify.marks import MarkTable, Subject
from fusehsm.fanotify.rules import ObjectKind, check_init, check_mark, parse_response
from tests.support.row_tests import error_of

PATCH_V2, PATCH_V1 = DIALECTS["patch-v2"], DIALECTS["patch-v1"]
BOTH = pytest.mark.parametrize("dialect", [PATCH_V2, PATCH_V1], ids=lambda dialect: dialect.name)

PAGE = 4096
O, A, X = 0x10000, 0x20000, 0x40000  # noqa: E741 (OPEN_PERM, ACCESS_PERM, OPEN_EXEC_PERM)
P, M = 0x80000, 0x100000  # PRE_ACCESS, PRE_MODIFY
ONDIR, ON_CHILD = 0x40000000, 0x08000000
NOTIF, CONTENT, PRE = 0x0, 0x4, 0x8
ADD, REMOVE, MOUNT, FILESYSTEM = 0x1, 0x2, 0x10, 0x100
IGNORED, SURVIVES, IGNORE = 0x20, 0x40, 0x400
EINVAL, EISDIR, ENOTDIR = errno.EINVAL, errno.EISDIR, errno.ENOTDIR
FILE, DIRECTORY, OTHER = ObjectKind.REGULAR, ObjectKind.DIRECTORY, ObjectKind.OTHER

AREA_PERM = "02+03, include/linux/fsnotify.h, fsnotify_file_area_perm"
FILE_PERM = "03, include/linux/fsnotify.h, fsnotify_file_perm"
FILE_RANGE = "06, include/linux/fsnotify.h, fsnotify_file_range"
DO_OPEN = "03, fs/namei.c, do_open"
FAULT = "13, mm/filemap.c, filemap_maybe_emit_fsnotify_event; v1 10, mm/filemap.c, filemap_fault"
WATCHES = (
    "10, fs/notify/fsnotify.c, fsnotify_file_has_pre_content_watches; "
    "v1 10, fs/notify/fsnotify.c, fsnotify_file_has_content_watches"
)
EVENTS_SUPPORTED = "04, fs/notify/fanotify/fanotify_user.c, fanotify_events_supported"
MODIFY_SUPPORTED = "05, fs/notify/fanotify/fanotify_user.c, fanotify_events_supported"
MARK = "04, fs/notify/fanotify/fanotify_user.c, do_fanotify_mark"
PERM_EVENTS = "02, include/linux/fsnotify_backend.h, ALL_FSNOTIFY_PERM_EVENTS"
RESPONSE = "09, fs/notify/fanotify/fanotify_user.c, process_access_response"
UAPI_ERRNO = "09, include/uapi/linux/fanotify.h, FAN_DENY_ERRNO"
GET_RESPONSE = "09, fs/notify/fanotify/fanotify.c, fanotify_get_response"


# Bits and records


@pytest.mark.parametrize(
    ("attribute", "value", "hunk"),
    [
        ("pre_access", P, "04, include/uapi/linux/fanotify.h, FAN_PRE_ACCESS; v1: remote-fetch.c"),
        ("pre_modify", M, "05, include/uapi/linux/fanotify.h, FAN_PRE_MODIFY; v1: remote-fetch.c"),
        ("pre_content", P | M, "05, include/linux/fanotify.h, FANOTIFY_PRE_CONTENT_EVENTS"),
        ("permission", O | A | X | P | M, "04, include/linux/fanotify.h, FANOTIFY_PERM_EVENTS"),
    ],
)
@BOTH
def test_bits(dialect: Dialect, attribute: str, value: int, hunk: str) -> None:
    assert getattr(dialect, attribute) == value, hunk


def _metadata(length: int, mask: int) -> bytes:
    return struct.pack("=IBBHQii", length, 3, 0, 24, mask, 7, 1234)


PIDFD = struct.pack("=BBHi", 4, 0, 8, 9)
# 08, include/uapi/linux/fanotify.h: header, u64 offset, u64 count, aligned by the compiler; v1 08: header, u32 count, u64 offset.
RECORDS = {
    "patch-v2": struct.pack("=BBHIQQ", 6, 0, 24, 0, 5001, 300),
    "patch-v1": struct.pack("=BBHIQ", 6, 0, 16, 300, 5001),
}


@dataclass(frozen=True, slots=True)
class RecordRow:
    """An event's bytes: the metadata, and which records follow."""

    mask: int
    range_: tuple[int, int] | None
    pidfd: int | None
    records: tuple[str, ...]
    hunk: str


RECORD_ROWS = [
    RecordRow(
        P, (5001, 300), None, ("range",), "08, fs/notify/fanotify/fanotify_user.c, copy_range_info_to_user"
    ),
    RecordRow(
        M, (5001, 300), None, ("range",), "08, fs/notify/fanotify/fanotify.h, fanotify_event_has_access_range"
    ),
    RecordRow(
        P,
        (5001, 300),
        9,
        ("pidfd", "range"),
        "08, fs/notify/fanotify/fanotify_user.c, copy_info_records_to_user",
    ),
    RecordRow(
        A, None, None, (), "08, fs/notify/fanotify/fanotify.h, fanotify_event_has_access_range: no such bit"
    ),
    RecordRow(O, None, 9, ("pidfd",), "01, fs/notify/fanotify/fanotify_user.c, copy_event_to_user"),
]


@BOTH
@pytest.mark.parametrize("row", RECORD_ROWS, ids=lambda row: f"{row.mask:#x}-{'-'.join(row.records)}")
def test_records(dialect: Dialect, row: RecordRow) -> None:
    made = {"pidfd": PIDFD, "range": RECORDS[dialect.name]}
    tail = b"".join(made[name] for name in row.records)
    expected = _metadata(24 + len(tail), row.mask) + tail
    assert encode_event(dialect, row.mask, 7, 1234, range_=row.range_, pidfd=row.pidfd) == expected, row.hunk
    (event,) = decode_events(dialect, expected)
    assert (event.offset, event.count) == (row.range_ or (None, None)), row.hunk


# fanotify_init(2): the series changes nothing


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(NOTIF, 0), (CONTENT, 0), (PRE, 0), (CONTENT | PRE, EINVAL), (PRE | 0x200, EINVAL), (PRE | 0x80, 0)],
)
def test_init(flags: int, expected: int) -> None:
    assert error_of(check_init, flags, os.O_WRONLY) == expected


# fanotify_mark(2)


@dataclass(frozen=True, slots=True)
class MarkRow:
    """One fanotify_mark(2) of a group of that class, its errno (0: it succeeds), and why."""

    group_class: int
    flags: int
    mask: int
    kind: ObjectKind
    errno: int
    hunk: str


MARK_ROWS = [
    # Classes: NOTIF none of them, CONTENT the old ones, PRE_CONTENT all.
    MarkRow(NOTIF, ADD, P, FILE, EINVAL, MARK),
    MarkRow(NOTIF, ADD, M, FILE, EINVAL, MARK),
    MarkRow(NOTIF, ADD, A, FILE, EINVAL, MARK),
    MarkRow(CONTENT, ADD, P, FILE, EINVAL, MARK),
    MarkRow(CONTENT, ADD, M, FILE, EINVAL, MARK),
    MarkRow(CONTENT, ADD, P | A, FILE, EINVAL, MARK),
    MarkRow(CONTENT, ADD, M, DIRECTORY, EINVAL, MARK + ": before the object is looked at"),
    MarkRow(CONTENT, REMOVE, P, FILE, EINVAL, MARK + ": whatever the command"),
    MarkRow(CONTENT, ADD, O | A | X, FILE, 0, MARK),
    MarkRow(PRE, ADD, P | M | O | A | X, FILE, 0, MARK),
    # Kinds of objects.
    MarkRow(PRE, ADD, P, DIRECTORY, 0, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD, P | ONDIR, DIRECTORY, 0, EVENTS_SUPPORTED + ": nothing about FAN_ONDIR"),
    MarkRow(PRE, ADD, P | ONDIR | ON_CHILD, DIRECTORY, 0, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD, P | ONDIR, FILE, 0, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD, P, OTHER, EINVAL, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD, M, OTHER, EINVAL, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD | MOUNT, P, OTHER, EINVAL, EVENTS_SUPPORTED + ": of every type of mark"),
    MarkRow(PRE, ADD, A | O, OTHER, 0, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD, M, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    MarkRow(PRE, ADD, P | M, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    MarkRow(PRE, ADD, M | ONDIR | ON_CHILD, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    MarkRow(
        PRE, ADD | MOUNT, M, DIRECTORY, EISDIR, MODIFY_SUPPORTED + ": the path's kind, whatever is marked"
    ),
    MarkRow(PRE, ADD | FILESYSTEM, M, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    MarkRow(PRE, ADD | MOUNT, M, FILE, 0, MODIFY_SUPPORTED),
    MarkRow(PRE, ADD | FILESYSTEM, P | M, FILE, 0, MODIFY_SUPPORTED),
    MarkRow(PRE, REMOVE, M, DIRECTORY, 0, MODIFY_SUPPORTED + ": asked by FAN_MARK_ADD alone"),
    MarkRow(PRE, ADD | IGNORED | SURVIVES, M, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    # The check of event flags stands above that of kinds.
    MarkRow(PRE, ADD | IGNORE | SURVIVES, P | ONDIR, OTHER, ENOTDIR, EVENTS_SUPPORTED + ": order"),
    MarkRow(PRE, ADD | IGNORE | SURVIVES, P | ON_CHILD, OTHER, ENOTDIR, EVENTS_SUPPORTED + ": order"),
    MarkRow(PRE, ADD | IGNORE | SURVIVES, P | ONDIR, FILE, ENOTDIR, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD | IGNORE | SURVIVES, P | ONDIR, DIRECTORY, 0, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD | IGNORE | SURVIVES, P, OTHER, EINVAL, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD | IGNORE | SURVIVES | MOUNT, P | ONDIR, OTHER, EINVAL, EVENTS_SUPPORTED),
    MarkRow(PRE, ADD | IGNORE, M, DIRECTORY, EISDIR, MODIFY_SUPPORTED),
    # 23 bits and no more: 05, fs/notify/fanotify/fanotify.c, fanotify_handle_event.
    MarkRow(PRE, ADD, 0x200000, FILE, EINVAL, "05, fs/notify/fanotify/fanotify.c, ALL_FANOTIFY_EVENT_BITS"),
]


@BOTH
@pytest.mark.parametrize(
    "row",
    MARK_ROWS,
    ids=lambda row: f"{row.group_class:#x}-{row.flags:#x}-{row.mask:#x}-{row.kind.name.lower()}",
)
def test_marks(dialect: Dialect, row: MarkRow) -> None:
    assert error_of(check_mark, row.group_class, dialect, row.flags, row.mask, row.kind) == row.errno, (
        row.hunk
    )


# Responses


SEVEN = {1: "EPERM", 5: "EIO", 11: "EAGAIN", 16: "EBUSY", 26: "ETXTBSY", 28: "ENOSPC", 122: "EDQUOT"}


def response_rows() -> Iterator[tuple[int, int, int, int, str]]:
    """(class, response, errno of write(2), errno that the accessor gets, hunk) of every upper byte."""
    for upper in range(256):
        for group_class in (CONTENT, PRE):
            allow, deny = upper << 24 | 1, upper << 24 | 2
            yield group_class, allow, EINVAL if upper else 0, 0, RESPONSE
            if not upper:
                yield group_class, deny, 0, errno.EPERM, GET_RESPONSE
            elif group_class == PRE and upper in SEVEN:
                yield group_class, deny, 0, upper, UAPI_ERRNO
            else:
                yield group_class, deny, EINVAL, 0, RESPONSE
    for response in (0, 3, 5 << 24, 5 << 24 | 3, 2 | 0x100, 2 | 0x800000):
        yield PRE, response, EINVAL, 0, "09, include/linux/fanotify.h, FANOTIFY_RESPONSE_VALID_MASK"
    yield PRE, 2 | 0x10, EINVAL, 0, RESPONSE + ": FAN_AUDIT without FAN_ENABLE_AUDIT"
    yield PRE | 0x40, 5 << 24 | 2 | 0x10, 0, 5, RESPONSE + ": the errno beside FAN_AUDIT"


def test_the_errnos_are_linux_ones() -> None:
    assert {getattr(errno, name) for name in SEVEN.values()} == SEVEN.keys()


@BOTH
def test_responses(dialect: Dialect) -> None:
    for group_class, response, error, decided, hunk in response_rows():
        data = struct.pack("=iI", 7, response)
        case = f"class {group_class:#x}, response {response:#x}: {hunk}"
        assert error_of(parse_response, data, group_class, dialect) == error, case
        if not error:
            assert parse_response(data, group_class, dialect).decision_errno == decided, case


# Events


@dataclass(frozen=True, slots=True)
class ShapeRow:
    """One access, and the (mask, offset, count) of its events, in order."""

    name: str
    access: Access
    events: tuple[tuple[int, int | None, int | None], ...]
    hunk: str


OPENED, ACCESSED = (O, None, None), (A, None, None)
R, W, ALLOCATE, FAULTED = AccessKind.READ, AccessKind.WRITE, AccessKind.FALLOCATE, AccessKind.FAULT
OPEN, DIRECTORY_READ = AccessKind.OPEN, AccessKind.READ_DIRECTORY

SHAPE_ROWS = [
    ShapeRow("open to read", Access(OPEN), (OPENED, (P, 0, 0)), DO_OPEN),
    ShapeRow("open to write", Access(OPEN, writable=True), (OPENED, (M, 0, 0)), AREA_PERM),
    ShapeRow("open a directory", Access(OPEN, directory=True), (OPENED, (P, 0, 0)), AREA_PERM),
    ShapeRow("open to execute", Access(OPEN, exec=True), ((X, None, None), OPENED, (P, 0, 0)), DO_OPEN),
    ShapeRow("O_TMPFILE", Access(OPEN, writable=True, unnamed=True), (OPENED,), DO_OPEN + ": not do_tmpfile"),
    ShapeRow("read", Access(R, 5001, 300), (ACCESSED, (P, 5001, 300)), AREA_PERM),
    ShapeRow("read nothing", Access(R, 100, 0), (ACCESSED, (P, 100, 0)), FILE_RANGE),
    ShapeRow("read too much", Access(R, 1, 2**31 - 1), (ACCESSED, (P, 1, 2**31 - 1)), FILE_RANGE),
    ShapeRow("write", Access(W, 5001, 300), ((M, 5001, 300),), AREA_PERM),
    ShapeRow("allocate", Access(ALLOCATE, 5001, 300), ((M, 5001, 300),), AREA_PERM),
    ShapeRow("truncate", Access(AccessKind.TRUNCATE, 5000), (), DO_OPEN + ": the series hooks no truncation"),
    ShapeRow("read a directory", Access(DIRECTORY_READ, directory=True), (ACCESSED, (P, 0, 0)), FILE_PERM),
    ShapeRow(
        "read on in a directory",
        Access(DIRECTORY_READ, 77, directory=True),
        (ACCESSED, (P, 77, 0)),
        FILE_PERM + ": f_pos",
    ),
    ShapeRow("map", Access(AccessKind.MAP, 4096, 10000), (), FAULT + ": mmap(2) has no hook"),
    ShapeRow("fault to read", Access(FAULTED, 8192, PAGE), (ACCESSED, (P, 8192, PAGE)), FAULT),
    ShapeRow("fault to write", Access(FAULTED, 8192, PAGE, writable=True), ((M, 8192, PAGE),), FAULT),
]


@BOTH
@pytest.mark.parametrize("row", SHAPE_ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_shapes(dialect: Dialect, row: ShapeRow) -> None:
    made = tuple((shape.mask, shape.offset, shape.count) for shape in shapes(row.access, dialect, PAGE))
    assert made == row.events, row.hunk
    for shape in shapes(row.access, dialect, PAGE):
        assert heard_when(shape, Armed.NO, dialect), (
            FILE_RANGE + ": asked at each access, nothing kept from open(2)"
        )


@BOTH
def test_nothing_is_settled_at_open(dialect: Dialect) -> None:
    for watched in (0, O, P, M, A):
        assert arm(watched, dialect) is Armed.ALL, FILE_RANGE


@BOTH
def test_only_a_faults_access_perm_wants_pre_content_watches(dialect: Dialect) -> None:
    """As posted no event of a fault comes without; those that let bytes in are asked all the same (conform/divergences.py)."""
    fault, read = Access(FAULTED, 0, PAGE), Access(R, 0, PAGE)
    assert [shape.with_pre_content for shape in shapes(fault, dialect, PAGE)] == [True, False], WATCHES
    assert [shape.with_pre_content for shape in shapes(read, dialect, PAGE)] == [False, False], AREA_PERM


# Who hears


@dataclass(frozen=True, slots=True)
class HeardRow:
    """A mark on the directory 2 or on the file 5 in it, and which bits are heard about the one and the other."""

    mask: int
    on: int
    of_directory: int
    of_file: int


HEARD_ROWS = [
    HeardRow(P, 2, 0, 0),
    HeardRow(P | ONDIR, 2, P, 0),
    HeardRow(P | ON_CHILD, 2, 0, P),
    HeardRow(P | A | ONDIR | ON_CHILD, 2, P | A, P | A),
    HeardRow(P | M, 5, 0, P | M),
]


@BOTH
@pytest.mark.parametrize("row", HEARD_ROWS, ids=lambda row: f"{row.mask:#x}-on-{row.on}")
def test_who_hears(dialect: Dialect, row: HeardRow) -> None:
    marks = MarkTable(dialect)
    marks.modify(ADD, row.mask, row.on, opened_for_write=False, is_dir=row.on == 2)
    for subject, heard in (
        (Subject(2, (1,), True), row.of_directory),
        (Subject(5, (2,), False), row.of_file),
    ):
        for bit in (O, A, X, P, M):
            assert marks.hears(bit, subject) == bool(heard & bit), f"{PERM_EVENTS}: {bit:#x}"


@BOTH
def test_an_event_of_a_group_says_its_range(dialect: Dialect) -> None:
    """From the access to the bytes that a listener reads."""
    group = Group(PRE, os.O_RDONLY, dialect)
    for access in (Access(OPEN, writable=True), Access(R, 5001, 300), Access(W, 10, 20)):
        for shape in shapes(access, dialect, PAGE):
            group.put(shape, pid=1234, tid=1234, target=None, path=b"/file")
    heard = decode_events(dialect, group.read(4096, lambda pending: 7))
    assert [(event.mask, event.offset, event.count) for event in heard] == [
        (O, None, None),
        (M, 0, 0),
        (A, None, None),
        (P, 5001, 300),
        (M, 10, 20),
    ], "06, fs/notify/fanotify/fanotify.c, fanotify_alloc_perm_event"
